"""The configuration of a map: lines between arguments of the model and fields of `config`, read in both directions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from .. import syntax as sx
from ..diagnostics import Collector, Diagnostic, Label, SpecError, fail
from .static import MISSING, CallValue, Missing, MissingField, evaluate

_UNKNOWN = object()


def lines(checkpoint: sx.Checkpoint) -> Iterator[tuple[sx.Selector, sx.Equation]]:
    """Lines whose right side speaks of `config`."""
    for line in checkpoint.equations:
        if isinstance(line, sx.Equation) and not isinstance(line.theirs, sx.String):
            for selector in line.ours:
                yield selector, line


def read_config(checkpoint: sx.Checkpoint, config: Mapping[str, Any], parameters: tuple[str, ...]) -> dict[str, Any]:
    """Arguments of the model from a config. A field that is absent leaves the parameter's default; of several lines for
    one parameter the first that is present holds.

    Left sides that are no parameter are checked: a field that is there must be equal. Raises `SpecError` `config-mismatch`
    with each field that does not hold.
    """
    collector = Collector()
    found: dict[str, Any] = {}
    checks: list[tuple[sx.Selector, sx.Equation]] = []
    for selector, line in lines(checkpoint):
        with collector.collecting():
            env = {**found, "config": config}
            if line.condition is not None and not _holds(line.condition, env):
                continue
            if isinstance(selector.value, sx.Name) and selector.value.id in parameters:
                _assign(found, selector.value.id, line, env)
            elif _spelled(selector.value) is not None:
                _unspell(found, selector.value, line, env)
            else:
                checks.append((selector, line))
    for selector, line in checks:
        with collector.collecting():
            _compare(selector, line, {**found, "config": config})
    collector.finish()
    return found


def _holds(condition: sx.Expr, env: Mapping[str, Any]) -> bool:
    try:
        return bool(evaluate(condition, env))
    except MissingField:
        return False


def _assign(found: dict[str, Any], name: str, line: sx.Equation, env: Mapping[str, Any]) -> None:
    try:
        value = evaluate(line.theirs, env)
    except MissingField:
        return
    if value is MISSING or value is None and line.condition is None and name in found:
        return
    found.setdefault(name, value)


def _spelled(expr: sx.Expr) -> tuple[str, dict[str, Any]] | None:
    """`spell(pattern, {"M": "mamba"})`: the parameter, and the word for each of its letters."""
    if not (isinstance(expr, sx.Call) and isinstance(expr.function, sx.Name) and expr.function.id == "spell"):
        return None
    if len(expr.arguments) != 2 or not isinstance(expr.arguments[0].value, sx.Name):
        raise fail("wrong-arity", "`spell` takes a parameter and a table of words", expr.span)
    table = evaluate(expr.arguments[1].value, {})
    if not isinstance(table, dict):
        raise fail("wrong-type", "`spell` takes a parameter and a table of words", expr.span)
    return expr.arguments[0].value.id, table


def _unspell(found: dict[str, Any], expr: sx.Expr, line: sx.Equation, env: Mapping[str, Any]) -> None:
    spelled = _spelled(expr)
    assert spelled is not None
    name, table = spelled
    words = evaluate(line.theirs, env)
    back = {word: letter for letter, word in table.items()}
    if isinstance(words, list) and all(w in back for w in words):
        found.setdefault(name, "".join(back[w] for w in words))


def _compare(selector: sx.Selector, line: sx.Equation, env: Mapping[str, Any]) -> None:
    try:
        theirs = evaluate(line.theirs, env)
        ours = evaluate(selector.value, env)
    except MissingField:
        return
    if theirs is MISSING or theirs is None or isinstance(ours, Missing):
        return
    if ours != theirs:
        field = _field(line.theirs) or "the config"
        raise fail("config-mismatch", f"`{field}` is {theirs!r}, this map holds for {ours!r}", line.span, "must be equal")


def _field(expr: sx.Expr) -> str | None:
    """`config.rope_scaling.factor` as `rope_scaling.factor`; None for other expressions."""
    parts: list[str] = []
    while isinstance(expr, sx.Member):
        parts.insert(0, expr.name)
        expr = expr.value
    return ".".join(parts) if isinstance(expr, sx.Name) and expr.id == "config" and parts else None


# --- going out -----------------------------------------------------------------------------------


def write_config(checkpoint: sx.Checkpoint, values: Mapping[str, Any]) -> dict[str, Any]:
    """A config for arguments of the model; lines marked `?` are only read.

    Raises `SpecError` `config-mismatch` where a value has no line that can say it.
    """
    config: dict[str, Any] = {}
    said: set[str] = set()
    missed: dict[str, sx.Equation] = {}
    for selector, line in lines(checkpoint):
        if selector.optional:
            continue
        name = selector.value.id if isinstance(selector.value, sx.Name) and selector.value.id in values else None
        if name is not None:
            if name in said:
                continue
            if _say(config, line, values[name], values):
                said.add(name)
                missed.pop(name, None)
            else:
                missed.setdefault(name, line)
        else:
            _state(config, selector, line, values)
    if missed:
        raise SpecError(
            Diagnostic("config-mismatch", f"no line of the map can write `{n}` = {values[n]!r}", Label(line.span, "tried last"))
            for n, line in missed.items()
        )
    return config


def _say(config: dict[str, Any], line: sx.Equation, value: Any, values: Mapping[str, Any]) -> bool:
    """Write one value where its line says; False if the line is for other values."""
    theirs = line.theirs
    field = _field(theirs)
    if field is not None:
        if isinstance(value, CallValue):
            return False
        if line.condition is not None and not _condition_allows(line.condition, config, values):
            return False
        _put(config, field, value)
        return True
    if isinstance(theirs, sx.Name) and isinstance(value, CallValue) and value == CallValue(theirs.id):
        return _satisfy(config, line.condition)
    if isinstance(theirs, sx.Call) and isinstance(value, CallValue) and isinstance(theirs.function, sx.Name):
        return theirs.function.id == value.name and _write_call(config, theirs, value) and _satisfy(config, line.condition)
    return False


def _condition_allows(condition: sx.Expr, config: Mapping[str, Any], values: Mapping[str, Any]) -> bool:
    try:
        return bool(evaluate(condition, {**values, "config": config}))
    except MissingField:
        return False


def _write_call(config: dict[str, Any], call: sx.Call, value: CallValue) -> bool:
    given = dict(value.arguments)
    plain = [v for n, v in value.arguments if n is None]
    for argument in call.arguments:
        field = _field(argument.value)
        if argument.name is not None:
            found = given.get(argument.name, _UNKNOWN)
        else:
            found = plain.pop(0) if plain else next(iter(given.values()), _UNKNOWN)
        if field is None or found is _UNKNOWN:
            return False
        _put(config, field, found)
    return True


def _satisfy(config: dict[str, Any], condition: sx.Expr | None) -> bool:
    """Write what makes a condition true: `config.a.b == constant`."""
    if condition is None:
        return True
    if not (isinstance(condition, sx.Binary) and condition.operator == "=="):
        return False
    field = _field(condition.left)
    if field is None or not isinstance(condition.right, (sx.String, sx.Number, sx.Constant)):
        return False
    if condition.right.value is not None:
        _put(config, field, condition.right.value)
    return True


def _state(config: dict[str, Any], selector: sx.Selector, line: sx.Equation, values: Mapping[str, Any]) -> None:
    field = _field(line.theirs)
    if field is None:
        return
    spelled = _spelled(selector.value)
    if spelled is not None:
        name, table = spelled
        _put(config, field, [table[c] for c in values[name]])
        return
    try:
        value = evaluate(selector.value, values)
    except MissingField:
        return
    if value is not MISSING and not isinstance(value, CallValue):
        _put(config, field, value)


def _put(config: dict[str, Any], field: str, value: Any) -> None:
    *folders, last = field.split(".")
    for name in folders:
        config = config.setdefault(name, {})
    config[last] = value


__all__ = ["CallValue", "read_config", "write_config"]
