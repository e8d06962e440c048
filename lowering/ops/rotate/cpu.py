"""CPU code of rotations."""

from __future__ import annotations

from typing import Any


def emit(use: Any) -> str:
    """The call."""
    return f"lib.rotate({', '.join(use.args)})"
