"""A depthwise convolution along a sequence that reads the present and earlier rows only."""

from __future__ import annotations

import math
from typing import Any

from ....dsl.program import Init
from ...op import Monoid, Op, OpCall, Setting, Typing, WeightRule
from .lift import lift


def _bind(call: OpCall) -> dict[str, tuple[Any, ...]]:
    at = call.sequence("x")
    dims = call.tensors["x"].dims
    return {"S": (dims[at],), "C": tuple(dims[at + 1 :]), "J": (call.new_dim("taps", call.settings["taps"]),)}


def _start(call: OpCall) -> Init:
    bound = 1 / math.sqrt(call.settings["taps"])
    return Init("uniform", (-bound, bound))


def _infer_stacked(call: OpCall) -> Typing:
    """x[*, S, joined]; one result a part, with the channels of its weight."""
    x, weights = call.tensors["x"], call.tensors["weights"]
    leading = tuple(x.dims[:-1])
    results = tuple(("real", leading + tuple(w.dims[:-1])) for w in weights)
    return Typing({"S": (x.dims[-2],), "C": (x.dims[-1],)}, (), results)


def _before(call: OpCall) -> Typing:
    x, into = call.tensors["x"], call.settings["into"]
    at = call.sequence("x")
    dims = tuple(x.dims)
    bound = {"S": (dims[at],), "B": tuple(into), "C": dims[at + 1 :]}
    return Typing(bound, (x,), (("real", (*dims[:at], *into, *dims[at + 1 :])),))


def _behind(call: OpCall) -> Typing:
    x, before, weight, bias = (call.tensors.get(n) for n in ("x", "before", "weight", "bias"))
    assert x is not None and before is not None and weight is not None
    at, dims = call.sequence("x"), tuple(x.dims)
    bound = {"S": (dims[at],), "B": (before.dims[at],), "C": dims[at + 1 :], "J": (weight.dims[-1],)}
    return Typing(bound, (x, before, weight, bias), (("real", dims),))


_ACT = Setting("act", "text", None, "an activation of the result; set by the compiler")
OPS = (
    Op(
        name="causal_conv",
        text="x[*, S~, C], weight[C, J+], bias?[C] -> y[*, S, C]",
        meaning="y[t] = bias + sum over j of weight[j] * x[t - taps + 1 + j], zero before a document's start",
        settings=(
            Setting("taps", "whole", meaning="how many rows it reads, the present one included"),
            Setting("bias", "flag", False, "whether a bias is added"),
            _ACT,
        ),
        weights=(WeightRule("weight", _start, axes=("C", "", "J")), WeightRule("bias", _start, when="bias")),
        bind=_bind,
        linear=(("x", "bias"), ("weight", "bias")),
        index=("J",),
        coordinates=True,
        lift=lift,
        monoid=Monoid("S", ("rows",), peers="neighbours", receiver_free=False),
        flops=lambda sizes, attrs: 2.0 * sizes["C"] * sizes["J"],
        source="Gu and Dao 2023 (Mamba), section 3.4; weights start like torch's Conv1d",
        stacked="parallel_conv",
        per_weight=2.0,
        epilogues=("silu",),
    ),
    Op(
        name="parallel_conv",
        text="x[*, S~, C], weights...[C, J+], biases...[C] -> y[*, S, C]",
        meaning="several causal convolutions of parts that stand side by side; made by the compiler",
        settings=(Setting("taps", "whole"), Setting("parts", "text"), _ACT),
        linear=(("x", "biases"), ("weights", "biases")),
        index=("J",),
        coordinates=True,
        monoid=Monoid("S", ("rows",), peers="neighbours", receiver_free=False),
        infer_with=_infer_stacked,
        per_weight=2.0,
        epilogues=("silu",),
        source="ours: the conv1d over x, B and C together that the families ship, derived",
    ),
    Op(
        name="rows_before",
        part_of="causal_conv",
        text="x[*, S+, C] -> r[*, B, C]",
        meaning="the last rows of the ranks before this one, zero where there are none; made by the compiler",
        settings=(Setting("into", "dims"), Setting("count", "whole", 1, "how many rows"), Setting("axes", "text", ())),
        infer_with=_before,
        linear=(("x",),),
        hands_over=True,
        meets="all_gather",
        flops=lambda sizes, attrs: 0.0,
        source="ours: the halo of a window",
    ),
    Op(
        name="conv_behind",
        part_of="causal_conv",
        text="x[*, S, C], before[*, B, C], weight[C, J+], bias?[C] -> y[*, S, C]",
        meaning="the convolution of rows that others stand before; made by the compiler",
        settings=(Setting("taps", "whole"), _ACT),
        infer_with=_behind,
        index=("J",),
        handed=("before",),
        coordinates=True,
        flops=lambda sizes, attrs: 2.0 * sizes["C"] * sizes["J"],
        source="ours: causal_conv behind a halo",
    ),
)
