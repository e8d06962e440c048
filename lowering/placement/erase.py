"""What a sharded graph computes, without its mesh: conversions erased and parts made whole, it is the graph it is of.

This holds what the types cannot see: that no node was lost, added or moved, and that settings say of a part what they
said of the whole (groups of a norm, the number of places of a mean).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ...dsl.program import Dim, Node, Type, Value
from ...dsl.source import NOWHERE, Span
from ..graph import STRUCTURE, Graph, op_of, renamed_attrs
from .types import Mesh


class Mismatch(Exception):
    """A sharded graph is not that of the whole one: the value, where it is written, and what is wrong."""

    def __init__(self, value: str, expected: Any, found: Any, span: Span = NOWHERE):
        super().__init__(f"`{value}`: expected {expected}, found {found}")
        self.value, self.expected, self.found, self.span = value, expected, found, span


@dataclass
class Whole:
    """The graph on whole dims that a sharded one is of: `nodes[name]` is the node that a sharded node is a part of,
    `values` and `dims` what these speak of, with what ops that were taken apart add."""

    graph: Graph
    nodes: dict[str, Node] = field(default_factory=dict)
    values: dict[str, Value] = field(default_factory=dict)
    dims: dict[str, Dim] = field(default_factory=dict)
    of: dict[str, str] = field(default_factory=dict)


def span_of(node: Node) -> Span:
    """Where the spec asks for a node."""
    return node.spans[0] if node.spans else NOWHERE


def whole_dim(dim: Dim) -> str:
    """The dim that a rank's part is a part of."""
    return dim.whole or dim.name


def erased(graph: Graph, of: Graph, mesh: Mesh) -> Whole:
    """Match a sharded graph to the whole one, node by node. Raises `Mismatch`."""
    found = Whole(of, values=dict(of.values), dims=dict(of.dims))
    waiting = list(of.nodes)
    _same(graph.name, _boundary(of), _boundary(graph))
    found.of.update((name, name) for name in _boundary(of))
    for node in graph.nodes:
        if node.op == "convert":
            found.of[node.name] = found.of[node.operands[0] or ""]
            continue
        if not waiting:
            raise Mismatch(node.name, "no more nodes", node.op, span_of(node))
        if waiting[0].op != node.op and waiting[0].op not in STRUCTURE and op_of(waiting[0]).lift is not None:
            waiting[:1] = _Apart(found).lifted(waiting[0])
        whole = waiting.pop(0)
        _match(node, whole, graph, found)
    if waiting:
        raise Mismatch(waiting[0].name, waiting[0].op, "nothing", span_of(waiting[0]))
    _dims(graph, found, mesh)
    _frame(graph, of, found)
    return found


def _boundary(graph: Graph) -> list[str]:
    return [v.name for v in graph.body.inputs] + [w.name for w in graph.body.weights]


def _same(value: str, expected: Any, found: Any, span: Span = NOWHERE) -> None:
    if expected != found:
        raise Mismatch(value, expected, found, span)


def _match(node: Node, whole: Node, graph: Graph, found: Whole) -> None:
    """One node: the same op on the same values, with the same settings but for how many groups a part has."""
    span = span_of(node)

    def name(dim: str) -> str:
        return whole_dim(graph.dims[dim]) if dim in graph.dims else dim

    _same(node.name, whole.op, node.op, span)
    _same(node.name, whole.operands, tuple(None if o is None else found.of[o] for o in node.operands), span)
    types = [(r.type.kind, tuple(name(d) for d in r.type.dims)) for r in node.results]
    _same(node.name, [(r.type.kind, r.type.dims) for r in whole.results], types, span)
    bindings = tuple((f, tuple(name(d) for d in ds)) for f, ds in node.bindings)
    if node.op in STRUCTURE:
        bindings = tuple((c.partition("/")[0], ds) for c, ds in bindings)
        attrs = tuple((k, tuple(name(d) for d in v) if k == "over" else v) for k, v in node.attrs)
        _same(node.name, whole.attrs, attrs, span)
    else:
        counted = {other for _, other in op_of(node).grouped if op_of(node).setting(other) is not None}
        if op_of(node).meets:  # where and how ranks meet is a matter of places
            counted |= {"axes", "order", "why"}
        attrs = tuple((k, v) for k, v in renamed_attrs(node, name) if k not in counted)
        _same(node.name, tuple((k, v) for k, v in whole.attrs if k not in counted), attrs, span)
    _same(node.name, whole.bindings, bindings, span)
    for r, of in zip(node.results, whole.results, strict=True):
        found.of[r.name] = of.name
    found.nodes[node.name] = whole


