"""The sizes that a kernel's file is cut by: constants at its top, read and put in place as they stand there.

They are the only thing that tuning changes. Those that a room names NUMERICS change the order of a sum, and with it the
bits of a result: two files that agree in these are of one numerics class.
"""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

NAME = "kernel"
Values = Mapping[str, tuple[Any, ...]]
"""The values that tuning may give to constants; all others stay as they are."""


def constants_of(text: str) -> dict[str, Any]:
    """The constants of a file by name: literals that are given to upper-case names before the first function."""
    return {name: ast.literal_eval(value) for name, value in _assigned(text)}


def with_constants(text: str, changed: Mapping[str, Any]) -> str:
    """The file with other constants. Raises KeyError for one that it does not have."""
    there = dict(_assigned(text))
    absent = [name for name in changed if name not in there]
    if absent:
        raise KeyError(absent[0])
    lines = text.splitlines(keepends=True)
    found = [(there[name], value) for name, value in changed.items()]
    for node, value in sorted(found, key=lambda f: (f[0].lineno, f[0].col_offset), reverse=True):
        if node.lineno != node.end_lineno:
            raise ValueError("a constant of a kernel stands on one line")
        line = lines[node.lineno - 1]
        lines[node.lineno - 1] = f"{line[: node.col_offset]}{value!r}{line[node.end_col_offset :]}"
    return "".join(lines)


def class_of(constants: Mapping[str, Any], numerics: Iterable[str]) -> tuple[tuple[str, str], ...]:
    """The numerics class: the constants that results depend on, to the bit."""
    return tuple((name, repr(constants[name])) for name in sorted(numerics) if name in constants)


def key_of(text: str) -> str:
    """What a kernel is known by: its text, untuned and under one name for all (`NAME`)."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _assigned(text: str) -> list[tuple[str, ast.expr]]:
    found: list[tuple[str, ast.expr]] = []
    for statement in ast.parse(text).body:
        if isinstance(statement, (ast.FunctionDef, ast.ClassDef)):
            break
        if not isinstance(statement, ast.Assign) or len(statement.targets) != 1:
            continue
        target, value = statement.targets[0], statement.value
        if isinstance(target, ast.Name):
            found.append((target.id, value))
        elif isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple) and len(target.elts) == len(value.elts):
            found += [(t.id, v) for t, v in zip(target.elts, value.elts, strict=True) if isinstance(t, ast.Name)]
    return [(name, value) for name, value in found if name.isupper() and _is_literal(value)]


def _is_literal(value: ast.expr) -> bool:
    try:
        ast.literal_eval(value)
    except ValueError:
        return False
    return True
