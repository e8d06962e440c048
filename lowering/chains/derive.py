"""Gradients of a chain, as expressions over the same values.

A gradient is summed over the dims that its operand lacks: `c` by a reduction in the kernel, at once; `r` where it is
stored, a part a program.
"""

from __future__ import annotations

from collections.abc import Mapping

from .expr import REDUCTIONS, Expr, Unfit, ordered
from .fold import Folding
from .table import TABLE


def derive(cotangents: Mapping[Expr, Expr], columns: int) -> dict[Expr, Expr]:
    """The gradient of each tensor that wants one and has one; `cotangents` of the values that the chain gives.

    Raises Unfit where it would pass through a largest column: `max` says a scale here, under `constant`.
    """
    a = Folding(columns)
    order = ordered(cotangents)
    moving: dict[Expr, bool] = {}
    for e in order:
        moving[e] = e.grad if e.op == "load" else e.op != "constant" and any(moving[x] for x in e.args)
    slope: dict[Expr, Expr] = dict(cotangents)
    found: dict[Expr, Expr] = {}
    for node in reversed(order):
        g = slope.get(node)
        if g is None or not moving[node] or a.value(g) == 0:
            continue
        if node.op == "load":
            found[node] = g
            continue
        if node.op == "max_over":
            raise Unfit("a gradient of the largest column of a row: kernels take it for a scale, under `constant`")
        parts = (g,) if node.op in REDUCTIONS else TABLE[node.op].slopes(a, node, g, *node.args)
        into: dict[Expr, Expr] = {}
        for x, part in zip(node.args, parts, strict=True):
            if part is None or not moving[x]:
                continue
            part = a.sum(part) if "c" in node.dims and "c" not in x.dims else part
            into[x] = a.add(into[x], part) if x in into else part
        for x, part in into.items():  # the parts of x * x meet before others do
            slope[x] = a.add(slope[x], part) if x in slope else part
    return {e: found[e] for e in order if e in found}
