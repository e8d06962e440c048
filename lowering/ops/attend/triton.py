"""What a kernel of attention is specialised by: widths, groups, what each source has, and sizes of tiles."""

from __future__ import annotations

from dataclasses import dataclass
from textwrap import wrap
from typing import Any, NamedTuple

from ....dsl.format import print_expr
from ...intervals import is_apart, tells_apart, why_no_interval
from ...target import Target

MOST_WIDTH = 256
"""Of keys and of values: a tile holds a row of them."""
# Constants of the file that change the order of a sum, and so its bits: tiles along what is summed, what spreads a
# row's weights over warps, and what decides by which instructions of tensor cores a product is summed.
NUMERICS = (
    "FORWARD_M", "FORWARD_N", "FORWARD_WARPS", "GRAD_Q_M", "GRAD_Q_N", "GRAD_Q_WARPS", "GRAD_KV_M", "GRAD_KV_N",
    "GRAD_KV_WARPS", "SPLIT_M", "SPLIT_N", "SPLIT_WARPS", "SPLIT_ROWS", "SPLIT_KEYS",
)  # fmt: skip
TUNED = {
    "FORWARD_M": (64, 128), "FORWARD_N": (32, 64, 128), "FORWARD_WARPS": (4, 8), "FORWARD_STAGES": (2, 3, 4),
    "GRAD_Q_M": (32, 64, 128), "GRAD_Q_N": (32, 64, 128), "GRAD_Q_WARPS": (4, 8), "GRAD_Q_STAGES": (1, 2, 3),
    "GRAD_KV_M": (32, 64, 128), "GRAD_KV_N": (32, 64, 128), "GRAD_KV_WARPS": (4, 8), "GRAD_KV_STAGES": (1, 2, 3),
    "SPLIT_N": (32, 64, 128), "SPLIT_WARPS": (2, 4, 8), "SPLIT_STAGES": (2, 3, 4), "SPLIT_KEYS": (256, 512, 1024),
}  # fmt: skip

Tile = tuple[int, int, int, int]
"""BLOCK_M rows, BLOCK_N keys, warps, stages."""


class Sized(NamedTuple):
    """Tiles for elements of two bytes, and of four."""

    half: Tile
    full: Tile


@dataclass(frozen=True)
class Source:
    """What one source has: a query of its own; how many places its score bias has, 0 for none; or a slope that its
    distance is times. `what` is its mask."""

    what: str
    query: bool = False
    places: int = 0
    slope: bool = False


@dataclass(frozen=True)
class Tiles:
    """Sizes of tiles. No more than `split_rows` rows have their keys read in parts of `split_keys`, some BLOCK_N."""

    forward: Sized
    grad_q: Sized
    grad_kv: Sized
    split: Sized
    split_rows: int = 64
    split_keys: int = 512


class _Named:
    """A source in the template: its text is the number that its names end in. `beside` and `answers` are what it hands
    to the functions of all sources, forward and backward, of what they have beside keys and values."""

    def __init__(self, number: str, source: Source, every: tuple[Source, ...]) -> None:
        self.number, self.query, self.places, self.slope = number, source.query, source.places, source.slope
        self.what = wrap(source.what, 110)
        own = {"bias_rows": source.places, "d_bias_rows": source.places, "slope": source.slope,
               "asks": source.places or source.slope, "holds_ptr": source.places or source.slope,
               "PLACES": str(source.places or 1)}  # fmt: skip
        if source.slope:
            own["LEARNED"] = f"d_slope{number}_ptr is not None"
        own.setdefault("LEARNED", "False")
        self.beside, self.answers = (
            ", ".join(str(v) if isinstance(v := own[n.split(":")[0]], str) else n if v else "None" for n in names)
            for names in (_beside(every), _answers(every))
        )

    def __str__(self) -> str:
        return self.number


