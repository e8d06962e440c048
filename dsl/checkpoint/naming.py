"""Lines of a map that name tensors, and the name that they give to a weight: its path, segment by segment."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .. import syntax as sx
from ..diagnostics import Collector, SpecError, did_you_mean, fail
from ..parse import parse
from ..program import Parameter
from ..source import Source, Span
from .static import MISSING, MissingField, evaluate

_HOLE = re.compile(r"\{([^{}]*)\}")


@dataclass(eq=False)
class Group:
    """Several of ours in one of theirs, in this order; or one of ours with its axes in another order."""

    members: tuple[str, ...]
    form: sx.ListOf | sx.Name
    span: Span


@dataclass(eq=False)
class Rename:
    """A line that names a segment. `path` are the segments before it and itself, each with the name that the line gives
    to its iteration (`layer[i]`) if any."""

    path: tuple[tuple[str, str | None], ...]
    text: str
    span: Span
    group: Group | None = None
    optional: bool = False
    used: bool = False

    @property
    def shown(self) -> str:
        return ".".join(word if index is None else f"{word}[{index}]" for word, index in self.path)


@dataclass(frozen=True)
class Place:
    """Where a weight lives: the name of theirs, the line that joins it with others, and the dim of ours of which each
    index has a name of its own (`{dim}` still stands in the name). `span` is the line that says so, if any."""

    name: str
    rename: Rename | None
    dim: str | None
    span: Span | None


@dataclass(frozen=True)
class _Segment:
    name: str
    kind: str | None
    number: int | None


def read_lines(checkpoint: sx.Checkpoint, values: Mapping[str, Any]) -> tuple[list[Rename], list[str]]:
    """The renames of a map and the patterns that it ignores. Raises `SpecError` `map-shape`."""
    collector = Collector()
    renames: list[Rename] = []
    ignored: list[str] = []
    for line in checkpoint.equations:
        if isinstance(line, sx.Ignore):
            ignored.extend(p.value for p in line.patterns)
        elif isinstance(line.theirs, sx.String):
            with collector.collecting():
                if line.condition is None or _holds(line.condition, values):
                    renames.extend(_renames(line))
    collector.finish()
    return renames, ignored


def _holds(condition: sx.Expr, values: Mapping[str, Any]) -> bool:
    try:
        return bool(evaluate(condition, values))
    except MissingField:
        return False


def _renames(line: sx.Equation) -> Iterator[Rename]:
    assert isinstance(line.theirs, sx.String)
    for selector in line.ours:
        expr = selector.value
        if isinstance(expr, (sx.Members, sx.ListOf)):
            before = _path(expr.value) if isinstance(expr, sx.Members) else ()
            members = tuple(_path(a.value) for a in expr.items)
            group = Group(tuple(m[-1][0] for m in members), line.form, line.span) if line.form is not None else None
            for member in members:
                yield Rename(before + member, line.theirs.value, line.span, group, selector.optional)
        else:
            path = _path(expr)
            group = Group((path[-1][0],), line.form, line.span) if line.form is not None else None
            yield Rename(path, line.theirs.value, line.span, group, selector.optional)


def _path(expr: sx.Expr) -> tuple[tuple[str, str | None], ...]:
    """`layer[i].attention` as (("layer", "i"), ("attention", None))."""
    if isinstance(expr, sx.Name):
        return ((expr.id, None),)
    if isinstance(expr, sx.Member):
        return (*_path(expr.value), (expr.name, None))
    if isinstance(expr, sx.Index) and len(expr.arguments) == 1:
        *before, (word, index) = _path(expr.value)
        name = expr.arguments[0].value
        if index is None and isinstance(name, sx.Name) and expr.arguments[0].name is None:
            return (*before, (word, name.id))
    raise fail("map-shape", "the left side of a tensor line is a path of names, such as `layer[i].norm`", expr.span)


# --- the name of a weight ------------------------------------------------------------------------


class Renames:
    """The lines of a map that rename, found by the last word of their paths."""

    def __init__(self, lines: Sequence[Rename]):
        self.lines = tuple(lines)
        self._by_word: dict[str, list[tuple[int, Rename]]] = {}
        for i, line in enumerate(self.lines):
            self._by_word.setdefault(line.path[-1][0], []).append((i, line))

    def ending_in(self, *words: str | None) -> list[Rename]:
        """Lines whose last word is one of these, the last line first."""
        found = {i: line for word in words if word is not None for i, line in self._by_word.get(word, ())}
        return [found[i] for i in sorted(found, reverse=True)]


def place(parameter: Parameter, renames: Renames, values: Mapping[str, Any]) -> Place:
    """Where a weight lives: each segment is named by the last line that matches it, or keeps its name.

    Raises `SpecError` `map-shape` for a name with a hole that nothing fills.
    """
    segments = _segments(parameter)
    parts: list[str] = []
    group: Rename | None = None
    dims: dict[str, None] = {}
    span: Span | None = None
    for end, segment in enumerate(segments, 1):
        found = _last_match(segments[:end], renames)
        numbered = segment.number is not None
        if found is None:
            text = segment.name
        else:
            rename, numbers = found
            rename.used = True
            text = _filled(rename, numbers, parameter, values, dims)
            numbered = numbered and rename.path[-1][1] is None
            span = rename.span
            group = rename if rename.group is not None else group
        parts += [t for t in (text, str(segment.number) if numbered else "") if t]
    if len(dims) > 1 and span is not None:
        raise fail("map-shape", f"`{'.'.join(parts)}` has an index for each of {', '.join(dims)}, one can be", span)
    return Place(".".join(parts), group, next(iter(dims), None), span if group is None else group.span)


def _segments(parameter: Parameter) -> list[_Segment]:
    """The names of a path, each with the number of its iteration."""
    path = (*parameter.path, None)
    return [
        _Segment(s, kind, after if isinstance(after, int) else None)
        for s, kind, after in zip(path, parameter.kinds, path[1:], strict=False)
        if isinstance(s, str)
    ]


def _last_match(segments: list[_Segment], renames: Renames) -> tuple[Rename, dict[str, int]] | None:
    for rename in renames.ending_in(segments[-1].name, segments[-1].kind):
        size = len(rename.path)
        tail = segments[len(segments) - size :] if size <= len(segments) else []
        pairs = list(zip(rename.path, tail, strict=False))
        if tail and all(word in (s.name, s.kind) and (i is None or s.number is not None) for (word, i), s in pairs):
            return rename, {i: s.number for (_, i), s in pairs if i is not None and s.number is not None}
    return None


def _filled(
    rename: Rename, numbers: Mapping[str, int], parameter: Parameter, values: Mapping[str, Any], dims: dict[str, None]
) -> str:
    """A name with its holes filled by iterations and values of the model; those of dims stay, and are noted."""

    def fill(hole: re.Match[str]) -> str:
        text = hole[1].strip()
        if text in numbers:
            return str(numbers[text])
        if text in dict(parameter.dims):
            dims[text] = None
            return f"{{{text}}}"
        return str(_computed(text, {**values, **numbers}, rename))

    return _HOLE.sub(fill, rename.text)


def _computed(text: str, values: Mapping[str, Any], rename: Rename) -> int | str:
    expr = _expression(text)
    try:
        value = MISSING if isinstance(expr, sx.Name) and expr.id not in values else expr and evaluate(expr, values)
    except (MissingField, SpecError):
        value = MISSING
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise fail(
            "map-shape",
            f"`{{{text}}}` stands for no number in `{rename.text}`",
            rename.span,
            help=did_you_mean(text, [*values, *(i for _, i in rename.path if i)], "something"),
        )
    return value


def _expression(text: str) -> sx.Expr | None:
    """The expression in a hole, or None if it is none."""
    try:
        (block,) = parse(Source("<hole>", f"block hole():\n    return {text}\n")).declarations
    except (SpecError, ValueError):
        return None
    returned = block.body[0] if isinstance(block, sx.Function) and len(block.body) == 1 else None
    return returned.values[0] if isinstance(returned, sx.Return) and len(returned.values) == 1 else None
