"""Several linear maps of one input as one product."""

from __future__ import annotations

from typing import Any

from ...op import Op, OpCall, Setting, Typing


def split_parts(operands: Any) -> list[tuple[Any, Any]]:
    """(weight, bias or None) of each part from the operands behind the input."""
    rest = list(operands)
    return list(zip(rest[0::2], rest[1::2], strict=True))


def _infer(call: OpCall) -> Typing:
    """A group of one part has its dims; the parts of a longer group stand side by side in the dim of its name."""
    x, weights = call.tensors["x"], call.tensors["weights"]
    ins = call.settings["ins"]
    leading = tuple(x.dims[: len(x.dims) - len(ins)])
    outs = {p: tuple(w.dims[: len(w.dims) - len(ins)]) for p, w in zip(call.settings["parts"], weights, strict=True)}
    joined = list(call.settings["joined"] or ())
    results = []
    for group in call.settings["give"]:
        dims = outs[group[0]] if len(group) == 1 else (joined.pop(0),)
        results.append(("real", leading + dims))
    return Typing({"K": ins}, (), tuple(results))


OP = Op(
    name="parallel_linear",
    text="x[*, K+], weights...[N, K], biases...[N] -> y[*, N]",
    meaning="several linear maps of one input as one product; made by the compiler",
    settings=(
        Setting("ins", "dims"),
        Setting("parts", "text"),
        Setting("give", "text"),
        Setting("joined", "dims", None),
    ),
    linear=(("x", "biases"), ("weights", "biases")),
    infer_with=_infer,
    per_weight=2.0,
    source="ours: the fused QKV and in_proj matrices that the families ship, derived",
)
