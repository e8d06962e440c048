"""RMSNorm as an expression of rows of one run each: y = x rstd w, rstd = 1 / sqrt(mean(x^2) + eps)."""

from __future__ import annotations

from typing import Any

from ...chains.expr import Expr, apply, number, reduce


def holds(use: Any) -> bool:
    """Every use."""
    return True


def columns(use: Any) -> int:
    """The places of one run."""
    if use.op == "rms_norm":
        return int(use.count("D") // use.attr("groups", 1))
    return int(use.count("D") // use.count("G"))


def express(use: Any, args: list[Expr]) -> tuple[Expr, list[tuple[str, Expr]]]:
    """Its result, and its statistic by name."""
    x = args[0]
    if use.op == "group_squares":
        return reduce("sum", apply("mul", x, x)), []
    if use.op == "rms_norm":
        weight, squares, count = args[1], reduce("sum", apply("mul", x, x)), columns(use)
    else:
        weight, squares, count = args[1], args[2], use.attr("count", 1)
    mean = apply("div", squares, number(count))
    rstd = apply("rsqrt", apply("add", mean, number(use.attr("eps", 1e-5))))
    y = apply("mul", x, rstd)
    return (apply("mul", y, weight) if weight is not None else y), [("rstd", rstd)]
