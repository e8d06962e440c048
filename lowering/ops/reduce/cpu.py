"""CPU code of reductions."""

from __future__ import annotations

from typing import Any

CALLS = {"sum": "sum", "mean": "mean", "max_over": "amax"}


def emit(use: Any) -> str:
    """The call."""
    have = use.operand_dims(0)
    dims = tuple(have.index(d) - len(have) for d in use.bound("D"))
    return f"{use.args[0]}.{CALLS[use.op]}({dims if len(dims) > 1 else dims[0]})"
