"""One row of a dim."""

from __future__ import annotations

from ....dsl.diagnostics import fail
from ....dsl.program import TOKENS
from ...op import Monoid, Op, OpCall, Setting, Typing, shown


def _infer(call: OpCall) -> Typing:
    """The dim goes. Along tokens that is the row of the document that a batch row is."""
    call.op._check_kinds(call)
    x, over = call.tensors["x"], call.settings["over"]
    if len(over) != 1 or not any(over[0] is d for d in x.dims):
        raise fail(
            "dim-mismatch", "`take` takes a row of one dim of its input", call.span_of("over"), f"this is {shown(x)}"
        )
    (dim,) = over
    if dim.clock not in (None, TOKENS):
        raise fail("not-built-yet", f"a row of `{dim.name}`, which comes with groups of tokens, is not built yet",
                   call.span_of("over"))  # fmt: skip
    if dim.size is not None and call.settings["index"] >= dim.size:
        raise fail(
            "out-of-range",
            f"row {call.settings['index']} is behind the end, `{dim.name}` has {dim.size}",
            call.span_of("index"),
        )
    return Typing({"S": over}, (x,), ((x.kind, tuple(d for d in x.dims if d is not dim)),))


OPS = (
    Op(
        name="take",
        text="x[*, S+] -> y[*]",
        meaning="one row of a dim; along a sequence the row of each batch row's one document",
        settings=(
            Setting("index", "whole", meaning="which row, from 0", least=0),
            Setting("over", "dims", meaning="the dim that goes"),
        ),
        infer_with=_infer,
        operand_kinds={"x": ("real", "token", "index", "mask", "coordinate")},
        linear=(("x",),),
        index=("S",),
        monoid=Monoid("S", ("row",), peers="all", receiver_free=True),
        flops=lambda sizes, attrs: 0.0,
        rigid=("S",),
        source="ours",
    ),
)
