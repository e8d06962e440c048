"""Root mean square normalisation, plain or within groups of the dims it runs over."""

from __future__ import annotations

from typing import Any

from ....dsl.diagnostics import fail
from ....dsl.program import Init
from ...op import Monoid, Op, OpCall, Setting, WeightRule


def over_dims(call: OpCall) -> tuple[Any, ...]:
    """The dims that a norm runs over: those named, else the last one."""
    dims = call.tensors["x"].dims
    if call.settings["over"] is not None:
        return call.settings["over"]
    if not dims:
        raise fail("too-few-dims", f"`{call.op.name}` needs a dim to run over", call.span, "this value has none")
    return (dims[-1],)


def _bind(call: OpCall) -> dict[str, tuple[Any, ...]]:
    over = over_dims(call)
    groups, first = call.settings["groups"], over[0]
    if first.size is not None and first.size % groups:
        raise fail(
            "not-exact",
            f"`{first.name}` = {first.size} does not divide into {groups} groups",
            call.span_of("groups"),
            f"{first.size} divided by {groups} leaves {first.size % groups}",
        )
    return {"D": over}


OPS = (
    Op(
        name="rms_norm",
        text="x[*, D!], weight[D] -> y[*, D]",
        meaning="x / sqrt(mean(x^2) + eps) * weight",
        settings=(
            Setting("eps", "number", 1e-5, "added to the mean square"),
            Setting("over", "dims", None, "the dims of the statistic; the last one if not given"),
            Setting("groups", "whole", 1, "equal parts of the first of them, each with a statistic of its own"),
        ),
        weights=(WeightRule("weight", Init("ones"), keep=True),),
        bind=_bind,
        linear=(("weight",),),
        grouped=(("D", "groups"),),
        monoid=Monoid("D", ("count", "sum_of_squares"), peers="all", receiver_free=True),
        flops=lambda sizes, attrs: 4.0 * sizes["D"],
        source="Zhang and Sennrich 2019, eq. 4; groups: Dao and Gu 2024 (Mamba-2), gated RMSNorm",
    ),
)
