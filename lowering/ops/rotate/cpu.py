"""CPU code of rotations."""

from __future__ import annotations

from typing import Any


def emit(use: Any) -> str:
    """The call. Angles broadcast along leading dims that they lack."""
    x, *angles = use.operands
    rows = use.graph.values[x].type.dims[:-2]
    aligned = [use.align(a, (*rows, *use.node.bound("R"))) for a in angles]
    return f"lib.rotate({', '.join([use.args[0], *aligned])})"
