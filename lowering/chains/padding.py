"""What masked places of a tile hold: they load 0, and a static walk tells what the math makes of that.

Where it is the identity of the reduction that follows, the kernel needs no `where`. What is not known is taken to be
finite: an infinity there is one in the row's real columns too, or in a weight.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

from .expr import Expr, ordered
from .table import TABLE

IDENTITY = {"sum": 0.0, "max_over": -math.inf}


def held(roots: Iterable[Expr], masked: str) -> dict[Expr, float | None]:
    """The number that each value has at a masked place, None where it is not known.

    masked: `c`, a column beyond the last, where tensors with columns load 0; `r`, a row beyond the last, all of it.
    """
    found: dict[Expr, float | None] = {}
    for e in ordered(roots):
        if e.op == "load":
            found[e] = 0.0 if masked in e.dims else None
        elif e.op == "number":
            found[e] = e.value
        elif e.op in IDENTITY:
            inside = found[e.args[0]]
            keeps = masked == "r" and (inside == 0 or (inside is not None and e.op == "max_over"))
            found[e] = inside if keeps else None
        else:
            found[e] = _after(e.op, [found[a] for a in e.args])
    return found


def _after(op: str, given: list[float | None]) -> float | None:
    known = [x for x in given if x is not None]
    if len(known) == len(given):
        return _value(TABLE[op].value, known)
    if (op == "mul" and 0 in known) or (op in ("div", "dropped") and given[0] == 0):
        return 0.0
    if op == "where":
        mask, x, y = given
        return (x if mask else y) if mask is not None else x if x == y else None
    return None


def _value(value: Callable[..., float], args: list[float]) -> float:
    try:
        return value(*args)
    except OverflowError:
        return math.inf
    except (ValueError, ZeroDivisionError):
        return math.nan
