"""Arithmetic and activations as expressions of a kernel of rows."""

from __future__ import annotations

from typing import Any

from ...chains.expr import Expr, apply
from ...chains.table import DEFINED, TABLE

SLOW = ("relu2",)
"""What PyTorch makes in more than one pass."""


def holds(use: Any) -> bool:
    """Whether a kernel can compute it: real numbers only, place by place; a power where its exponent is a number."""
    return (use.op in TABLE or use.op in DEFINED) and (use.op != "pow" or use.attr("y") is not None)


def columns(use: Any) -> int | None:
    """None: it works place by place."""
    return None


def express(use: Any, args: list[Expr]) -> tuple[Expr, list[tuple[str, Expr]]]:
    """The op on expressions; settings that are no operands are its attributes."""
    attrs = {k: v for k in ("low", "high") if (v := use.attr(k)) is not None}
    return apply(use.op, *(a for a in args if a is not None), **attrs), []
