"""Cross entropy against known targets, as a sum; the count of known targets is its normaliser."""

from __future__ import annotations

from ...op import Monoid, Op

OPS = (
    Op(
        name="cross_entropy",
        text="logits[*, V!], target[*] -> total[]",
        meaning="sum over places with a known target of log(sum(exp(logits))) - logits[target]",
        operand_kinds={"target": ("token", "index")},
        index=("V",),
        result_kind="loss",
        monoid=Monoid("V", ("max", "sum", "picked"), peers="all", receiver_free=True),
        flops=lambda sizes, attrs: 4.0 * sizes["V"],
        source="ours: a loss is a pair (sum, count), see the design page on loss normalisation",
    ),
)
