"""From the rules of a layout to dims of graphs: which factors of the mesh split which dim, and where.

An axis is factored where something has fewer places than the axis ranks (key heads, groups of a state space): the
outer factor splits it, over the inner one it is replicated. Nothing else is needed for replication.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from math import prod
from typing import Any

from ...dsl.diagnostics import Collector, Label, did_you_mean, fail
from ...dsl.layout import Layout, Split, label
from ...dsl.selectors import START, States
from ..graph import STRUCTURE, Graph, GraphProgram, op_of
from .exchanges import exchanges
from .types import Atom, Mesh
from .ways import Told, told


@dataclass
class Assignment:
    """`dims[graph][dim]` are the factors that split a dim where it can be, outer first; `outside` are the graphs of the
    residual stream, in which the rules with `between blocks` hold, too; `told` are the ways of uses, `tried` axes that
    are factored for an exchange that may be chosen."""

    layout: Layout
    mesh: Mesh
    dims: dict[str, dict[str, tuple[str, ...]]] = field(default_factory=dict)
    outside: frozenset[str] = frozenset()
    told: Told = field(default_factory=dict)
    tried: frozenset[str] = frozenset()

    def atoms(self, graph: str, dim: str) -> tuple[str, ...]:
        """The factors that split a dim of a graph."""
        return self.dims.get(graph, {}).get(dim, ())


Wanted = dict[str, dict[str, tuple[Split, ...]]]


def assign(program: GraphProgram, layout: Layout, without: frozenset[str] = frozenset()) -> Assignment:
    """Decide for every graph; the axes `without` are not factored for what may be chosen.

    Raises `SpecError`: selects-nothing, split-twice, uneven-split, not-built-yet.
    """
    outside = _outside(program)
    wanted, hits = _wanted(program, layout, outside)
    errors = Collector()
    for split in layout.splits:
        if split not in hits and not split.selector.optional and any(layout.size(a) > 1 for a in split.axes):
            with errors.collecting():
                raise _absent(program, split)
    for graph in program.graphs.values():
        for dim, splits in wanted.get(graph.name, {}).items():
            with errors.collecting():
                _once(dim, splits)
    errors.finish()
    ways = told(program, layout)
    mesh, tried = _factored(program, layout, wanted, ways, errors, without)
    errors.finish()
    found = Assignment(layout, mesh, outside=outside, told=ways, tried=tried)
    for graph in program.graphs.values():
        own = {}
        for dim, splits in wanted.get(graph.name, {}).items():
            atoms = tuple(atom for s in splits for axis in s.axes for atom in mesh.names(axis))
            size = graph.dims[dim].size
            own[dim] = fitting(size, tuple(sorted(atoms, key=mesh.names().index)), mesh)
        found.dims[graph.name] = own
    return found


def _outside(program: GraphProgram) -> frozenset[str]:
    """The graphs of the residual stream: the model's and those of iterations of its loops."""
    found: set[str] = set()
    waiting = list(program.roots)
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        found.add(name)
        graph = program.graphs[name]
        waiting.extend(b for i in graph.body.instances if i.schedule is not None for b in i.bodies)
    routed = {b for g in program.graphs.values() for n in g.nodes if n.op == "route" for b in g.bodies_of(n)}
    return frozenset(found - routed)


