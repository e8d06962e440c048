"""Slopes of heads for scores that fall with distance (Press et al. 2022, ALiBi)."""

from __future__ import annotations

import torch
from torch import Tensor


def slopes(heads: int) -> Tensor:
    """fp32 [heads]: 2^(-8 i / p), i = 1 .. p, where p is the largest power of two of which there are so many heads; the
    rest are 2^(-4 i / p) of odd i, as released."""
    near = 1 << (heads.bit_length() - 1)
    powers = [8 * i / near for i in range(1, near + 1)] + [4 * i / near for i in range(1, 2 * (heads - near), 2)]
    return torch.tensor([2.0**-p for p in powers])
