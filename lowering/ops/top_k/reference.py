"""KeepTopK (Shazeer et al. 2017, eq. 5), as the places it keeps; the earlier of equal values is larger."""

from __future__ import annotations

import torch
from torch import Tensor

State = tuple[Tensor, Tensor]


def top_k(x: Tensor, k: int) -> Tensor:
    """x[*, E] -> bool[*, E]: place e is chosen if fewer than k places come before it in order."""
    a, b = x[..., :, None], x[..., None, :]
    earlier = torch.arange(x.shape[-1])[None] < torch.arange(x.shape[-1])[:, None]
    return ((b > a) | ((b == a) & earlier)).sum(-1) < k


def identity(x: Tensor) -> State:
    """The state of no places."""
    return x[..., :0], torch.zeros_like(x[..., :0], dtype=torch.int64)


def lift(x: Tensor, offset: int, k: int) -> State:
    """The k largest values of places [offset, offset + x.shape[-1]), largest first, and where they are."""
    order = torch.argsort(-x, dim=-1, stable=True)[..., :k]
    return x.gather(-1, order), order + offset


def combine(a: State, b: State, k: int) -> State:
    """Both parts, in either order: of equal values the earlier place is larger."""
    values, places = (torch.cat(pair, -1) for pair in zip(a, b, strict=True))
    by_place = torch.argsort(places, -1)
    values, places = values.gather(-1, by_place), places.gather(-1, by_place)
    order = torch.argsort(-values, dim=-1, stable=True)[..., :k]
    return values.gather(-1, order), places.gather(-1, order)


def finish(state: State, x: Tensor, offset: int) -> Tensor:
    """Which places [offset, offset + x.shape[-1]) are chosen, from the largest of all parts."""
    here = offset + torch.arange(x.shape[-1])
    return (state[1][..., :, None] == here).any(-2)
