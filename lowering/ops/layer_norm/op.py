"""Layer normalisation; zero-centred stores weight - 1."""

from __future__ import annotations

from typing import Any

from ....dsl.program import Init
from ...op import Monoid, Op, OpCall, Setting, WeightRule
from ..rms_norm.op import over_dims


def _bind(call: OpCall) -> dict[str, tuple[Any, ...]]:
    return {"D": over_dims(call)}


def _start(call: OpCall) -> Init:
    return Init("zeros" if call.settings["zero_centred"] else "ones")


OPS = (
    Op(
        name="layer_norm",
        text="x[*, D!], weight[D], bias?[D] -> y[*, D]",
        meaning="(x - mean(x)) / sqrt(var(x) + eps) * weight + bias",
        settings=(
            Setting("eps", "number", 1e-5, "added to the variance"),
            Setting("over", "dims", None, "the dims of the statistic; the last one if not given"),
            Setting("zero_centred", "flag", False, "the factor is 1 + weight, and weights start at 0"),
            Setting("bias", "flag", True, "whether a bias is added"),
        ),
        weights=(
            WeightRule("weight", _start, keep=True),
            WeightRule("bias", Init("zeros"), when="bias", keep=True),
        ),
        bind=_bind,
        monoid=Monoid("D", ("count", "mean", "sum_of_squared_deviations"), peers="all", receiver_free=True),
        flops=lambda sizes, attrs: 7.0 * sizes["D"],
        source="Ba, Kiros and Hinton 2016, eq. 3; zero-centred: `apply_layernorm_1p` of Megatron-LM",
    ),
)