def _dims(graph: Graph, found: Whole, mesh: Mesh) -> None:
    """Every part has the size of one rank's part, and no factor splits a dim twice."""
    for dim in graph.dims.values():
        whole = found.dims.get(whole_dim(dim))
        if whole is None or bool(dim.axes) != (dim.whole is not None):
            raise Mismatch(dim.name, "a part of a dim", dim)
        if len(set(dim.axes)) < len(dim.axes) or not set(dim.axes) <= set(mesh.names()):
            raise Mismatch(dim.name, "different factors of the mesh", dim.axes)
        ranks = mesh.size(dim.axes)
        _same(dim.name, whole.size, None if dim.size is None else dim.size * ranks)
        _same(dim.name, (whole.sequence, whole.clock), (dim.sequence, dim.clock))
        _same(dim.name, whole.lead, tuple(whole_dim(graph.dims[x]) for x in dim.lead))


def _frame(graph: Graph, of: Graph, found: Whole) -> None:
    """Inputs, weights, results and what is emitted are those of the whole graph."""

    def dims(names: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(whole_dim(graph.dims[d]) for d in names)

    for have, want in zip(graph.body.inputs, of.body.inputs, strict=True):
        _same(have.name, want.type, Type(have.type.kind, dims(have.type.dims)))
    for ours, theirs in zip(graph.body.weights, of.body.weights, strict=True):
        _same(ours.name, (theirs.dims, theirs.trained, theirs.init), (dims(ours.dims), ours.trained, ours.init))
    _same(graph.name, of.body.outputs, tuple(found.of[o] for o in graph.body.outputs))
    _same(graph.name, of.body.emits, tuple((k, label, found.of[v]) for k, label, v in graph.body.emits))
    _same(graph.name, of.body.instances, graph.body.instances)


class _Apart:
    """What an op's `lift` adds its parts through; here they are only noted, on whole dims."""

    def __init__(self, found: Whole):
        self._found, self._made = found, list[Node]()

    def lifted(self, node: Node) -> list[Node]:
        """The nodes that a use is taken apart into."""
        lift = op_of(node).lift
        assert lift is not None
        _same(node.name, node.name, lift(node, self), span_of(node))
        return self._made

    def size(self, dim: str) -> int | None:
        """The size of the whole dim."""
        return self._found.dims[dim].size

    def type_of(self, name: str) -> Type:
        """The type of a value, on whole dims."""
        return self._found.values[name].type

    def dim(self, base: str, size: int) -> str:
        """A new dim."""
        name, n = base, 1
        while name in self._found.dims:
            n += 1
            name = f"{base}_{n}"
        self._found.dims[name] = Dim(name, size)
        return name

    def split_like(self, dim: str, first: str) -> None:
        """Nothing is split here."""

    def add(
        self, op: str, operands: tuple[str | None, ...], dims: tuple[str, ...], like: Node, kind: str = "real",
        name: str | None = None, bindings: tuple[tuple[str, tuple[str, ...]], ...] = (), **attrs: Any,
    ) -> str:  # fmt: skip
        """Note one use; gives the name of its result (`name`, or a fresh one)."""
        made = Value(self._fresh(op) if name is None else name, Type(kind, dims))
        self._note(op, operands, (made,), like, bindings, attrs)
        return made.name

    def add_all(
        self, op: str, operands: tuple[str | None, ...], results: dict[str, tuple[str, ...]], like: Node,
        bindings: tuple[tuple[str, tuple[str, ...]], ...] = (), **attrs: Any,
    ) -> tuple[str, ...]:  # fmt: skip
        """Note one use with several results, each with its dims."""
        made = tuple(Value(self._fresh(name), Type("real", dims)) for name, dims in results.items())
        self._note(op, operands, made, like, bindings, attrs)
        return tuple(v.name for v in made)

    def _note(self, op: str, operands: tuple[str | None, ...], made: tuple[Value, ...], like: Node,
              bindings: tuple[tuple[str, tuple[str, ...]], ...], attrs: dict[str, Any]) -> None:  # fmt: skip
        self._found.values.update((v.name, v) for v in made)
        self._made.append(Node(made, op, operands, tuple(attrs.items()), bindings, like.spans))

    def _fresh(self, base: str) -> str:
        name, n = base, 1
        while name in self._found.values:
            n += 1
            name = f"{base}_{n}"
        return name


def axes_of(value: Value, dims: Mapping[str, Dim]) -> tuple[tuple[str, ...], ...]:
    """For each dim of a value the factors that split it, as its type says."""
    return tuple(dims[d].axes for d in value.type.dims)
