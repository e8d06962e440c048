"""CPU code of root mean square norms, whole or from squares that ranks summed together."""

from __future__ import annotations

from typing import Any


def construct(use: Any) -> str:
    """The module that owns the weight."""
    groups = use.attr("groups")
    return f"lib.RmsNorm({use.sizes('D')}, eps={use.attr('eps')!r}{f', groups={groups}' if groups != 1 else ''})"


def emit(use: Any) -> str:
    """The call."""
    if use.op == "group_squares":
        return f"lib.group_squares({use.args[0]}, dims={len(use.bound('D'))}, groups={use.sizes('G')[0]})"
    if use.op == "scaled_rows":
        return f"lib.scaled_rows({', '.join(use.args)}, count={use.attr('count')}, eps={use.attr('eps')!r})"
    if use.own:
        return f"{use.own}({use.args[0]})"
    return f"lib.rms_norm({use.args[0]}, {use.args[1]}, {use.attr('eps')!r}, groups={use.attr('groups')})"
