"""Reductions of dims that do not come back: sum, mean, max."""

from __future__ import annotations

from typing import Any

from ...op import Monoid, Op, OpCall, Setting
from ..rms_norm.op import over_dims


def _bind(call: OpCall) -> dict[str, tuple[Any, ...]]:
    return {"D": over_dims(call)}


def _reduction(name: str, meaning: str, state: tuple[str, ...], linear: bool) -> Op:
    return Op(
        name=name,
        text="x[*, D+] -> y[*]",
        meaning=meaning,
        settings=(Setting("over", "dims", None, "the dims that are reduced; the last one if not given"),),
        bind=_bind,
        linear=(("x",),) if linear else (),
        monoid=Monoid("D", state, peers="all", receiver_free=True),
        flops=lambda sizes, attrs: float(sizes["D"]),
        source="ours",
    )


OPS = (
    _reduction("sum", "the sum along dims", ("sum",), True),
    _reduction("mean", "the mean along dims", ("count", "sum"), True),
    _reduction("max_over", "the largest along dims", ("max",), False),
)
