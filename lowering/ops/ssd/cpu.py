"""CPU code of the state space scan: chunks as batched products, one in-place update a decoded token."""

from __future__ import annotations

from typing import Any


def construct(use: Any) -> str:
    """The module that owns A_log, D and dt_bias."""
    heads = use.sizes("H")
    return f"lib.Weights(A_log={heads}, D={heads}, dt_bias={heads})"


def emit(use: Any) -> str:
    """The call; `past` is the state before a step."""
    match use.op:
        case "ssd_before":
            return f"lib.ssd_before({use.args[0]}, {use.args[1]}, {use.group()})"
        case "ssd_leave" | "ssd_behind":
            return f"lib.{use.op}({', '.join(use.args)}, {use.rows_of(0)})"
        case "ssd_inside":
            return f"lib.ssd({', '.join(use.args)}, {use.rows_of(0)}, chunk={use.attr('chunk')}{use.kernel})"
    u, dt, b, c, a_log, d, dt_bias = use.args
    weights = f"{a_log}, {d}, {dt_bias}"
    return f"lib.ssd({u}, {dt}, {b}, {c}, {weights}, at, chunk={use.attr('chunk')}, past={use.past}{use.kernel})"


def slot(use: Any, state: Any) -> str:
    """What a stream keeps for it."""
    sizes = {name: size[0] for name, size in state.rows}
    return f"stream.scan(heads={sizes['h']}, head_dim={sizes['p']}, groups={sizes['g']}, state={sizes['n']})"
