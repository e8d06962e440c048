"""CPU code of cross entropy."""

from __future__ import annotations

from typing import Any


def emit(use: Any) -> str:
    """The sum over places whose target is known."""
    return f"lib.cross_entropy({', '.join(use.args)})"


def count(use: Any) -> str:
    """The number of places whose target is known: what the sum is divided by."""
    return f"lib.known({use.args[1]})"
