"""Rotation of channel pairs (Su et al. 2021, eq. 34): (x_j, x_{j+R}) turns by the angle of (cos_j, sin_j)."""

from __future__ import annotations

import torch
from torch import Tensor


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x[*, S, H, D], cos and sin[*, S, R] -> y[*, S, H, D]; channels from 2 R on pass."""
    pairs = cos.shape[-1]
    a, b, rest = x[..., :pairs], x[..., pairs : 2 * pairs], x[..., 2 * pairs :]
    c, s = cos[..., None, :], sin[..., None, :]
    return torch.cat([a * c - b * s, b * c + a * s, rest], -1)
