"""Softmax and its logarithm as expressions of rows."""

from __future__ import annotations

from typing import Any

from ...chains.expr import Expr, apply, reduce


def holds(use: Any) -> bool:
    """Every use."""
    return True


def columns(use: Any) -> int | None:
    """All places that it runs over."""
    return use.count("D")


def express(use: Any, args: list[Expr]) -> tuple[Expr, list[tuple[str, Expr]]]:
    """exp(x - most) / total, or x - most - log(total)."""
    (x,) = args
    # A maximum that is taken away again has no gradient.
    far = apply("sub", x, apply("constant", reduce("max", x)))
    weight = apply("exp", far)
    total = reduce("sum", weight)
    if use.op == "log_softmax":
        return apply("sub", far, apply("log", total)), [("total", total)]
    return apply("div", weight, total), [("total", total)]
