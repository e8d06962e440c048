"""The tensors of a map: every weight of ours has one home in theirs, and every home has its weights."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .. import syntax as sx
from ..diagnostics import Collector, Label, SpecError, fail
from ..program import Parameter
from ..source import Span
from .static import evaluate


@dataclass(frozen=True)
class Piece:
    """A weight of ours inside a tensor of theirs: `shape` are our dims, `stored` the axes it has there."""

    name: str
    shape: tuple[int, ...]
    stored: tuple[int, ...]


@dataclass(frozen=True)
class Entry:
    """A tensor of theirs and the weights of ours that it holds.

    `axis` is where several pieces are joined (0 rows, 1 columns). With `order`, theirs has the axes named there (dims of
    ours, `parts` for the pieces) and is stored with its leading axes flattened to `shape`.
    """

    theirs: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]
    axis: int = 0
    order: tuple[str, ...] = ()
    dims: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True)
class TensorMap:
    """A map that is total and one-to-one. `ignored` are patterns of tensors of theirs that are dropped."""

    entries: tuple[Entry, ...]
    ignored: tuple[str, ...]

    def is_ignored(self, name: str) -> bool:
        return any(re.fullmatch(_wildcards(p), name) for p in self.ignored)


def _wildcards(pattern: str) -> str:
    return ".*".join(re.escape(part) for part in re.split(r"\*|\{\w*\}", pattern))


@dataclass(eq=False)
class _Rename:
    """A line that names a segment: `path` are the names before it, the segment last; `index` a name for iterations."""

    path: tuple[str, ...]
    text: str
    span: Span
    index: str | None = None
    group: _Group | None = None
    optional: bool = False
    used: bool = False


@dataclass(eq=False)
class _Group:
    """Several of ours in one of theirs, in this order."""

    members: tuple[str, ...]
    form: sx.ListOf | sx.Name
    span: Span


@dataclass
class _Home:
    """What lies in one tensor of theirs while the map is made."""

    rename: _Rename | None
    pieces: dict[str, Parameter] = field(default_factory=dict)


def tensor_map(
    checkpoint: sx.Checkpoint, parameters: Sequence[Parameter], values: Mapping[str, Any] | None = None,
    kinds: frozenset[str] = frozenset(),
) -> TensorMap:  # fmt: skip
    """The map of a model's weights. `values` are the model's arguments, for `if`; `kinds` are names that a line may speak
    of although this model has none (blocks and ops that other models of the family use).

    Raises `SpecError`: map-collision, map-unused-line, map-shape.
    """
    collector = Collector()
    renames, ignored = _lines(checkpoint, values or {}, collector)
    collector.finish()
    homes: dict[str, _Home] = {}
    for parameter in parameters:
        theirs, group = _place(parameter, renames)
        home = homes.setdefault(theirs, _Home(group))
        with collector.collecting():
            _move_in(home, theirs, group, parameter, checkpoint)
    for rename in renames:
        if not (rename.used or rename.optional or _may_be_absent(rename, kinds)):
            collector.add(fail("map-unused-line", f"no weight of the model is at `{'.'.join(rename.path)}`", rename.span))
    entries = []
    for theirs, home in homes.items():
        with collector.collecting():
            entries.append(_entry(theirs, home, checkpoint))
    collector.finish()
    return TensorMap(tuple(entries), tuple(ignored))


def _may_be_absent(rename: _Rename, kinds: frozenset[str]) -> bool:
    return any(part in kinds for part in rename.path)


# --- lines ---------------------------------------------------------------------------------------


def _lines(checkpoint: sx.Checkpoint, values: Mapping[str, Any], collector: Collector) -> tuple[list[_Rename], list[str]]:
    renames: list[_Rename] = []
    ignored: list[str] = []
    for line in checkpoint.equations:
        if isinstance(line, sx.Ignore):
            ignored.extend(p.value for p in line.patterns)
        elif isinstance(line.theirs, sx.String):
            with collector.collecting():
                if line.condition is None or evaluate(line.condition, values):
                    renames.extend(_renames(line))
    return renames, ignored


def _renames(line: sx.Equation) -> list[_Rename]:
    assert isinstance(line.theirs, sx.String)
    text, span = line.theirs.value, line.span
    made = []
    for selector in line.ours:
        expr, optional = selector.value, selector.optional
        if isinstance(expr, sx.Members):
            before = _dotted(expr.value)
            members = tuple(a.value.id for a in expr.items if isinstance(a.value, sx.Name))
            group = _Group(members, line.form, span) if line.form is not None else None
            made += [_Rename((*before, m), text, span, group=group, optional=optional) for m in members]
        elif isinstance(expr, sx.Index):
            (argument,) = expr.arguments
            index = argument.value.id if isinstance(argument.value, sx.Name) else None
            made.append(_Rename(_dotted(expr.value), text, span, index=index, optional=optional))
        else:
            group = _Group((_dotted(expr)[-1],), line.form, span) if line.form is not None else None
            made.append(_Rename(_dotted(expr), text, span, group=group, optional=optional))
    return made


def _dotted(expr: sx.Expr) -> tuple[str, ...]:
    if isinstance(expr, sx.Member):
        return (*_dotted(expr.value), expr.name)
    if isinstance(expr, sx.Index):
        return _dotted(expr.value)
    if isinstance(expr, sx.Name):
        return (expr.id,)
    raise fail("map-shape", "the left side of a tensor line is a path of names", expr.span)


# --- places --------------------------------------------------------------------------------------


def _place(parameter: Parameter, renames: list[_Rename]) -> tuple[str, _Rename | None]:
    """The name of a weight's home, segment by segment, and the line that joins it with others."""
    named: list[tuple[str, str | None]] = []
    parts: list[str] = []
    group: _Rename | None = None
    path = parameter.path
    for i, segment in enumerate(path):
        if isinstance(segment, int):
            continue
        named.append((segment, parameter.kinds[i]))
        number = path[i + 1] if i + 1 < len(path) and isinstance(path[i + 1], int) else None
        rename = _last_match(named, renames)
        if rename is None:
            text = segment if number is None else f"{segment}.{number}"
        else:
            rename.used = True
            text = rename.text if rename.index is None else rename.text.replace("{" + rename.index + "}", str(number))
            if rename.index is None and number is not None:
                text = f"{text}.{number}"
            group = rename if rename.group is not None else group
        if text:
            parts.append(text)
    return ".".join(parts), group


