"""Reductions of dims that do not come back: sum, mean, max."""

from __future__ import annotations

from typing import Any

from ....dsl.diagnostics import fail
from ...op import Monoid, Op, OpCall, Setting, Typing, shown
from ..rms_norm.op import over_dims


def _infer(call: OpCall) -> Typing:
    """The reduced dims go, wherever they stand."""
    call.op._check_kinds(call)
    x, over = call.tensors["x"], over_dims(call)
    absent = [d for d in over if not any(d is e for e in x.dims)]
    if absent:
        raise fail("dim-mismatch", f"`{call.op.name}` reduces `{absent[0].name}`, which its input does not have",
                   call.span_of("over"), f"the input is {shown(x)}")
    rest = tuple(d for d in x.dims if not any(d is e for e in over))
    return Typing({"D": tuple(over)}, (x,), (("real", rest),))


def _reduction(name: str, meaning: str, state: tuple[str, ...], linear: bool) -> Op:
    return Op(
        name=name,
        text="x[*, D+] -> y[*]",
        meaning=meaning,
        settings=(Setting("over", "dims", None, "the dims that are reduced; the last one if not given"),),
        infer_with=_infer,
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
