"""What a kernel of attention is specialised by: widths, groups, what each source has, and sizes of tiles."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from ....dsl.format import print_expr
from ...intervals import is_interval, tells_apart
from ...target import Target

MOST_WIDTH = 256
"""Of keys and of values: a tile holds a row of them."""
Tile = tuple[int, int, int, int]
"""BLOCK_M rows, BLOCK_N keys, warps, stages."""


class Sized(NamedTuple):
    """Tiles for elements of two bytes, and of four."""

    half: Tile
    full: Tile


@dataclass(frozen=True)
class Source:
    """What one source has: a query of its own; how many places its score bias has, 0 for none. `what` is its mask."""

    what: str
    query: bool = False
    places: int = 0


@dataclass(frozen=True)
class Tiles:
    """Sizes of tiles by the bytes of an element.

    In the numerics class: BLOCK_N of `forward`, `grad_q` and `split`, BLOCK_M of `grad_kv`, `split_keys`, and
    `split_rows`, which says who is split; warps too, since sums of a row go over them. Free: all else.
    """

    forward: Sized
    grad_q: Sized
    grad_kv: Sized
    split: Sized
    split_rows: int = 64
    split_keys: int = 512


class _Named:
    """A source in the template: its text is the number that its names end in."""

    def __init__(self, number: str, source: Source) -> None:
        self.number, self.what, self.query, self.places = number, source.what, source.query, source.places

    def __str__(self) -> str:
        return self.number


@dataclass(frozen=True)
class Attend:
    """Facts of one kernel: `group` query heads share a key head; widths of keys and of values."""

    group: int
    width: int
    value_width: int
    sources: tuple[Source, ...]
    capability: int | None = None
    tiles: Tiles | None = None

    def rendered(self) -> dict[str, Any]:
        """What the template prints."""
        several = len(self.sources) > 1
        sources = [_Named(str(i + 1) if several else "", s) for i, s in enumerate(self.sources)]
        shares_q = not all(s.query for s in sources)
        gradients = ["d_q"] if shares_q else []
        for s in sources:
            gradients += [f"d_k{s}", f"d_v{s}"] + [f"d_query{s}"] * s.query + [f"d_bias{s}"] * bool(s.places)
        has_bias = any(s.places for s in sources)
        return {
            "group": self.group, "width": self.width, "value_width": self.value_width, "block_d": _block(self.width),
            "block_e": _block(self.value_width), "sources": sources, "shares_q": shares_q, "has_bias": has_bias,
            "gradients": gradients, "parts": [f"parts{s}" for s in sources], "given": [f"s{s}" for s in sources], "tiles": self.tiles or tiles(self.width, self.value_width, self.capability),
            "title": f"Attention to {len(sources)} sources of keys under one softmax." if several else "Attention.",
            "over_all": " over all sources" if several else "",
            "plus": " + bias[asks + holds_n]" if has_bias else "",
        }  # fmt: skip


def kernel(use: Any, target: Target) -> Attend | None:
    """The facts of one use of attention, or None where `why_not` says why."""
    if why_not(use) is not None:
        return None
    (heads,), (kv_heads,), (width,), (value_width,) = (use.sizes(formal) for formal in ("H", "K", "D", "E"))
    sources = []
    for i, (mask, given) in enumerate(zip(use.attr("masks"), _given(use), strict=True)):
        (places,) = use.sizes(f"N{i + 1}" if i else "N") if given.get("bias") else (0,)
        sources.append(Source(print_expr(mask), given.get("query") is not None, places))
    return Attend(heads // kv_heads, width, value_width, tuple(sources), target.capability)


def why_not(use: Any) -> str | None:
    """Why a use of attention has no kernel and goes through torch; None where it has one."""
    if use.op != "attend":
        return "its keys are told from rank to rank"
    if use.attr("dropout"):
        return "dropout of weights needs them one by one"
    for formal, what in (("D", "keys"), ("E", "values")):
        (width,) = use.sizes(formal)
        if not 0 < width <= MOST_WIDTH:
            return f"its {what} are {width} wide, a tile holds at most {MOST_WIDTH}"
    distances = use.attr("distances")
    for i, (mask, given) in enumerate(zip(use.attr("masks"), _given(use), strict=True)):
        if not is_interval(mask):
            return f"`{print_expr(mask)}` is not proved to let each query see one interval of keys"
        if given.get("bias") and not tells_apart(distances[i]):
            return f"`{print_expr(distances[i])}` is not proved to be another place for each key"
    return None


def _given(use: Any) -> list[dict[str, str | None]]:
    """The operands of each source by name."""
    names, rest = ["k", "v", *use.attr("options")], use.operands[1:]
    return [dict(zip(names, rest[i : i + len(names)], strict=True)) for i in range(0, len(rest), len(names))]


def _block(width: int) -> int:
    """A tile's side that holds a width: a power of two, and what tensor cores multiply at least."""
    return max(16, 1 << (width - 1).bit_length())


def tiles(width: int, value_width: int, capability: int | None) -> Tiles:
    """Sizes that need no more registers and shared memory than a target has."""
    return Tiles(
        forward=Sized((128, 64, 8, 3), (32, 32, 4, 2)),
        grad_q=Sized((128, 64, 8, 2), (32, 32, 4, 2)),
        grad_kv=Sized((64, 128, 8, 2), (32, 32, 4, 2)),
        split=Sized((16, 64, 4, 3), (16, 32, 4, 2)),
    )
