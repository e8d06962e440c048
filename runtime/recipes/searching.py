"""The step `search`: every candidate of a grid within a budget is cut and trained for a while; the best goes on.

It is planned as steps that exist: `best.0.cut` prunes, `best.0` trains, for each candidate; `best` itself compares
their held-out losses, writes `ranking.json`, and is the winner as it was cut, so that its training proper starts there.
Source: Muralidharan et al. 2024, section 3 (ranks before a short retraining mean little).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...dsl.diagnostics import did_you_mean, fail
from ...dsl.source import Span
from ..compress import Candidate, candidates
from .checking import Checked, at_step
from .values import Made, Spec, Step, kind_of

TRAINED = ("data", "objective", "tokens", "steps", "lr", "batch", "seq", "seed", "weight_decay", "clip", "dtype")


def searched(at: str, arguments: Mapping[str, Any], spans: Mapping[str, Span], span: Span) -> list[Step]:
    """The steps of a search, the one that ranks last. Raises `SpecError`: no-such-parameter, wrong-type, out-of-range,
    and what cutting and training a candidate raise."""
    Checked("search", dict(arguments), spans, span)
    found = _candidates(arguments, spans, span)
    steps: list[Step] = []
    to = arguments["to"]
    for i, candidate in enumerate(found):
        spec = Spec(to.file, to.name, candidate.program, candidate.arguments)
        cut = {"model": arguments["model"], "to": spec, "by": arguments["by"], "keep": None,
               "merge_heads": arguments["merge_heads"]}  # fmt: skip
        steps.append(_step(f"{at}.{i}.cut", "prune", cut, spans, span))
        trained = {"model": steps[-1].made, **{name: arguments[name] for name in TRAINED}}
        steps.append(_step(f"{at}.{i}", "train", trained, spans, span))
    choices = tuple(spec for step in steps[::2] for spec in step.made.specs)
    ranked = {"cuts": [s.made for s in steps[::2]], "models": [s.made for s in steps[1::2]], "data": arguments["data"],
              "seq": arguments["seq"], "rows": arguments["rows"]}  # fmt: skip
    return [*steps, Step(at, "search", ranked, Made(at, "model", None, choices, at), span, spans)]


def _step(name: str, kind: str, arguments: dict[str, Any], spans: Mapping[str, Span], span: Span) -> Step:
    return Step(name, kind, arguments, Checked(kind, arguments, spans, span).made(name), span, spans)


def _candidates(a: Mapping[str, Any], spans: Mapping[str, Span], span: Span) -> list[Candidate]:
    to, grid, at = a["to"], a["grid"], spans.get("grid", span)
    for name, values in grid.items():
        if name not in to.program.arguments:
            raise fail("no-such-parameter", f"`{to.name}` has no parameter `{name}`", at,
                       help=did_you_mean(name, to.program.arguments, "a parameter"))  # fmt: skip
        if not isinstance(values, list) or not values:
            raise fail("wrong-type", f"`{name}` of a grid must be a list of values, this is {kind_of(values)}", at)
    target, tolerance = a["target"], a["tolerance"]
    found: list[Candidate] = at_step(
        span, lambda: candidates(to.file, to.name, grid, target=target, tolerance=tolerance)
    )
    if not found:
        every = candidates(to.file, to.name, grid, least=0, most=float("inf"))
        near = min(every, key=lambda c: abs(c.parameters - target))
        least, most = target * (1 - tolerance), target * (1 + tolerance)
        raise fail("out-of-range", f"no candidate of the grid has {least:,.0f} to {most:,.0f} parameters",
                   at, help=f"the nearest has {near.parameters:,}")  # fmt: skip
    return found
