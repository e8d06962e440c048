"""Which places along a dim hold the k largest values."""

from __future__ import annotations

from ....dsl.diagnostics import fail
from ...op import Monoid, Op, OpCall, Setting, Typing, shown
from ..rms_norm.op import over_dims


def _infer(call: OpCall) -> Typing:
    call.op._check_kinds(call)
    x, over, k = call.tensors["x"], over_dims(call), call.settings["k"]
    if len(over) != 1 or not any(d is over[0] for d in x.dims):
        raise fail(
            "dim-mismatch", "`top_k` chooses along one dim of its input", call.span_of("over"), f"this is {shown(x)}"
        )
    if k > call.known(over[0], "x"):
        raise fail("out-of-range", f"`{over[0].name}` = {over[0].size} places are fewer than {k}", call.span_of("k"))
    return Typing({"E": tuple(over)}, (x,), (("mask", tuple(x.dims)),))


OPS = (
    Op(
        name="top_k",
        text="x[*, E!] -> y[*, E]",
        meaning="true at the k largest places along a dim; of equal values the earlier is larger",
        settings=(
            Setting("k", "whole", meaning="how many are chosen"),
            Setting("over", "dims", None, "the dim to choose along; the last one if not given"),
        ),
        infer_with=_infer,
        monoid=Monoid("E", ("values", "places"), peers="all", receiver_free=True),
        flops=lambda sizes, attrs: float(sizes["E"]),
        rigid=("E",),
        source="Shazeer et al. 2017, eq. 5 (KeepTopK)",
    ),
)
