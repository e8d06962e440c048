"""Root mean square normalisation (Zhang and Sennrich 2019, eq. 4): y = x / sqrt(mean(x^2) + eps) * g."""

from __future__ import annotations

import torch
from torch import Tensor

State = tuple[Tensor, Tensor]


def rms_norm(x: Tensor, g: Tensor, eps: float = 1e-5, groups: int = 1) -> Tensor:
    """x[*, D], g[D] -> y[*, D]; the mean runs over each of `groups` equal parts of D."""
    parts = x.reshape(*x.shape[:-1], groups, -1)
    y = parts / torch.sqrt((parts**2).mean(-1, keepdim=True) + eps)
    return y.reshape(x.shape) * g


def group_squares(x: Tensor, groups: int = 1) -> Tensor:
    """x[*, D] -> s[*, G]: sums of x^2 over each of G equal parts of D."""
    return (x**2).unflatten(-1, (groups, -1)).sum(-1)


def scaled_rows(x: Tensor, g: Tensor, s: Tensor, count: int, eps: float = 1e-5) -> Tensor:
    """x[*, D], g[D], s[*, G] -> y[*, D]: x / sqrt(s / count + eps) * g, with s of the part of D that a place is in."""
    each = (s / count + eps).repeat_interleave(x.shape[-1] // s.shape[-1], -1)
    return x / torch.sqrt(each) * g


def identity(x: Tensor) -> State:
    """The state of no elements."""
    return torch.zeros((), dtype=x.dtype), torch.zeros(x.shape[:-1], dtype=x.dtype)


def lift(x: Tensor) -> State:
    """(count, sum of squares) of a part of D."""
    return torch.tensor(float(x.shape[-1]), dtype=x.dtype), (x**2).sum(-1)


def combine(a: State, b: State) -> State:
    """Both parts."""
    return a[0] + b[0], a[1] + b[1]


def finish(state: State, x: Tensor, g: Tensor, eps: float = 1e-5) -> Tensor:
    """A part of y, from the statistic of all parts."""
    count, squares = state
    return x / torch.sqrt(squares / count + eps)[..., None] * g
