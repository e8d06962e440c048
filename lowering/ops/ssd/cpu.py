"""CPU code of the state space scan: chunks as batched products, one in-place update a decoded token."""

from __future__ import annotations

from typing import Any


def construct(use: Any) -> str:
    """The module that owns A_log, D and dt_bias."""
    heads = use.sizes("H")
    return f"lib.Weights(A_log={heads}, D={heads}, dt_bias={heads})"


def emit(use: Any) -> str:
    """The call; `past` is the state before a step."""
    u, dt, b, c, a_log, d, dt_bias = use.args
    weights = f"{a_log}, {d}, {dt_bias}"
    return f"lib.ssd({u}, {dt}, {b}, {c}, {weights}, at, chunk={use.attr('chunk')}, past={use.past})"


def slot(use: Any, state: Any) -> str:
    """What a stream keeps for it."""
    sizes = {name: size[0] for name, size in state.rows}
    return f"stream.scan(heads={sizes['h']}, head_dim={sizes['p']}, groups={sizes['g']}, state={sizes['n']})"
