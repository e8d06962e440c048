"""Reductions."""

from __future__ import annotations

from torch import Tensor


def sum(x: Tensor) -> Tensor:  # noqa: A001
    """x[*, D] -> y[*]."""
    return x.sum(-1)


def mean(x: Tensor) -> Tensor:
    """x[*, D] -> y[*]."""
    return x.sum(-1) / x.shape[-1]


def max_over(x: Tensor) -> Tensor:
    """x[*, D] -> y[*]."""
    return x.amax(-1)
