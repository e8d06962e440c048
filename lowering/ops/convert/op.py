"""A change of where a value is on a mesh: what the shard pass puts between uses. No spec says it."""

from __future__ import annotations

from ...op import Op, OpCall, Setting, Typing

_KINDS = ("real", "token", "index", "mask", "coordinate", "loss")


def _infer(call: OpCall) -> Typing:
    """The same value; its dims are those of the place that it is brought to."""
    x = call.tensors["x"]
    return Typing({}, (x,), ((x.kind, tuple(call.settings["to"])),))


OPS = (
    Op(
        name="convert",
        text="x[*] -> y[*]",
        meaning="the same value in another place on the mesh; made by the compiler",
        settings=(
            Setting("kind", "text", meaning="all_reduce, all_gather, reduce_scatter, all_to_all, all_max or convert"),
            Setting("axes", "text", meaning="over which factors of the mesh"),
            Setting("src", "text", meaning="what it is: R, I, P, M, or which dim is split"),
            Setting("dst", "text", meaning="what it becomes"),
            Setting("to", "dims", meaning="the dims of the result"),
            Setting("why", "text", "", "the reason, where there was a choice"),
        ),
        infer_with=_infer,
        operand_kinds={"x": _KINDS},
        linear=(("x",),),
        flops=lambda sizes, attrs: 0.0,
        source="the conversions of spmd_types (Meta, 2026)",
    ),
)
