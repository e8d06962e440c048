"""What exchanges of heads for positions ask of the axes of a mesh: that ranks get equal parts, or share one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod

from ...dsl.diagnostics import Label, fail
from ...dsl.layout import Layout, Split
from ...dsl.program import Node
from ...dsl.ways import Way
from ..graph import STRUCTURE, Graph, op_of
from .uses import SEQUENCE_ROLES


@dataclass(frozen=True)
class Exchange:
    """A dim that is split over an axis in one use in place of the sequence: a rank of the other axes that split it has
    `left` places. `shared` is a dim that it divides into runs, with the places that are left of that. Without a `way`
    it is one that may be chosen."""

    graph: Graph
    axis: str
    ranks: int
    dim: str
    left: int
    shared: tuple[str, int] | None
    way: Way | None

    def factor(self) -> int | None:
        """At how many ranks the axis must be factored, None where it need not be. Raises `uneven-split`."""
        if self.left % self.ranks:
            self._refuse(self.dim, self.left, False)
            return None
        if self.shared is None or self.shared[1] % self.ranks == 0 or self.shared[1] == 1:
            return None
        if self.ranks % self.shared[1]:
            self._refuse(*self.shared, True)
            return None
        return self.shared[1]

    def _refuse(self, dim: str, left: int, may_share: bool) -> None:
        """Raises `uneven-split` where the layout asks for it; what may be chosen is then not."""
        if self.way is None:
            return
        size, ranks, axis = self.graph.size(dim) or 0, self.ranks, self.axis
        fits = [n for n in range(1, max(left, ranks) + 1) if left % n == 0 or may_share and n % left == 0]
        near = [*[n for n in fits if n < ranks][-1:], *[n for n in fits if n > ranks][:1]]
        here = "" if left == size else f", of which a rank of the other axes has {left},"
        raise fail("uneven-split", f"`{dim}` = {size}{here} does not divide over the {ranks} ranks of `{axis}`",
                    self.way.span, f"{left} / {ranks} = {left / ranks:g}",
                    (Label(self.graph.body.span, f"`{dim}` is a dim of `{self.graph.body.block}`"),),
                    help=f"{' or '.join(f'`{axis} = {n}`' for n in near)} would do")  # fmt: skip


def exchanges(
    graph: Graph, layout: Layout, wanted: Mapping[str, Sequence[Split]], told: Mapping[str, Way]
) -> Iterator[Exchange]:
    """What exchanges split in a graph: those that the layout asks for, and those that may be chosen where keys are
    read. `wanted` are the rules that split each of its dims."""
    for node in (n for n in graph.nodes if n.op not in STRUCTURE):
        way = told.get(node.name)
        if way is not None and way.kind != "exchange" or way is None and not attends(node):
            continue
        for axis in dict.fromkeys(a for d in _sequences(node) for a in _axes(wanted, layout, d)):
            dims = exchangeable(node)
            for dim in (d for d in dims if graph.size(d) is not None and (way is None or d in way.dims)):
                left = _left(graph, layout, wanted, dim, axis)
                other = _shared(node).get(dim)
                shared = None if other in (None, dim) else (other, _left(graph, layout, wanted, other, axis))
                yield Exchange(graph, axis, layout.size(axis), dim, left, shared, way)


def attends(node: Node) -> bool:
    """Whether a use reads keys."""
    return any(op_of(node).signature.role(f) == "attend" for f in op_of(node).signature.formals())


def exchangeable(node: Node) -> tuple[str, ...]:
    """The dims that a use along a sequence could be split along in its place: parallel in it, needed no further."""
    op = op_of(node)
    if not any(op.signature.role(f) in SEQUENCE_ROLES for f in op.signature.formals()):
        return ()
    rigid = {*op.rigid, *op.coupled, *(f for f in op.index if f not in op.offset)}
    found: dict[str, bool] = {}
    for formal, dims in node.bindings:
        plain = formal.rstrip("0123456789")
        fits = op.signature.role(plain) == "parallel" and plain not in rigid
        found.update((d, fits and found.get(d, True)) for d in dims)
    along = set(_sequences(node))
    return tuple(d for d, fits in found.items() if fits and d not in along)


def _shared(node: Node) -> dict[str, str]:
    """The dim that each divides into runs."""
    grouped = [pair for pair in op_of(node).grouped if op_of(node).setting(pair[1]) is None]
    return {node.bound(first)[0]: node.bound(other)[0] for first, other in grouped}


def _sequences(node: Node) -> Iterator[str]:
    """The dims that a use runs along."""
    op = op_of(node)
    for formal, dims in node.bindings:
        if op.signature.role(formal.rstrip("0123456789")) in SEQUENCE_ROLES:
            yield from dims


def _axes(wanted: Mapping[str, Sequence[Split]], layout: Layout, dim: str) -> list[str]:
    return [a for s in wanted.get(dim, ()) for a in s.axes if layout.size(a) > 1]


def _left(graph: Graph, layout: Layout, wanted: Mapping[str, Sequence[Split]], dim: str, axis: str) -> int:
    """The places of a dim that a rank of the other axes has."""
    size = graph.size(dim) or 0
    ranks = prod(layout.size(a) for a in _axes(wanted, layout, dim) if a != axis)
    return size // ranks if size % ranks == 0 else 1 if ranks % size == 0 else size
