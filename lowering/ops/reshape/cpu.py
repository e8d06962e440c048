"""CPU code of merged and split dims."""

from __future__ import annotations

import math
from typing import Any


def emit(use: Any) -> str:
    """The call: of the sizes that only the data know, at most one stands between others and is -1."""
    have = use.operand_dims(0)
    old, new = use.bound("A"), use.bound("B")
    first = have.index(old[0]) - len(have)
    x = use.wrap(use.args[0])
    if len(new) == 1:
        return f"{x}.flatten({first}, {first + len(old) - 1})"
    sizes = tuple(use.graph.size(d) for d in new)
    inner = [math.prod(s or 1 for s in sizes[i + 1 :]) for i in range(len(sizes))]
    # A size that the data decide is what is left: also where there is nothing, which -1 could not say.
    shape = ", ".join(f"{x}.shape[{first}] // {inner[i]}" if s is None else str(s) for i, s in enumerate(sizes))
    return f"{x}.unflatten({first}, ({shape}))"
