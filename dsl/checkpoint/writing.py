"""From the arguments of a model to a config."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from .. import syntax as sx
from ..diagnostics import Diagnostic, Label, SpecError, fail
from .config import drop, field_of, fields_in, is_spelled, lines, put, same, shown, spelled, target
from .reading import read_config
from .static import MISSING, CallValue, MissingField, evaluate


def write_config(
    checkpoint: sx.Checkpoint, values: Mapping[str, Any], parameters: Sequence[sx.Parameter],
    carried: Mapping[str, Any] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """A config for arguments of a model. `carried` is the config that the model came with: fields of which the map does
    not speak stay as they were.

    What is written is read again: an older spelling that now says otherwise goes, anything else that does is an error.
    Raises `SpecError` `config-mismatch` where a value has no line that can say it.
    """
    config: dict[str, Any] = copy.deepcopy(dict(carried or {}))
    said: set[str] = set()
    nones: dict[str, str] = {}
    for selector, line in lines(checkpoint):
        name = target(selector, values)
        if selector.optional or name in said:
            continue
        field = field_of(line.theirs)
        if name is not None and field is not None and values[name] is None:
            nones.setdefault(name, field)
            continue
        if name is None or is_spelled(selector.value):
            _state(config, selector, line, values)
            said |= {name} if name is not None else set()
        elif _say(config, line, values[name], values):
            said.add(name)
    _leave_out(checkpoint, config, values, parameters, nones)
    if _differs(checkpoint, config, values, parameters):
        for root in _older(checkpoint):
            config.pop(root, None)
    wrong = _differs(checkpoint, config, values, parameters)
    if wrong:
        raise SpecError(wrong)
    return config


def _say(config: dict[str, Any], line: sx.Equation, value: Any, values: Mapping[str, Any]) -> bool:
    """Write one value where its line says; False if the line is for other values."""
    theirs = line.theirs
    field = field_of(theirs)
    if field is not None:
        if isinstance(value, CallValue) or not _allows(line.condition, config, values):
            return False
        put(config, field, value)
        return True
    if not isinstance(value, CallValue):
        return False
    if isinstance(theirs, sx.Name):
        return value == CallValue(theirs.id) and _satisfy(config, line.condition)
    if isinstance(theirs, sx.Call) and isinstance(theirs.function, sx.Name) and theirs.function.id == value.name:
        return _write_call(config, theirs, value) and _satisfy(config, line.condition)
    return False


def _allows(condition: sx.Expr | None, config: Mapping[str, Any], values: Mapping[str, Any]) -> bool:
    try:
        return condition is None or bool(evaluate(condition, {**values, "config": config}))
    except MissingField:
        return False


def _write_call(config: dict[str, Any], call: sx.Call, value: CallValue) -> bool:
    """Write the arguments of a waiting function where the line's own call has them; False if they are not the same."""
    if len(call.arguments) != len(value.arguments):
        return False
    given = dict(value.arguments)
    found: list[tuple[str, Any]] = []
    for place, argument in enumerate(call.arguments):
        field = field_of(argument.value)
        name, placed = value.arguments[place]
        if field is None or (argument.name is not None and name is not None and argument.name not in given):
            return False
        found.append((field, given.get(argument.name, placed) if argument.name is not None else placed))
    for field, one in found:
        put(config, field, one)
    return True


def _satisfy(config: dict[str, Any], condition: sx.Expr | None) -> bool:
    """Write what makes a condition true: `config.a.b == constant`."""
    if condition is None:
        return True
    if not (isinstance(condition, sx.Binary) and condition.operator == "=="):
        return False
    field = field_of(condition.left)
    if field is None or not isinstance(condition.right, (sx.String, sx.Number, sx.Constant)):
        return False
    put(config, field, condition.right.value)
    return True


def _state(config: dict[str, Any], selector: sx.Selector, line: sx.Equation, values: Mapping[str, Any]) -> None:
    """Write the left side of a line that is compared coming in, or spell a string of letters."""
    field = field_of(line.theirs)
    if field is None or not _allows(line.condition, config, values):
        return
    if is_spelled(selector.value):
        name, words = spelled(selector.value)
        letters = values[name]
        if not isinstance(letters, str):
            raise fail(
                "config-mismatch",
                f"`{name}` is {shown(letters)}, `spell` writes the letters of a string",
                selector.span,
            )
        unknown = [c for c in letters if c not in words]
        if unknown:
            raise fail(
                "config-mismatch",
                f"`{name}` has {shown(unknown[0])}, for which `{field}` has no word",
                selector.span,
                help=f"the map knows {', '.join(map(shown, words))}",
            )
        put(config, field, [words[c][0] for c in letters])
        return
    try:
        value = evaluate(selector.value, values)
    except MissingField:
        return
    if value is not MISSING and not isinstance(value, CallValue):
        put(config, field, value)


def _leave_out(
    checkpoint: sx.Checkpoint, config: dict[str, Any], values: Mapping[str, Any], parameters: Sequence[sx.Parameter],
    nones: Mapping[str, str],
) -> None:  # fmt: skip
    """A parameter that is none has no field, unless the map takes something else where there is none: then null."""
    for field in nones.values():
        put(config, field, None)
    for field in nones.values():
        without = copy.deepcopy(config)
        drop(without, field)
        if not _differs(checkpoint, without, values, parameters):
            drop(config, field)


# --- what was written is read again --------------------------------------------------------------


def _differs(
    checkpoint: sx.Checkpoint, config: Mapping[str, Any], values: Mapping[str, Any], parameters: Sequence[sx.Parameter]
) -> list[Diagnostic]:
    """What reading a config again gives otherwise than `values`."""
    try:
        again = read_config(checkpoint, config, parameters)
    except SpecError as error:
        return list(error.diagnostics)
    return [
        _lost(checkpoint, p, values[p.name], values)
        for p in parameters
        if p.name in values and not same(_now(p, again, values), values[p.name])
    ]


def _now(parameter: sx.Parameter, again: Mapping[str, Any], values: Mapping[str, Any]) -> Any:
    """The value that a parameter has when the config is read again."""
    if parameter.name in again:
        return again[parameter.name]
    try:
        return evaluate(parameter.default, values) if parameter.default is not None else MISSING
    except MissingField:
        return MISSING


def _lost(checkpoint: sx.Checkpoint, parameter: sx.Parameter, value: Any, values: Mapping[str, Any]) -> Diagnostic:
    mine = [line.span for selector, line in lines(checkpoint) if target(selector, values) == parameter.name]
    return Diagnostic(
        "config-mismatch",
        f"no line of the map can write `{parameter.name}` = {shown(value)}",
        Label(mine[-1], "tried last") if mine else Label(checkpoint.name_span, "in this map"),
        help=f"a line such as `{parameter.name} = config.{parameter.name}` would",
    )


def _older(checkpoint: sx.Checkpoint) -> list[str]:
    """The fields that only lines with `?` name."""
    roots: dict[bool, set[str]] = {True: set(), False: set()}
    for selector, line in lines(checkpoint):
        roots[selector.optional].update(f.partition(".")[0] for f in fields_in(line.condition, line.theirs))
    return sorted(roots[True] - roots[False])
