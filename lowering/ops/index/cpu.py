"""CPU code of indexes and coordinates."""

from __future__ import annotations

from typing import Any


def emit(use: Any) -> str:
    """The expression."""
    if use.op == "coordinate":
        which = use.attr("which")
        return "at.position" if which == "position" else f"at.keys().{which}" if which == "document" else "at.validity"
    (size,) = use.sizes("D")
    return f"torch.arange({size}, dtype=torch.float32)"
