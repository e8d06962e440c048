"""Two tensors side by side."""

from __future__ import annotations

import torch
from torch import Tensor


def concat(x: Tensor, y: Tensor) -> Tensor:
    """x[*, A], y[*, B] -> z[*, A + B]."""
    z = torch.zeros(*x.shape[:-1], x.shape[-1] + y.shape[-1], dtype=x.dtype)
    z[..., : x.shape[-1]] = x
    z[..., x.shape[-1] :] = y
    return z
