"""Random zeros while training (Srivastava et al. 2014); nothing changes otherwise."""

from __future__ import annotations

from ....dsl.diagnostics import fail
from ...op import Op, OpCall, Setting, Typing


def _infer(call: OpCall) -> Typing:
    call.op._check_kinds(call)
    rate = call.settings["rate"]
    if not 0 <= rate < 1:
        raise fail(
            "out-of-range",
            f"the rate of `dropout` is {rate:g}, it must be at least 0 and less than 1",
            call.span_of("rate"),
        )
    x = call.tensors["x"]
    return Typing({"D": tuple(x.dims)}, (x,), (("real", tuple(x.dims)),))


OPS = (
    Op(
        name="dropout",
        text="x[D] -> y[D]",
        meaning="while training, x / (1 - rate) with probability 1 - rate and else 0; x otherwise",
        settings=(Setting("rate", "number", meaning="the probability of a zero"),),
        infer_with=_infer,
        linear=(("x",),),
        random=True,
        flops=lambda sizes, attrs: float(sizes["D"]),
        source="Srivastava et al. 2014, Dropout, section 4; scaled while training",
    ),
)
