"""Dropout, of values and of the weights of attention: which are zero follows from the row of the batch and from where
a place is along every other dim, each counted in the whole, so it is the same wherever these are and when they are made
again.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .chance import STEP, further, kept, key_of, numbers, state_of
from .rows import At


def dropout(
    x: Tensor, rate: float, module: nn.Module, name: str, at: At, by_row: bool = True,
    axes: tuple[tuple[str, ...], ...] | None = None,
) -> Tensor:  # fmt: skip
    """While the module trains, x / (1 - rate) with probability 1 - rate, else 0."""
    if not module.training or not rate:
        return x
    some = kept(rate, state_of(key_of(module, name, at), x.device), numbers(x.shape, at, by_row, axes, x.device))
    return torch.where(some, x * (1 / (1 - rate)), 0)


def drawn(
    like: Tensor, module: nn.Module, name: str, at: At, by_row: bool = True,
    axes: tuple[tuple[str, ...], ...] | None = None,
) -> Tensor | None:  # fmt: skip
    """What a kernel is told that drops places of something like [*rows, columns]: int64 [rows], from which it counts on
    along the columns, c steps to column c. These are the numbers of `dropout`. None while the module does not train."""
    if not module.training:
        return None
    *rows, columns = numbers(like.shape, at, by_row, axes, like.device)
    state = state_of(key_of(module, name, at), like.device)
    for index in rows:
        state = further(state[..., None], index)
    return state.flatten() + (columns[0] + 1) * STEP


class Drop(NamedTuple):
    """Which weights of attention are zero: by a number of the row of the batch, the head, the query and the key, each
    counted in the whole. Arguments as of `dropout`, for queries [*, t, H, D]."""

    rate: float
    key: tuple[int | Tensor, ...]
    at: At
    by_row: bool
    axes: tuple[tuple[str, ...], ...] | None

    def of(self, q: Tensor) -> Dropped:
        """For these queries [*lead, t, H, D]."""
        *lead, queries, heads = numbers(q.shape[:-1], self.at, self.by_row, self.axes, q.device)
        state = state_of(self.key, q.device)
        for index in lead:
            state = further(state[..., None], index)
        return Dropped(self.rate, state.flatten(), queries, heads)


class Dropped(NamedTuple):
    """`Drop` for queries [b, t, H, D]: the states of rows, and the numbers of queries and heads."""

    rate: float
    rows: Tensor
    queries: Tensor
    heads: Tensor

    def applied(self, weight: Tensor, source: int, queries: Tensor, keys: Tensor) -> Tensor:
        """weight [b, H, t, n] of some queries to some keys of a source, by their numbers -> the same, some of it 0 and
        the rest divided by 1 - rate."""
        some = kept(self.rate, further(self.rows, torch.full_like(self.rows, source)), (self.heads, queries, keys))
        return torch.where(some, weight * (1 / (1 - self.rate)), 0)


def drop(
    rate: float, module: Any, name: str, at: At, by_row: bool = True, axes: tuple[tuple[str, ...], ...] | None = None
) -> Drop | None:
    """What `attend` is given while the module trains (Vaswani et al. 2017, as released); None otherwise."""
    return Drop(rate, key_of(module, name, at), at, by_row, axes) if module.training and rate else None