@dataclass(frozen=True)
class Attend:
    """Facts of one kernel: `group` query heads share a key head; widths of keys and of values. is_part: its keys are
    some of those that queries see, and who calls it brings together what it gives."""

    group: int
    width: int
    value_width: int
    sources: tuple[Source, ...]
    capability: int | None = None
    tiles: Tiles | None = None
    is_part: bool = False

    def rendered(self) -> dict[str, Any]:
        """What the template prints."""
        several = len(self.sources) > 1
        sources = [_Named(str(i + 1) if several else "", s, self.sources) for i, s in enumerate(self.sources)]
        shares_q = not all(s.query for s in sources)
        gradients = ["d_q"] if shares_q else []
        for s in sources:
            gradients += [f"d_k{s}", f"d_v{s}"] + [f"d_query{s}"] * s.query
            gradients += [f"d_bias{s}"] * bool(s.places) + [f"d_slope{s}"] * s.slope
        has_bias, has_slope = any(s.places for s in sources), any(s.slope for s in sources)
        return {
            "is_part": self.is_part, "group": self.group, "width": self.width, "value_width": self.value_width,
            "block_d": _block(self.width), "block_e": _block(self.value_width),
            "sources": sources, "shares_q": shares_q, "has_bias": has_bias, "gradients": gradients,
            "has_slope": has_slope, "beside": ", ".join(_beside(self.sources)),
            "answers": ", ".join(_answers(self.sources)), "learned": _learned(self.sources),
            "answered": "d_q, d_slope" if has_slope else "d_q",
            "parts": [f"parts{s}" for s in sources], "given": [f"source{s}" for s in sources],
            "askers": [f"{end}{s}" for s in sources for end in ("first", "last")],
            "tiles": self.tiles or tiles(max(self.width, self.value_width), has_bias, self.capability),
            "title": f"Attention to {len(sources)} sources of keys under one softmax." if several else "Attention.",
            "over_all": " over all sources" if several else "",
            "scores": ("\n        " if has_bias and has_slope else " ") + "scale * q . k_n"
            + " + bias[asks + holds_n]" * has_bias + " + slope[head] (asks + holds_n)" * has_slope,
        }  # fmt: skip


def _beside(sources: tuple[Source, ...]) -> list[str]:
    """What functions of all sources take of what some have beside keys and values."""
    bias, slope = any(s.places for s in sources), any(s.slope for s in sources)
    both = ["asks", "holds_ptr"] if bias or slope else []
    return ["bias_rows"] * bias + ["slope"] * slope + both + ["PLACES: tl.constexpr"] * bias


def _answers(sources: tuple[Source, ...]) -> list[str]:
    """The same in the backward pass."""
    bias, slope = any(s.places for s in sources), any(s.slope for s in sources)
    names = _beside(sources)
    at = names.index("holds_ptr") + 1 if names else 0
    return names[:at] + ["d_bias_rows"] * bias + names[at:] + ["LEARNED: tl.constexpr"] * slope


def _learned(sources: tuple[Source, ...]) -> str:
    """Whether a gradient of slopes is wanted: they are the first of the last three tensors of their source."""
    found, place = [], 1
    for s in sources:
        place += 7 + s.query
        if s.slope:
            found.append(f"ctx.needs_input_grad[{place}]")
        place += 3 * bool(s.places or s.slope)
    return " or ".join(found)


