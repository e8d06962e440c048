"""A linear map of some dims to others, with an optional bias: y = W x + b."""

from __future__ import annotations

from typing import Any

from ....dsl.program import Init
from ...op import Op, OpCall, Setting, WeightRule
from .stacked import OP as PARALLEL_LINEAR


def _bind(call: OpCall) -> dict[str, tuple[Any, ...]]:
    ins, outs = call.settings["map"]
    return {"K": ins, "N": outs}


OPS = (
    Op(
        name="linear",
        text="x[*, K+], weight[N, K], bias?[N] -> y[*, N]",
        meaning="a linear map of the dims left of the arrow to the dims right of it",
        settings=(
            Setting("map", "map", meaning="`hidden -> ffn`, `hidden -> [heads, head_dim]`"),
            Setting("bias", "flag", False, "whether a bias is added"),
            Setting("weight", "weight", None, "a weight of another call, used instead of an own one"),
        ),
        weights=(
            WeightRule("weight", Init("free")),
            WeightRule("bias", Init("zeros"), when="bias"),
        ),
        bind=_bind,
        linear=(("x", "bias"), ("weight", "bias")),
        source="ours: the product of Megatron-LM's column- and row-parallel layers, before any layout",
        stacked="parallel_linear",
        per_weight=2.0,
    ),
    PARALLEL_LINEAR,
)
