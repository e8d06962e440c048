"""Random zeros while training (Srivastava et al. 2014); nothing changes otherwise."""

from __future__ import annotations

from ...op import Op, OpCall, Setting, Typing, check_rate


def _infer(call: OpCall) -> Typing:
    call.op._check_kinds(call)
    check_rate(call)
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
        random="rate",
        flops=lambda sizes, attrs: float(sizes["D"]),
        source="Srivastava et al. 2014, Dropout, section 4; scaled while training",
    ),
)