def _last_match(named: list[tuple[str, str | None]], renames: list[_Rename]) -> _Rename | None:
    for rename in reversed(renames):
        tail = named[len(named) - len(rename.path) :]
        if len(tail) == len(rename.path) and all(w in (n, k) for w, (n, k) in zip(rename.path, tail, strict=True)):
            return rename
    return None


def _member(parameter: Parameter, group: _Group) -> str:
    """Which of a group's members a weight belongs to."""
    return next(str(s) for s in reversed(parameter.path) if s in group.members)


def _move_in(home: _Home, theirs: str, rename: _Rename | None, parameter: Parameter, checkpoint: sx.Checkpoint) -> None:
    group = rename.group if rename is not None else None
    key = _member(parameter, group) if group is not None else ""
    other = next(iter(home.pieces.values()), None)
    same_line = rename is not None and home.rename is not None and home.rename.group is group
    if other is not None and (key in home.pieces or not same_line):
        raise fail("map-collision", f"`{parameter.name}` and `{other.name}` would both be `{theirs}`",
                   rename.span if rename is not None else checkpoint.name_span, "this line gives the name",
                   [Label(checkpoint.name_span, "in this map")],
                   help="several of ours in one of theirs: `a.[b, c] = \"name\" as rows`")
    home.pieces[key] = parameter


def _entry(theirs: str, home: _Home, checkpoint: sx.Checkpoint) -> Entry:
    group = home.rename.group if home.rename is not None else None
    if group is None:
        ((_, parameter),) = home.pieces.items()
        return Entry(theirs, parameter.stored_shape, (_piece(parameter),))
    missing = [m for m in group.members if m not in home.pieces]
    if missing:
        raise fail("map-shape", f"`{theirs}` lacks its part `{missing[0]}`", group.span,
                   f"no weight of that name goes to `{theirs}`")
    ordered = [home.pieces[m] for m in group.members]
    if isinstance(group.form, sx.ListOf):
        return _as_axes(theirs, ordered, group)
    return _joined(theirs, ordered, group)


def _piece(parameter: Parameter) -> Piece:
    return Piece(parameter.name, parameter.shape, parameter.stored_shape)


def _joined(theirs: str, parameters: list[Parameter], group: _Group) -> Entry:
    assert isinstance(group.form, sx.Name)
    axis = {"rows": 0, "columns": 1}.get(group.form.id)
    if axis is None:
        raise fail("map-shape", f"`{group.form.id}` is no way to join tensors", group.form.span, "expected rows or columns")
    shapes = [p.stored_shape for p in parameters]
    rest = [s[:axis] + s[axis + 1 :] for s in shapes]
    if any(len(s) <= axis for s in shapes) or len(set(rest)) != 1:
        shown = ", ".join(f"{p.name} {list(p.stored_shape)}" for p in parameters)
        raise fail("map-shape", f"the parts of `{theirs}` do not fit side by side", group.span, shown)
    total = sum(s[axis] for s in shapes)
    shape = shapes[0][:axis] + (total,) + shapes[0][axis + 1 :]
    return Entry(theirs, shape, tuple(_piece(p) for p in parameters), axis)


def _as_axes(theirs: str, parameters: list[Parameter], group: _Group) -> Entry:
    """`as [heads, parts, head_dim, hidden]`: theirs has these axes, flattened like our layout."""
    assert isinstance(group.form, sx.ListOf)
    names = tuple(a.value.id for a in group.form.items if isinstance(a.value, sx.Name))
    first = parameters[0]
    sizes = dict(first.dims)
    here = tuple(n for n in names if n in sizes or n == "parts")
    if set(here) - {"parts"} != set(sizes) or any(tuple(p.shape) != tuple(first.shape) for p in parameters):
        raise fail("map-shape", f"`as` must name the dims {', '.join(sizes)} of each part of `{theirs}`", group.form.span)
    if len(parameters) > 1 and "parts" not in here:
        raise fail("map-shape", "`parts` must stand where the parts lie", group.form.span)
    columns = 1
    last = first.weight.layout[-1] if len(first.weight.layout) > 1 and "parts" in here else here[-1:]
    for n in last:
        columns *= sizes.get(n, 1)
    total = len(parameters)
    for size in sizes.values():
        total *= size
    shape = (total // columns, columns) if len(first.weight.layout) > 1 else (total,)
    return Entry(theirs, shape, tuple(_piece(p) for p in parameters), 0, here, first.dims)


__all__ = ["Entry", "Piece", "SpecError", "TensorMap", "tensor_map"]
