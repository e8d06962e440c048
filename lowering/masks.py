"""What a mask lets a query see, read off its comparisons: how far back, how far ahead.

`hull(mask)` gives (behind, ahead): every key that a query at position p sees lies in [p - behind, p + ahead], where
None is no bound. `and` intersects, `or` takes the wider, `not` goes inwards; comparisons of other coordinates bound
nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from math import ceil, floor

from ..dsl import syntax as sx

Bound = int | None


@dataclass(frozen=True)
class Hull:
    """Bounds on key.position - query.position; None is unbounded."""

    behind: Bound
    ahead: Bound


ALL = Hull(None, None)
NOTHING = Hull(0, 0)
"""Of a mask that lets nothing be seen: any bounds would do, these ask for no cache and for no later key."""


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
    if isinstance(mask, sx.Unary) and mask.operator == "not" and (opposite := _negated(mask.value)) is not None:
        return hull(opposite)
    return NOTHING if mask == sx.Constant(False) else ALL


_OPPOSITE = {"<": ">=", ">=": "<", ">": "<=", "<=": ">", "!=": "==", "==": "!=", "and": "or", "or": "and"}


def _negated(mask: sx.Expr) -> sx.Expr | None:
    """A mask that allows what this one does not, written without an outer `not`; None where there is no such one."""
    match mask:
        case sx.Unary(operator="not", value=value):
            return value
        case sx.Constant(value=bool(value)):
            return sx.Constant(not value)
        case sx.Binary(operator="and" | "or" as op, left=left, right=right):
            return sx.Binary(_OPPOSITE[op], sx.Unary("not", left), sx.Unary("not", right))
        case sx.Binary(operator=op, left=left, right=right) if op in _OPPOSITE:
            return sx.Binary(_OPPOSITE[op], left, right)
    return None


@dataclass(frozen=True)
class _Line:
    """key * (position of the key) + query * (position of the query) + something between low and high."""

    key: Fraction
    query: Fraction
    low: Fraction
    high: Fraction

    def __neg__(self) -> _Line:
        return _Line(-self.key, -self.query, -self.high, -self.low)

    def __add__(self, other: _Line) -> _Line:
        return _Line(self.key + other.key, self.query + other.query, self.low + other.low, self.high + other.high)

    def times(self, factor: int) -> _Line:
        low, high = sorted((self.low * factor, self.high * factor))
        return _Line(self.key * factor, self.query * factor, low, high)

    def divided(self, by: int) -> _Line:
        """Floor division of what is a whole number: it takes away at most (by - 1) / by."""
        return _Line(self.key / by, self.query / by, (self.low - (by - 1)) / by, self.high / by)


def _comparison(mask: sx.Binary) -> Hull:
    """`left op right` where left - right is a line in key.position - query.position alone; else no bound."""
    sides = (_line(mask.left), _line(mask.right))
    if sides[0] is None or sides[1] is None:
        return ALL
    difference = sides[0] + -sides[1]
    if not difference.key or difference.key != -difference.query:
        return ALL
    # Both sides are whole numbers, so `<` is `<= -1` of their difference.
    strict = 1 if mask.operator in ("<", ">") else 0
    below = Hull(None, None) if mask.operator in (">", ">=") else _at_most(difference, strict)
    above = Hull(None, None) if mask.operator in ("<", "<=") else _at_most(-difference, strict)
    return Hull(_least(below.behind, above.behind), _least(below.ahead, above.ahead))


def _at_most(line: _Line, strict: int) -> Hull:
    """Where line <= -strict is possible: slope * offset + low <= -strict, for the offset key - query."""
    bound = (-strict - line.low) / line.key
    return Hull(None, floor(bound)) if line.key > 0 else Hull(-ceil(bound), None)


def _line(expr: sx.Expr) -> _Line | None:
    """A linear expression of the two positions, with floor divisions by a number; else None."""
    match expr:
        case sx.Number(value=int(value)):
            return _Line(Fraction(0), Fraction(0), Fraction(value), Fraction(value))
        case sx.Member(value=sx.Name(id="key" | "query" as which), name="position"):
            return _Line(Fraction(which == "key"), Fraction(which == "query"), Fraction(0), Fraction(0))
        case sx.Unary(operator="-", value=value):
            inner = _line(value)
            return None if inner is None else -inner
        case sx.Binary(operator="+" | "-" as op, left=left, right=right):
            a, b = _line(left), _line(right)
            return None if a is None or b is None else a + b if op == "+" else a + -b
        case sx.Binary(operator="*", left=left, right=right):
            for factor, other in ((left, right), (right, left)):
                if isinstance(factor, sx.Number) and isinstance(factor.value, int) and (line := _line(other)):
                    return line.times(factor.value)
        case sx.Binary(operator="//", left=left, right=sx.Number(value=int(by))) if by > 0:
            inner = _line(left)
            return None if inner is None else inner.divided(by)
    return None


def _least(a: Bound, b: Bound) -> Bound:
    return b if a is None else a if b is None else min(a, b)


def _most(a: Bound, b: Bound) -> Bound:
    return None if a is None or b is None else max(a, b)
