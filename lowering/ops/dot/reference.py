"""Products of two tensors, summed."""

from __future__ import annotations

from torch import Tensor


def dot(x: Tensor, y: Tensor) -> Tensor:
    """x[*, H, K], y[H, K, N] -> z[*, H, N]."""
    return (x[..., None] * y).sum(-2)
