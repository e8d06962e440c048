"""Two models read side by side: what they are made of, what is set otherwise, and whose weights fit whom."""

from __future__ import annotations

from collections import Counter
from typing import Any

from ..dsl.checkpoint.static import CallValue
from ..dsl.diagnostics import SpecError
from ..dsl.program import Program
from .compress import Plan, Scores
from .compress.dims import Dims, without_numbers
from .show import summary

ABSENT = "-"
"""Stands for what one of two models does not have."""
FIGURES = ("parameters", "active_parameters", "flops_per_token", "state_bytes")


def difference(a: Program, b: Program, length: int = 4096) -> dict[str, Any]:
    """What differs between two models, as plain data.

    `figures` are [of a, of b] of `show.summary`; `settings` parameters with another value; `blocks` parameters by block
    where they differ; `dims` sizes of dims of one name that differ. `weights` tells of checkpoints: how many tensors
    have the same path and shape, examples of those with another shape, and of those that only one has. `is_part` says
    whether b is a cut of a (`heddle prune`), else `why_not`.
    """
    one, two = summary(a, length), summary(b, length)
    return {
        "models": [a.name, b.name],
        "families": [a.family, b.family],
        "length": length,
        "figures": {name: [one[name], two[name]] for name in FIGURES},
        "settings": _pairs(a.arguments, b.arguments),
        "blocks": _pairs(*({r["path"]: r["parameters"] for r in s["blocks"]} for s in (one, two))),
        "dims": _pairs(_sizes(a), _sizes(b)),
        "weights": _weights(a, b),
        **_cut(a, b),
    }


def _pairs(a: Any, b: Any) -> dict[str, list[Any]]:
    """What is another, or there on one side only, by name in the order of a."""
    names = dict.fromkeys((*a, *b))
    other = [n for n in names if n not in a or n not in b or a[n] != b[n]]
    return {n: [_plain(x[n]) if n in x else ABSENT for x in (a, b)] for n in other}


def _plain(value: Any) -> Any:
    """A setting as data; a list, or a function that waits, as a spec writes it."""
    if isinstance(value, CallValue):
        given = ", ".join(f"{name} = {written(v)}" for name, v in value.arguments)
        return f"{value.name}({given})" if given else value.name
    if isinstance(value, list):
        return f"[{', '.join(map(written, value))}]"
    return value if isinstance(value, (int, float, str, bool, type(None))) else str(value)


def written(value: Any) -> str:
    """A setting as a spec writes it."""
    plain = _plain(value)
    if plain is None or isinstance(plain, bool):
        return {None: "none", True: "true", False: "false"}[plain]
    return f"{plain:,}" if isinstance(plain, int) else str(plain)


def _sizes(program: Program) -> dict[str, str]:
    """Sizes of dims that weights have; iterations of a loop with one size count once."""
    dims = Dims(program)
    found: dict[str, dict[int, None]] = {}
    for key, size in dims.sizes.items():
        if key in dims.carried:
            found.setdefault(without_numbers(key), {})[size] = None
    return {key: " | ".join(map(str, sizes)) for key, sizes in found.items()}


def _weights(a: Program, b: Program) -> dict[str, Any]:
    """How the tensors of two checkpoints compare: counts, and of each kind the first, iterations put together."""
    one, two = ({p.name: [size for _, size in p.dims] for p in x.tensors()} for x in (a, b))
    same = [n for n in one if two.get(n) == one[n]]
    other = {n: [one[n], two[n]] for n in one if n in two and two[n] != one[n]}
    return {
        "same": len(same),
        "other_shape": {"count": len(other), "examples": _first(other)},
        "only_first": _counted([n for n in one if n not in two]),
        "only_second": _counted([n for n in two if n not in one]),
    }


def _first(shapes: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, pair in shapes.items():
        found.setdefault(without_numbers(name), pair)
    return found


def _counted(names: list[str]) -> dict[str, Any]:
    return {"count": len(names), "examples": dict(Counter(without_numbers(n) for n in names))}


def _cut(a: Program, b: Program) -> dict[str, Any]:
    """Whether b can be pruned out of a, whatever scores say."""
    dims = Dims(a)
    loops = {loop.name: [1.0] * len(loop.kinds) for loop in dims.loops.values()}
    scores = Scores.of({d: [1.0] * n for d, n in dims.sizes.items() if d in dims.carried}, loops)
    try:
        Plan(a, b, scores)
    except SpecError as error:
        return {"is_part": False, "why_not": error.diagnostics[0].message}
    return {"is_part": True, "why_not": None}