def _wanted(program: GraphProgram, layout: Layout, outside: frozenset[str]) -> tuple[Wanted, set[Split]]:
    """The rules that select each dim, in the layout's order; and the rules that select any."""
    wanted: Wanted = {}
    hits: set[Split] = set()
    walked: set[Any] = set()

    def visit(name: str, states: tuple[States, ...], bound: dict[str, tuple[Split, ...]]) -> None:
        key = (name, states, tuple(sorted((d, tuple(map(layout.splits.index, s))) for d, s in bound.items() if s)))
        if key in walked:
            return
        walked.add(key)
        graph = program.graphs[name]
        own = wanted.setdefault(name, {})
        for dim in graph.dims:
            taken = list(bound.get(dim, ()))
            for split, now in zip(layout.splits, states, strict=True):
                if split.between and name not in outside:
                    continue
                if split.selector.accepts(split.selector.advance(now, (dim,))):
                    hits.add(split)
                    taken += [split] if split not in taken else []
            taken.sort(key=layout.splits.index)
            if taken:
                own[dim] = tuple(dict.fromkeys([*own.get(dim, ()), *taken]))
        for node in (n for n in graph.nodes if n.op in STRUCTURE):
            instance = graph.instance(node.attr("instance"))
            count = len(instance.schedule) if instance.schedule is not None else 0
            for which, body in enumerate(instance.bodies):
                block = program.graphs[body].body.block
                places = [i for i, b in enumerate(instance.schedule or (0,)) if b == which]
                inner = {c: tuple(s for s in own.get(ours[0], ()) if not (s.between and body not in outside))
                         for c, ours in node.bindings if ours}  # fmt: skip
                after: list[States] = []
                for split, now in zip(layout.splits, states, strict=True):
                    each = {split.selector.advance(now, (instance.name, block), (i, count) if count else None)
                            for i in places}  # fmt: skip
                    if len(each) != 1:
                        raise fail("not-built-yet", "splitting a dim in some iterations of one block is not built yet",
                                   split.span, help="name the dim without iterations")  # fmt: skip
                    after.append(each.pop())
                visit(body, tuple(after), inner)

    for root in program.roots:
        visit(root, (START,) * len(layout.splits), {})
    return wanted, hits


def _absent(program: GraphProgram, split: Split) -> Exception:
    name = split.selector.steps[-1].name
    dims = dict.fromkeys(d for g in program.graphs.values() for d in g.dims)
    near = did_you_mean(name, dims, "a dim") or f"`{name}?` may be absent"
    return fail("selects-nothing", f"no dim of `{program.program.name}` is named `{split.selector}`", split.span,
                "this rule splits nothing", help=near)  # fmt: skip


def _once(dim: str, splits: tuple[Split, ...]) -> None:
    """A dim is split over an axis once. Raises `split-twice`."""
    seen: dict[str, Split] = {}
    for split in splits:
        for axis in split.axes:
            if axis in seen and (seen[axis] is not split or split.axes.count(axis) > 1):
                if seen[axis].between != split.between:
                    continue  # one holds outside blocks only
                raise fail("split-twice", f"`{dim}` is split over `{axis}` twice", split.span, "the second",
                           (Label(seen[axis].span, "the first"),))  # fmt: skip
            seen[axis] = split


def fitting(size: int | None, atoms: tuple[str, ...], mesh: Mesh) -> tuple[str, ...]:
    """The outer factors that a dim has places for."""
    if size is None:
        return atoms
    kept: list[str] = []
    for axis in dict.fromkeys(mesh.axis(a) for a in atoms):
        for atom in (a for a in atoms if mesh.axis(a) == axis):
            if size % mesh.size([*kept, atom]):
                break
            kept.append(atom)
    return tuple(kept)


