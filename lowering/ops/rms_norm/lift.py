"""A norm whose dims are cut: squares are summed, the sums meet across ranks, and each part is scaled."""

from __future__ import annotations

from typing import Any


def lift(node: Any, graph: Any) -> str:
    """before: y = rms_norm(x, weight);  after: s = group_squares(x);  y = scaled_rows(x, weight, s)."""
    x, weight = node.operands
    over, groups = node.bound("D"), node.attr("groups", 1)
    dims = graph.type_of(x).dims
    runs = graph.dim("runs", groups)
    graph.split_like(runs, over[0])
    lead = tuple(d for d in dims if d not in over)
    count = 1
    for d in over:
        count *= graph.size(d)
    bound = (("D", over), ("G", (runs,)))
    squares = graph.add("group_squares", (x,), (*lead, runs), node, bindings=bound, over=over, into=(runs,))
    return graph.add(
        "scaled_rows", (x, weight, squares), dims, node, name=node.name, bindings=bound,
        over=over, into=(runs,), eps=node.attr("eps", 1e-5), count=count // groups,
    )  # fmt: skip
