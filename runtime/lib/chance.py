"""Random numbers that are counted, not drawn from a state: a place's number follows from what it is, so it is the same
however a batch is cut over ranks, in whatever order things run, and when they run again.

The counter is mixed by the finaliser of SplitMix64 (Steele, Lea and Flood 2014), in int64 that wraps around.
"""

from __future__ import annotations

import zlib
from typing import Any

import torch
from torch import Tensor, nn

from .linear import spec_path
from .rows import At

_STEP, _FIRST, _SECOND = -7046029254386353131, -4658895280553007687, -7723592293110705685


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def named(name: str) -> int:
    """The number of a name; torch.compile takes it as it is, and does not look into how it is made."""
    return zlib.crc32(name.encode())


def name_sites(model: nn.Module) -> None:
    """Give each module a number of its own, from its path in the spec: what it draws is its own."""
    for path, module in model.named_modules():
        module.site = named(spec_path(model, path)) if path else 0


def _mixed(x: Tensor) -> Tensor:
    """SplitMix64's finaliser; shifts are logical."""
    x = (x ^ ((x >> 30) & ((1 << 34) - 1))) * _FIRST
    x = (x ^ ((x >> 27) & ((1 << 37) - 1))) * _SECOND
    return x ^ ((x >> 31) & ((1 << 33) - 1))


def state_of(key: tuple[int | Tensor, ...], device: torch.device | None = None) -> Tensor:
    """What a key mixes to, int64[]: with a place it makes that place's number."""
    state = torch.zeros((), dtype=torch.int64, device=device)
    for part in key:
        state = _mixed((state + part) * _STEP + _STEP)
    return state


def counted(state: Tensor, places: Tensor) -> Tensor:
    """The number of each place (int64) as a whole one of 53 bits, of which `uniform` makes a fraction."""
    return (_mixed(_mixed(places * _STEP + state)) >> 11) & ((1 << 53) - 1)


def uniform(key: tuple[int | Tensor, ...], places: Tensor) -> Tensor:
    """Numbers in [0, 1) in fp64, one for each place (int64); another key gives others."""
    return counted(state_of(key, places.device), places).double() * 2.0**-53


def places(shape: torch.Size, at: At, by_row: bool, axes: tuple[tuple[str, ...], ...] | None) -> Tensor:
    """The number of each place of a tensor in the whole tensor. by_row: its first dim are rows of the batch; axes: over
    which axes of the mesh each of its dims is split."""
    place = torch.zeros((), dtype=torch.int64, device=at.device)
    for i, size in enumerate(shape):
        split = axes[i] if axes else ()
        ranks, rank = (at.mesh.size(*split), at.mesh.place(*split)) if split else (1, 0)
        index = torch.arange(size, device=at.device)
        index = index + at.before if by_row and i == 0 else index + rank * size
        place = place[..., None] * (size * ranks) + index
    return place


def dropout(
    x: Tensor, rate: float, module: Any, name: str, at: At, by_row: bool = True,
    axes: tuple[tuple[str, ...], ...] | None = None,
) -> Tensor:  # fmt: skip
    """While the module trains, x / (1 - rate) where a number of the place is at least `rate`, else 0."""
    if not module.training or not rate:
        return x
    site = getattr(module, "site", 0)
    use = at.uses[site, name] = at.uses.get((site, name), -1) + 1  # a shared block draws anew each time it is called
    key = (at.draw(), site, named(name), use)
    kept = uniform(key, places(x.shape, at, by_row, axes)) >= rate
    return torch.where(kept, x * (1 / (1 - rate)), 0)
