"""CPU code of tensors side by side."""

from __future__ import annotations

from typing import Any


def emit(use: Any) -> str:
    """The call."""
    have = use.operand_dims(0)
    (joined,) = use.bound("A")
    return f"torch.cat(({use.args[0]}, {use.args[1]}), {have.index(joined) - len(have)})"
