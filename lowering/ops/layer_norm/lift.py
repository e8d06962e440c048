"""A layer norm whose dims are cut: the mean across ranks first, then the variance around it."""

from __future__ import annotations

from typing import Any


def lift(node: Any, graph: Any) -> str:
    """before: y = layer_norm(x, weight, bias);  after: the sum, the squares around the mean, and each part."""
    x, weight, bias = node.operands
    over, dims = node.bound("D"), graph.type_of(x).dims
    lead = tuple(d for d in dims if d not in over)
    count = 1
    for d in over:
        count *= graph.size(d)
    bound = (("D", over),)
    total = graph.add("row_sums", (x,), lead, node, bindings=bound, over=over)
    squares = graph.add("centred_squares", (x, total), lead, node, bindings=bound, over=over, count=count)
    return graph.add(
        "centred_rows", (x, weight, bias, total, squares), dims, node, name=node.name, bindings=bound,
        over=over, eps=node.attr("eps", 1e-5), count=count, zero_centred=node.attr("zero_centred", False),
    )  # fmt: skip
