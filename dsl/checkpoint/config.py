"""Lines of a map that speak of `config`: which fields they name, and how a list of words spells a string of letters.

What the lines mean, in both directions:

- A field that is absent or null says nothing: its line is silent, and a comparison sees `none`.
- `if` silences a line: coming in by the config that is read, going out by the one that is written.
- Of several lines for one parameter the first that speaks holds; the others that speak must agree.
- A parameter for which no line speaks keeps its default. But if a field that these lines name is there, it has a value
  that the map does not know, and that is an error: no config is half understood.
- A left side that is no parameter is compared coming in, and written going out.
- A left side that ends in `?` is read and compared, never written: an older or a second spelling.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from .. import syntax as sx
from ..diagnostics import fail
from .static import MISSING, CallValue, evaluate


def lines(checkpoint: sx.Checkpoint) -> Iterator[tuple[sx.Selector, sx.Equation]]:
    """Lines whose right side is no name of a tensor, each with one left side."""
    for line in checkpoint.equations:
        if isinstance(line, sx.Equation) and not isinstance(line.theirs, sx.String):
            for selector in line.ours:
                yield selector, line


def target(selector: sx.Selector, names: Mapping[str, Any]) -> str | None:
    """The parameter that a line gives a value to, or None for a line that is compared."""
    expr = selector.value
    if is_spelled(expr):
        return spelled(expr)[0]
    return expr.id if isinstance(expr, sx.Name) and expr.id in names else None


# --- fields --------------------------------------------------------------------------------------


def field_of(expr: sx.Expr) -> str | None:
    """`config.rope_scaling.factor` as `rope_scaling.factor`; None for other expressions."""
    parts: list[str] = []
    while isinstance(expr, sx.Member):
        parts.insert(0, expr.name)
        expr = expr.value
    return ".".join(parts) if isinstance(expr, sx.Name) and expr.id == "config" and parts else None


def fields_in(*exprs: sx.Expr | None) -> list[str]:
    """Every field that expressions name, each once, in their order."""
    found: dict[str, None] = {}
    for expr in exprs:
        if expr is not None:
            _collect(expr, found)
    return list(found)


def _collect(node: sx.Syntax, found: dict[str, None]) -> None:
    field = field_of(node) if isinstance(node, sx.Member) else None
    if field is not None:
        found[field] = None
        return
    for value in vars(node).values():
        for child in value if isinstance(value, tuple) else (value,):
            if isinstance(child, sx.Syntax):
                _collect(child, found)


def get(config: Mapping[str, Any], field: str) -> Any:
    """The value of a field; null and absent are both `MISSING`."""
    value: Any = config
    for name in field.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    return MISSING if value is None else value


def put(config: dict[str, Any], field: str, value: Any) -> None:
    """Write a field, and the tables above it."""
    *folders, last = field.split(".")
    for name in folders:
        if not isinstance(config.get(name), dict):
            config[name] = {}
        config = config[name]
    config[last] = value


def drop(config: dict[str, Any], field: str) -> None:
    """Remove a field, if it is there."""
    *folders, last = field.split(".")
    inner: Any = config
    for name in folders:
        inner = inner.get(name) if isinstance(inner, dict) else None
    if isinstance(inner, dict):
        inner.pop(last, None)


# --- values --------------------------------------------------------------------------------------


def shown(value: Any) -> str:
    """A value as the language writes it."""
    if value is None or value is MISSING:
        return "none"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return f'"{value}"'
    if isinstance(value, list):
        return f"[{', '.join(map(shown, value))}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f'"{k}": {shown(v)}' for k, v in value.items()) + "}"
    if isinstance(value, CallValue):
        given = ", ".join(shown(v) if n is None else f"{n} = {shown(v)}" for n, v in value.arguments)
        return f"{value.name}({given})" if value.arguments else value.name
    return repr(value)


def is_plain(value: Any) -> bool:
    """Whether a spec can say a value: finite numbers, one-line strings without quotes, lists and calls of such."""
    if isinstance(value, str):
        return value.isprintable() and '"' not in value
    if isinstance(value, float):
        return math.isfinite(value)
    if isinstance(value, list):
        return all(map(is_plain, value))
    if isinstance(value, CallValue):
        return all(is_plain(v) for _, v in value.arguments)
    return value is None or isinstance(value, int)


def same(a: Any, b: Any) -> bool:
    """Whether two values mean one thing: truth values are no numbers."""
    if isinstance(a, bool) != isinstance(b, bool):
        return False
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, CallValue) and isinstance(b, CallValue):
        return a.name == b.name and len(a.arguments) == len(b.arguments) and _same_arguments(a.arguments, b.arguments)
    return bool(a == b)


def _same_arguments(a: tuple[tuple[str | None, Any], ...], b: tuple[tuple[str | None, Any], ...]) -> bool:
    """By name where both give names, else by place."""
    by_name = dict(b)
    if all(name is not None and name in by_name for name, _ in a):
        return all(same(value, by_name[name]) for name, value in a)
    return all(same(x, y) and (m is None or n is None) for (m, x), (n, y) in zip(a, b, strict=True))


# --- words for letters ---------------------------------------------------------------------------


def is_spelled(expr: sx.Expr) -> bool:
    """Whether this is `spell(pattern, {"M": "mamba", "E": ["moe", "experts"]})`."""
    return isinstance(expr, sx.Call) and isinstance(expr.function, sx.Name) and expr.function.id == "spell"


def spelled(expr: sx.Expr) -> tuple[str, dict[str, list[str]]]:
    """The parameter, and the words for each of its letters; the first is written, all are read."""
    assert isinstance(expr, sx.Call)
    if len(expr.arguments) != 2 or not isinstance(expr.arguments[0].value, sx.Name):
        raise fail("wrong-arity", "`spell` takes a parameter and a table of words", expr.span)
    table = evaluate(expr.arguments[1].value, {})
    words = {k: v if isinstance(v, list) else [v] for k, v in table.items()} if isinstance(table, dict) else {}
    if not words or not all(isinstance(w, str) for ws in words.values() for w in ws):
        raise fail("wrong-type", "`spell` takes a parameter and a table of words", expr.span)
    return expr.arguments[0].value.id, words
