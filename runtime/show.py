"""What a model is made of: parameters by block, operations a token, bytes of state."""

from __future__ import annotations

from typing import Any

from ..dsl.program import Program
from ..lowering.cost import active_parameters, flops_per_token
from ..lowering.passes.stream import state_bytes, streaming_errors
from ..lowering.pipeline import lower


def summary(program: Program, length: int = 4096) -> dict[str, Any]:
    """A model as plain data. `parameters` is their number, `active_parameters` how many work on one token (fewer where
    there are experts); `blocks` has (path, copies, parameters in all).

    `flops_per_token` is a forward pass at `length` tokens, `state_bytes` what one sequence of that length keeps in bf16
    (folded states in fp32), None if the model cannot be streamed.
    """
    lowered = lower(program)
    late = streaming_errors(lowered)
    return {
        "model": program.name,
        "family": program.family,
        "parameters": program.num_parameters(),
        "active_parameters": active_parameters(lowered),
        "blocks": _blocks(program),
        "length": length,
        "flops_per_token": flops_per_token(lowered, length),
        "state_bytes": None if late else state_bytes(lowered, length),
        "arguments": {k: v for k, v in program.arguments.items() if isinstance(v, (int, float, str, bool, type(None)))},
    }


def _blocks(program: Program) -> list[dict[str, Any]]:
    """Parameters of each block: paths with `*` for iterations, in order of appearance."""
    found: dict[str, dict[str, Any]] = {}
    copies: dict[str, set[tuple[str | int, ...]]] = {}
    for p in program.parameters():
        depth = next((i for i, s in enumerate(p.path) if isinstance(s, int)), None)
        head = p.path[: depth + 2] if depth is not None else p.path[:1]
        name = ".".join("*" if isinstance(s, int) else s for s in head)
        row = found.setdefault(name, {"path": name, "copies": 0, "parameters": 0})
        row["parameters"] += p.count
        copies.setdefault(name, set()).add(head)
        row["copies"] = len(copies[name])
    return list(found.values())


def weights(program: Program) -> list[dict[str, Any]]:
    """Every weight: its path, dims by name, and how it is filled."""
    return [
        {"path": p.name, "dims": [{"name": n, "size": s} for n, s in p.dims], "init": str(p.init)}
        for p in program.parameters()
    ]
