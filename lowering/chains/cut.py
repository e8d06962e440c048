"""What a backward pass reads and what it computes again: one minimum cut.

Each value that it needs is either there (an input or output of the chain, which it reads), saved by the forward pass
(written and read), or computed again from what is. Values and their costs in bytes make a graph, in which the cheapest
such choice is a minimum cut (Ford and Fulkerson 1956; for activations: Horace He's partitioner in functorch, 2022).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import networkx as nx

from .expr import REDUCTIONS, Expr, ordered
from .table import TABLE

_TILE = 1 << 20  # the cost of reading one tile; others are its parts, whole numbers, so that the cut is always the same
_AGAIN = _TILE // 8  # of computing a reduction once more


def needed(gradients: Iterable[Expr], cotangents: Iterable[Expr]) -> list[Expr]:
    """Values of the forward pass that gradients are made of: operands, which depend on no cotangent, of what does."""
    moved = set(cotangents)
    found: dict[Expr, None] = {}
    for e in ordered(gradients):
        if e not in moved and any(a in moved for a in e.args):
            moved.add(e)
            found.update(dict.fromkeys(a for a in e.args))
    return [e for e in found if e not in moved and e.op != "number"]


def cut(wanted: Iterable[Expr], outputs: Mapping[Expr, Expr], columns: int) -> list[Expr]:
    """The values, of those that `wanted` are made of, that a backward pass should find in memory; inputs are left out.

    outputs: values that the chain gives, and how each is read.
    """
    wanted = list(wanted)
    graph = nx.DiGraph()
    order = [e for e in ordered(wanted) if e.op != "number"]
    place = {e: i for i, e in enumerate(order)}
    for e, i in place.items():
        graph.add_edge((i, 0), (i, 1), **_cost(e, outputs, columns))
        if e.op == "load":
            graph.add_edge("there", (i, 0))
        elif e.op in REDUCTIONS:
            graph.add_edge("there", (i, 0), capacity=_AGAIN)
        for a in e.args:
            if a in place:
                graph.add_edge((place[a], 1), (i, 0))
    for e in wanted:
        graph.add_edge((place[e], 1), "wanted")
    if "there" not in graph:
        return []
    _, (near, _) = nx.minimum_cut(graph, "there", "wanted")
    return [e for e, i in place.items() if (i, 0) in near and (i, 1) not in near and e.op != "load"]


def _cost(e: Expr, outputs: Mapping[Expr, Expr], columns: int) -> dict[str, int]:
    """What having the value costs; nothing is said where it must not be saved.

    A tile has 2 bytes a column and a statistic 4 a row; what is written is read too. A tie between an input and an
    output goes to the input, which is not rounded, but where the output says as much.
    """
    op = TABLE.get(e.op, TABLE["neg"])
    read = _TILE if "c" in e.dims else max(1, 2 * _TILE // columns)
    if e.op == "load":
        return {"capacity": read // e.view.divide if "r" in e.dims else 1}
    if "r" not in e.dims or op.is_mask:
        return {}  # derived from weights alone, or a mask: it is computed again
    tie = -_TILE // 32 if op.by_result else _TILE // 32
    return {"capacity": read + tie if e in outputs else 2 * read}
