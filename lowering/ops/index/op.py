"""Values that need no data: the index along a dim, and the coordinates of a sequence."""

from __future__ import annotations

from ...op import Op, OpCall, Setting, Typing


def _index(call: OpCall) -> Typing:
    (dim,) = call.settings["dim"]
    return Typing({"D": (dim,)}, (), (("real", (dim,)),))


def _coordinate(call: OpCall) -> Typing:
    (dim,) = call.settings["dim"]
    return Typing({"S": (dim,)}, (), (("coordinate", (*dim.lead, dim)),))


OPS = (
    Op(
        name="index",
        text="-> y[D]",
        meaning="0, 1, 2, ... along a dim",
        settings=(Setting("dim", "dims"),),
        index=("D",),
        infer_with=_index,
        flops=lambda sizes, attrs: 0.0,
        source="ours",
    ),
    Op(
        name="coordinate",
        text="-> y[S]",
        meaning="a coordinate of a sequence: its position, document or validity",
        settings=(Setting("dim", "dims"), Setting("which", "text")),
        index=("S",),
        coordinates=True,
        infer_with=_coordinate,
        flops=lambda sizes, attrs: 0.0,
        source="ours",
    ),
)
