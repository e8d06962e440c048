"""Random numbers that are counted, not drawn from a state: a place's number follows from what it is, so it is the same
however a batch is cut over ranks, in whatever order things run, and when they run again.

Along each dim a place's number counts on from the state of the dims before it: how long a dim is, which for a slower
sequence packed documents of other rows decide, says nothing. The counter is mixed by the finaliser of SplitMix64
(Steele, Lea and Flood 2014), in int64 that wraps around.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .constant import constant
from .linear import spec_path
from .rows import At

STEP, _FIRST, _SECOND = -7046029254386353131, -4658895280553007687, -7723592293110705685
MOST = 1 << 22
"""How many numbers are worked out at a time: each takes 8 bytes a few times over, and becomes one."""


@constant
def named(name: str) -> int:
    """The number of a name; torch.compile takes it as it is, and does not look into how it is made."""
    return zlib.crc32(name.encode())


def name_sites(model: nn.Module) -> None:
    """Give each module a number of its own, from its path in the spec: what it draws is its own."""
    for path, module in model.named_modules():
        module.site = named(spec_path(model, path)) if path else 0


def mixed(x: Tensor) -> Tensor:
    """SplitMix64's finaliser; shifts are logical."""
    x = (x ^ ((x >> 30) & ((1 << 34) - 1))) * _FIRST
    x = (x ^ ((x >> 27) & ((1 << 37) - 1))) * _SECOND
    return x ^ ((x >> 31) & ((1 << 33) - 1))


def state_of(key: tuple[int | Tensor, ...], device: torch.device | None = None) -> Tensor:
    """What a key mixes to, int64[]: with a place it makes that place's number."""
    state = torch.zeros((), dtype=torch.int64, device=device)
    for part in key:
        state = mixed((state + part) * STEP + STEP)
    return state


def further(state: Tensor, index: Tensor) -> Tensor:
    """The state of each place along a further dim, by its number alone."""
    return mixed(state + (index + 1) * STEP)


def least_of(rate: float) -> int:
    """Numbers have 53 bits; those that are at least so large are kept, which is so with probability 1 - rate."""
    return math.ceil(rate * 2.0**53)


def passes(number: Tensor, least: int) -> Tensor:
    """Whether the upper 53 bits of what places come to are at least so large."""
    return (number >> 11) & ((1 << 53) - 1) >= least


def kept(rate: float, state: Tensor, along: Sequence[Tensor]) -> Tensor:
    """bool [*state, *along]: true with probability 1 - rate. along: the numbers of the places that are here, int64, a
    tensor for each dim behind those of the state."""
    return _kept(least_of(rate), state, list(along))


def _kept(least: int, state: Tensor, along: list[Tensor]) -> Tensor:
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
    return passes(state, least)


def numbers(
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


def key_of(module: nn.Module, name: str, at: At) -> tuple[int | Tensor, ...]:
    """Of one use: a shared block draws anew each time it is called."""
    site = getattr(module, "site", 0)
    use = at.uses[site, name] = at.uses.get((site, name), -1) + 1
    return at.draw(), site, named(name), use
