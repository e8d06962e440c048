"""What a mask lets queries see of the rows of another clock, proved on whole numbers.

Every bound here is a whole-number function of a position that repeats: f(p + period) = f(p) + growth. So one period
shows all of it, and what a stream must keep, or wait for, is exact.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from typing import Any

from ..dsl import syntax as sx
from ..dsl.program import TOKENS, Clock
from .masks import hull

LONGEST = 1 << 16
"""A period that is longer is not walked: nothing is bounded then."""


@dataclass(frozen=True)
class Reach:
    """What the rows of a query clock may see of a key clock. `keep`: how many keys before the newest ones that come
    with the same token a later query may still see, None for all; `late`: whether one may see keys that come later."""

    keep: int | None
    late: bool


def value(expr: sx.Expr, query: int, key: int = 0) -> int:
    """The value of an expression of `query.position` and `key.position`. Raises `ValueError` for any other."""
    match expr:
        case sx.Number(value=int(number)):
            return number
        case sx.Member(value=sx.Name(id="query"), name="position"):
            return query
        case sx.Member(value=sx.Name(id="key"), name="position"):
            return key
        case sx.Unary(operator="-", value=inner):
            return -value(inner, query, key)
        case sx.Binary(operator="+" | "-" | "*" | "//" as op, left=left, right=right):
            a, b = value(left, query, key), value(right, query, key)
            return a + b if op == "+" else a - b if op == "-" else a * b if op == "*" else a // b
    raise ValueError(f"no whole number of two positions: {expr}")


def groups(clock: Clock, tokens: int) -> int:
    """How many groups have come with the first tokens of a document."""
    if not tokens:
        return 0
    return max(0, value(clock.value, tokens - 1) + 1) if clock.begins else max(0, value(clock.value, tokens))


@cache
def widest(clock: Clock) -> int | None:
    """The most tokens of a group; None where a group can be as long as its document."""
    growth = _slope(clock.value, "query")
    if not growth:
        return None
    period = _period(clock.value)
    if period is None:
        return None
    sizes: dict[int, int] = {}
    for p in range(2 * period + 1):
        group = value(clock.value, p)
        sizes[group] = sizes.get(group, 0) + 1
    return max(sizes.values())


def is_steady(clock: Clock) -> bool:
    """Whether groups start at 0 or below and follow each other one by one, as far as all positions go."""
    try:
        period = _period(clock.value)
        if period is None or value(clock.value, 0) > 0:
            return False
        return all(0 <= value(clock.value, p + 1) - value(clock.value, p) <= 1 for p in range(period))
    except (ValueError, ZeroDivisionError):
        return False


def reach(mask: sx.Expr, query: Clock, key: Clock) -> Reach:
    """How queries of one clock see keys of another."""
    match mask:
        case sx.Binary(operator="and", left=left, right=right):
            a, b = reach(left, query, key), reach(right, query, key)
            keeps = [r.keep for r in (a, b) if r.keep is not None]
            return Reach(min(keeps, default=None), a.late and b.late)
        case sx.Binary(operator="or", left=left, right=right):
            a, b = reach(left, query, key), reach(right, query, key)
            keep = None if a.keep is None or b.keep is None else max(a.keep, b.keep)
            return Reach(keep, a.late or b.late)
        case sx.Constant(value=False):
            return Reach(0, False)
        case sx.Binary(operator="<" | "<=" | ">" | ">=" | "==", left=left, right=right):
            try:
                return _compared(mask, query, key)
            except (ValueError, ZeroDivisionError):
                pass
    return Reach(None, True)


@cache
def spread(expr: sx.Expr, mask: sx.Expr, query: Clock, key: Clock) -> tuple[int, int] | None:
    """The least and the largest value of an expression of both positions wherever a mask lets a query see a key; None
    where they are not known to be bounded. A mask that lets nothing be seen gives (0, 0)."""
    try:
        both = sx.Binary("and", mask, expr)
        period = _common_period(both, query, key)
        if period is None or _drift(expr, query, key):
            return None
        if query == key:
            bounds = hull(mask)
            if bounds.behind is None or bounds.ahead is None:
                return None
            behind, ahead = bounds.behind, bounds.ahead
        else:
            seen = reach(mask, query, key)
            if seen.keep is None or seen.late:
                return None
            behind, ahead = seen.keep, 0
        values = list(_values(expr, mask, query, key, period, behind, ahead))
    except (ValueError, ZeroDivisionError):
        return None
    return (min(values), max(values)) if values else (0, 0)


def _drift(expr: sx.Expr, query: Clock, key: Clock) -> bool:
    """Whether an expression is another one further on, where queries and keys have moved together."""
    moved = (_slope(expr, which) * _slope(c.value, "query") * c.times for which, c in (("query", query), ("key", key)))
    return sum(moved) != 0


def _values(
    expr: sx.Expr, mask: sx.Expr, query: Clock, key: Clock, period: int, behind: int, ahead: int
) -> Iterator[int]:
    """The values over one period that is so far on that no key is missing."""
    value_at, holds, start = function(expr), function(mask), period
    while groups(key, start) * key.times < behind:
        start += period
    for token in range(start, start + period):
        rows = range(groups(query, token) * query.times, groups(query, token + 1) * query.times)
        before, there = groups(key, token) * key.times, groups(key, token + 1) * key.times
        for p in rows:
            low, high = (p - behind, p + ahead + 1) if query == key else (before - behind, there)
            yield from (value_at(p, k) for k in range(low, high) if holds(p, k))


def function(expr: sx.Expr) -> Callable[[int, int], Any]:
    """An expression of two positions, or a mask, as a function of both. Raises `ValueError` for any other."""
    made: Callable[[int, int], Any] = eval(f"lambda query, key: {_python(expr)}", {"__builtins__": {}})
    return made


def _python(expr: sx.Expr) -> str:
    match expr:
        case sx.Number(value=int(number)):
            return str(number)
        case sx.Constant(value=bool(constant)):
            return str(constant)
        case sx.Member(value=sx.Name(id="query" | "key" as which), name="position"):
            return which
        case sx.Unary(operator="-" | "not" as op, value=inner):
            return f"({op} {_python(inner)})"
        case sx.Binary(operator=op, left=left, right=right) if op in _SAME_IN_PYTHON:
            return f"({_python(left)} {op} {_python(right)})"
    raise ValueError(f"no expression of two positions: {expr}")


_SAME_IN_PYTHON = frozenset(("+", "-", "*", "//", "<", "<=", ">", ">=", "==", "!=", "and", "or"))


def _compared(mask: sx.Binary, query: Clock, key: Clock) -> Reach:
    """A comparison whose difference never falls as the key's position grows, or never rises: the keys seen lie in a
    row."""
    difference = sx.Binary("-", mask.left, mask.right)
    rising = _slope(difference, "key")
    if not rising or not _is_monotone(difference, rising > 0):
        return Reach(None, True)
    period = _common_period(difference, query, key)
    if period is None:
        return Reach(None, True)
    op = mask.operator if rising > 0 else _MIRRORED[mask.operator]
    low_bound, high_bound = {">": 1, ">=": 0, "==": 0}.get(op), {"<": 0, "<=": 1, "==": 1}.get(op)

    def first(p: int, bound: int) -> int:
        """The smallest key from which on the difference, turned so that it rises, is at least the bound."""
        sign = 1 if rising > 0 else -1
        return _bisect(lambda k: sign * value(difference, p, k) >= bound)

    def seen(p: int) -> tuple[int | None, int | None]:
        """The first and the last key that a query row sees."""
        return (
            None if low_bound is None else first(p, low_bound),
            None if high_bound is None else first(p, high_bound) - 1,
        )

    return _walked(seen, query, key, period)


_MIRRORED = {"<": ">", "<=": ">=", ">": "<", ">=": "<=", "==": "=="}


def _walked(seen: Callable[[int], tuple[int | None, int | None]], query: Clock, key: Clock, period: int) -> Reach:
    """Follow two periods of tokens behind the first rows: what the rows that come with each see of what is there."""
    keep, late, growing = 0, False, False
    lows: list[tuple[int, Fraction]] = []
    half = _begun(query, key) + period
    for token, rows in _coming(query, 2 * half):
        there, before = groups(key, token + 1) * key.times, groups(key, token) * key.times
        low, high = seen(rows[0])[0], seen(rows[1])[1]
        late = late or high is None or high >= there
        if low is None:
            growing = True
        else:
            keep = max(keep, before - low)
            lows.append((token, Fraction(low - there)))
    # The distance to the newest key must not grow from one period to the next, nor what lies ahead.
    growing = growing or min(low for _, low in lows) < min(low for token, low in lows if token < half)
    return Reach(None if growing else keep, late or _runs_ahead(seen, query, key, half))


def _begun(query: Clock, key: Clock) -> int:
    """The tokens after which both have rows. Raises `ValueError` where that takes too long."""
    for tokens in range(LONGEST):
        if groups(query, tokens) and groups(key, tokens):
            return tokens
    raise ValueError("no rows")


def _runs_ahead(seen: Callable[[int], tuple[int | None, int | None]], query: Clock, key: Clock, half: int) -> bool:
    """Whether the newest key that is seen grows faster than the keys come."""
    ahead = [
        (token, high - groups(key, token + 1) * key.times)
        for token, rows in _coming(query, 2 * half)
        if (high := seen(rows[1])[1]) is not None
    ]
    return bool(ahead) and max(most for _, most in ahead) > max(most for token, most in ahead if token < half)


def _coming(query: Clock, tokens: int) -> Iterator[tuple[int, tuple[int, int]]]:
    """Tokens with which rows of a clock come, and the first and last of these."""
    for token in range(tokens):
        before, after = groups(query, token), groups(query, token + 1)
        if after > before:
            yield token, (before * query.times, after * query.times - 1)


def _bisect(holds: Callable[[int], bool]) -> int:
    """The smallest whole number for which something holds that holds for all larger ones."""
    low, high = -1, 1
    while not holds(high):
        high *= 2
        if high > 1 << 40:
            raise ValueError("never")
    while holds(low):
        low *= 2
        if low < -(1 << 40):
            raise ValueError("always")
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high


def _slope(expr: sx.Expr, which: str) -> Fraction:
    """How much an expression grows a position in the long run."""
    match expr:
        case sx.Number():
            return Fraction(0)
        case sx.Member(value=sx.Name(id=name)):
            return Fraction(name == which)
        case sx.Unary(operator="-", value=inner):
            return -_slope(inner, which)
        case sx.Binary(operator="+", left=left, right=right):
            return _slope(left, which) + _slope(right, which)
        case sx.Binary(operator="-", left=left, right=right):
            return _slope(left, which) - _slope(right, which)
        case sx.Binary(operator="*", left=left, right=right):
            return _slope(left, which) * value(right, 0) + _slope(right, which) * value(left, 0)
        case sx.Binary(operator="//", left=left, right=sx.Number(value=int(by))):
            return _slope(left, which) / by
    raise ValueError(f"no line: {expr}")


def _is_monotone(expr: sx.Expr, rising: bool) -> bool:
    """Whether every part that has the key's position grows (or falls) with it."""
    match expr:
        case sx.Binary(operator="+", left=left, right=right):
            return _is_monotone(left, rising) and _is_monotone(right, rising)
        case sx.Binary(operator="-", left=left, right=right):
            return _is_monotone(left, rising) and _is_monotone(right, not rising)
        case sx.Unary(operator="-", value=inner):
            return _is_monotone(inner, not rising)
        case sx.Binary(operator="//", left=left, right=sx.Number(value=int(by))):
            return _is_monotone(left, rising == (by > 0))
    slope = _slope(expr, "key")
    return not slope or (slope > 0) == rising


def _divisors(expr: sx.Expr) -> int:
    """A number that all floor divisions of an expression divide."""
    match expr:
        case sx.Binary(operator="//", left=left, right=sx.Number(value=int(by))):
            return abs(by) * _divisors(left)
        case sx.Binary(left=left, right=right):
            return math.lcm(_divisors(left), _divisors(right))
        case sx.Unary(value=inner):
            return _divisors(inner)
    return 1


def _period(expr: sx.Expr) -> int | None:
    found = _divisors(expr)
    return found if found <= LONGEST else None


def _common_period(difference: sx.Expr, query: Clock, key: Clock) -> int | None:
    """Tokens after which queries, keys and mask are as before, further on."""
    period = math.lcm(_divisors(query.value), _divisors(key.value))
    every = _divisors(difference)
    for clock in (query, key):
        growth = _slope(clock.value, "query") * clock.times * period
        if growth.denominator != 1:
            return None
        period *= every // math.gcd(every, int(growth)) if growth else 1
    return period if period <= LONGEST else None


__all__ = ["TOKENS", "Reach", "function", "groups", "is_steady", "reach", "spread", "value", "widest"]
