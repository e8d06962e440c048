"""CPU code of reductions: the library's, over valid rows only where a sequence is reduced."""

from __future__ import annotations

from math import prod
from typing import Any

CALLS = {"sum": "sum", "mean": "mean", "max_over": "amax", "count": "sum"}


def emit(use: Any) -> str:
    """The call. A loss is the sum; its count is what `count` says."""
    have = use.operand_dims(0)
    dims = tuple(have.index(d) - len(have) for d in use.bound("D"))
    shown = f"{dims if len(dims) > 1 else dims[0]}"
    rows = _rows(use)
    how = "sum" if use.node.results[0].type.kind == "loss" else use.op
    x = use.wrap(use.args[0])
    if use.graph.values[use.operands[0]].type.kind == "mask" and how != "count":
        x = f"{x}.float()"
    at = use.rows_of(0)
    if len(use.operands) > 1:
        return f'lib.reduce_rows({x}, "{how}", {dims}, {at}, {rows or ()}, where={use.args[1]})'
    if rows is not None:
        return f'lib.reduce_rows({x}, "{how}", {dims}, {at}, {rows})'
    return f"{x}.{CALLS[how]}({shown})" + ".float()" * (how == "count")


def count(use: Any) -> str:
    """The number of places of a loss: valid rows, or batch rows, times the static dims."""
    if len(use.operands) > 1:
        return f"lib.count_rows({use.args[1]}, {use.rows_of(1)}, {_rows(use) or ()})"
    along = [use.graph.dims[d] for d in use.bound("D") if use.graph.dims[d].clock is not None]
    static = prod(use.graph.size(d) or 1 for d in use.bound("D") if not any(d in (*s.lead, s.name) for s in along))
    rows = f"{use.rows_of(0)}.count()" if along else "at.lead[0]"
    return rows if static == 1 else f"{static} * {rows}"


def _rows(use: Any) -> tuple[int, ...] | None:
    """The axes of the operand that its sequence and what that varies along are, if the sequence is reduced."""
    have = use.operand_dims(0)
    for d in use.bound("D"):
        if use.graph.dims[d].clock is not None:
            return tuple(have.index(x) for x in (*use.graph.dims[d].lead, d))
    return None
