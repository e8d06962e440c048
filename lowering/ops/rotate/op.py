"""Rotation of pairs of channels: rotary positions."""

from __future__ import annotations

from typing import Any

from ....dsl.diagnostics import fail
from ...op import Op, OpCall, Typing, _match, check_leading


def _infer(call: OpCall) -> Typing:
    bindings: dict[str, tuple[Any, ...]] = {}
    op = call.op
    op._check_kinds(call)
    operands = [call.tensors[name] for name in ("x", "cos", "sin")]
    leading, *others = [
        _match(call, op.signature.operand(name), call.tensors[name], bindings) for name in ("x", "cos", "sin")
    ]
    for other in others:
        check_leading(leading, other, call)
    (width,), (pairs,) = bindings["D"], bindings["R"]
    if 2 * pairs.size > width.size:
        raise fail(
            "out-of-range",
            f"{pairs.size} pairs of channels are rotated, `{width.name}` has only {width.size} channels",
            call.span,
        )
    dims = leading + bindings["S"] + bindings["H"] + bindings["D"]
    return Typing(bindings, tuple(operands), (("real", dims),))


OPS = (
    Op(
        name="rotate",
        text="x[*, S, H, D], cos[*, S, R], sin[*, S, R] -> y[*, S, H, D]",
        meaning="channel j and channel j + pairs turn by the angle of this cosine and sine; later channels pass; the "
        "angles may lack leading dims of x",
        linear=(("x",),),
        coupled=("D",),
        infer_with=_infer,
        flops=lambda sizes, attrs: 3.0 * sizes["H"] * sizes["D"],
        source="Su et al. 2021, eq. 34, in the pairing of GPT-NeoX (j with j + pairs)",
    ),
)
