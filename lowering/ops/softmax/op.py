"""Softmax and its logarithm along a dim."""

from __future__ import annotations

from ...op import Monoid, Op, Setting
from ..rms_norm.op import over_dims

_OVER = Setting("over", "dims", None, "the dims it runs over; the last one if not given")
_COMMON = dict(
    text="x[*, D!] -> y[*, D]",
    settings=(_OVER,),
    bind=lambda call: {"D": over_dims(call)},
    monoid=Monoid("D", ("max", "sum"), peers="all", receiver_free=True),
    flops=lambda sizes, attrs: 5.0 * sizes["D"],
    source="ours",
)

OPS = (
    Op(name="softmax", meaning="exp(x) / sum(exp(x))", **_COMMON),
    Op(name="log_softmax", meaning="x - log(sum(exp(x)))", **_COMMON),
)
