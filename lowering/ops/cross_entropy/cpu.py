"""CPU code of cross entropy, whole or in parts of the vocabulary."""

from __future__ import annotations

from typing import Any


def emit(use: Any) -> str:
    """The sum over places whose target is known, or a part of its state."""
    args = use.args
    match use.op:
        case "row_max":
            return f"{use.wrap(args[0])}.detach().amax(-1)"
        case "picked":
            return f"lib.{use.op}({', '.join(args)}, {use.start('V')})"
        case "cross_entropy" if use.head is not None:
            x, weight, bias = use.head
            bias = "" if bias is None else f", {bias}"
            return f"lib.linear_cross_entropy({x}, {weight}, {args[1]}{bias}{use.kernel})"
        case "cross_entropy":
            return f"lib.cross_entropy({', '.join(args)}{use.kernel})"
    return f"lib.{use.op}({', '.join(args)})"


def count(use: Any) -> str:
    """The number of places whose target is known: what the sum is divided by."""
    return f"lib.known({use.args[1]})"
