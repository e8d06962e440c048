"""CPU code of depthwise causal convolutions."""

from __future__ import annotations

from typing import Any


def construct(use: Any) -> str:
    """The module that owns weight and bias."""
    taps = use.attr("taps")
    if use.op == "parallel_conv":
        parts = ", ".join(
            f'"{name}": {use.weight_sizes(weight)[:-1]}'
            for name, weight in zip(use.attr("parts"), use.operands[1::2], strict=True)
        )
        return f"lib.ParallelConv({{{parts}}}, {taps}, bias={use.operands[2] is not None})"
    return f"lib.Conv({use.sizes('C')}, {taps}, bias={use.args[2] is not None})"


def emit(use: Any) -> str:
    """The call; `past` are the rows before a step."""
    if use.op == "rows_before":
        return f"lib.rows_before({use.args[0]}, {use.attr('count')}, {use.group()}, {use.rows_of(0)})"
    act = f', act="{use.attr("act")}"' if use.attr("act") else ""
    if use.own:
        return f"{use.own}({use.args[0]}, at, past={use.past}{act}{use.kernel})"
    if use.op == "conv_behind":
        x, before, weight, bias = use.args
        bias = "None" if bias is None else bias
        return f"lib.conv_behind({x}, {before}, {weight}, {bias}, {use.rows_of(0)}{act}{use.kernel})"
    flat = f"{use.args[0]}.flatten(2)"
    bias = "None" if use.args[2] is None else f"{use.args[2]}.flatten()"
    weight = f"{use.args[1]}.flatten(0, -2)"
    y = f"lib.causal_conv({flat}, {weight}, {bias}, at, {use.past}{act}{use.kernel})"
    return f"{y}.unflatten(-1, {use.sizes('C')})"


def slot(use: Any, state: Any) -> str:
    """What a stream keeps for it."""
    ((_, row),) = state.rows
    channels = 1
    for size in row:
        channels *= size
    return f"stream.window(channels={channels}, taps={state.keep + 1})"
