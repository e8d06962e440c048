"""A convolution along a sequence that is cut: a rank is told the rows before its own."""

from __future__ import annotations

from typing import Any


def lift(node: Any, graph: Any) -> str:
    """before: y = causal_conv(x, w, b);  after: r = rows_before(x);  y = conv_behind(x, r, w, b)."""
    x, weight, bias = node.operands
    bound, dims = dict(node.bindings), graph.type_of(x).dims
    (seq,), taps = bound["S"], node.attr("taps")
    rows = graph.dim("rows", taps - 1)
    lead = dims[: dims.index(seq)]
    own = (("S", (seq,)), ("B", (rows,)), ("C", bound["C"]))
    halo = (*lead, rows, *bound["C"])
    before = graph.add("rows_before", (x,), halo, node, bindings=own, into=(rows,), count=taps - 1)
    return graph.add(
        "conv_behind", (x, before, weight, bias), dims, node, name=node.name, bindings=(*own, ("J", bound["J"])),
        taps=taps, act=node.attr("act"),
    )  # fmt: skip
