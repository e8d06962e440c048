"""Expressions of maps: numbers, strings, lists, tables, fields of a config, and calls that stay calls."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from .. import syntax as sx
from ..arithmetic import binary, check_length, kind, negate
from ..diagnostics import fail, listed, near_or_all


@dataclass(frozen=True)
class CallValue:
    """A waiting function as a value: `by_wavelength(factor = 8)`; without arguments a bare name."""

    name: str
    arguments: tuple[tuple[str | None, Any], ...] = ()
    kind_word = "a function"


class Missing:
    """A field that a config does not have."""

    kind_word = "missing"

    def __repr__(self) -> str:
        return "missing"

    def __bool__(self) -> bool:
        return False


MISSING = Missing()


class MissingField(Exception):
    """An expression needs a field that the config does not have."""


Env = Mapping[str, Any]
FUNCTIONS: dict[str, Callable[..., Any]] = {
    "length": len, "floor": math.floor, "ceil": math.ceil, "sqrt": math.sqrt, "max": max, "min": min, "abs": abs,
}  # fmt: skip


def evaluate(expr: sx.Expr, env: Env) -> Any:
    """The value of an expression. A comparison sees a missing field as none; arithmetic with one raises `MissingField`.

    A name that `env` does not have is a waiting function. Raises `SpecError`: unknown-name, wrong-type.
    """
    match expr:
        case sx.Name(id=name):
            return env[name] if name in env else CallValue(name)
        case sx.Number(value=value) | sx.String(value=value) | sx.Constant(value=value):
            return value
        case sx.ListOf():
            return [evaluate(a.value, env) for a in expr.items]
        case sx.Table():
            return {p.key: evaluate(p.value, env) for p in expr.pairs}
        case sx.Member():
            return _member(evaluate(expr.value, env), expr)
        case sx.Unary(operator="not"):
            return not evaluate(expr.value, env)
        case sx.Unary():
            return negate(_present(evaluate(expr.value, env)), expr.span)
        case sx.Binary(operator="and"):
            return evaluate(expr.left, env) and evaluate(expr.right, env)
        case sx.Binary(operator="or"):
            return evaluate(expr.left, env) or evaluate(expr.right, env)
        case sx.Binary(operator="==" | "!=" as op):
            left, right = (_or_none(evaluate(e, env)) for e in (expr.left, expr.right))
            return (left == right) == (op == "==")
        case sx.Binary():
            left, right = (_present(evaluate(e, env)) for e in (expr.left, expr.right))
            return _binary(expr, left, right)
        case sx.Choose():
            return evaluate(expr.yes if evaluate(expr.condition, env) else expr.no, env)
        case sx.Comprehension(names=(name,)):
            inner = [_Within(name, item, env) for item in _items(evaluate(expr.source, env), expr.source)]
            return [evaluate(expr.body, e) for e in inner if expr.condition is None or evaluate(expr.condition, e)]
        case sx.Index():
            return _index(expr, env)
        case sx.Call():
            return _call(expr, env)
    raise fail("wrong-type", "a checkpoint map cannot compute this", expr.span, help=_COMPUTES)


class _Within(Mapping[str, Any]):
    """An environment with one more name. The outer one may find its values when asked, so it is not copied."""

    def __init__(self, name: str, value: Any, outer: Env):
        self._name, self._value, self._outer = name, value, outer

    def __getitem__(self, name: str) -> Any:
        return self._value if name == self._name else self._outer[name]

    def __contains__(self, name: object) -> bool:
        return name == self._name or name in self._outer

    def __iter__(self) -> Iterator[str]:
        return iter({self._name, *self._outer})

    def __len__(self) -> int:
        return len({self._name, *self._outer})


def _or_none(value: Any) -> Any:
    return None if value is MISSING else value


def _present(value: Any) -> Any:
    if value is MISSING or value is None:
        raise MissingField
    return value


def _binary(expr: sx.Binary, left: Any, right: Any) -> Any:
    if expr.operator == "in" and isinstance(left, (list, dict)) and isinstance(right, dict):
        return False
    return binary(expr.operator, left, right, expr.span)


def _items(source: Any, expr: sx.Expr) -> Iterable[Any]:
    """What a comprehension goes through: the integer n stands for 0 .. n-1, as in loops."""
    if isinstance(source, int) and not isinstance(source, bool):
        check_length(source, expr.span)
        return range(source)
    if isinstance(source, (list, str, dict)):
        return source
    raise fail("wrong-type", f"a list or a number of turns stands here, this is {kind(_present(source))}", expr.span)


_COMPUTES = "maps compute with numbers, strings, lists, tables and fields of `config`"


def _member(base: Any, expr: sx.Member) -> Any:
    if base is MISSING or base is None:
        return MISSING
    if isinstance(base, Mapping):
        return base.get(expr.name, MISSING)
    raise fail("no-such-member", f"{kind(base)} has no part named `{expr.name}`", expr.span)


def _index(expr: sx.Index, env: Env) -> Any:
    base = _present(evaluate(expr.value, env))
    at = _present(evaluate(expr.arguments[0].value, env))
    try:
        return base[at]
    except (KeyError, IndexError, TypeError):
        if isinstance(at, str) and isinstance(base, dict):
            raise fail(
                "out-of-range",
                f"there is no entry `{at}`",
                expr.span,
                help=near_or_all(at, map(str, base), "an entry", "the entries are"),
            ) from None
        is_row = isinstance(base, (str, list))
        has = f"this has {len(base)} items, counted from 0" if is_row else f"this is {kind(base)}"
        raise fail("out-of-range", f"there is no entry {at!r}", expr.span, has) from None


def _call(expr: sx.Call, env: Env) -> Any:
    if not isinstance(expr.function, sx.Name):
        raise fail(
            "wrong-type",
            "a checkpoint map cannot call this",
            expr.span,
            "expected the name of a function",
            help=f"maps compute with {listed(FUNCTIONS)}",
        )
    name = expr.function.id
    values = [(a.name, evaluate(a.value, env)) for a in expr.arguments]
    if name in FUNCTIONS:
        given = [_present(v) for _, v in values]
        try:
            return FUNCTIONS[name](*given)
        except (TypeError, ValueError, OverflowError):
            raise fail("wrong-type", f"`{name}` does not work on {', '.join(map(kind, given))}", expr.span) from None
    if any(v is MISSING or v is None for _, v in values):
        raise MissingField
    return CallValue(name, tuple(values))
