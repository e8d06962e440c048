"""Dynamic projection: P = softmax over the rows of a group, y = P^T x (Zhu et al. 2021, eq. 3)."""

from __future__ import annotations

import torch
from torch import Tensor

State = tuple[Tensor, Tensor, Tensor]


def summarise(x: Tensor, say: Tensor, group: Tensor) -> Tensor:
    """x[b, T, H, D], say[b, T, H, R], group int[T], nondecreasing from 0 -> y[b, groups * R, H, D]."""
    rows = []
    for s in range(int(group.max()) + 1):
        (t,) = (group == s).nonzero(as_tuple=True)
        rows.append(finish(lift(x[:, t], say[:, t])))
    return torch.cat(rows, 1)


def identity(x: Tensor, say: Tensor) -> State:
    """The state of no rows."""
    b, _, h, d = x.shape
    r = say.shape[-1]
    return (
        torch.full((b, h, r), -torch.inf, dtype=x.dtype),
        torch.zeros(b, h, r, dtype=x.dtype),
        torch.zeros(b, h, r, d, dtype=x.dtype),
    )


def lift(x: Tensor, say: Tensor) -> State:
    """(max, sum, weighted values) of some rows of a group."""
    top = say.amax(1)
    weight = torch.exp(say - top[:, None])
    return top, weight.sum(1), torch.einsum("bthr,bthd->bhrd", weight, x)


def combine(a: State, b: State) -> State:
    """Rows of both; the same as of attention, but nobody asks."""
    top = torch.maximum(a[0], b[0])
    safe = torch.where(torch.isinf(top), torch.zeros_like(top), top)
    scale = [torch.exp(s[0] - safe) for s in (a, b)]
    return top, a[1] * scale[0] + b[1] * scale[1], a[2] * scale[0][..., None] + b[2] * scale[1][..., None]


def finish(state: State) -> Tensor:
    """-> [b, R, H, D]."""
    return (state[2] / state[1][..., None]).transpose(1, 2)
