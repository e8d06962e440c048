"""CPU code of the token some places later, and of whether it is known."""

from __future__ import annotations

from typing import Any


def emit(use: Any) -> str:
    """The call."""
    if use.op == "is_known":
        return f"{use.args[0]} >= 0"
    by = use.attr("by")
    return f"lib.next_token({use.args[0]}, at{f', by={by}' if by != 1 else ''})"
