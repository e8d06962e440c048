"""CPU code of dropout: zeros that follow from a place's number, in the mode of the module."""

from __future__ import annotations

from typing import Any


def emit(use: Any) -> str:
    """The call, or its input where nothing is ever dropped."""
    (x,), rate = use.args, use.attr("rate")
    if not rate:
        return x
    dims = use.operand_dims(0)
    more = "" if dims and use.is_batch(dims[0]) else ", by_row=False"
    axes = tuple(use.graph.dims[d].axes for d in dims)
    if any(a for d, a in zip(dims, axes, strict=True) if not use.is_batch(d)):
        more += f", axes={axes}"
    return f'lib.dropout({x}, {rate!r}, self, "{use.node.name}", at{more})'
