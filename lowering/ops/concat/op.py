"""Two tensors side by side along a new dim."""

from __future__ import annotations

from ....dsl.diagnostics import fail
from ...op import Op, OpCall, Setting, Typing, shown


def _infer(call: OpCall) -> Typing:
    """x[.., A, ..], y[.., B, ..] -> z[.., C, ..]: all other dims are those of both."""
    call.op._check_kinds(call)
    x, y = call.tensors["x"], call.tensors["y"]
    parts, (made,) = call.settings["map"]
    if len(parts) != 2 or any(not any(d is e for e in t.dims) for d, t in zip(parts, (x, y), strict=True)):
        raise fail(
            "dim-mismatch",
            "`concat` joins a dim of its first input with one of its second",
            call.span_of("map"),
            f"these are {shown(x)} and {shown(y)}",
        )
    a, b = (tuple(made if d is part else d for d in t.dims) for t, part in ((x, parts[0]), (y, parts[1])))
    if x.kind != y.kind or a != b:
        raise fail(
            "dim-mismatch",
            "the inputs of `concat` have the same dims but for the one that is joined",
            call.span,
            f"these are {shown(x)} and {shown(y)}",
        )
    return Typing({"A": parts[:1], "B": parts[1:], "C": (made,)}, (x, y), ((x.kind, a),))


OPS = (
    Op(
        name="concat",
        text="x[*, A], y[*, B] -> z[*, C]",
        meaning="the rows of x, and behind them those of y",
        settings=(Setting("map", "join", meaning="`[a, b] -> both`"),),
        infer_with=_infer,
        operand_kinds=dict.fromkeys(("x", "y"), ("real", "token", "index", "mask", "coordinate")),
        linear=(("x", "y"),),
        coupled=("A", "B", "C"),  # a choice of places of C is one of A and one of B
        flops=lambda sizes, attrs: 0.0,
        rigid=("A", "B", "C"),
        source="ours",
    ),
)
