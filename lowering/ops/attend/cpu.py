"""CPU code of attention: the library's fused product where one causal source is all, else one softmax over sources."""

from __future__ import annotations

from typing import Any


def emit(use: Any) -> str:
    """The call; `past` are the keys and values before a step."""
    q, *rest = use.args
    masks = [use.mask(m) for m in use.attr("masks")]
    sources = ", ".join(f"({k}, {v}, {m})" for k, v, m in zip(rest[0::2], rest[1::2], masks, strict=True))
    scale = use.attr("scale")
    scale = use.sizes("D")[0] ** -0.5 if scale is None else scale
    return f"lib.attend({q}, {sources}, at=at, scale={scale!r}, past={use.past})"


def slot(use: Any, state: Any) -> str:
    """What a stream keeps for it."""
    rows = dict(state.rows)
    keep = "" if state.keep is None else f", keep={state.keep}"
    return f"stream.cache(k={rows['k']}, v={rows['v']}{keep})"
