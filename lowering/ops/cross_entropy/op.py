"""Cross entropy against known targets, as a sum; the count of known targets is its normaliser."""

from __future__ import annotations

from ...op import Monoid, Op
from .lift import lift

OPS = (
    Op(
        name="cross_entropy",
        text="logits[*, V!], target[*] -> total[]",
        meaning="sum over places with a known target of log(sum(exp(logits))) - logits[target]",
        operand_kinds={"target": ("token", "index")},
        index=("V",),
        absorbs=("logits", "linear"),
        lift=lift,
        result_kind="loss",
        monoid=Monoid("V", ("max", "sum", "picked"), peers="all", receiver_free=True),
        flops=lambda sizes, attrs: 4.0 * sizes["V"],
        source="ours: a loss is a pair (sum, count), see the design page on loss normalisation",
    ),
    Op(
        name="row_max",
        text="logits[*, V+] -> m[*]",
        meaning="the largest of each row, through which no gradient flows; made by the compiler",
        monoid=Monoid("V", ("max",), peers="all", receiver_free=True),
        detached=True,
        flops=lambda sizes, attrs: float(sizes["V"]),
        source="ours: part of the state of the loss's monoid",
    ),
    Op(
        name="sum_exp",
        text="logits[*, V+], m[*] -> s[*]",
        meaning="the sum of exp(logits - m) of each row; made by the compiler",
        monoid=Monoid("V", ("sum",), peers="all", receiver_free=True),
        flops=lambda sizes, attrs: 3.0 * sizes["V"],
        source="ours: part of the state of the loss's monoid",
    ),
    Op(
        name="picked",
        text="logits[*, V+], target[*] -> p[*]",
        meaning="the logit of the target of each row, 0 where it is not among these; made by the compiler",
        operand_kinds={"target": ("token", "index")},
        index=("V",),
        offset=("V",),
        linear=(("logits",),),
        monoid=Monoid("V", ("sum",), peers="all", receiver_free=True),
        flops=lambda sizes, attrs: 1.0,
        source="ours: part of the state of the loss's monoid",
    ),
    Op(
        name="nll",
        text="s[*], target[*], p[*], m[*] -> total[]",
        meaning="the sum over places with a known target of log(s) + m - p; made by the compiler",
        operand_kinds={"target": ("token", "index")},
        result_kind="loss",
        flops=lambda sizes, attrs: 4.0,
        source="ours: the last step of the loss's monoid",
    ),
)
