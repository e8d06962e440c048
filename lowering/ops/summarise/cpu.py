"""CPU code of summaries."""

from __future__ import annotations

import math
from typing import Any


def emit(use: Any) -> str:
    """The call; `past` are the rows of the group that is open before a step."""
    x, say = use.args
    (rows,) = use.bound("P")
    past = f", past={use.past}" if use.is_kept else ""
    return f"lib.summarise({x}, {say}, {use.at(rows, times=1)}{past})"


def slot(use: Any, state: Any) -> str:
    """What a stream keeps for it."""
    return f"stream.open({state.keep}, {', '.join(str(math.prod(size)) for _, size in state.rows)})"
