"""CPU code of layer norms, whole or from sums that ranks made together."""

from __future__ import annotations

from typing import Any


def construct(use: Any) -> str:
    """The module that owns weight and bias."""
    centred = ", zero_centred=True" if use.attr("zero_centred") else ""
    bias = "" if use.args[2] is not None else ", bias=False"
    return f"lib.LayerNorm({use.sizes('D')}, eps={use.attr('eps')!r}{centred}{bias})"


def emit(use: Any) -> str:
    """The call."""
    if use.op == "row_sums":
        return f"lib.row_sums({use.args[0]}, dims={len(use.bound('D'))})"
    if use.op == "centred_squares":
        return f"lib.centred_squares({', '.join(use.args)}, dims={len(use.bound('D'))}, count={use.attr('count')})"
    if use.op == "centred_rows":
        settings = f"count={use.attr('count')}, eps={use.attr('eps')!r}, zero_centred={use.attr('zero_centred')}"
        return f"lib.centred_rows({', '.join(map(str, use.args))}, {settings})"
    if use.own:
        return f"{use.own}({use.args[0]})"
    x, weight, bias = use.args
    return f"lib.layer_norm({x}, {weight}, {bias}, {use.attr('eps')!r}, zero_centred={use.attr('zero_centred')})"
