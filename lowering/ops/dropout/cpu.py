"""CPU code of dropout: zeros that follow from a place's number, in the mode of the module."""

from __future__ import annotations

from typing import Any


def emit(use: Any) -> str:
    """The call, or its input where nothing is ever dropped."""
    (x,), rate = use.args, use.attr("rate")
    if not rate:
        return x
    name, more = use.drawn(use.operand_dims(0))
    return f"lib.dropout({x}, {rate!r}, self, {name}, at{more})"


def drawn(use: Any, like: str) -> str:
    """What a kernel is told that does it; `like` has the shape of the operand."""
    name, more = use.drawn(use.operand_dims(0))
    return f"lib.drawn({like}, self, {name}, at{more})"
