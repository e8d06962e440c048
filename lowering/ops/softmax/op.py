"""Softmax and its logarithm along a dim."""

from __future__ import annotations

from ...op import Monoid, Op, Setting
from ..rms_norm.op import over_dims


def _softmax(name: str, meaning: str) -> Op:
    return Op(
        name=name,
        text="x[*, D!] -> y[*, D]",
        meaning=meaning,
        settings=(Setting("over", "dims", None, "the dims it runs over; the last one if not given"),),
        bind=lambda call: {"D": over_dims(call)},
        monoid=Monoid("D", ("max", "sum"), peers="all", receiver_free=True),
        flops=lambda sizes, attrs: 5.0 * sizes["D"],
        source="ours",
    )


OPS = (
    _softmax("softmax", "exp(x) / sum(exp(x))"),
    _softmax("log_softmax", "x - log(sum(exp(x)))"),
)
