"""One row of a dim."""

from __future__ import annotations

from torch import Tensor


def take(x: Tensor, index: int) -> Tensor:
    """x[*, S] -> y[*]."""
    return x[..., index]
