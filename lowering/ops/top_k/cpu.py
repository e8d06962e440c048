"""CPU code of the choice of the largest."""

from __future__ import annotations

from typing import Any


def emit(use: Any) -> str:
    """The call."""
    have = use.operand_dims(0)
    return f"lib.top_k({use.args[0]}, {use.attr('k')}, {have.index(use.bound('E')[0]) - len(have)})"
