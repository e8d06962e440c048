"""Layer normalisation as an expression of rows: y = (x - mean) rstd w + b."""

from __future__ import annotations

from typing import Any

from ...chains.expr import Expr, apply, number, reduce


def holds(use: Any) -> bool:
    """Every use."""
    return True


def columns(use: Any) -> int:
    """All places that it runs over."""
    return int(use.count("D"))


def express(use: Any, args: list[Expr]) -> tuple[Expr, list[tuple[str, Expr]]]:
    """Its result, and its statistics by name."""
    x = args[0]
    if use.op == "row_sums":
        return reduce("sum", x), []
    alone = use.op == "layer_norm"
    count = number(columns(use) if alone else use.attr("count", 1))
    total = reduce("sum", x) if alone else args[1 if use.op == "centred_squares" else 3]
    mean = apply("div", total, count)
    centred = apply("sub", x, mean)
    if use.op == "centred_squares":
        return reduce("sum", apply("mul", centred, centred)), [("mean", mean)]
    weight, bias = args[1], args[2] if len(args) > 2 else None
    squares = reduce("sum", apply("mul", centred, centred)) if alone else args[4]
    rstd = apply("rsqrt", apply("add", apply("div", squares, count), number(use.attr("eps", 1e-5))))
    y = apply("mul", centred, rstd)
    if weight is not None:
        y = apply("mul", y, apply("add", weight, number(1.0)) if use.attr("zero_centred", False) else weight)
    return (apply("add", y, bias) if bias is not None else y), [("mean", mean), ("rstd", rstd)]