def kernel(use: Any, target: Target) -> Attend | None:
    """The facts of one use of attention, or None where `why_not` says why."""
    if why_not(use) is not None:
        return None
    (heads,), (kv_heads,), (width,), (value_width,) = (use.sizes(formal) for formal in ("H", "K", "D", "E"))
    sources = []
    for i, (mask, given) in enumerate(zip(use.attr("masks"), _given(use), strict=True)):
        (places,) = use.sizes(f"N{i + 1}" if i else "N") if given.get("bias") else (0,)
        own = given.get("query") is not None, places, given.get("slope") is not None
        sources.append(Source(print_expr(mask), *own))
    if use.op == "attend_ring":  # one kernel takes the keys of any source of any rank
        what = "; ".join(dict.fromkeys(s.what for s in sources))
        return Attend(heads // kv_heads, width, value_width, (Source(what),), target.capability, is_part=True)
    return Attend(heads // kv_heads, width, value_width, tuple(sources), target.capability)


def why_not(use: Any) -> str | None:
    """Why a use of attention has no kernel and goes through torch; None where it has one."""
    if use.op == "attend_ring" and use.attr("options"):
        return f"its keys are told from rank to rank, and have a {' and a '.join(use.attr('options'))} of their own"
    if use.attr("dropout"):
        return "dropout of weights needs them one by one"
    for formal, what in (("D", "keys"), ("E", "values")):
        (width,) = use.sizes(formal)
        if not 0 < width <= MOST_WIDTH:
            return f"its {what} are {width} wide, a tile holds at most {MOST_WIDTH}"
    distances = use.attr("distances")
    for i, (mask, given) in enumerate(zip(use.attr("masks"), _given(use), strict=True)):
        if (reason := why_no_interval(mask)) is not None:
            return f"`{print_expr(mask)}` is not proved to let each query see one interval of keys: {reason}"
        if given.get("bias") and not tells_apart(distances[i]):
            return f"`{print_expr(distances[i])}` is not proved to be another place for each key"
        if given.get("slope") and not is_apart(distances[i]):
            return f"`{print_expr(distances[i])}` is not proved to be a term of the query and one of the key"
    return None


def _given(use: Any) -> list[dict[str, str | None]]:
    """The operands of each source by name."""
    names, rest = ["k", "v", *use.attr("options")], use.operands[1:]
    return [dict(zip(names, rest[i : i + len(names)], strict=True)) for i in range(0, len(rest), len(names))]


def _block(width: int) -> int:
    """A tile's side that holds a width: a power of two, and what tensor cores multiply at least."""
    return max(16, 1 << (width - 1).bit_length())


# By capability, and the most that keys and values are wide: forward, grad_q, grad_kv, split. All were built ahead of
# time at published sizes (triton 3.7), with shared memory as the target has it: none spills registers, but gradients of
# keys 192 wide on sm_90 (5 loads of q's, 2 of keys').
_TILES = {
    80: {
        64: ((128, 64, 8, 3), (128, 64, 8, 2), (64, 128, 8, 2), (16, 64, 4, 3)),
        128: ((64, 64, 8, 2), (64, 64, 8, 2), (64, 64, 8, 2), (16, 64, 4, 3)),
        256: ((64, 32, 8, 2), (64, 32, 8, 2), (32, 32, 8, 2), (16, 64, 4, 2)),
    },
    90: {
        64: ((128, 64, 8, 3), (128, 64, 8, 2), (64, 128, 8, 2), (16, 64, 4, 3)),
        128: ((128, 64, 8, 3), (128, 64, 8, 2), (64, 64, 8, 2), (16, 64, 4, 3)),
        256: ((64, 64, 8, 2), (64, 32, 8, 2), (32, 64, 8, 2), (16, 64, 4, 2)),
    },
    100: {
        64: ((128, 64, 8, 3), (64, 64, 4, 2), (64, 128, 8, 2), (16, 64, 4, 3)),
        128: ((128, 64, 8, 3), (128, 64, 8, 2), (64, 128, 8, 2), (16, 64, 4, 3)),
        256: ((64, 64, 8, 2), (64, 32, 8, 2), (32, 64, 8, 2), (16, 64, 4, 2)),
    },
}
# Where scores have biases, which are gathered for each score.
_WITH_BIAS = {
    80: ((64, 32, 8, 2), (32, 32, 4, 2), (32, 32, 4, 2), (16, 64, 4, 2)),
    90: ((128, 64, 8, 3), (64, 32, 8, 2), (64, 128, 8, 2), (16, 64, 4, 3)),
    100: ((128, 64, 8, 3), (64, 32, 8, 2), (64, 128, 8, 2), (16, 64, 4, 3)),
}
_WIDE_WITH_BIAS = ((64, 32, 8, 2), (32, 32, 4, 2), (32, 32, 4, 2), (16, 64, 4, 2))
# fp32 is multiplied as IEEE 754 says, without tensor cores, whatever torch is allowed (`allow_tf32`): what a kernel
# gives is a fact of its file. To 128 wide at most 2 registers are spilled, or 11 of q's gradient where scores have
# biases; to 256, on sm_90, none forward and 198 of q's gradient.
_FULL = {
    128: ((16, 32, 8, 2), (32, 32, 8, 2), (32, 32, 4, 2), (16, 32, 8, 2)),
    256: ((32, 32, 8, 1), (16, 16, 8, 1), (16, 16, 8, 1), (16, 16, 8, 1)),
}


def tiles(width: int, bias: bool, capability: int | None) -> Tiles:
    """Sizes for a width of keys and values. A GPU that is not named gets what all have room for."""
    block, of = _block(width), capability or 80
    half = _TILES[of][max(64, block)]
    if bias:
        half = _WITH_BIAS[of] if block <= 64 else _WIDE_WITH_BIAS
    full = _FULL[max(128, block)]
    forward, grad_q, grad_kv, split = (Sized(two, four) for two, four in zip(half, full, strict=True))
    return Tiles(forward, grad_q, grad_kv, split)
