"""softmax(x)_i = exp(x_i) / sum_j exp(x_j), and its logarithm."""

from __future__ import annotations

import torch
from torch import Tensor

State = tuple[Tensor, Tensor]


def softmax(x: Tensor) -> Tensor:
    """x[*, D] -> y[*, D]."""
    e = torch.exp(x - x.amax(-1, keepdim=True))
    return e / e.sum(-1, keepdim=True)


def log_softmax(x: Tensor) -> Tensor:
    """x[*, D] -> y[*, D]."""
    x = x - x.amax(-1, keepdim=True)
    return x - torch.log(torch.exp(x).sum(-1, keepdim=True))


def identity(x: Tensor) -> State:
    """The state of no elements."""
    return torch.full(x.shape[:-1], -torch.inf, dtype=x.dtype), torch.zeros(x.shape[:-1], dtype=x.dtype)


def lift(x: Tensor) -> State:
    """(max, sum of exp(x - max)) of a part of D."""
    top = x.amax(-1)
    return top, torch.exp(x - _finite(top)[..., None]).sum(-1)


def combine(a: State, b: State) -> State:
    """Both parts."""
    top = torch.maximum(a[0], b[0])
    return top, a[1] * torch.exp(a[0] - _finite(top)) + b[1] * torch.exp(b[0] - _finite(top))


def _finite(top: Tensor) -> Tensor:
    """0 for the largest of nothing: -inf minus -inf would be NaN, in the gradient even behind a `where`."""
    return torch.where(torch.isinf(top), torch.zeros_like(top), top)


def finish(state: State, x: Tensor) -> Tensor:
    """A part of y, from the statistic of all parts."""
    return torch.exp(x - state[0][..., None]) / state[1][..., None]


def finish_log(state: State, x: Tensor) -> Tensor:
    """A part of log y, from the statistic of all parts."""
    return x - state[0][..., None] - torch.log(state[1])[..., None]
