"""A row of a table for each token."""

from __future__ import annotations

from typing import Any

from ....dsl.program import Init
from ...op import Op, OpCall, Setting, WeightRule


def _bind(call: OpCall) -> dict[str, tuple[Any, ...]]:
    rows, outs = call.settings["map"]
    return {"V": rows, "N": outs}


OPS = (
    Op(
        name="embed",
        text="ids[*], weight[V+, N] -> y[*, N]",
        meaning="the row of a learned table that a token names",
        settings=(
            Setting("map", "map", meaning="`vocab -> hidden`"),
            Setting("weight", "weight", None, "a table of another call, used instead of an own one"),
        ),
        weights=(WeightRule("weight", Init("free")),),
        bind=_bind,
        operand_kinds={"ids": ("token", "index", "coordinate")},
        linear=(("weight",),),
        index=("V",),
        offset=("V",),
        flops=lambda sizes, attrs: 0.0,
        source="ours",
    ),
)
