"""Layouts as plain data: a mesh, what is split over which of its axes, stages, and what must hold.

`layout_of` follows a layout to those that it is made from; a rule that is said again replaces what it said.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from . import syntax as sx
from .diagnostics import Diagnostic, Label, SpecError, did_you_mean, fail, listed
from .load import File
from .selectors import Selector, read
from .source import NOWHERE, Span
from .ways import Way, ways_of

STORED = ("parameters", "gradients", "optimizer")
"""What is split where it is stored only: no dim of the model."""
SCHEDULES = ("interleaved", "zero_bubble")


@dataclass(frozen=True)
class Split:
    """`shard D over A [between blocks]`: the dims that a selector names, split over axes, the outer axis first."""

    selector: Selector
    axes: tuple[str, ...]
    between: bool = False
    span: Span = field(default=NOWHERE, compare=False, repr=False)


@dataclass(frozen=True)
class Stages:
    """`stages over A`: layers one after the other on the ranks of an axis, micro-batches in the order of a schedule.

    A schedule is "1f1b" where nothing is said, or one of `SCHEDULES`; a rank has `chunks` stages. `layers` are the
    layers of each stage, if they are not to be divided evenly.
    """

    axis: str
    schedule: str = "1f1b"
    chunks: int = 1
    microbatches: int = 1
    layers: tuple[int, ...] | None = None
    span: Span = field(default=NOWHERE, compare=False, repr=False)


@dataclass(frozen=True)
class Expectation:
    """`expect all_reduce per attention <= 1`."""

    what: str
    per: str | None
    comparison: str
    bound: int
    span: Span = field(default=NOWHERE, compare=False, repr=False)

    def holds(self, count: int) -> bool:
        """Whether a number of collectives is what was expected."""
        tests: dict[str, Callable[[int, int], bool]] = {
            "<=": lambda a, b: a <= b, ">=": lambda a, b: a >= b, "<": lambda a, b: a < b, ">": lambda a, b: a > b,
            "==": lambda a, b: a == b, "=": lambda a, b: a == b, "!=": lambda a, b: a != b,
        }  # fmt: skip
        return tests[self.comparison](count, self.bound)


@dataclass(frozen=True)
class Layout:
    """How a model lies on a mesh of ranks. `stored` says which axes split parameters, gradients or optimizer state;
    `ways` how parts of it are computed where their sequence is split: later ones win. `apart` says where parameters are
    whole: between "blocks" they are not, and gathered again for the backward pass, or only between "microbatches"."""

    name: str
    mesh: tuple[tuple[str, int], ...]
    splits: tuple[Split, ...] = ()
    stored: tuple[tuple[str, tuple[str, ...], Span], ...] = ()
    apart: str = "blocks"
    stages: Stages | None = None
    recompute: tuple[Selector, ...] = ()
    ways: tuple[Way, ...] = ()
    expects: tuple[Expectation, ...] = ()
    span: Span = field(default=NOWHERE, compare=False, repr=False)
    mesh_span: Span = field(default=NOWHERE, compare=False, repr=False)

    @property
    def ranks(self) -> int:
        """How many ranks the mesh has."""
        total = 1
        for _, size in self.mesh:
            total *= size
        return total

    def size(self, axis: str) -> int:
        """How many ranks an axis has; 1 for one that the mesh lacks."""
        return dict(self.mesh).get(axis, 1)

    def stored_over(self, what: str) -> tuple[str, ...]:
        """The axes over which something is split where it is stored; what parameters are split over, all else is."""
        order = STORED[: STORED.index(what) + 1]
        found = [axes for name, axes, _ in self.stored if name in order]
        return tuple(dict.fromkeys(a for axes in found for a in axes if self.size(a) > 1))


def layouts(file: File) -> list[str]:
    """The names of the layouts that a file declares or uses, in order."""
    own = [name for name, d in file.declared.items() if getattr(d, "keyword", "") == "layout"]
    used = [n for n in file.used if (f := file.lookup(n)) and getattr(f.declaration, "keyword", "") == "layout"]
    return own + used


def layout_of(file: File, name: str | None = None, sizes: Mapping[str, int] | None = None) -> Layout:
    """The layout of a file, the one named or else its last. `sizes` are other sizes of axes of its mesh.

    Raises `SpecError`: unknown-name, wrong-type, out-of-range, not-built-yet, and what ways and selectors raise.
    """
    known = layouts(file)
    span = Span(file.source, 0, 0)
    if name is None and not known:
        raise fail("unknown-name", f"`{file.source.name}` has no layout", span, help="`layout NAME:` declares one")
    name = known[-1] if name is None else name
    found = file.lookup(name)
    if found is None or getattr(found.declaration, "keyword", "") != "layout":
        near = did_you_mean(name, known, "a layout") or (f"layouts: {listed(known)}" if known else None)
        raise fail("unknown-name", f"no layout is named `{name}`", span, help=near)
    declaration = found.declaration
    assert isinstance(declaration, (sx.Sheet, sx.Variant))
    layout = Layout(name, (), span=declaration.name_span)
    errors: list[Diagnostic] = []
    for rule in _rules(found.file, declaration):
        try:
            layout = _with(layout, rule)
        except SpecError as error:
            errors.extend(error.diagnostics)
    if errors:
        raise SpecError(errors)
    return _resized(layout, sizes or {})


def _rules(file: File, d: sx.Sheet | sx.Variant) -> Iterator[sx.Rule]:
    """The rules of a layout behind those of what it is made from."""
    if isinstance(d, sx.Variant) and isinstance(d.value, sx.Name) and (base := file.lookup(d.value.id)) is not None:
        assert isinstance(base.declaration, (sx.Sheet, sx.Variant))
        yield from _rules(base.file, base.declaration)
    yield from d.rules


def _resized(layout: Layout, sizes: Mapping[str, int]) -> Layout:
    for axis, size in sizes.items():
        if axis not in dict(layout.mesh):
            axes = listed(a for a, _ in layout.mesh)
            raise fail("unknown-name", f"the mesh of `{layout.name}` has no axis `{axis}`", layout.mesh_span,
                       help=f"its axes are {axes}")  # fmt: skip
        if size < 1:
            raise fail("out-of-range", f"an axis of {size} ranks is none", layout.mesh_span)
    return replace(layout, mesh=tuple((a, sizes.get(a, n)) for a, n in layout.mesh))


def _with(layout: Layout, rule: sx.Rule) -> Layout:
    """A layout with one more rule."""
    match rule:
        case sx.Mesh(axes=axes):
            mesh = tuple((a.name, _whole(a.value, f"axis `{a.name}`")) for a in axes)
            return replace(layout, mesh=mesh, mesh_span=rule.span)
        case sx.Shard():
            return _sharded(layout, rule)
        case sx.Stages():
            return replace(layout, stages=_stages(rule))
        case sx.Recompute(selectors=selectors):
            return replace(layout, recompute=tuple(read(s, _numbers) for s in selectors))
        case sx.Expect():
            bound = _whole(rule.bound, "the bound", least=0)
            made = Expectation(rule.what, rule.per, rule.comparison, bound, rule.span)
            rest = tuple(e for e in layout.expects if (e.what, e.per) != (rule.what, rule.per))
            return replace(layout, expects=(*rest, made))
        case sx.Apply():
            made_ways = ways_of(rule, _numbers)
            said = {w.selector.steps for w in made_ways}
            return replace(layout, ways=(*(w for w in layout.ways if w.selector.steps not in said), *made_ways))
        case sx.Scoped():
            what = "another mesh inside a block (folding)"
        case _:
            what = "a setting of a layout"
    raise fail("not-built-yet", f"{what} is not built yet", rule.span,
               help="`shard`, `stages`, `recompute`, `expect` and ways (`attend: ring`) are")  # fmt: skip


def _sharded(layout: Layout, rule: sx.Shard) -> Layout:
    splits, stored, apart = layout.splits, layout.stored, layout.apart
    for item in rule.dims:
        selector = read(item, _numbers)
        name = selector.steps[-1].name
        is_stored = len(selector.steps) == 1 and name in STORED
        if rule.between is not None and (name != "parameters" if is_stored else rule.between != "blocks"):
            raise fail("unknown-name", f"`{name}` is not sharded between `{rule.between}`", rule.span,
                       help="dims are between `blocks`, parameters between `blocks` or `microbatches`, "
                       "in lines of their own")  # fmt: skip
        if is_stored:
            apart = (rule.between or "blocks") if name == "parameters" else apart
            stored = (*(s for s in stored if s[0] != name), (name, rule.axes, rule.span))
            continue
        made = Split(selector, rule.axes, rule.between == "blocks", rule.span)
        splits = (*(s for s in splits if (s.selector.steps, s.between) != (selector.steps, made.between)), made)
    return replace(layout, splits=splits, stored=stored, apart=apart)


def _stages(rule: sx.Stages) -> Stages:
    made = Stages(rule.axis, span=rule.span)
    for setting in rule.settings:
        if setting.name == "microbatches":
            made = replace(made, microbatches=_whole(setting.value, "`microbatches`"))
        elif setting.name == "schedule":
            made = _scheduled(made, setting.value)
        elif setting.name == "layers":
            made = replace(made, layers=tuple(_numbers(setting.value)))
        else:
            raise fail("unknown-setting", f"stages have no setting `{setting.name}`", setting.span,
                       help=did_you_mean(setting.name, ("schedule", "microbatches", "layers"), "a setting")
                       or "settings are `schedule`, `microbatches`, `layers`")  # fmt: skip
    return made


def _scheduled(stages: Stages, value: sx.Expr) -> Stages:
    chunks = 1
    if isinstance(value, sx.Call) and isinstance(value.function, sx.Name):
        for argument in value.arguments:
            if argument.name not in (None, "chunks"):
                raise fail("unknown-setting", f"a schedule has no setting `{argument.name}`", argument.value.span)
            chunks = _whole(argument.value, "`chunks`")
        value = value.function
    name = value.id if isinstance(value, sx.Name) else value.value if isinstance(value, sx.String) else None
    if name not in SCHEDULES:
        raise fail("unknown-name", "this is no schedule of a pipeline", value.span,
                   help=f"schedules are {listed(SCHEDULES)}")  # fmt: skip
    return replace(stages, schedule=str(name), chunks=chunks)


def _numbers(expr: sx.Expr) -> list[int]:
    """The whole numbers of an index: one, or a list of them."""
    if isinstance(expr, sx.ListOf):
        return [n for item in expr.items for n in _numbers(item.value)]
    return [_whole(expr, "a place", least=0)]


def _whole(expr: sx.Expr, what: str, least: int = 1) -> int:
    """A whole number that stands in a rule. Raises `wrong-type`, `out-of-range`."""
    value = _value(expr)
    if value is None or isinstance(value, float):
        raise fail("wrong-type", f"{what} must be a whole number", expr.span, "this is none")
    if value < least:
        raise fail("out-of-range", f"{what} must be at least {least}", expr.span, f"this is {value}")
    return value


def _value(expr: sx.Expr) -> Any:
    match expr:
        case sx.Number(value=value):
            return value
        case sx.Unary(operator="-", value=inner):
            found = _value(inner)
            return None if found is None else -found
        case sx.Binary(operator="+" | "-" | "*" as op, left=left, right=right):
            a, b = _value(left), _value(right)
            if a is None or b is None:
                return None
            return a + b if op == "+" else a - b if op == "-" else a * b
    return None


def label(split: Split) -> Label:
    """Where a rule stands, for messages about what follows from it."""
    return Label(split.span, f"split over {', '.join(f'`{a}`' for a in split.axes)} here")
