"""Derive every type from the signatures again, and hold it against what stands on the nodes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ...dsl.diagnostics import InternalError
from ...dsl.program import Clock, Dim, Node
from ...dsl.source import NOWHERE
from ..graph import STRUCTURE, Graph, GraphProgram, op_of
from ..op import OpCall, OwnedWeight
from . import lowering_pass


class GraphDim:
    """A dim of a graph, for the op rooms: identity is identity."""

    def __init__(self, name: str, size: int | None, sequence: bool, clock: Clock | None = None):
        self.name, self.size, self.sequence, self.clock = name, size, sequence, clock
        self.lead: tuple[GraphDim, ...] = ()
        self.factors: tuple[GraphDim, ...] = ()
        self.span = None


def graph_dims(dims: Iterable[Dim]) -> dict[str, GraphDim]:
    """The dims of a body by name."""
    found = {d.name: GraphDim(d.name, d.size, d.sequence, d.clock) for d in dims}
    for d in dims:
        found[d.name].lead = tuple(found[x] for x in d.lead)
        found[d.name].factors = tuple(found[x] for x in d.factors)
    return found


class GraphTensor:
    """A value of a graph, for the op rooms."""

    def __init__(self, name: str, kind: str, dims: tuple[GraphDim, ...]):
        self.name, self.kind, self.dims = name, kind, dims


@lowering_pass(requires={"built"}, ensures={"typed"})
def infer_types(program: GraphProgram) -> GraphProgram:
    """Check the type of every result against its op's signature.

    Why here: passes that follow trust the types; the elaborator that wrote them shares nothing with this walk but the
    op rooms. Raises: InternalError.
    """
    for graph in program.graphs.values():
        graph.verify()
        check_types(graph)
    return program


def check_types(graph: Graph) -> None:
    """Raises `InternalError` where a node's results differ from what its op says."""
    dims = graph_dims(graph.body.dims)
    for node in graph.nodes:
        if node.op in STRUCTURE:
            continue
        typing = infer(node, graph, dims)
        found = tuple((kind, tuple(d.name for d in ds)) for kind, ds in typing.results)
        written = tuple((r.type.kind, r.type.dims) for r in node.results)
        if found != written:
            raise InternalError(f"{graph.name}: `{node.name}` is written as {written}, its op says {found}")


def infer(node: Node, graph: Graph, dims: dict[str, GraphDim]) -> Any:
    """What a node's op says about it. The weights that it owns are checked, not made."""
    op = op_of(node)
    operands = list(node.operands)
    tensors: dict[str, Any] = {}
    weights: dict[str, Any] = {}
    given = [o for o in op.signature.operands if not o.repeated]
    repeated = [o.name for o in op.inputs if o.repeated and (not o.optional or o.name in node.attr("options", ()))]
    for operand in given:
        name = operands.pop(0) if operands else None
        tensor = None if name is None else _tensor(name, graph, dims)
        (tensors if operand in op.inputs else weights)[operand.name] = tensor
    for i, name in enumerate(repeated):
        tensors[name] = [None if o is None else _tensor(o, graph, dims) for o in operands[i :: len(repeated)]]
    settings = {s.name: _setting(node.attr(s.name, s.default), s.kind, dims) for s in op.settings}
    settings.update((o.name, node.attr(o.name)) for o in op.inputs if node.attr(o.name) is not None)
    for rule in op.weights:
        if rule.when is not None:
            settings[rule.when] = weights.get(rule.operand) is not None
    made: dict[str, GraphDim] = {}
    of_weights = [d for t in weights.values() if t is not None for d in t.dims]

    made_here = [dims[d] for r in node.results for d in r.type.dims if d in dims]

    def known_dim(name: str, size: int | None, along: GraphDim | None = None, clock: Clock | None = None) -> GraphDim:
        """A dim that an op makes is one that its weights (taps) or its results (groups of rows) have already."""
        for d in made_here:
            if clock is not None and (d.size, d.clock) == (size, clock) and along is not None and d.lead == along.lead:
                return d
        for d in reversed(of_weights):
            if d.size == size and d.name.rstrip("_0123456789") == name:
                return d
        return made.setdefault(name, GraphDim(name, size, False))

    typing = op.infer(OpCall(op, tensors, settings, node.spans[0] if node.spans else NOWHERE, {}, known_dim))
    for operand, found in zip(op.signature.operands, typing.operands, strict=False):
        if isinstance(found, OwnedWeight):
            tensor = weights[operand.name]
            if tensor is None or tensor.dims != found.dims:
                raise InternalError(f"{graph.name}: weight `{operand.name}` of `{node.name}` does not fit its op")
    return typing


def _tensor(name: str, graph: Graph, dims: dict[str, GraphDim]) -> GraphTensor:
    value = graph.values[name]
    return GraphTensor(name, value.type.kind, tuple(dims[d] for d in value.type.dims))


def _setting(value: Any, kind: str, dims: dict[str, GraphDim]) -> Any:
    if kind == "dims" and value is not None:
        return tuple(dims[d] for d in value)
    if kind in ("map", "split", "join"):
        return tuple(tuple(dims[d] for d in side) for side in value)
    if kind == "coordinate":
        return dims[value[0]], value[1]
    return value
