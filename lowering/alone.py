"""Parts of a program by themselves: each kernel of a target as a block of its own, to be run beside its meaning."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from ..dsl.program import Node, Type, Value
from .graph import STRUCTURE, Graph, GraphProgram
from .ops import has_part
from .passes.find_epilogues import Epilogue
from .passes.join_heads import Head


@dataclass(frozen=True)
class Alone:
    """Nodes that are one kernel, as the block `name` of `program`. `of` is the block that they are from."""

    name: str
    of: str
    nodes: tuple[Node, ...]
    program: GraphProgram

    @property
    def graph(self) -> Graph:
        """The block."""
        return self.program.graphs[self.name]


def kernels(program: GraphProgram) -> Iterator[Alone]:
    """Every use of an op or of several that may be a kernel for the program's target, callees first; those that do not
    differ once."""
    return _once(_each(program))


def products(program: GraphProgram) -> Iterator[Alone]:
    """Every product that may be one kernel with what is behind it, with that; those that do not differ once."""
    return _once(_each_product(program))


def _once(found: Iterator[Alone]) -> Iterator[Alone]:
    seen: set[object] = set()
    for made in found:
        key = _meaning(made.graph)
        if key not in seen:
            seen.add(key)
            yield made


def _each_product(program: GraphProgram) -> Iterator[Alone]:
    for graph in program.callees_first():
        for epilogue in program.epilogues.get(graph.name, ()):
            if epilogue.facts is not None:
                yield _with_epilogue(program, graph, epilogue)


def _with_epilogue(program: GraphProgram, graph: Graph, epilogue: Epilogue) -> Alone:
    nodes = tuple(graph.producers[n] for n in (epilogue.product, *epilogue.nodes))
    alone = _alone(program, graph, nodes)
    behind = tuple(f for f in program.fused.get(graph.name, ()) if f.nodes == epilogue.nodes)
    fused = {alone.name: behind} if behind else {}
    return replace(alone, program=replace(alone.program, fused=fused, epilogues={alone.name: (epilogue,)}))


def _each(program: GraphProgram) -> Iterator[Alone]:
    for graph in program.callees_first():
        fused = program.fused.get(graph.name, ())
        inside = {name for f in fused for name in f.nodes}
        groups = [tuple(graph.producers[n] for n in f.nodes) for f in fused]
        head = program.heads.get(graph.name)
        others = (n for n in graph.nodes if n.name not in inside and n.op not in STRUCTURE)
        groups += [(n,) for n in others if has_part(n.op, "triton")]
        for nodes in sorted(groups, key=lambda ns: graph.nodes.index(ns[-1])):
            if head is not None and nodes[-1].name == head.loss:
                yield _with_head(program, head.node, nodes[-1], graph)
            else:
                yield _alone(program, graph, nodes)


def _with_head(program: GraphProgram, maker: Node, loss: Node, objective: Graph) -> Alone:
    """A loss beside the map of the model whose result it makes by itself, as one block."""
    model = program.model
    (made,), given = maker.results, {}
    for operand in loss.operands[1:]:
        value = objective.values[operand or ""]
        dims = made.type.dims[: len(value.type.dims)]
        given[operand] = Value(f"{loss.name}_{value.name}", Type(value.type.kind, dims))
    result = Value(f"{loss.name}_of_{made.name}", loss.results[0].type)
    bindings = tuple((formal, made.type.dims[-len(dims) :]) for formal, dims in loss.bindings)
    operands = (made.name, *(given[o].name for o in loss.operands[1:]))
    own = replace(loss, results=(result,), operands=operands, bindings=bindings)
    body = replace(
        model.body, inputs=(*model.body.inputs, *given.values()), nodes=(*model.nodes, own), outputs=(result.name,)
    )
    alone = _alone(program, Graph(body), (maker, own))
    return replace(alone, program=replace(alone.program, heads={alone.name: Head(maker, own.name)}))


def _alone(program: GraphProgram, graph: Graph, nodes: tuple[Node, ...]) -> Alone:
    """The block of some nodes: it is given what they read, and gives what others read of it."""
    inside = {r.name for n in nodes for r in n.results}
    read = dict.fromkeys(o for n in nodes for o in n.operands if o is not None and o not in inside)
    weights = tuple(w for w in graph.body.weights if w.name in read)
    owned = {w.name for w in weights}
    inputs = tuple(graph.values[v] for v in read if v not in owned)
    outside = {o for n in graph.nodes if n not in nodes for o in n.operands} | set(graph.results)
    outputs = tuple(r.name for n in nodes for r in n.results if r.name in outside)
    name = f"{graph.name}_{nodes[-1].name}"
    body = replace(
        graph.body, name=name, block=name, inputs=inputs, weights=weights, instances=(), nodes=nodes, outputs=outputs,
        emits=(), rules=(), asked=0,
    )  # fmt: skip
    fused = tuple(f for f in program.fused.get(graph.name, ()) if set(f.nodes) == {n.name for n in nodes})
    graphs = {**program.graphs, name: Graph(body)}
    own = replace(
        program, graphs=graphs, fused={name: fused} if fused else {}, epilogues={}, heads={}, states={}
    )  # fmt: skip
    return Alone(name, graph.name, nodes, own)


def _meaning(graph: Graph) -> object:
    """What makes two such blocks do the same: ops, settings and sizes, not what anything is called."""
    place: dict[str, int] = {}
    for name in (*(v.name for v in graph.body.inputs), *(w.name for w in graph.body.weights)):
        place[name] = len(place)
    dims: dict[str, int] = {}

    def shape(value: str) -> tuple[object, ...]:
        return tuple((dims.setdefault(d, len(dims)), graph.size(d)) for d in graph.values[value].type.dims)

    found: list[object] = [tuple(shape(v) for v in place)]
    for node in graph.nodes:
        operands = tuple(None if o is None else place[o] for o in node.operands)
        found.append((node.op, operands, repr([a for a in node.attrs if a[0] not in ("parts", "over", "into")])))
        place.update((r.name, len(place)) for r in node.results)
    return tuple(found)
