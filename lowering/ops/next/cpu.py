"""CPU code of the token some places later."""

from __future__ import annotations

from typing import Any


def emit(use: Any) -> str:
    """The call."""
    by = use.attr("by")
    return f"lib.next_token({use.args[0]}, at{f', by={by}' if by != 1 else ''})"
