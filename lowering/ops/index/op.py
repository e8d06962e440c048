"""Values that need no data: the index along a dim, and the coordinates of a sequence."""

from __future__ import annotations

from ....dsl.diagnostics import fail
from ...op import Op, OpCall, Setting, Typing


def _index(call: OpCall) -> Typing:
    (dim,) = call.settings["dim"]
    return Typing({"D": (dim,)}, (), (("real", (dim,)),))


def _coordinate(call: OpCall) -> Typing:
    """Of a sequence that follows the stream each row has its own; of one that is there as a whole all are alike."""
    (dim,) = call.settings["dim"]
    if dim.clock is not None:
        return Typing({"S": (dim,)}, (), (("coordinate", (*dim.lead, dim)),))
    if dim.size is None:
        raise fail(
            "size-unknown",
            f"the rows of `{dim.name}` cannot be counted before the data are there",
            call.span,
            help=f"give `{dim.name}` a size where the input is declared: `[{dim.name} = 128]`",
        )
    return Typing({"S": (dim,)}, (), (("coordinate", (dim,)),))


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
        name="slopes",
        text="-> y[D]",
        meaning="2^(-8 i / p), i = 1 .. p, p the largest power of two of which there are so many; then 2^(-4 i / p) "
        "of odd i",
        settings=(Setting("dim", "dims", meaning="the heads, one slope each"),),
        index=("D",),
        infer_with=_index,
        flops=lambda sizes, attrs: 0.0,
        source="Press et al. 2022, ALiBi, section 3; other numbers of heads as released, and in BLOOM",
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
