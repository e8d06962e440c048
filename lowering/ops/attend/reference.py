"""Attention (Vaswani et al. 2017, eq. 1) over several sources under one softmax; no key, no value: 0. Dropout zeroes
weights behind the softmax: of the sum that they are divided by nothing goes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

State = tuple[Tensor, Tensor, Tensor]


def attend(q: Tensor, sources: list[tuple[Any, ...]], scale: float, kept: list[Tensor] | None = None,
           rate: float = 0.0) -> Tensor:  # fmt: skip
    """q[b, Q, H, D], each source k[b, S, K, D], v[b, S, K, E], seen bool[b, Q, S], and what takes the place of q for it
    and is added to its scores, [b, Q, H, S] or 0 -> o[b, Q, H, E]. kept: for each source the weights that are not
    zeroed, bool[b, Q, H, S], at a rate."""
    state = identity(q, sources[0][1].shape[-1])
    for i, (k, v, seen, query, bias) in enumerate(sources):
        factor = 1.0 if kept is None else kept[i].to(q.dtype) / (1 - rate)
        state = combine(state, lift(q if query is None else query, k, v, seen, scale, bias, factor))
    return finish(state)


def attend_ring(q: Tensor, parts: list[list[tuple[Any, ...]]], scale: float) -> Tensor:
    """The same, from sources in parts, each of keys that are elsewhere."""
    return attend(q, [source for part in parts for source in part], scale)


def identity(q: Tensor, width: int) -> State:
    """The state of no keys."""
    b, n, h, _ = q.shape
    return (
        torch.full((b, n, h), -torch.inf, dtype=q.dtype),
        torch.zeros(b, n, h, dtype=q.dtype),
        torch.zeros(b, n, h, width, dtype=q.dtype),
    )


def lift(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float, bias: Tensor | float = 0.0,
         factor: Tensor | float = 1.0) -> State:  # fmt: skip
    """(max, sum, weighted values) of some keys, for every query; query head h uses key head h // (H / K)."""
    group = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)
    score = scale * torch.einsum("bqhd,bshd->bqhs", q, k) + bias
    score = score.masked_fill(~seen[:, :, None], -torch.inf)
    top = score.amax(-1) if score.shape[-1] else torch.full(score.shape[:-1], -torch.inf, dtype=q.dtype)
    safe = torch.where(torch.isinf(top), torch.zeros_like(top), top)
    weight = torch.exp(score - safe[..., None])
    return top, weight.sum(-1), torch.einsum("bqhs,bshe->bqhe", weight * factor, v)


def combine(a: State, b: State) -> State:
    """Keys of both."""
    top = torch.maximum(a[0], b[0])
    # Where no key was seen yet, -inf minus -inf would be NaN, in the gradient even behind a `where`.
    safe = torch.where(torch.isinf(top), torch.zeros_like(top), top)
    scale = [torch.exp(s[0] - safe) for s in (a, b)]
    total = a[1] * scale[0] + b[1] * scale[1]
    return top, total, a[2] * scale[0][..., None] + b[2] * scale[1][..., None]


def finish(state: State) -> Tensor:
    """The weighted mean; 0 where no key was seen."""
    _, total, values = state
    some = total > 0
    return torch.where(some[..., None], values / torch.where(some, total, torch.ones_like(total))[..., None], 0)
