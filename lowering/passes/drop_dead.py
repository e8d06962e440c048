"""Remove what no output and no loss needs."""

from __future__ import annotations

from ...dsl.program import Node
from ..graph import STRUCTURE, Graph, GraphProgram
from . import each_graph, lowering_pass


@lowering_pass(requires={"typed"}, ensures={"live"})
def drop_dead(program: GraphProgram) -> GraphProgram:
    """Drop nodes whose results are not read, but for calls of blocks that state a loss.

    before:  a = silu(x);  b = relu(x);  return a
    after:   a = silu(x);  return a

    Why here: fusion must not see readers that are not there.
    """
    return each_graph(program, lambda graph: live(graph, program.emitting))


def live(graph: Graph, emitting: frozenset[str]) -> Graph:
    """The graph without nodes that nothing needs; weights stay, they belong to the checkpoint."""
    wanted = set(graph.results)
    kept: list[Node] = []
    for node in reversed(graph.nodes):
        states = node.op in STRUCTURE and any(b in emitting for b in graph.instance(node.attr("instance")).bodies)
        if states or any(r.name in wanted for r in node.results):
            kept.append(node)
            wanted.update(o for o in node.operands if o is not None)
    return graph.with_nodes(tuple(reversed(kept)))
