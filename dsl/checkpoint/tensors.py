"""The tensors of a map: every weight of ours has one home in theirs, and every home has its weights."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import groupby
from typing import Any

from .. import syntax as sx
from ..diagnostics import Collector, Label, SpecError, fail, near_or_all
from ..program import WRAPPED, Parameter
from ..source import Span
from .naming import Group, Place, Rename, Renames, place, read_lines


@dataclass(frozen=True)
class Piece:
    """A weight of ours inside a tensor of theirs: `shape` are our dims, `stored` the axes that it has there.

    With `index` it is only that index of our first dim, which `shape` and `stored` then lack.
    """

    name: str
    shape: tuple[int, ...]
    stored: tuple[int, ...]
    index: int | None = None


@dataclass(frozen=True)
class Entry:
    """A tensor of theirs and the weights of ours that it holds.

    `axis` is where several pieces are joined (0 rows, 1 columns). With `order`, theirs has the axes named there (`dims`
    of ours, `parts` for the pieces), flattened to `shape`.
    """

    theirs: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]
    axis: int = 0
    order: tuple[str, ...] = ()
    dims: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True)
class TensorMap:
    """A map that is total and one-to-one. `ignored` are patterns of tensors of theirs that are dropped: `{i}` stands
    for a number, `*` for anything."""

    entries: tuple[Entry, ...]
    ignored: tuple[str, ...] = ()

    @cached_property
    def _ignoring(self) -> re.Pattern[str] | None:
        return re.compile("|".join(map(_wildcards, self.ignored))) if self.ignored else None

    def is_ignored(self, name: str) -> bool:
        return self._ignoring is not None and self._ignoring.fullmatch(name) is not None


def _wildcards(pattern: str) -> str:
    words = {"*": ".*", "{": r"\d+"}
    return "".join(words.get(part[:1], re.escape(part)) for part in re.split(r"(\*|\{\w+\})", pattern))


@dataclass
class _Home:
    """What lies in one tensor of theirs while the map is made."""

    place: Place
    pieces: dict[str, Parameter] = field(default_factory=dict)

    @property
    def group(self) -> Group | None:
        return self.place.rename.group if self.place.rename is not None else None


def tensor_map(
    checkpoint: sx.Checkpoint, parameters: Sequence[Parameter], values: Mapping[str, Any] | None = None,
    kinds: frozenset[str] = frozenset(),
) -> TensorMap:  # fmt: skip
    """The map of a model's weights. `values` are the model's arguments, for `if` and in names; `kinds` are blocks and
    ops of which a line may speak although this model has none (other models of the family do).

    Raises `SpecError`: map-collision, map-unused-line, map-shape.
    """
    collector = Collector()
    renames, ignored = read_lines(checkpoint, values or {})
    found = Renames(renames)
    homes: dict[str, _Home] = {}
    for parameter in parameters:
        with collector.collecting():
            _move_in(homes, parameter, place(parameter, found, values or {}), checkpoint)
    occurring = {word for p in parameters for word in (*p.path, *p.kinds)}
    joined = {rename.group for rename in renames if rename.used and rename.group is not None}
    for rename in renames:
        absent = any(word in kinds and word not in occurring for word, _ in rename.path)
        if not (rename.used or rename.optional or absent or rename.group in joined):
            collector.add(
                fail(
                    "map-unused-line",
                    f"no weight of the model is at `{rename.shown}`",
                    rename.span,
                    help=_near_path(rename, parameters),
                )
            )
    entries: list[Entry] = []
    for theirs, home in homes.items():
        with collector.collecting():
            entries.extend(_entries(theirs, home))
    _check_names(entries, checkpoint, collector)
    collector.finish()
    return TensorMap(tuple(entries), tuple(ignored))


def _near_path(rename: Rename, parameters: Sequence[Parameter]) -> str | None:
    """What lies where a line looks: the parts beside what it names, else paths that look like it."""
    *before, last = (word for word, _ in rename.path)
    paths = list(dict.fromkeys(tuple(w for w in p.path if isinstance(w, str) and w != WRAPPED) for p in parameters))
    beside = dict.fromkeys(
        path[at + len(before)]
        for path in paths
        for at in range(len(path) - len(before))
        if before and list(path[at : at + len(before)]) == before
    )
    words = dict.fromkeys(w for path in paths for w in path)
    if beside:
        return near_or_all(last, beside, f"a part of `{'.'.join(before)}`", f"the parts of `{'.'.join(before)}` are")
    return near_or_all(last, words, "a part", "the parts of the model are")


def _move_in(homes: dict[str, _Home], parameter: Parameter, where: Place, checkpoint: sx.Checkpoint) -> None:
    home = homes.setdefault(where.name, _Home(where))
    group = where.rename.group if where.rename is not None else None
    key = where.rename.path[-1][0] if where.rename is not None else ""
    other = next(iter(home.pieces.values()), None)
    if other is not None and (key in home.pieces or group is None or home.group is not group):
        spans = list(dict.fromkeys(s for s in (home.place.span, where.span) if s is not None))
        raise _collision(other.name, parameter.name, where.name, spans, checkpoint)
    home.pieces[key] = parameter


def _collision(name: str, other: str, theirs: str, spans: Sequence[Span], checkpoint: sx.Checkpoint) -> SpecError:
    """`spans` are the lines that give the name, if there are any."""
    span = spans[-1] if spans else checkpoint.name_span
    before = [Label(s, "as this one does") for s in spans[:-1]] or [Label(checkpoint.name_span, "in this map")]
    return fail(
        "map-collision",
        f"`{name}` and `{other}` would both be `{theirs}`",
        span,
        "this line gives the name" if spans else "",
        before if spans else (),
        help='to join them: `a.[b, c] = "name" as rows`',
    )


def _check_names(entries: Sequence[Entry], checkpoint: sx.Checkpoint, collector: Collector) -> None:
    """No name of theirs twice: an index that was filled in may meet a name that was written out."""
    seen: dict[str, Entry] = {}
    for entry in entries:
        other = seen.setdefault(entry.theirs, entry)
        if other is not entry:
            collector.add(_collision(other.pieces[0].name, entry.pieces[0].name, entry.theirs, (), checkpoint))
        if not entry.theirs:
            collector.add(
                fail(
                    "map-shape",
                    f"`{entry.pieces[0].name}` would have no name",
                    checkpoint.name_span,
                    'every line that speaks of it gives ""',
                    help="one of them must give a name",
                )
            )


# --- one home, one or more tensors of theirs -----------------------------------------------------


def _entries(theirs: str, home: _Home) -> Iterator[Entry]:
    parameters, dim = _ordered(theirs, home), home.place.dim
    if dim is None:
        yield _entry(theirs, parameters, home.group)
        return
    for p in parameters:
        if p.dims[0][0] != dim:
            raise fail(
                "map-shape",
                f"`{p.name}` cannot be cut along `{dim}`: only its first dim `{p.dims[0][0]}` "
                "can have a tensor for each index",
                home.place.span or p.weight.span,
            )
    whole = _entry(theirs, [_without_first(p) for p in parameters], home.group)
    for index in range(parameters[0].dims[0][1]):
        pieces = tuple(replace(p, index=index) for p in whole.pieces)
        yield replace(whole, theirs=theirs.replace(f"{{{dim}}}", str(index)), pieces=pieces)


def _ordered(theirs: str, home: _Home) -> list[Parameter]:
    if home.group is None:
        return list(home.pieces.values())
    missing = [m for m in home.group.members if m not in home.pieces]
    if missing:
        raise fail(
            "map-shape",
            f"`{theirs}` lacks its part `{missing[0]}`",
            home.group.span,
            f"no weight of that name goes to `{theirs}`",
        )
    return [home.pieces[m] for m in home.group.members]


def _without_first(p: Parameter) -> Parameter:
    """A weight as one index of its first dim sees it."""
    first = p.dims[0][0]
    layout = tuple(tuple(d for d in axis if d != first) for axis in p.weight.layout)
    layout = tuple(new for new, old in zip(layout, p.weight.layout, strict=True) if new or not old)
    return replace(p, dims=p.dims[1:], weight=replace(p.weight, dims=p.weight.dims[1:], layout=layout))


def _entry(theirs: str, parameters: list[Parameter], group: Group | None) -> Entry:
    if group is None:
        (only,) = parameters
        return Entry(theirs, only.stored_shape, (_piece(only),))
    if isinstance(group.form, sx.ListOf):
        return _as_axes(theirs, parameters, group.form)
    return _joined(theirs, parameters, group.form)


def _piece(parameter: Parameter) -> Piece:
    return Piece(parameter.name, parameter.shape, parameter.stored_shape)


def _joined(theirs: str, parameters: list[Parameter], form: sx.Name) -> Entry:
    axis = {"rows": 0, "columns": 1}.get(form.id)
    if axis is None:
        raise fail("map-shape", f"`{form.id}` is no way to join tensors", form.span, "expected rows or columns")
    shapes = [p.stored_shape for p in parameters]
    rest = {s[:axis] + s[axis + 1 :] for s in shapes}
    if any(len(s) <= axis for s in shapes) or len(rest) != 1:
        shown = ", ".join(f"{p.name} {list(p.stored_shape)}" for p in parameters)
        raise fail(
            "map-shape",
            f"the parts of `{theirs}` do not fit side by side",
            form.span,
            shown,
            help="`rows` joins along the first axis, `columns` along the second; the others must be the same",
        )
    total = sum(s[axis] for s in shapes)
    shape = (*shapes[0][:axis], total, *shapes[0][axis + 1 :])
    return Entry(theirs, shape, tuple(_piece(p) for p in parameters), axis)


def _as_axes(theirs: str, parameters: list[Parameter], form: sx.ListOf) -> Entry:
    """`as [heads, parts, head_dim, hidden]`: theirs has these axes; neighbours that are one axis in our layout are one
    in theirs. A bias names the axes that it has."""
    names = [a.value.id if isinstance(a.value, sx.Name) else "" for a in form.items]
    first = parameters[0]
    sizes = dict(first.dims)
    order = tuple(n for n in names if n in sizes or n == "parts")
    if sorted(n for n in order if n != "parts") != sorted(sizes) or order.count("parts") > 1:
        raise fail(
            "map-shape",
            f"`as` must name each dim of `{first.name}` once: {', '.join(sizes)}",
            form.span,
            _unlike(names, sizes),
        )
    if any(p.dims != first.dims for p in parameters):
        shown = ", ".join(f"{p.name} [{', '.join(f'{n} = {s}' for n, s in p.dims)}]" for p in parameters)
        raise fail("map-shape", f"the parts of `{theirs}` have not the same dims", form.span, shown)
    if len(parameters) > 1 and "parts" not in order:
        raise fail(
            "map-shape",
            "`parts` must stand where the parts lie",
            form.span,
            "names dims only",
            help=f"for example `[parts, {', '.join(names)}]`",
        )
    shape = _flattened(order, {**sizes, "parts": len(parameters)}, first, form.span)
    return Entry(theirs, shape, tuple(_piece(p) for p in parameters), 0, order, first.dims)


def _unlike(names: Sequence[str], sizes: Mapping[str, int]) -> str:
    """What a list of dims has too few and too many of."""
    missing = [n for n in sizes if n not in names]
    twice = [n for n in dict.fromkeys(names) if names.count(n) > 1]
    found = [f"lacks {', '.join(missing)}"] * bool(missing) + [f"has {', '.join(twice)} twice"] * bool(twice)
    return " and ".join(found)


def _flattened(order: tuple[str, ...], sizes: Mapping[str, int], first: Parameter, span: Span) -> tuple[int, ...]:
    """Axes of theirs: runs of dims that are one axis of our layout; the parts go with the output dims beside them."""
    home = {d: i for i, axis in enumerate(first.weight.layout) for d in axis}
    axes = [home.get(d) for d in order]
    for i, axis in enumerate(axes):
        if axis is None:
            axes[i] = min((a for a in (*axes[max(i - 1, 0) : i], *axes[i + 1 : i + 2]) if a is not None), default=0)
    placed = groupby(zip(order, axes, strict=True), key=lambda pair: pair[1])
    runs = [(axis, [d for d, _ in run]) for axis, run in placed]
    if len({axis for axis, _ in runs}) != len(runs):
        raise fail("map-shape", f"the dims of one axis of `{first.name}` must stand side by side", span)
    return tuple(math.prod(sizes[d] for d in run) for _, run in runs)
