"""What `heddle explain` says of matrix products: which may be one kernel with what is behind them, or before them, what
that would save, and what is chosen."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import Any

from ..codegen.lock import Lock
from ..codegen.products import key
from ..dsl.program import Node
from ..lowering.chains.expr import Output, ordered
from ..lowering.chains.fused import Fused, Part
from ..lowering.graph import STRUCTURE, Graph, GraphProgram
from ..lowering.ops import has_part, part
from ..lowering.passes.find_epilogues import Epilogue
from .plan.devices import Device, of_capability

ROWS = 8192
"""Of an estimate: a row of tokens of a long context, or several."""


def told(program: GraphProgram, graph: Graph, lock: Lock | None) -> list[str]:
    """Lines on the products of a graph, and on what its kernels of rows make for products."""
    device = of_capability(program.target.capability)
    lines: list[str] = []
    for e in program.epilogues.get(graph.name, ()):
        lines += _epilogue(graph, e, program.target.name, device, lock)
    return lines + (list(_prologues(program, graph, device)) if device is not None else [])


def _epilogue(graph: Graph, e: Epilogue, target: str, device: Device | None, lock: Lock | None) -> Iterator[str]:
    node = graph.producers[e.product]
    ops = ", ".join(n.op for n in (node, *(graph.producers[n] for n in e.nodes)))
    yield f"product with an epilogue: {ops}; {node.operands[0]} -> {e.nodes[-1]}"
    if e.facts is None:
        yield f"  PyTorch's: {e.why_not}"
        return
    if device is not None:
        yield f"  {_estimated(node, e.facts, device)}"
    found = lock.kernels.get(key(node.op, e.facts)) if lock is not None else None
    if found is None:
        yield f"  PyTorch's: no lock has measured the kernel (heddle tune --target {target})"
        return
    us = [f"{t:.1f} us" if t is not None else "not measured" for t in (found.us, found.library_us)]
    yield f"  {'one kernel' if found.is_used else 'PyTorch'}: as one {us[0]}, PyTorch's {us[1]} (lock)"


def _estimated(node: Node, facts: Any, device: Device) -> str:
    """What one kernel would save, in training."""
    of = part(node.op, "cute").estimate(facts, ROWS, device, trains=True)
    return (
        f"one kernel of {facts.n} columns of {facts.k} moves {of.saved_bytes / 1e6:.0f} MB less, of {ROWS} rows: by "
        f"estimate {of.gain:.1%} of {of.library_s * 1e6:.0f} us on {device.name}; as fast at {of.needed:.0%} of the "
        "library's rate"
    )


def _prologues(program: GraphProgram, graph: Graph, device: Device) -> Iterator[str]:
    """What kernels that reduce rows write for products, and what one would save that made it by itself: none does."""
    for fused in program.fused.get(graph.name, ()):
        if all(Part(graph, graph.producers[n]).columns is None for n in fused.nodes):
            continue
        for value, output in zip(fused.outputs, fused.chain.outputs, strict=False):
            if _tiles_behind(fused, output) > 1:  # it would read as much more as it does not write
                continue
            for where, node in _readers(program, graph, value):
                if node.op not in STRUCTURE and has_part(node.op, "cute"):
                    n = sum(_columns(where, r.name) for r in node.results)
                    gain = part(node.op, "cute").prologue_gain(n, _columns(graph, value), ROWS, device)
                    yield (
                        f"`{value}` is written for {node.op} of {n} columns in `{where.name}`: made inside, it would "
                        f"save at most {gain:.1%} of both, by estimate on {device.name}; no kernel does"
                    )


def _tiles_behind(fused: Fused, output: Output) -> int:
    """How many tiles a result follows from: those that the kernel is given, or others that it gives."""
    others = {o.value for o in fused.chain.outputs if o is not output}
    found = ordered([output.value], others)
    return sum(e.dims == "rc" and (e.op == "load" or e in others) for e in found)


def _readers(program: GraphProgram, graph: Graph, value: str) -> Iterator[tuple[Graph, Node]]:
    """The nodes that read a value, in blocks that are given it, too."""
    for node in graph.users.get(value, ()):
        if node.op != "call":
            yield graph, node
            continue
        callee = program.graphs[graph.instance(node.attr("instance")).bodies[0]]
        for place, operand in enumerate(o for o in node.operands if o is not None):
            if operand == value:
                yield from _readers(program, callee, callee.body.inputs[place].name)


def _columns(graph: Graph, value: str) -> int:
    """How many places a row of a value has: those of the dims whose sizes are known."""
    return prod(graph.size(d) or 1 for d in graph.values[value].type.dims)
