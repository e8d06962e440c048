"""The token some places later: what a language model predicts, and whether it is known."""

from __future__ import annotations

from typing import Any

from ...op import Op, OpCall, Setting


def _bind(call: OpCall) -> dict[str, tuple[Any, ...]]:
    return {"S": (call.tensors["ids"].dims[call.sequence("ids")],)}


OPS = (
    Op(
        name="next",
        text="ids[*, S~] -> y[*, S]",
        meaning="the token `by` places later; unknown at the end of a document",
        settings=(Setting("by", "whole", 1, "how many places later"),),
        bind=_bind,
        operand_kinds={"ids": ("token", "index")},
        result_kind=lambda call: call.tensors["ids"].kind,
        coordinates=True,
        flops=lambda sizes, attrs: 0.0,
        source="ours",
    ),
    Op(
        name="is_known",
        text="ids[*] -> y[*]",
        meaning="true where a token is known: `is_known(next(tokens))` where a prediction is scored",
        operand_kinds={"ids": ("token", "index")},
        result_kind="mask",
        flops=lambda sizes, attrs: 0.0,
        source="ours",
    ),
)
