"""Arguments of a recipe's steps, checked as far as they can be before anything runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from pydantic import ValidationError

from ...dsl.arithmetic import is_number
from ...dsl.diagnostics import Label, SpecError, fail
from ...dsl.elaborate import DEFAULT, Lent
from ...dsl.source import Span
from ..check import program_of
from ..compress import Plan as Cut
from ..compress import Scores
from ..compress.dims import Dims
from ..compress.layers import METRICS
from ..compress.merging import merges, mixture
from ..compress.scores import HOW
from ..train import TrainConfig
from .values import Data, Made, Objective, Schedule, Spec, kind_of

CHOICES: dict[tuple[str, str], tuple[Any, ...]] = {
    ("importance", "batch"): HOW, ("importance", "seq"): HOW, ("importance", "depth"): METRICS,
    ("prune", "merge_heads"): (True, False), ("search", "merge_heads"): (True, False),
    ("load", "map"): (None, "huggingface"), ("train", "dtype"): ("fp32", "bf16", "fp64"),
}  # fmt: skip
"""Arguments of steps that are one of some words."""
WORDS = frozenset(word for words in CHOICES.values() for word in words if isinstance(word, str))


class Checked:
    """Arguments of a step, checked as far as they can be before it runs."""

    def __init__(self, kind: str, arguments: dict[str, Any], spans: Mapping[str, Span], span: Span):
        self.kind, self.arguments, self.spans, self.span = kind, arguments, spans, span
        wanted: dict[str, tuple[Callable[[Any], bool], str]] = {
            "data": (lambda v: isinstance(v, Data), "data"),
            "to": (lambda v: isinstance(v, Spec), "a model of a spec"),
            "by": (lambda v: v is None or isinstance(v, Made) and v.kind == "scores", "scores"),
            "grid": (lambda v: isinstance(v, dict), "a table of lists"),
            "target": (is_number, "a number of parameters"),
            "tolerance": (is_number, "a number"),
            "keep": (lambda v: v is None or isinstance(v, dict), "a table"),
            "lr": (lambda v: isinstance(v, Schedule) or is_number(v), "a learning rate or a schedule"),
            "folder": (lambda v: isinstance(v, str), "the path of a folder"),
            "models": (lambda v: isinstance(v, (list, Made)), "models"),
        }
        for name in ("samples", "batch", "seq", "seed", "length", "rows", "steps", "tokens", "clip", "weight_decay"):
            if not (kind == "importance" and name in ("batch", "seq")):
                wanted[name] = (lambda v: v is None or is_number(v), "a number")
        model = (lambda v: isinstance(v, Spec), "a model of a spec") if kind == "load" else (
            (lambda v: _is_model(v) or isinstance(v, Spec), "a model") if kind == "train" else
            (_is_model, "a model with weights"))  # fmt: skip
        wanted["model"] = model
        for (step, name), words in CHOICES.items():
            if step == kind:
                wanted[name] = (partial(_is_one_of, words), f"one of {', '.join(map(_word, words))}")
        for name, value in arguments.items():
            holds, what = wanted.get(name, (lambda v: True, ""))
            if not holds(value):
                raise fail("wrong-type", f"`{name}` of `{kind}` must be {what}, this is {kind_of(value)}",
                           spans.get(name, span))  # fmt: skip

    def made(self, at: str) -> Made:
        """What the step makes, at a name; what is wrong with its model raises."""
        model = self.arguments.get("model")
        if self.kind not in ("load", "train", "prune"):
            return Made(at, {"importance": "scores", "report": "report"}[self.kind])
        mine = (model,) if isinstance(model, Spec) else model.specs if isinstance(model, Made) else ()
        if self.kind == "prune":
            return Made(at, "model", self._pruned(mine))
        if self.kind == "train":
            objective = objective_of(self.arguments)
            lent = {n: m.specs[0] for n, m in objective.lent.items() if m.specs}
            for spec in mine:
                at_step(self.span, partial(trained_program, spec, objective, lent))
            if self.arguments["tokens"] is None and self.arguments["steps"] is None:
                raise fail("missing-argument", "`train` needs `tokens` or `steps`", self.span)
            self._config()
        if isinstance(model, Made) and model.choices:
            return Made(at, "model", None, model.choices, model.chosen_by)
        return Made(at, "model", mine[0])

    def _config(self) -> None:
        """Settings of training are possible ones."""
        try:
            config_of(self.arguments)
        except ValidationError as error:
            first = error.errors()[0]
            name = str(first["loc"][0])
            name = {"min_lr": "lr", "warmup": "lr", "schedule": "lr"}.get(name, name)
            name = "tokens" if name == "steps" and self.arguments["steps"] is None else name
            least = [f"at least {v}" if k == "ge" else f"more than {v}" for k, v in first.get("ctx", {}).items()
                     if k in ("ge", "gt")]  # fmt: skip
            what = least[0] if least else "another kind of value"
            raise fail("out-of-range", f"`{name}` of `train` gives {first['input']}, it must be {what}",
                       self.spans.get(name, self.span)) from None  # fmt: skip

    def _pruned(self, teachers: tuple[Spec, ...]) -> Spec:
        to: Spec = self.arguments["to"]
        for teacher in teachers:
            by = None
            if self.arguments["by"] is not None:  # any scores show whether the cut is one
                dims = Dims(teacher.program)
                loops = {loop.name: [1.0] * len(loop.kinds) for loop in dims.loops.values()}
                by = Scores.of({d: [1.0] * n for d, n in dims.sizes.items() if d in dims.carried}, loops)
            at_step(self.span, partial(self._cut, teacher, to, by))
        return to

    def _cut(self, teacher: Spec, to: Spec, by: Scores | None) -> None:
        cut = Cut(teacher.program, to.program, by, self.arguments["keep"] or {})
        if self.arguments["merge_heads"]:
            for key in cut.choice.matched:
                if merges(cut.choice, key):
                    mixture(cut.choice, key)


def objective_of(arguments: Mapping[str, Any]) -> Objective:
    """What trains in a step `train`."""
    return arguments["objective"] or Objective(DEFAULT, {}, {})


def trained_program(spec: Spec, objective: Objective, lent: Mapping[str, Spec]) -> Any:
    """The program of a model with what trains it."""
    others: dict[str, Lent] = {n: (s.file, s.name, s.overrides) for n, s in lent.items()}
    return program_of(spec.file, spec.name, spec.overrides, objective.name, dict(objective.options), others)


def at_step(span: Span, check: Callable[[], Any]) -> Any:
    """The value of a check; what it finds says which step of the recipe asked for it."""
    try:
        return check()
    except SpecError as error:
        here = Label(span, "this step asks for it")
        raise SpecError([replace(d, secondary=(*d.secondary, here)) for d in error.diagnostics]) from None


def config_of(a: Mapping[str, Any]) -> TrainConfig:
    """Settings of training, of the arguments of a step. Raises pydantic's ValidationError."""
    batch, seq = a["batch"], a["seq"]
    steps = a["steps"] if a["steps"] is not None else math.ceil(a["tokens"] / max(1, batch * seq))
    rate = a["lr"]
    if not isinstance(rate, Schedule):
        rate = Schedule("constant", rate, rate, 0)
    return TrainConfig.model_validate({
        "steps": steps, "batch": batch, "seq": seq, "lr": rate.lr, "min_lr": rate.min_lr, "schedule": rate.kind,
        "warmup": rate.warmup, "weight_decay": a["weight_decay"], "clip": a["clip"], "dtype": a["dtype"],
        "seed": a["seed"],
    })  # fmt: skip


def _word(value: Any) -> str:
    return f"`{str(value).lower() if isinstance(value, bool) else 'none' if value is None else value}`"


def _is_one_of(words: tuple[Any, ...], value: Any) -> bool:
    return any(value is word or isinstance(word, str) and value == word for word in words)


def _is_model(value: Any) -> bool:
    return isinstance(value, Made) and value.kind == "model"
