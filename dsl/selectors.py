"""What a selector names: `out`, `moe.up`, `linear in attention`, `linear in layer[last(8)]`.

A selector is a small automaton over the segments of a path, from the root down: `a.b` is b directly in a, `a in b` is
a anywhere below b, and an index picks iterations. Its states are all that a block must know of the path above it, so
blocks under equal states are one block, however many iterations there are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from . import syntax as sx
from .diagnostics import fail

States = frozenset[int]
START: States = frozenset({0})


@dataclass(frozen=True)
class Pick:
    """Iterations of a loop: the `first` or `last` n, or `at` the places listed."""

    way: str
    values: tuple[int, ...]

    def has(self, index: int, count: int) -> bool:
        """Whether iteration `index` of `count` is picked."""
        if self.way == "at":
            return index in self.values
        return index < self.values[0] if self.way == "first" else index >= count - self.values[0]


@dataclass(frozen=True)
class Step:
    """One segment that must come: directly behind the one before, or `below` it at any depth."""

    name: str
    picks: tuple[Pick, ...] = ()
    below: bool = True


@dataclass(frozen=True)
class Selector:
    """Steps from the outermost segment to the one that is selected. `optional`: it may select nothing."""

    steps: tuple[Step, ...]
    optional: bool = False

    def advance(self, states: States, names: Iterable[str | None], index: tuple[int, int] | None = None) -> States:
        """States behind one more segment: `names` are what it is called and stands for, `index` (i, of n) in a loop."""
        known = set(names)
        found = {s for s in states if s < len(self.steps) and self.steps[s].below}
        for s in states:
            if s < len(self.steps) and self.steps[s].name in known:
                picks = self.steps[s].picks
                if not picks or index is not None and any(p.has(*index) for p in picks):
                    found.add(s + 1)
        return frozenset(found)

    def accepts(self, states: States) -> bool:
        """Whether the segment just read is selected."""
        return len(self.steps) in states

    @property
    def counts_iterations(self) -> bool:
        return any(step.picks for step in self.steps)

    def __str__(self) -> str:
        text = ""
        for step in self.steps:
            shown = step.name + (f"[{', '.join(map(_pick_text, step.picks))}]" if step.picks else "")
            text = shown if not text else f"{shown} in {text}" if step.below else f"{text}.{shown}"
        return text + "?" * self.optional


def _pick_text(pick: Pick) -> str:
    return ", ".join(map(str, pick.values)) if pick.way == "at" else f"{pick.way}({pick.values[0]})"


Numbers = Callable[[sx.Expr], list[int]]


def read(selector: sx.Selector, numbers: Numbers) -> Selector:
    """The selector that a text says; `numbers` evaluates an index to whole numbers. Raises `wrong-selector`."""
    return Selector(tuple(_steps(selector.value, numbers)), selector.optional)


def _steps(expr: sx.Expr, numbers: Numbers) -> list[Step]:
    match expr:
        case sx.Name(id=name):
            return [Step(name)]
        case sx.Member(value=inner, name=name):
            return [*_steps(inner, numbers), Step(name, below=False)]
        case sx.Binary(operator="in", left=left, right=right):
            return _steps(right, numbers) + _steps(left, numbers)
        case sx.Index(value=inner, arguments=arguments):
            *before, last = _steps(inner, numbers)
            picks = tuple(_pick(a.value, numbers) for a in arguments)
            return [*before, Step(last.name, last.picks + picks, last.below)]
    raise fail(
        "wrong-selector",
        "this does not name a part of a model",
        expr.span,
        help="selectors are names: `out`, `moe.up`, `linear in attention`, `linear in layer[last(8)]`",
    )


def _pick(expr: sx.Expr, numbers: Numbers) -> Pick:
    match expr:
        case sx.Call(function=sx.Name(id="first" | "last" as way), arguments=(argument,)) if argument.name is None:
            return Pick(way, tuple(numbers(argument.value)[:1]))
    return Pick("at", tuple(numbers(expr)))


def written(selector: Selector) -> sx.Selector:
    """The selector as syntax; `read` gives it back."""
    expr: Any = None
    for step in selector.steps:
        if expr is not None and not step.below:
            expr = sx.Member(expr, step.name)
            if step.picks:
                expr = sx.Index(expr, _indices(step))
            continue
        made: sx.Expr = sx.Name(step.name)
        if step.picks:
            made = sx.Index(made, _indices(step))
        expr = made if expr is None else sx.Binary("in", made, expr)
    return sx.Selector(expr, selector.optional)


def _indices(step: Step) -> tuple[sx.Argument, ...]:
    return tuple(sx.Argument(_index(p)) for p in step.picks)


def _index(pick: Pick) -> sx.Expr:
    numbers = tuple(sx.Number(v, str(v)) for v in pick.values)
    if pick.way == "at":
        return numbers[0] if len(numbers) == 1 else sx.ListOf(tuple(sx.Argument(n) for n in numbers))
    return sx.Call(sx.Name(pick.way), (sx.Argument(numbers[0]),))
