"""What names of a recipe stand for before anything runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ...dsl.load import File
from ...dsl.program import Program
from ...dsl.source import Span


@dataclass(frozen=True)
class Spec:
    """A model of a spec, without weights; `overrides` are other values of its parameters."""

    file: File
    name: str
    program: Program = field(compare=False, repr=False)
    overrides: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Data:
    """Text: what `--data` names."""


@dataclass(frozen=True)
class Schedule:
    """A learning rate over the steps: `cosine(2e-4, 2e-5, warmup = 120)`."""

    kind: str
    lr: float
    min_lr: float
    warmup: int


@dataclass(frozen=True)
class Objective:
    """A block that trains: its options, and the models that it asks by its parameters' names."""

    name: str
    options: Mapping[str, Any]
    lent: Mapping[str, Made]


@dataclass(frozen=True)
class Made:
    """What a step makes: a model (then of a spec), scores, or a report. Of a search, and of what is made of its result,
    the spec is one of `choices`, which the step `chosen_by` tells when it has run."""

    step: str
    kind: str
    spec: Spec | None = None
    choices: tuple[Spec, ...] = ()
    chosen_by: str | None = None

    @property
    def specs(self) -> tuple[Spec, ...]:
        """What the spec may be."""
        return self.choices or (() if self.spec is None else (self.spec,))


@dataclass(frozen=True)
class Step:
    """One step: the folder that it fills, what does it, its arguments by name, where it stands in the recipe, and where
    those that are written stand."""

    name: str
    kind: str
    arguments: Mapping[str, Any]
    made: Made
    span: Span
    spans: Mapping[str, Span] = field(default_factory=dict)


KINDS = {Spec: "a model of a spec", Data: "data", Schedule: "a schedule", Objective: "an objective"}


def kind_of(value: Any) -> str:
    """What a value is, in words."""
    if isinstance(value, Made):
        return {"model": "a model", "scores": "scores", "report": "a report"}[value.kind]
    if isinstance(value, (list, tuple)):
        return "a list"
    if isinstance(value, dict):
        return "a table"
    if isinstance(value, str):
        return "a word"
    return "nothing" if value is None else KINDS.get(type(value), "a number")
