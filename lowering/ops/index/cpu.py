"""CPU code of indexes and coordinates."""

from __future__ import annotations

from typing import Any


def emit(use: Any) -> str:
    """The expression."""
    if use.op == "coordinate":
        return f"at.{use.attr('which')}"
    (size,) = use.sizes("D")
    return f"torch.arange({size}, dtype=torch.float32)"
