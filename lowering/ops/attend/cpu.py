"""Code of attention: the library's fused product where one causal source is all, else one softmax over sources."""

from __future__ import annotations

from typing import Any

from ....dsl.format import print_expr


def emit(use: Any) -> str:
    """The call; `past` are the keys and values before a step."""
    q, *rest = use.args
    names = ["k", "v", *use.attr("options")]
    (queries,) = use.bound("Q")
    sources = []
    for i, mask in enumerate(use.attr("masks")):
        given = dict(zip(names, rest[i * len(names) : (i + 1) * len(names)], strict=True))
        (keys,) = use.bound(f"S{i + 1}" if i else "S")
        at = "" if keys == queries else f", {use.at(keys)}"
        plain = f"{given['k']}, {given['v']}, {use.mask(mask)}"
        more = [f"query={given['query']}"] if given.get("query") else []
        if (name := next((n for n in ("bias", "slope") if given.get(n)), None)) is not None:
            distance = f"lambda query, key: {print_expr(use.attr('distances')[i])}"
            more.append(f"{name}={given[name]}, distance={distance}")
        if more:
            rows = f", rows={use.at(keys)}" if at else ""
            sources.append(f"lib.Source({plain}{rows}, {', '.join(more)})")
        else:
            sources.append(f"({plain}{at})")
    if use.attr("dropout"):
        rate, (name, more) = use.attr("dropout"), use.drawn(use.operand_dims(0)[:-1])
        drop = f", drop=lib.drop({rate!r}, self, {name}, at{more})"
    else:
        drop = ""
    scale = use.attr("scale")
    scale = use.sizes("D")[0] ** -0.5 if scale is None else scale
    if use.op == "attend_ring":
        order = f', order="{use.attr("order")}"' if use.attr("order") else ""
        how = f"at=at, group={use.group()}, scale={scale!r}{order}{use.kernel}{drop}"
        return f"lib.attend_ring({q}, {', '.join(sources)}, {how})"
    past = f", past={use.past}" if use.is_kept else ""
    return f"lib.attend({q}, {', '.join(sources)}, at={use.at(queries)}, scale={scale!r}{past}{use.kernel}{drop})"


def slot(use: Any, state: Any) -> str:
    """What a stream keeps for it."""
    rows = dict(state.rows)
    keep = "" if state.keep is None else f", keep={state.keep}"
    return f"stream.cache(k={rows['k']}, v={rows['v']}{keep}{use.clock_of(state)})"
