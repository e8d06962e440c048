"""A few rows in place of each group of neighbouring rows: weighted means with weights that the data choose."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ....dsl.diagnostics import fail
from ....dsl.program import TOKENS
from ...op import Monoid, Op, OpCall, Setting, Typing, alone_along, shown


def _infer(call: OpCall) -> Typing:
    """x[*, S, H.., D..], say[*, S, H.., R] -> y[*, P, H.., D..]; P has R rows for each group of S, in its place."""
    call.op._check_kinds(call)
    x, say = call.tensors["x"], call.tensors["say"]
    dim, clock = call.settings["by"]
    if dim.clock != TOKENS:
        raise fail("not-built-yet", f"groups of `{dim.name}` are not built yet", call.span_of("by"),
                   "groups are of the tokens of the model's first input")  # fmt: skip
    at = {}
    for name, tensor in (("x", x), ("say", say)):
        at[name] = next((i for i, d in enumerate(tensor.dims) if d is dim), len(tensor.dims))
        if at[name] == len(tensor.dims):
            raise fail(
                "dim-mismatch",
                f"`{name}` of `summarise` does not have `{dim.name}`, by whose `{clock.name}` it is grouped",
                call.span_of(name),
                f"this is {shown(tensor)}",
            )
    leading, heads = tuple(x.dims[: at["x"]]), tuple(say.dims[at["say"] + 1 : -1])
    behind = tuple(x.dims[at["x"] + 1 :])
    if tuple(say.dims[: at["say"]]) != leading or len(say.dims) < at["say"] + 2 or behind[: len(heads)] != heads:
        raise fail(
            "dim-mismatch",
            "`say` of `summarise` has the dims of `x` up to its last, which is how many rows a group becomes",
            call.span_of("say"),
            f"this is {shown(say)}, `x` is {shown(x)}",
        )
    alone_along(call, leading, dim)
    rank = call.known(say.dims[-1], "say")
    rows = call.new_sequence(dim, replace(clock, times=rank))
    bindings = {"S": (dim,), "H": heads, "D": behind[len(heads) :], "R": (say.dims[-1],), "P": (rows,)}
    return Typing(bindings, (x, say), (("real", (*leading, rows, *behind)),))


def _flops(sizes: Mapping[str, int], attrs: Mapping[str, Any]) -> float:
    return 2.0 * sizes["H"] * sizes["R"] * sizes["D"]


OPS = (
    Op(
        name="summarise",
        text="x[*, S/, H, D], say[*, S/, H, R] -> y[*, P, H, D]",
        meaning="for each group of rows R rows: the means of x with the weights softmax(say) over the group",
        settings=(Setting("by", "coordinate", meaning="rows of one value are a group: `seq.piece`"),),
        linear=(("x",),),
        coupled=("R",),  # rows of a group stand in order: a distance may tell them apart
        coordinates=True,
        monoid=Monoid("S", ("max", "sum", "weighted_values"), peers="group", receiver_free=True),
        flops=_flops,
        infer_with=_infer,
        rigid=("R", "P"),
        source="Zhu et al. 2021 (Long-Short Transformer), eq. 3: dynamic projection",
    ),
)
