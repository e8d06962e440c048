"""CPU code of one row."""

from __future__ import annotations

from typing import Any


def emit(use: Any) -> str:
    """The call; along tokens it also sees that a batch row is one document."""
    have = use.operand_dims(0)
    (dim,) = use.bound("S")
    axis, x = have.index(dim), use.args[0]
    if use.graph.dims[dim].clock is None:
        return f"{use.wrap(x)}.select({axis}, {use.attr('index')})"
    return f"lib.take_row({x}, {axis}, {use.attr('index')}, at)"
