"""What a mask lets a query see, read off its comparisons: how far back, how far ahead.

`hull(mask)` gives (behind, ahead): every key that a query at position p sees lies in [p - behind, p + ahead], where
None is no bound. `and` intersects, `or` takes the wider; comparisons of other coordinates bound nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..dsl import syntax as sx

Bound = int | None


@dataclass(frozen=True)
class Hull:
    """Bounds on key.position - query.position; None is unbounded."""

    behind: Bound
    ahead: Bound


ALL = Hull(None, None)


def hull(mask: sx.Expr) -> Hull:
    """The hull of a mask expression."""
    if isinstance(mask, sx.Binary) and mask.operator == "and":
        a, b = hull(mask.left), hull(mask.right)
        return Hull(_least(a.behind, b.behind), _least(a.ahead, b.ahead))
    if isinstance(mask, sx.Binary) and mask.operator == "or":
        a, b = hull(mask.left), hull(mask.right)
        return Hull(_most(a.behind, b.behind), _most(a.ahead, b.ahead))
    if isinstance(mask, sx.Binary) and mask.operator in ("<", "<=", ">", ">=", "=="):
        return _comparison(mask)
    return ALL


def _comparison(mask: sx.Binary) -> Hull:
    """`left op right` with left - right = c + a * key + b * query, where a = -b = +-1; else no bound."""
    difference = _linear(sx.Binary("-", mask.left, mask.right))
    if difference is None:
        return ALL
    constant, key, query = difference
    if (key, query) not in ((1, -1), (-1, 1)):
        return ALL
    # key * (key.position - query.position) + constant  op  0
    strict = 1 if mask.operator in ("<", ">") else 0
    upper = mask.operator in ("<", "<=")
    if mask.operator == "==":
        offset = -constant * key
        return Hull(-offset, offset)
    if upper == (key == 1):
        return Hull(None, -constant * key - strict)
    return Hull(constant * key - strict, None)


def _linear(expr: sx.Expr) -> tuple[int, int, int] | None:
    """(constant, coefficient of key.position, of query.position) of a linear expression, else None."""
    match expr:
        case sx.Number(value=value) if isinstance(value, int):
            return value, 0, 0
        case sx.Member(value=sx.Name(id="key"), name="position"):
            return 0, 1, 0
        case sx.Member(value=sx.Name(id="query"), name="position"):
            return 0, 0, 1
        case sx.Unary(operator="-", value=value):
            inner = _linear(value)
            return None if inner is None else (-inner[0], -inner[1], -inner[2])
        case sx.Binary(operator="+" | "-" as op, left=left, right=right):
            a, b = _linear(left), _linear(right)
            sign = 1 if op == "+" else -1
            return None if a is None or b is None else tuple(x + sign * y for x, y in zip(a, b, strict=True))  # type: ignore[return-value]
    return None


def _least(a: Bound, b: Bound) -> Bound:
    return b if a is None else a if b is None else min(a, b)


def _most(a: Bound, b: Bound) -> Bound:
    return None if a is None or b is None else max(a, b)
