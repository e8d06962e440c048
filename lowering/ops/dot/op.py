"""Products of two tensors, summed along dims that both have."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ....dsl.diagnostics import fail
from ...op import Op, OpCall, Setting, Typing, shown


def _infer(call: OpCall) -> Typing:
    """x[L.., K..], y[L.., K.., N..] -> z[L.., N..]: dims of both are aligned by name; what is only y's comes last."""
    call.op._check_kinds(call)
    x, y, over = call.tensors["x"], call.tensors["y"], call.settings["over"]
    for t in (x, y):
        absent = next((d for d in over if not any(d is e for e in t.dims)), None)
        if absent is not None:
            raise fail(
                "dim-mismatch",
                f"`dot` sums along `{absent.name}`, which one of its inputs does not have",
                call.span_of("over"),
                f"this is {shown(t)}",
            )
    kept = tuple(d for d in x.dims if not any(d is e for e in over))
    more = tuple(d for d in y.dims if not any(d is e for e in x.dims))
    unknown = [d for d in y.dims if d.sequence]
    if unknown:
        raise fail("not-built-yet", f"`dot` with a second input along `{unknown[0].name}` is not built yet", call.span)
    both = tuple(d for d in kept if any(d is e for e in y.dims))
    rest = tuple(d for d in kept if not any(d is e for e in both))
    return Typing({"L": rest, "H": both, "K": tuple(over), "N": more}, (x, y), (("real", (*kept, *more)),))


def _flops(sizes: Mapping[str, int], attrs: Mapping[str, Any]) -> float:
    return 2.0 * sizes["H"] * sizes["K"] * sizes["N"]


OPS = (
    Op(
        name="dot",
        text="x[*, H, K+], y[H, K+, N] -> z[*, H, N]",
        meaning="the sum along dims of x times y; other dims that both have are aligned by name",
        settings=(Setting("over", "dims", meaning="the dims that are summed"),),
        infer_with=_infer,
        linear=(("x",), ("y",)),
        flops=_flops,
        source="ours",
    ),
)