def _factored(
    program: GraphProgram, layout: Layout, wanted: Wanted, ways: Told, errors: Collector, without: frozenset[str]
) -> tuple[Mesh, frozenset[str]]:
    """The axes in the factors that smaller dims need, and those that are factored for what may be chosen only. Raises
    (into `errors`) uneven-split, not-built-yet."""
    maybe: dict[str, set[int]] = {}
    cuts: dict[str, dict[int, Any]] = {axis: {} for axis, size in layout.mesh if size > 1}
    for graph in program.graphs.values():
        shared = dict(_shared(graph))
        for dim, splits in wanted.get(graph.name, {}).items():
            size = graph.dims[dim].size
            for split in splits:
                for axis in (a for a in split.axes if layout.size(a) > 1):
                    ranks = layout.size(axis)
                    if size is None or size % ranks == 0:
                        continue
                    if dim in shared and ranks % size == 0:
                        cuts[axis][size] = (graph, dim, split)
                        continue
                    with errors.collecting():
                        raise _uneven(graph, dim, size, axis, ranks, split, dim in shared)
        for first, number in _counted(graph):
            for split in wanted.get(graph.name, {}).get(first, ()):
                for axis in (a for a in split.axes if layout.size(a) > 1):
                    if number % layout.size(axis) and layout.size(axis) % number == 0 and number > 1:
                        cuts[axis][number] = (graph, first, split)
        for exchange in exchanges(graph, layout, wanted.get(graph.name, {}), ways.get(graph.name, {})):
            with errors.collecting():
                factor = exchange.factor()
                if factor is not None and exchange.way is None:
                    maybe.setdefault(exchange.axis, set()).add(factor)
                elif factor is not None:
                    cuts[exchange.axis].setdefault(factor, (graph, exchange.dim, exchange.way))
    tried = frozenset(maybe) - without
    atoms: list[Atom] = []
    for axis, size in layout.mesh:
        if size == 1 or layout.stages is not None and axis == layout.stages.axis:
            continue
        chain = [1, *sorted(n for n in cuts[axis] if 1 < n < size), size]
        for n in sorted(maybe.get(axis, ())) if axis in tried else ():
            longer = sorted({*chain, n})
            chain = longer if all(b % a == 0 for a, b in pairwise(longer)) else chain
        wrong = next(((a, b) for a, b in pairwise(chain) if b % a), None)
        if wrong is not None:
            graph, dim, split = cuts[axis][wrong[1] if wrong[1] in cuts[axis] else wrong[0]]
            with errors.collecting():
                raise fail("not-built-yet", f"`{axis}` would be factored at {wrong[0]} and at {wrong[1]} ranks, which "
                           "do not nest; that is not built yet", split.span,
                           f"because of `{dim}` in `{graph.body.block}`")  # fmt: skip
            continue
        sizes = [b // a for a, b in pairwise(chain)]
        names = [axis] if len(sizes) == 1 else [f"{axis}.{i}" for i in range(len(sizes))]
        atoms += [Atom(n, axis, s) for n, s in zip(names, sizes, strict=True)]
    return Mesh(tuple(atoms)), tried


def _shared(graph: Graph) -> Iterator[tuple[str, str]]:
    """(dim, dim that it divides into runs) for each pair of grouped dims: the first may have less places than ranks."""
    for node in (n for n in graph.nodes if n.op not in STRUCTURE):
        for formal, other in op_of(node).grouped:
            if op_of(node).setting(other) is None:
                yield node.bound(other)[0], node.bound(formal)[0]


def _counted(graph: Graph) -> Iterator[tuple[str, int]]:
    """(dim, number of runs that a setting divides it into)."""
    for node in (n for n in graph.nodes if n.op not in STRUCTURE):
        for formal, other in op_of(node).grouped:
            setting = op_of(node).setting(other)
            if setting is not None:
                yield node.bound(formal)[0], int(node.attr(other, setting.default))


def _uneven(graph: Graph, dim: str, size: int, axis: str, ranks: int, split: Split, shared: bool) -> Exception:
    """7 heads do not go 2 ways: with the numbers of ranks that do."""
    fits = [n for n in range(1, max(size, ranks) + 1) if size % n == 0 or (shared and n % size == 0)]
    below, above = [n for n in fits if n < ranks][-1:], [n for n in fits if n > ranks][:1]
    near = " or ".join(f"`{axis} = {n}`" for n in [*below, *above])
    span = graph.body.span
    return fail("uneven-split", f"`{dim}` = {size} does not divide over the {ranks} ranks of `{axis}`", split.span,
                f"{size} / {ranks} = {size / ranks:g}", (Label(span, f"`{dim}` is a dim of `{graph.body.block}`"),),
                help=f"{near} would do")  # fmt: skip


def local_size(size: int | None, atoms: tuple[str, ...], mesh: Mesh) -> int | None:
    """The size of a rank's part."""
    return None if size is None else size // prod(mesh.size([a]) for a in atoms)


def where(assignment: Assignment, graph: str, dim: str) -> list[Label]:
    """The rules that split a dim, for messages."""
    return [label(s) for s in assignment.layout.splits if s.selector.steps[-1].name == dim]
