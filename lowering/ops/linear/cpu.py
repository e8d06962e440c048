"""CPU code of linear maps: the library's matrix product."""

from __future__ import annotations

from typing import Any

from .stacked import split_parts


def construct(use: Any) -> str:
    """The module that owns the weights."""
    if use.op == "parallel_linear":
        return _construct_parallel(use)
    return f"lib.Linear({use.sizes('K')}, {use.sizes('N')}, bias={use.args[2] is not None})"


def _construct_parallel(use: Any) -> str:
    ins = use.attr("ins")
    parts = []
    for name, (weight, bias) in zip(use.attr("parts"), split_parts(use.operands[1:]), strict=True):
        outs = use.weight_sizes(weight)[: -len(ins)]
        parts.append(f'"{name}": ({outs}, {bias is not None})')
    give = use.attr("give")
    groups = "" if all(len(g) == 1 for g in give) else f", give={give}"
    return f"lib.Parallel({{{', '.join(parts)}}}, {use.dim_sizes(ins)}{groups})"


def emit(use: Any) -> str:
    """The call."""
    if use.own:
        return f"{use.own}({use.args[0]})"
    x, weight, bias = use.args
    ins, outs = use.sizes("K"), use.sizes("N")
    x = f"{x}.flatten(-{len(ins)})" if len(ins) > 1 else x
    if len(ins) + len(outs) > 2:
        weight = f"{weight}.flatten(0, {len(outs) - 1}).flatten(1)"
    bias = "" if bias is None else f", {bias}.flatten()"
    tail = f".unflatten(-1, {outs})" if len(outs) > 1 else ""
    return f"F.linear({x}, {weight}{bias}){tail}"
