"""Several dims as one, and one as several: the numbers stay."""

from __future__ import annotations

from ....dsl.diagnostics import fail
from ...op import Op, OpCall, Setting, Typing, shown


def _infer(call: OpCall) -> Typing:
    """A merged dim stands where the last of its parts stood, a split one's parts where it stood."""
    call.op._check_kinds(call)
    x = call.tensors["x"]
    (old, new), dims = call.settings["map"], list(x.dims)
    absent = [d for d in old if not any(d is e for e in dims)]
    if absent:
        raise fail(
            "dim-mismatch",
            f"`reshape` takes `{absent[0].name}` apart or away, which its input does not have",
            call.span_of("map"),
            f"this is {shown(x)}",
        )
    first = dims.index(old[0])
    if tuple(dims[first : first + len(old)]) != tuple(old):
        raise fail(
            "not-built-yet",
            "`reshape` of dims that do not follow each other is not built yet",
            call.span_of("map"),
            f"this is {shown(x)}",
        )
    dims[first : first + len(old)] = new
    return Typing({"A": tuple(old), "B": tuple(new)}, (x,), ((x.kind, tuple(dims)),))


OPS = (
    Op(
        name="reshape",
        text="x[*, A] -> y[*, B]",
        meaning="the same numbers under other dims",
        settings=(Setting("map", "split", meaning="`[rows, cols] -> places` merges, `places -> [rows, cols]` splits"),),
        infer_with=_infer,
        operand_kinds={"x": ("real", "token", "index", "mask", "coordinate")},
        linear=(("x",),),
        flops=lambda sizes, attrs: 0.0,
        rigid=("A", "B"),
        source="ours",
    ),
)
