"""Rotations as a kernel of rows: the halves of the channels are two views of one tensor, and so are the result's.

(y1, y2) = (x1 cos - x2 sin, x2 cos + x1 sin)
"""

from __future__ import annotations

from math import prod
from typing import Any

from ...chains.expr import Chain, Output, View, apply, load

ALONE = True
"""Its rows are half as wide as those of its values, so it joins nothing."""


def holds(use: Any) -> bool:
    """Where all channels turn (others would have to be copied), by angles that lack none but the first dims."""
    return 2 * use.count("R") == use.count("D") and all(_again(use, i) is not None for i in (1, 2))


def columns(use: Any) -> int | None:
    """The pairs of channels."""
    return use.count("R")


def chain(use: Any, lines: tuple[str, ...]) -> tuple[Chain, tuple[str, ...]]:
    """The chain, and the operands that it reads. Rows are (token, head); the angles are those of the token."""
    pairs, heads = use.count("R"), prod(use.graph.size(d) or 0 for d in use.node.bound("H"))
    halves = [View(start=i * pairs, width=2 * pairs) for i in range(2)]
    x1, x2 = (load("x", "rc", view) for view in halves)
    cos, sin = (load(name, "rc", View(heads, _again(use, i) or None)) for i, name in ((1, "cos"), (2, "sin")))
    y1 = apply("sub", apply("mul", x1, cos), apply("mul", x2, sin))
    y2 = apply("add", apply("mul", x2, cos), apply("mul", x1, sin))
    outputs = tuple(Output("y", y, "rc", view) for y, view in zip((y1, y2), halves, strict=True))
    return Chain("rotate", pairs, outputs, (), lines), ("x", "cos", "sin")


def _again(use: Any, operand: int) -> int | None:
    """After how many tokens the angles come again, 0: never; None where they lack a dim behind one that they have."""
    rows, own = (use.graph.values[use.node.operands[i]].type.dims[:-end] for i, end in ((0, 2), (operand, 1)))
    if own == rows:
        return 0
    if own != rows[len(rows) - len(own) :]:
        return None
    return prod(use.graph.size(d) or 0 for d in own) or None
