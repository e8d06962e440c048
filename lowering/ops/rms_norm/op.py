"""Root mean square normalisation, plain or within groups of the dims it runs over."""

from __future__ import annotations

from typing import Any

from ....dsl.diagnostics import fail
from ....dsl.program import Init
from ...op import Monoid, Op, OpCall, Setting, Typing, WeightRule
from .lift import lift


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


def _squares(call: OpCall) -> Typing:
    """Leading dims and one for the runs of `over`."""
    x, over, into = call.tensors["x"], call.settings["over"], call.settings["into"]
    lead = tuple(d for d in x.dims if not any(d is e for e in over))
    return Typing({"D": tuple(over), "G": tuple(into)}, (x,), (("real", (*lead, *into)),))


def _scaled(call: OpCall) -> Typing:
    x, weight, squares = (call.tensors.get(name) for name in ("x", "weight", "s"))
    assert x is not None
    bound = {"D": tuple(call.settings["over"]), "G": tuple(call.settings["into"])}
    return Typing(bound, (x, weight, squares), (("real", tuple(x.dims)),))


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
        lift=lift,
        monoid=Monoid("D", ("count", "sum_of_squares"), peers="all", receiver_free=True),
        flops=lambda sizes, attrs: 4.0 * sizes["D"],
        source="Zhang and Sennrich 2019, eq. 4; groups: Dao and Gu 2024 (Mamba-2), gated RMSNorm",
    ),
    Op(
        name="group_squares",
        text="x[*, D+] -> s[*, G]",
        meaning="the sum of squares of each of equal runs of some dims; made by the compiler",
        settings=(Setting("over", "dims", meaning="the dims of the statistic"), Setting("into", "dims")),
        infer_with=_squares,
        grouped=(("D", "G"),),
        monoid=Monoid("D", ("sum",), peers="all", receiver_free=True),
        flops=lambda sizes, attrs: 2.0 * sizes["D"],
        source="ours: the state of the norm's monoid",
    ),
    Op(
        name="scaled_rows",
        text="x[*, D], weight[D], s[*, G] -> y[*, D]",
        meaning="x / sqrt(s / count + eps) * weight, s of the run that a place is in; made by the compiler",
        settings=(
            Setting("over", "dims"),
            Setting("into", "dims"),
            Setting("eps", "number", 1e-5),
            Setting("count", "whole", 1, "places of a run on all ranks"),
        ),
        infer_with=_scaled,
        grouped=(("D", "G"),),
        linear=(("x",), ("weight",)),
        flops=lambda sizes, attrs: 2.0 * sizes["D"],
        source="ours: the last step of the norm's monoid",
    ),
)
