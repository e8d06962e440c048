"""Arithmetic on values known at compile time: numbers, strings, lists, booleans, none.

Integers stay integers as long as the result is one. A division of integers that leaves a remainder gives a
`Ratio`, which remembers both numbers, so that a size made of it is refused with the numbers the user knows.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from fractions import Fraction
from typing import Any

from .diagnostics import fail
from .source import Span

MOST_ITEMS = 100_000
"""The longest list or string that a program may build: a bound on time and memory, far above any real model."""


class Ratio(Fraction):
    """An exact quotient that is no integer; `numerator_text` / `denominator_text` are the numbers as divided."""

    divided: int
    by: int

    def __new__(cls, divided: int, by: int) -> Ratio:
        made = super().__new__(cls, divided, by)
        made.divided, made.by = divided, by
        return made

    def __str__(self) -> str:
        return f"{self.divided} / {self.by}"


def kind(value: Any) -> str:
    """The user's word for the kind of a value."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "a truth value"
    if isinstance(value, (int, float, Fraction)):
        return "a number"
    if isinstance(value, str):
        return "a string"
    if isinstance(value, (list, tuple)):
        return "a list"
    if isinstance(value, dict):
        return "a table"
    return getattr(value, "kind_word", type(value).__name__.lower())


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float, Fraction)) and not isinstance(value, bool)


def tidy(value: Any) -> Any:
    """An integer where a number is one exactly; other values as they are."""
    if isinstance(value, Fraction) and value.denominator == 1:
        return int(value)
    return value


def as_float(value: Any) -> int | float:
    """A plain Python number (ints stay ints)."""
    return float(value) if isinstance(value, Fraction) else value


def _divide(a: Any, b: Any) -> Any:
    if isinstance(a, int) and isinstance(b, int):
        return a // b if a % b == 0 else Ratio(a, b)
    return tidy(a / b)


def _power(a: Any, b: Any) -> Any:
    if isinstance(a, int) and isinstance(b, int) and b >= 0:
        if a.bit_length() * b > 4096:
            raise OverflowError
        return a**b
    result = float(a) ** float(b)
    if isinstance(result, complex):
        raise ValueError
    return result


_NUMERIC: dict[str, Callable[[Any, Any], Any]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": _divide,
    "//": operator.floordiv,
    "%": operator.mod,
    "^": _power,
}
_ORDER: dict[str, Callable[[Any, Any], bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}


def binary(op: str, a: Any, b: Any, span: Span) -> Any:
    """`a op b` for compile-time values. Raises `wrong-type`, `divide-by-zero`, `too-large`."""
    if op == "==":
        return a == b
    if op == "!=":
        return a != b
    if op == "in":
        if isinstance(b, str) and isinstance(a, str) or isinstance(b, (list, tuple, dict)):
            return a in b
        raise fail("wrong-type", f"`in` needs a list, a table or a string, this is {kind(b)}", span)
    if op in _ORDER:
        if is_number(a) and is_number(b) or isinstance(a, str) and isinstance(b, str):
            return _ORDER[op](a, b)
        raise fail("wrong-type", f"`{op}` compares numbers, these are {kind(a)} and {kind(b)}", span)
    if is_number(a) and is_number(b):
        return _number(op, a, b, span)
    repeated = _sequence(op, a, b, span)
    if repeated is not None:
        return repeated
    raise fail("wrong-type", f"`{op}` does not work on {kind(a)} and {kind(b)}", span)


def _number(op: str, a: Any, b: Any, span: Span) -> Any:
    try:
        result = tidy(_NUMERIC[op](a, b))
    except ZeroDivisionError:
        raise fail("divide-by-zero", f"`{as_float(a)} {op} {as_float(b)}` divides by zero", span) from None
    except (OverflowError, ValueError):
        raise fail("too-large", f"`{as_float(a)} {op} {as_float(b)}` is no number that can be held", span) from None
    if isinstance(result, int) and result.bit_length() > 4096 or isinstance(result, float) and math.isinf(result):
        raise fail("too-large", "the result is too large", span)
    return result


def _sequence(op: str, a: Any, b: Any, span: Span) -> Any:
    if op == "*" and isinstance(b, (str, list)) and isinstance(a, int):
        a, b = b, a
    if op == "*" and isinstance(a, (str, list)) and isinstance(b, int) and not isinstance(b, bool):
        check_length(len(a) * b, span)
        return a * max(b, 0)
    if op == "+" and isinstance(a, str) and isinstance(b, str):
        check_length(len(a) + len(b), span)
        return a + b
    if op == "+" and isinstance(a, list) and isinstance(b, list):
        check_length(len(a) + len(b), span)
        return a + b
    return None


def check_length(length: int, span: Span) -> None:
    """Refuse lists, strings and loops beyond `MOST_ITEMS`."""
    if length > MOST_ITEMS:
        raise fail("too-large", f"this has {length} items, at most {MOST_ITEMS} are allowed", span)


def negate(value: Any, span: Span) -> Any:
    if not is_number(value):
        raise fail("wrong-type", f"`-` needs a number, this is {kind(value)}", span)
    return -value


def whole(value: Any, what: str, span: Span, least: int = 1) -> int:
    """`value` as a size. Raises `not-exact` with both numbers, `wrong-type`, `out-of-range`."""
    if isinstance(value, Ratio):
        raise fail(
            "not-exact",
            f"{what} would be {value}, which does not divide",
            span,
            f"{value.divided} divided by {value.by} leaves {value.divided % value.by}",
        )
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        shown = f" ({as_float(value)})" if is_number(value) else ""
        raise fail("wrong-type", f"{what} must be a whole number, this is {kind(value)}{shown}", span)
    if value < least:
        raise fail("out-of-range", f"{what} must be at least {least}, this is {value}", span)
    if value > 2**53:
        raise fail("too-large", f"{what} is {value}, which is too large for a size", span)
    return value
