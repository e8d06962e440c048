"""Dropout (Srivastava et al. 2014, section 4): r ~ Bernoulli(1 - rate), y = r x / (1 - rate)."""

from __future__ import annotations

from torch import Tensor


def dropout(x: Tensor, kept: Tensor, rate: float) -> Tensor:
    """x[D], kept bool[D] -> y[D]."""
    return x * kept / (1 - rate)
