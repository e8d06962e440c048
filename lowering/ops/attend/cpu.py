"""CPU code of attention: the library's fused product where one causal source is all, else one softmax over sources."""

from __future__ import annotations

from typing import Any


def emit(use: Any) -> str:
    """The call; `past` are the keys and values before a step."""
    q, *rest = use.args
    masks = [use.mask(m) for m in use.attr("masks")]
    (queries,) = use.bound("Q")
    keys = [use.bound(f"S{i + 1}" if i else "S")[0] for i in range(len(masks))]
    where = ["" if dim == queries else f", {use.at(dim)}" for dim in keys]
    parts = zip(rest[0::2], rest[1::2], masks, where, strict=True)
    sources = ", ".join(f"({k}, {v}, {m}{at})" for k, v, m, at in parts)
    scale = use.attr("scale")
    scale = use.sizes("D")[0] ** -0.5 if scale is None else scale
    past = f", past={use.past}" if use.is_kept else ""
    return f"lib.attend({q}, {sources}, at={use.at(queries)}, scale={scale!r}{past})"


def slot(use: Any, state: Any) -> str:
    """What a stream keeps for it."""
    rows = dict(state.rows)
    keep = "" if state.keep is None else f", keep={state.keep}"
    return f"stream.cache(k={rows['k']}, v={rows['v']}{keep}{use.clock_of(state)})"
