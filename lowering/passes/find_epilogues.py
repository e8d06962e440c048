"""What a product may end with, place by place, before its result is stored."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ...dsl.program import Node
from ..afterwards import parts
from ..chains.expr import REDUCTIONS, WHOLE, Expr, Unfit, load, loads_of, ordered, rebuilt
from ..chains.fused import Fused, Part, expressed, is_alone, is_fusible
from ..constants import constants
from ..graph import STRUCTURE, Graph, GraphProgram
from ..ops import has_part, part
from . import lowering_pass


@dataclass(frozen=True)
class Epilogue:
    """`nodes`, in order, are all that reads the result of the node `product`, and one kernel may stand in place of both
    where it is measured to be faster.

    `facts` are what its room says that kernel is specialised by, None where there can be none: `why_not` says why. It
    adds the value `residual` last, if there is one.
    """

    product: str
    nodes: tuple[str, ...]
    residual: str | None
    facts: Any
    why_not: str = ""


@lowering_pass(requires={"fused"}, ensures={"epilogues"})
def find_epilogues(program: GraphProgram) -> GraphProgram:
    """Find the products whose result is read by work place by place alone, and what kernel could make both.

    before:  up = linear(x, w);  y = relu2(up)      # up is written, and read again
    after:   the same, and known: one kernel may give y of x and w

    Why here: behind the search for kernels of rows, one of which, as a whole, may be what a product ends with. Nothing
    is decided: what pays is measured for a target (a lock says it), and untuned the library's product stands. Identity
    for a target without kernels.
    """
    if not program.target.kernels:
        return program
    # Of two products that are added, the end of the last: the other is there by then.
    made = {
        name: tuple({e.nodes: e for e in _found(program, graph)}.values()) for name, graph in program.graphs.items()
    }
    return program.with_graphs(program.graphs, epilogues={name: found for name, found in made.items() if found})


def _found(program: GraphProgram, graph: Graph) -> Iterator[Epilogue]:
    when = parts(graph, program.emitting)
    phase = {n.name: i for i, nodes in enumerate((when.result, when.stated, when.after)) for n in nodes}
    apart = constants(graph, program)
    fused = {name: f for f in program.fused.get(graph.name, ()) for name in f.nodes}
    for node in graph.nodes:
        if node.op in STRUCTURE or not has_part(node.op, "cute") or node.attr("recompute") or len(node.results) != 1:
            continue
        behind = _behind(graph, node, fused)
        if behind is None or any(phase.get(n) != phase.get(node.name) or n in apart for n in behind.nodes):
            continue
        found = _offered(program, graph, node, behind)
        if found is not None:
            yield found


def _behind(graph: Graph, node: Node, fused: dict[str, Fused]) -> Fused | None:
    """All that reads a node's result, where it is one kernel of rows, or would be one by itself."""
    users = graph.users.get(node.name, ())
    if not users or node.name in graph.results:
        return None
    first = users[0]
    found = fused.get(first.name)
    if found is None and is_fusible(graph, first) and not is_alone(first) and Part(graph, first).columns is None:
        found = expressed(graph, (first,), ())
    if found is None or not {n.name for n in users} <= set(found.nodes):
        return None
    given, (result,) = found.value_of.values(), node.results
    gives = [graph.values[v].type.dims for v in found.outputs]
    return found if node.name in given and gives == [result.type.dims] else None


def _split(behind: Fused, result: str) -> tuple[Expr | None, str | None] | None:
    """Of a kernel of rows: what is done with a product's result alone, an expression of `z` (None: nothing), and the
    value that is added last, if there is one. None where there is more in it, numbers are drawn, or other rows read."""
    value = behind.chain.outputs[0].value
    if behind.drawn or any(e.op in REDUCTIONS for e in ordered([value])):
        return None
    tiles = {e: behind.value_of[e.name] for e in loads_of([value])}
    if any(e.dims != "rc" or e.view != WHOLE for e in tiles) or result not in tiles.values():
        return None
    (own,) = (e for e, v in tiles.items() if v == result)
    added = next((e for e in value.args if e in tiles and e is not own), None) if value.op == "add" else None
    step = next(e for e in value.args if e is not added) if added is not None else value
    if loads_of([step]) != [own]:
        return None
    z = rebuilt([step], {own: load("z", "rc")})[step]
    return (None if step is own else z), (None if added is None else tiles[added])


def _offered(program: GraphProgram, graph: Graph, node: Node, behind: Fused) -> Epilogue | None:
    """What the room of the product makes of it."""
    split = _split(behind, node.name)
    if split is None:
        return None
    step, residual = split
    said = "_".join(dict.fromkeys(graph.producers[n].op for n in behind.nodes))
    try:
        facts = part(node.op, "cute").kernel(Part(graph, node), program.target, step, said, residual is not None)
    except Unfit as error:
        return Epilogue(node.name, behind.nodes, residual, None, str(error))
    return None if facts is None else Epilogue(node.name, behind.nodes, residual, facts)
