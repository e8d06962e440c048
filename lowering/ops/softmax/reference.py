"""softmax(x)_i = exp(x_i) / sum_j exp(x_j)."""

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
    return torch.log(softmax(x))


def identity(x: Tensor) -> State:
    """The state of no elements."""
    return torch.full(x.shape[:-1], -torch.inf, dtype=x.dtype), torch.zeros(x.shape[:-1], dtype=x.dtype)


def lift(x: Tensor) -> State:
    """(max, sum of exp(x - max)) of a part of D."""
    top = x.amax(-1)
    return top, torch.exp(x - top[..., None]).sum(-1)


def combine(a: State, b: State) -> State:
    """Both parts."""
    top = torch.maximum(a[0], b[0])
    scale = [torch.where(torch.isinf(s[0]), torch.zeros_like(top), torch.exp(s[0] - top)) for s in (a, b)]
    return top, a[1] * scale[0] + b[1] * scale[1]


def finish(state: State, x: Tensor) -> Tensor:
    """A part of y, from the statistic of all parts."""
    return torch.exp(x - state[0][..., None]) / state[1][..., None]
