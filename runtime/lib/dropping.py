"""Dropout of the weights of attention: which are zero follows from the row of the batch, the head, the query and the
key, each counted in the whole, so it is the same wherever these are and when they are made again.

Along each dim a place's number counts on from the state of the dims before it, mixed as in `chance.py`: how long a dim
is, which for a slower sequence packed documents of other rows decide, says nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .chance import _STEP, _mixed, named, state_of
from .rows import At

MOST = 1 << 22
"""How many numbers are worked out at a time: each takes 8 bytes a few times over, and becomes one."""


def further(state: Tensor, index: Tensor) -> Tensor:
    """The state of each place along a further dim, by its number alone: how long the dim is, here or in the whole, says
    nothing."""
    return _mixed(state + (index + 1) * _STEP)


def kept(rate: float, state: Tensor, along: Sequence[Tensor]) -> Tensor:
    """bool [*state, *along]: true with probability 1 - rate. along: the numbers of the places that are here, int64, a
    tensor for each dim behind those of the state."""
    return _kept(math.ceil(rate * 2.0**53), state, list(along))


def _kept(least: int, state: Tensor, along: list[Tensor]) -> Tensor:
    """Whether the upper 53 bits of what they come to are at least so large."""
    sizes = [*state.shape, *map(len, along)]
    if math.prod(sizes) > MOST:
        dim = next(i for i, n in enumerate(sizes) if n > 1)
        i = dim - state.dim()
        if i < 0:
            halves = [_kept(least, half, along) for half in state.chunk(2, dim)]
        else:
            halves = [_kept(least, state, [*along[:i], half, *along[i + 1 :]]) for half in along[i].chunk(2)]
        return torch.cat(halves, dim)
    for index in along:
        state = further(state[..., None], index)
    return (state >> 11) & ((1 << 53) - 1) >= least


def _numbers(
    shape: Sequence[int], at: At, by_row: bool, axes: tuple[tuple[str, ...], ...] | None, device: Any
) -> list[Tensor]:
    """The number in the whole of each place along each dim of a tensor. by_row: its first dim are rows of the batch;
    axes: over which axes of the mesh each of its dims is split."""
    found = []
    for i, size in enumerate(shape):
        split = axes[i] if axes else ()
        before = at.before if by_row and i == 0 else at.mesh.place(*split) * size if split else 0
        found.append(torch.arange(before, before + size, device=device))
    return found


def _key(module: nn.Module, name: str, at: At) -> tuple[int | Tensor, ...]:
    """Of one use: a shared block draws anew each time it is called."""
    site = getattr(module, "site", 0)
    use = at.uses[site, name] = at.uses.get((site, name), -1) + 1
    return at.draw(), site, named(name), use


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
        *lead, queries, heads = _numbers(q.shape[:-1], self.at, self.by_row, self.axes, q.device)
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
    return Drop(rate, _key(module, name, at), at, by_row, axes) if module.training and rate else None
