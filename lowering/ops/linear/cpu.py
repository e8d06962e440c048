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
        return f"{use.own}({use.args[0]}{use.epilogue})"
    x, weight, bias = use.args
    ins = f", ins={len(use.sizes('K'))}" if len(use.sizes("K")) != 1 else ""
    return f"lib.linear({x}, {weight}{'' if bias is None else f', {bias}'}{ins}{use.epilogue})"
