"""Attention whose weights are kept: the softmax of scores that are there as a whole.

Dims: b batch, t queries, n keys, H heads, V key heads (head h reads key head h // (H // V)).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def product(x: Tensor, y: Tensor) -> Tensor:
    """x [b, H, t, n] @ y [b, V, n, m] -> [b, H, t, m]: the heads of a group are rows of one matrix."""
    heads, groups = x.shape[1], y.shape[1]
    if heads == groups:
        return x @ y
    return (x.unflatten(1, (groups, -1)).flatten(2, 3) @ y).unflatten(2, (-1, x.shape[2])).flatten(1, 2)


def weighed(score: Tensor, seen: Tensor) -> Tensor:
    """softmax of score [b, H, t, n] over the keys that are seen, bool [b, 1, t, n]; 0 for the others, also in rows that
    see nothing. Worked out in fp32 or fp64, kept in the dtype of the scores."""
    made: Tensor = _Weighed.apply(score, seen)
    return made


class _Weighed(torch.autograd.Function):
    """Keeps its result alone: neither scores nor what is seen, of which a weight of 0 tells enough."""

    @staticmethod
    def forward(ctx: Any, score: Tensor, seen: Tensor) -> Tensor:
        wide = torch.float64 if score.dtype == torch.float64 else torch.float32
        weight = score.masked_fill(~seen, -torch.inf).softmax(-1, dtype=wide).to(score.dtype)
        weight.masked_fill_(~seen, 0)  # a row that sees nothing is one of NaN
        ctx.save_for_backward(weight)
        return weight

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        (weight,) = ctx.saved_tensors
        wide = torch.float64 if grad.dtype == torch.float64 else torch.float32
        part = grad.to(wide) * weight
        return (part - weight * part.sum(-1, keepdim=True)).to(grad.dtype), None
