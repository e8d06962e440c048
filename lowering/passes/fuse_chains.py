"""One kernel for what is computed row by row."""

from __future__ import annotations

import networkx as nx

from ...dsl.program import Node
from ..afterwards import parts
from ..chains.expr import Chain, Unfit
from ..chains.fused import Fused, expressed, groups
from ..chains.plan import plan
from ..constants import constants
from ..graph import Graph, GraphProgram
from . import lowering_pass


@lowering_pass(requires={"postponed"}, ensures={"fused"})
def fuse_chains(program: GraphProgram) -> GraphProgram:
    """Bring together what one kernel computes: arithmetic place by place, and statistics of rows of one width.

    before:  h = x + r;  q = linear(c, ..);  y = rms_norm(h, y.weight)
    after:   q = linear(c, ..);  h = x + r;  y = rms_norm(h, y.weight)      # one kernel: h, y

    Why here: last, of what is really computed; state belongs to ops that are in no such kernel. Identity for a target
    without kernels.
    """
    if not program.target.kernels:
        return program
    graphs, fused = {}, {}
    for name, graph in program.graphs.items():
        found = groups(graph, parts(graph, program.emitting), constants(graph, program))
        made = tuple(f for nodes in found if _fits((f := expressed(graph, nodes, _lines(nodes))).chain))
        graphs[name] = _together(graph, made)
        if made:
            fused[name] = made
    return program.with_graphs(graphs, fused=fused)


def _fits(chain: Chain) -> bool:
    """Whether a kernel can be generated; where not, the nodes stay PyTorch's."""
    try:
        plan(chain)
    except Unfit:
        return False
    return True


def _lines(nodes: tuple[Node, ...]) -> tuple[str, ...]:
    """The lines of the spec that asked for a kernel's nodes."""
    spans = [s for n in nodes for s in n.spans[:1] if s.source.text]
    return tuple(dict.fromkeys(s.source.line(s.line).strip() for s in sorted(spans, key=lambda s: s.line)))


def _together(graph: Graph, fused: tuple[Fused, ...]) -> Graph:
    """The same nodes, those of a kernel one behind the other, else in their order."""
    group = {name: i for i, f in enumerate(fused) for name in f.nodes}
    key = {n.name: group.get(n.name, n.name) for n in graph.nodes}
    order: nx.DiGraph = nx.DiGraph()
    place: dict[object, int] = {}
    for i, node in enumerate(graph.nodes):
        order.add_node(key[node.name])
        place[key[node.name]] = i  # a kernel stands where its last node stood
        for operand in node.operands:
            producer = graph.producers.get(operand) if operand else None
            if producer is not None and key[producer.name] != key[node.name]:
                order.add_edge(key[producer.name], key[node.name])
    members: dict[object, list[Node]] = {}
    for node in graph.nodes:
        members.setdefault(key[node.name], []).append(node)
    sorted_ = nx.lexicographical_topological_sort(order, key=place.__getitem__)
    return graph.with_nodes(tuple(n for k in sorted_ for n in members[k]))
