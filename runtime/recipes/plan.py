"""What a recipe will do, worked out and checked before anything runs: its steps, in order, with all arguments.

A recipe is a function over models and data. A call of a step at the right side of `name = ...` fills the folder `name`;
one inside of another call fills a folder behind a dot (`wide.by`), one of a list a numbered one (`tuned.0`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...dsl import syntax as sx
from ...dsl.diagnostics import did_you_mean, fail
from ...dsl.load import File
from ...dsl.source import Span
from ..check import program_of
from .checking import WORDS, Checked
from .searching import searched
from .values import Data, Made, Objective, Schedule, Spec, Step, kind_of

REQUIRED = object()
STEPS: dict[str, dict[str, Any]] = {
    "load": {"model": REQUIRED, "folder": REQUIRED, "map": None},
    "importance": {"model": REQUIRED, "data": REQUIRED, "samples": 1024, "batch": "l2", "seq": "mean", "length": 512,
                   "rows": 8, "depth": "bi"},
    "prune": {"model": REQUIRED, "to": REQUIRED, "by": None, "keep": None, "merge_heads": False},
    "train": {"model": REQUIRED, "data": REQUIRED, "objective": None, "tokens": None, "steps": None, "lr": 1e-3,
              "batch": 8, "seq": 512, "seed": 0, "weight_decay": 0.1, "clip": 1.0, "dtype": "fp32"},
    "search": {"model": REQUIRED, "data": REQUIRED, "to": REQUIRED, "by": None, "grid": REQUIRED, "target": REQUIRED,
               "tolerance": 0.05, "objective": None, "tokens": None, "steps": None, "lr": 1e-3, "batch": 8, "seq": 512,
               "seed": 0, "weight_decay": 0.1, "clip": 1.0, "dtype": "fp32", "rows": 64, "merge_heads": False},
    "report": {"models": REQUIRED, "data": REQUIRED, "seq": 512, "rows": 64},
}  # fmt: skip
"""The steps that exist, with their parameters and defaults."""
SCHEDULES = {"cosine": "cosine", "wsd": "wsd", "constant": "constant"}


@dataclass(frozen=True)
class Plan:
    """The steps of a recipe, and the names of what it returns."""

    name: str
    steps: tuple[Step, ...]
    returned: tuple[str, ...]


def planned(file: File, recipe: str | None = None, settings: Mapping[str, Any] | None = None) -> Plan:
    """The plan of a recipe of a file (the last, if none is named).

    `settings` are parameters of the recipe by name, and arguments of its steps as `step.argument`.
    Raises `SpecError`: unknown-name, nothing-declared, missing-argument, no-such-parameter, wrong-type, and what the
    models of the recipe are wrong in: a student that is no part of its teacher, a vocabulary that is another.
    """
    names = [n for n, d in file.declared.items() if isinstance(d, sx.Function) and d.keyword == "recipe"]
    if not names:
        raise fail("nothing-declared", f"`{file.source.name}` declares no recipe", Span(file.source, 0, 0),
                   help="a recipe starts with `recipe NAME(data):`")  # fmt: skip
    name = recipe or names[-1]
    if name not in names:
        raise fail("unknown-name", f"`{file.source.name}` has no recipe named `{name}`", Span(file.source, 0, 0),
                   help=did_you_mean(name, names, "a recipe"))  # fmt: skip
    declaration = file.declared[name]
    assert isinstance(declaration, sx.Function)
    return _Planner(file, declaration, dict(settings or {})).plan()


class _Planner:
    def __init__(self, file: File, recipe: sx.Function, settings: dict[str, Any]):
        self.file, self.recipe = file, recipe
        self.over = {tuple(k.rsplit(".", 1)): v for k, v in settings.items() if "." in k}
        self.used: set[tuple[str, ...]] = set()
        self.names: dict[str, Any] = {}
        self.steps: list[Step] = []
        given = {k: v for k, v in settings.items() if "." not in k}
        for parameter in recipe.parameters:
            if parameter.name == "data":
                self.names["data"] = Data()
            elif parameter.name in given:
                self.names[parameter.name] = given.pop(parameter.name)
            elif parameter.default is not None:
                self.names[parameter.name] = self.value(parameter.default, parameter.name)
            else:
                raise fail("missing-argument", f"the recipe needs `{parameter.name}`", recipe.name_span,
                           help=f"--set {parameter.name}=VALUE gives it")  # fmt: skip
        if given:
            self._no_parameter(next(iter(given)), [p.name for p in recipe.parameters], f"`{recipe.name}`")

    def plan(self) -> Plan:
        returned: list[Any] = []
        for statement in self.recipe.body:
            match statement:
                case sx.Assign(names=(name,), values=(expr,)):
                    if name in self.names:
                        raise fail("bound-twice", f"`{name}` is bound already", statement.span)
                    self.names[name] = self.value(expr, name)
                case sx.Return(values=values):
                    returned = [self.value(v, "result") for v in values]
                case _:
                    raise fail("not-built-yet", "a recipe is made of `name = step(...)` and `return`", statement.span)
        for at in self.over.keys() - self.used:
            steps = [s.name for s in self.steps]
            if at[0] not in steps:
                raise fail("unknown-name", f"`{self.recipe.name}` has no step `{at[0]}`", self.recipe.name_span,
                           help=did_you_mean(at[0], steps, "a step"))  # fmt: skip
            step = next(s for s in self.steps if s.name == at[0])
            self._no_parameter(at[1], list(STEPS[step.kind]), f"the step `{step.kind}` of `{at[0]}`")
        flat = [x for r in returned for x in (r if isinstance(r, list) else [r])]
        return Plan(self.recipe.name, tuple(self.steps), tuple(m.step for m in flat if isinstance(m, Made)))

    def _no_parameter(self, name: str, known: list[str], whose: str) -> None:
        raise fail("no-such-parameter", f"{whose} has no parameter `{name}`", self.recipe.name_span,
                   help=did_you_mean(name, known, "a parameter"))  # fmt: skip

    # --- expressions ------------------------------------------------------------------------------

    def value(self, expr: sx.Expr, at: str) -> Any:
        """The value of an expression; a step that it calls fills the folder `at`."""
        match expr:
            case sx.Number(value=number):
                return int(number) if float(number).is_integer() else number
            case sx.String(value=text):
                return text
            case sx.Constant(value=constant):
                return constant
            case sx.Unary(operator="-", value=inner):
                return -self.value(inner, at)
            case sx.Name(id=name):
                return self._named(name, expr.span)
            case sx.ListOf(items=items):
                found: list[Any] = []
                for i, item in enumerate(items):
                    one = self.value(item.value, f"{at}.{i}")
                    found.extend(one if isinstance(item.value, sx.Range) else [one])
                return found
            case sx.Range(first=first, last=last, step=step):
                by = 1 if step is None else self.value(step, at)
                return list(range(self.value(first, at), self.value(last, at) + 1, by))
            case sx.Table(pairs=pairs):
                return {pair.key: self.value(pair.value, at) for pair in pairs}
            case sx.Comprehension(names=(name,), source=source, body=body, condition=None):
                made = []
                for i, item in enumerate(self.value(source, at)):
                    before = dict(self.names)
                    self.names[name] = item
                    made.append(self.value(body, f"{at}.{i}"))
                    self.names = before
                return made
            case sx.Call(function=sx.Name(id=name)):
                return self._call(name, expr, at)
        raise fail("not-built-yet", "this is not built yet in recipes", expr.span)

    def _named(self, name: str, span: Span) -> Any:
        if name in self.names:
            return self.names[name]
        found = self.file.lookup(name)
        if found is not None and getattr(found.declaration, "keyword", None) == "model":
            return Spec(found.file, name, program_of(found.file, name))
        if name in WORDS:
            return name
        known = [*self.names, *self.file.declared, *STEPS, *WORDS]
        raise fail("unknown-name", f"nothing is named `{name}` here", span, help=did_you_mean(name, known, "something"))

    def _call(self, name: str, call: sx.Call, at: str) -> Any:
        if name in SCHEDULES:
            return self._schedule(name, call, at)
        if name not in STEPS:
            block = self.file.lookup(name)
            help = did_you_mean(name, [*STEPS, *SCHEDULES], "a step")
            if block is not None and getattr(block.declaration, "keyword", None) == "block":
                help = f"an objective of this name trains: `train(model, data, objective = {name}(it, ...))`"
            raise fail("unknown-name", f"there is no step `{name}`", call.function.span, help=help)
        slots = STEPS[name]
        given: dict[str, Any] = {}
        spans: dict[str, Span] = {}
        for place, argument in enumerate(call.arguments):
            key = argument.name or (list(slots)[place] if place < len(slots) else "")
            if key not in slots:
                raise fail("no-such-parameter", f"the step `{name}` has no parameter `{key or place}`", argument.span,
                           help=did_you_mean(key, slots, "a parameter"))  # fmt: skip
            if key in given:
                raise fail("duplicate-argument", f"`{key}` is given twice", argument.span)
            spans[key] = argument.value.span
            given[key] = (
                self._objective(argument.value, at) if key == "objective" else self.value(argument.value, f"{at}.{key}")
            )
        for step, key in list(self.over):
            if step == at and key in slots:
                given[key] = self.over[step, key]
                self.used.add((step, key))
        missing = [k for k, default in slots.items() if default is REQUIRED and k not in given]
        if missing:
            raise fail("missing-argument", f"the step `{name}` needs `{missing[0]}`", call.span)
        arguments = {k: given.get(k, default) for k, default in slots.items()}
        if name == "search":
            self.steps.extend(searched(at, arguments, spans, call.span))
        else:
            made = Checked(name, arguments, spans, call.span).made(at)
            self.steps.append(Step(at, name, arguments, made, call.span, spans))
        return self.steps[-1].made

    def _schedule(self, name: str, call: sx.Call, at: str) -> Schedule:
        values: dict[str, Any] = {"lr": None, "min_lr": None, "warmup": 50}
        for place, argument in enumerate(call.arguments):
            key = argument.name or (list(values)[place] if place < len(values) else "")
            if key not in values:
                raise fail("no-such-parameter", f"`{name}` has no parameter `{key or place}`", argument.span,
                           help=did_you_mean(key, values, "a parameter"))  # fmt: skip
            values[key] = self.value(argument.value, at)
        if values["lr"] is None:
            raise fail("missing-argument", f"`{name}` needs a learning rate", call.span)
        least = values["lr"] if values["min_lr"] is None else values["min_lr"]
        return Schedule(SCHEDULES[name], values["lr"], least, int(values["warmup"]))

    def _objective(self, expr: sx.Expr, at: str) -> Objective:
        """`distil(it, teacher)`: the block by name, its models and its other parameters."""
        if isinstance(expr, sx.Name):
            return Objective(expr.id, {}, {})
        if not isinstance(expr, sx.Call) or not isinstance(expr.function, sx.Name):
            raise fail("wrong-type", "an objective is a call of a block: `distil(it, teacher)`", expr.span)
        found = self.file.lookup(expr.function.id)
        if found is None or not isinstance(found.declaration, sx.Function):
            raise fail("unknown-name", f"no objective is named `{expr.function.id}`", expr.function.span)
        slots = [p.name for p in found.declaration.parameters]
        options: dict[str, Any] = {}
        for place, argument in enumerate(expr.arguments):
            key = argument.name or (slots[place] if place < len(slots) else "")
            if isinstance(argument.value, sx.Name) and argument.value.id == "it":
                continue  # the model that is trained
            options[key] = self.value(argument.value, f"{at}.{key}")
            if isinstance(options[key], Spec):
                raise fail("wrong-type", f"`{key}` of `{expr.function.id}` must be a model with weights, this is "
                           f"{kind_of(options[key])}", argument.span)  # fmt: skip
        lent = {k: v for k, v in options.items() if isinstance(v, Made)}
        return Objective(expr.function.id, {k: v for k, v in options.items() if k not in lent}, lent)
