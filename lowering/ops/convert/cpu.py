"""Code of conversions: one differentiable collective a line."""

from __future__ import annotations

from typing import Any


def emit(use: Any) -> str:
    """The call, with the types before and behind it."""
    axes = ", ".join(f'"{a}"' for a in use.attr("axes"))
    group = f"at.mesh[{axes}]"
    if use.attr("kind") == "all_max":
        return f"spmd.all_max({use.args[0]}, {group})"
    src, dst = (f"S({x})" if isinstance(x, int) else x for x in (use.attr("src"), use.attr("dst")))
    return f"spmd.{use.attr('kind')}({use.args[0]}, {group}, src={src}, dst={dst})"
