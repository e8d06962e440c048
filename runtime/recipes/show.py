"""The plan of a recipe as lines of text."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .plan import Plan
from .values import Made, Objective, Schedule, Spec


def lines(plan: Plan) -> Iterator[str]:
    """A line for each step: what it fills, with what, and how many parameters the model has."""
    for step in plan.steps:
        given = ", ".join(f"{k} = {shown(v)}" for k, v in step.arguments.items() if v is not None)
        counts = sorted({spec.program.num_parameters() for spec in step.made.specs})
        ends = " to ".join(f"{n:,}" for n in dict.fromkeys((*counts[:1], *counts[-1:])))
        size = f"  [{ends} parameters]" if counts else ""
        yield f"{step.name}: {step.kind}({given}){size}"


def shown(value: Any) -> str:
    """A value as the recipe would write it."""
    match value:
        case Made(step=name):
            return name
        case Spec(name=name, overrides=overrides):
            return f"{name}({', '.join(f'{k} = {shown(v)}' for k, v in overrides.items())})" if overrides else name
        case Schedule(kind=kind, lr=lr, min_lr=low, warmup=warmup):
            return f"{kind}({lr:g}, {low:g}, warmup = {warmup})"
        case Objective(name=name, options=options, lent=lent):
            return f"{name}({', '.join(['it', *(f'{k} = {shown(v)}' for k, v in {**lent, **options}.items())])})"
        case list() | tuple():
            return f"[{', '.join(shown(v) for v in value)}]"
        case dict():
            return f"{{{', '.join(f'{k}: {shown(v)}' for k, v in value.items())}}}"
        case bool():
            return str(value).lower()
        case float() | int():
            return f"{value:g}" if abs(value) >= 1e6 or isinstance(value, float) else str(value)
    return str(value) if isinstance(value, str) else "data"
