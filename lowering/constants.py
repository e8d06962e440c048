"""What a model computes once, when it is made: values that follow from the spec alone."""

from __future__ import annotations

from ..dsl.program import Node
from .graph import STRUCTURE, Graph, GraphProgram, op_of


def constants(graph: Graph, program: GraphProgram) -> dict[str, Node]:
    """The nodes of the model's own graph that depend on nothing, by name; of other graphs none."""
    found: dict[str, Node] = {}
    if graph.name != program.program.root:
        return found
    for node in graph.nodes:
        if node.op in STRUCTURE or op_of(node).coordinates and _follows(graph, node):
            continue
        if node.op == "convert":  # a rank knows where it is when it runs
            continue
        if all(o is None or o in graph.producers and graph.producers[o].name in found for o in node.operands):
            found[node.name] = node
    return found


def _follows(graph: Graph, node: Node) -> bool:
    """Whether an op reads where the rows of a sequence are that comes with the stream."""
    return node.op != "coordinate" or any(graph.dims[d].clock is not None for d in node.bound("S"))
