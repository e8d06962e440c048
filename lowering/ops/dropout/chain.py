"""Dropout as an expression of rows: which places are 0 follows from their numbers, forward and backward alike."""

from __future__ import annotations

from typing import Any

from ...chains.expr import Expr, apply


def holds(use: Any) -> bool:
    """Where anything is ever dropped, of rows whose width is known."""
    dims = use.node.bound("D")
    return bool(use.attr("rate")) and bool(dims) and use.graph.size(dims[-1]) is not None


def columns(use: Any) -> int:
    """The places of the last dim, along which numbers count on."""
    return int(use.graph.size(use.node.bound("D")[-1]))


def express(use: Any, args: list[Expr]) -> tuple[Expr, list[tuple[str, Expr]]]:
    """The op on its operand and what is drawn of rows."""
    x, drawn = args
    return apply("dropout", x, drawn, rate=use.attr("rate")), []
