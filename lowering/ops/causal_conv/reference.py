"""Depthwise causal convolution: y[t, c] = b[c] + sum_j w[c, j] x[t - J + 1 + j, c], x = 0 before the start."""

from __future__ import annotations

import torch
from torch import Tensor

State = tuple[Tensor]


def causal_conv(x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
    """x[*, S, C], w[C, J], b[C] -> y[*, S, C]."""
    return window(torch.zeros_like(x[..., :0, :]), x, w, b)


def window(before: Tensor, x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
    """Rows x behind the rows `before` (as many of them as there are; the rest is 0)."""
    taps = w.shape[-1]
    zeros = torch.zeros(*x.shape[:-2], max(0, taps - 1 - before.shape[-2]), x.shape[-1], dtype=x.dtype)
    rows = torch.cat([zeros, before[..., max(0, before.shape[-2] - taps + 1) :, :], x], -2)
    y = torch.stack([w[:, j] * rows[..., j : j + x.shape[-2], :] for j in range(taps)]).sum(0)
    return y if b is None else y + b


def rows_before(x: Tensor, first: int, count: int) -> Tensor:
    """The `count` rows before row `first` of x[b, S, C], zero where there are none."""
    rows = torch.cat([torch.zeros(len(x), count, *x.shape[2:], dtype=x.dtype), x[:, :first]], 1)
    return rows[:, rows.shape[1] - count :]


def conv_behind(x: Tensor, before: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
    """x[*, S, C] behind before[*, B, C] -> y[*, S, C]; `before` are rows of the same document."""
    return window(before, x, w, b)


def identity(x: Tensor) -> State:
    """No rows."""
    return (x[..., :0, :],)


def lift(x: Tensor, taps: int) -> State:
    """The last J - 1 rows of a part: all that a later row may still read."""
    return (x[..., max(0, x.shape[-2] - taps + 1) :, :],)


def combine(a: State, b: State, taps: int) -> State:
    """Rows of a, then rows of b: not commutative."""
    return lift(torch.cat([a[0], b[0]], -2), taps)


def finish(state: State, x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
    """The results of a part, from the rows before it."""
    return window(state[0], x, w, b)
