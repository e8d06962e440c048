"""What was joined into kernels, by how much it saves, and why it ends where it does, and what is left to PyTorch:
comments below a graph."""

from __future__ import annotations

from collections.abc import Iterator

from ...dsl.program import Node
from ..graph import STRUCTURE, Graph, GraphProgram, op_of
from ..ops import has_part
from .fused import Fused, Part, is_alone, is_fusible, shape_of


def told(program: GraphProgram, graph: Graph) -> list[str]:
    """Lines on the kernels of rows of a graph, and on what has no kernel."""
    lines: list[str] = []
    for fused in program.fused.get(graph.name, ()):
        nodes = [graph.producers[n] for n in fused.nodes]
        saved = ": moves {1} tiles in place of {0}".format(*_moved(graph, nodes, fused)) if len(nodes) > 1 else ""
        lines.append(
            f"one kernel: {', '.join(n.op for n in nodes)} of rows of {fused.chain.columns}; "
            f"{', '.join(fused.inputs)} -> {', '.join(fused.outputs)}{saved}"
        )
        lines += [f"  {line}" for line in dict.fromkeys(_ends(graph, nodes, fused))]
    return lines + (_left(program, graph) if program.target.kernels else [])


def _left(program: GraphProgram, graph: Graph) -> list[str]:
    """What PyTorch computes and why: ops of rows that are in no kernel, and ops for which none are written. The rooms
    that write kernels say by themselves which uses have none (`Files.without`)."""
    joined = {name for f in program.fused.get(graph.name, ()) for name in f.nodes}
    found: dict[str, list[str]] = {}
    for node in graph.nodes:
        if node.name not in joined and node.op not in STRUCTURE and not has_part(node.op, "triton"):
            found.setdefault(_not_fused(graph, node), []).append(f"`{node.op}`")
    return [f"PyTorch computes {', '.join(dict.fromkeys(ops))}: {why}" for why, ops in found.items()]


def _not_fused(graph: Graph, node: Node) -> str:
    if not has_part(node.op, "chain"):
        return "no kernels are written for it"
    if node.attr("recompute"):
        return "it is made again in the backward pass"
    return "nothing is saved by one" if is_fusible(graph, node) else "not of real numbers in rows of a known width"


def _moved(graph: Graph, nodes: list[Node], fused: Fused) -> tuple[int, int]:
    """How many tiles are read or written by the nodes one by one, and by the kernel; rows and weights are small."""
    shape = shape_of(graph, nodes)
    assert shape is not None

    def tiles(values: tuple[str | None, ...]) -> int:
        return sum(graph.values[v].type.dims == shape.dims for v in dict.fromkeys(values) if v is not None)

    apart = sum(tiles(n.operands) + tiles(tuple(r.name for r in n.results)) for n in nodes)
    return apart, tiles(fused.inputs) + tiles(fused.outputs)


def _ends(graph: Graph, nodes: list[Node], fused: Fused) -> Iterator[str]:
    """For each value that goes in or out and has a node at its other end: why that is not in the kernel, too."""
    inside = set(fused.nodes)
    for value in fused.inputs:
        made = graph.producers.get(value)
        if made is not None and made.name not in inside:
            yield f"begins behind `{value}`: {_reason(graph, made, nodes)}"
    for value in fused.outputs:
        for user in graph.users.get(value, ()):
            if user.name not in inside:
                yield f"ends with `{value}`: {_reason(graph, user, nodes)}"


def _reason(graph: Graph, node: Node, nodes: list[Node]) -> str:
    if node.op in STRUCTURE:
        return f"`{node.attr('instance')}` is a block of its own"
    if not has_part(node.op, "chain"):
        op = op_of(node)
        why = "draws numbers" if op.random and op.monoid is None else "works along more than a row"
        return f"`{node.op}` {why}"
    if node.attr("recompute"):
        return f"`{node.op}` is made again in the backward pass"
    if not is_fusible(graph, node):
        return f"`{node.op}` is not of real numbers in rows of a known width"
    columns = Part(graph, node).columns
    if is_alone(node) or is_alone(nodes[0]):
        return f"`{node.op if is_alone(node) else nodes[0].op}` is a kernel of its own"
    if shape_of(graph, [*nodes, node]) is None:
        return f"`{node.op}` has rows of {columns}" if columns else f"`{node.op}` has other dims"
    return f"`{node.op}` waits for something outside the kernel"
