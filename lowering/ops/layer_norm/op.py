"""Layer normalisation; zero-centred stores weight - 1."""

from __future__ import annotations

from typing import Any

from ....dsl.program import Init
from ...op import Monoid, Op, OpCall, Setting, Typing, WeightRule
from ..rms_norm.op import over_dims
from .lift import lift


def _bind(call: OpCall) -> dict[str, tuple[Any, ...]]:
    return {"D": over_dims(call)}


def _start(call: OpCall) -> Init:
    return Init("zeros" if call.settings["zero_centred"] else "ones")


def _sums(call: OpCall) -> Typing:
    """One number for what leads."""
    x, over = call.tensors["x"], call.settings["over"]
    lead = tuple(d for d in x.dims if not any(d is e for e in over))
    return Typing({"D": tuple(over)}, tuple(call.tensors.values()), (("real", lead),))


def _rows(call: OpCall) -> Typing:
    x = call.tensors["x"]
    given = tuple(call.tensors.get(name) for name in ("x", "weight", "bias", "total", "squares"))
    return Typing({"D": tuple(call.settings["over"])}, given, (("real", tuple(x.dims)),))


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
        lift=lift,
        flops=lambda sizes, attrs: 7.0 * sizes["D"],
        source="Ba, Kiros and Hinton 2016, eq. 3; zero-centred: `apply_layernorm_1p` of Megatron-LM",
    ),
    Op(
        name="row_sums",
        text="x[*, D+] -> t[*]",
        meaning="the sum along some dims, in no less than fp32; made by the compiler",
        settings=(Setting("over", "dims"),),
        infer_with=_sums,
        linear=(("x",),),
        monoid=Monoid("D", ("sum",), peers="all", receiver_free=True),
        flops=lambda sizes, attrs: float(sizes["D"]),
        source="ours: part of the state of the norm's monoid",
    ),
    Op(
        name="centred_squares",
        text="x[*, D+], total[*] -> s[*]",
        meaning="the sum of squares of x - total / count along some dims; made by the compiler",
        settings=(Setting("over", "dims"), Setting("count", "whole", 1, "places on all ranks")),
        infer_with=_sums,
        monoid=Monoid("D", ("sum",), peers="all", receiver_free=True),
        flops=lambda sizes, attrs: 3.0 * sizes["D"],
        source="ours: the state of the norm's monoid",
    ),
    Op(
        name="centred_rows",
        text="x[*, D], weight[D], bias?[D], total[*], squares[*] -> y[*, D]",
        meaning="(x - mean) / sqrt(var + eps) * weight + bias from the sums of all ranks; made by the compiler",
        settings=(
            Setting("over", "dims"),
            Setting("eps", "number", 1e-5),
            Setting("count", "whole", 1, "places on all ranks"),
            Setting("zero_centred", "flag", False),
        ),
        infer_with=_rows,
        flops=lambda sizes, attrs: 4.0 * sizes["D"],
        source="ours: the last step of the norm's monoid",
    ),
)
