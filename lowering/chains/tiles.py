"""How a chain's kernels are cut: whole rows, rows in walks, or tiles; how large, by how many warps and programs.

Where a kernel sums anything, all of it changes the order: it belongs to the numerics class. How many rows a tile has
decides how its columns are shared out among threads, so the sum of a row depends on that, too.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

ROW, WALK, TILE = "row", "walk", "tile"
"""One program owns whole rows; it owns rows and walks over their columns; or it owns a tile of rows and columns."""

PROGRAMS = 256
TILE_PROGRAMS = 64
"""How many programs share the rows where each sums a part of a weight's gradient. Fixed: with the number of processors
of a GPU, its gradients would differ from those of another."""

_PLACES = 128  # of tiles that live at one time, for each thread: built for sm_90 and sm_100, more of them spilled
_ELEMENTS = 512  # of a tile, for each warp: 16 a thread, which are two loads of 128 bits in 16-bit types


@dataclass(frozen=True)
class Tiles:
    """One kernel's cut. `programs`: how many share the rows, where each sums its part of a gradient; else 0."""

    mode: str
    block_r: int
    block_c: int
    warps: int
    programs: int = 0


def choose(columns: int, reduces: bool, live: int, sums: bool) -> Tiles:
    """Untuned: by the registers that `live` tiles take at one time. sums: whether gradients of weights are summed."""
    whole = power(columns)
    if not reduces:
        block_c = min(whole, 512 if sums else 1024)
        block_r = min(32, max(1, 2048 // block_c))
        return Tiles(TILE, block_r, block_c, _warps(block_r * block_c, 4), TILE_PROGRAMS if sums else 0)
    block_r = min(32, max(1, 2048 // whole))
    warps = _warps(block_r * whole, 16)
    if live * block_r * whole <= _PLACES * 32 * warps:
        return Tiles(ROW, block_r, whole, warps, PROGRAMS if sums else 0)
    return Tiles(WALK, 1, 4096, 8, PROGRAMS if sums else 0)


def _warps(elements: int, most: int) -> int:
    return max(1, min(most, power(elements // _ELEMENTS)))


def power(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << max(0, n - 1).bit_length()


def tuned(constants: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The values that the constants of a chain's file may have, by their names there: half and twice what is untuned.

    Columns of a program stay: where it owns whole rows, fewer would be another kernel.
    """
    found: dict[str, tuple[int, ...]] = {}
    for name, value in constants.items():
        if name.endswith(("_BLOCK_R", "_PROGRAMS")):
            found[name] = tuple(v for v in (value // 4, value // 2, 2 * value, 4 * value) if v)
        elif name.endswith("_WARPS"):
            found[name] = tuple(v for v in (1, 2, 4, 8, 16) if v != value)
    return found


def numerics(constants: Mapping[str, Any], summing: Iterable[str]) -> tuple[str, ...]:
    """Those of which results depend to the bit: of the kernels that sum along a row, or over rows, by name."""
    first = tuple(f"{name.upper()}_" for name in summing)
    return tuple(name for name in constants if name.removesuffix(_size_of(name)) in first)


def _size_of(name: str) -> str:
    return next((end for end in ("BLOCK_R", "BLOCK_C", "WARPS", "PROGRAMS") if name.endswith(f"_{end}")), "")
