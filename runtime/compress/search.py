"""Candidates: every student of a grid of parameters that fits a budget, counted by elaborating its spec."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from ...dsl.load import File
from ...dsl.program import Program
from ..check import program_of
from ..errors import UserError


@dataclass(frozen=True)
class Candidate:
    """A student: the parameters that differ from the model's, its program, and how many weights it has."""

    arguments: Mapping[str, Any]
    program: Program
    parameters: int


def candidates(
    file: File,
    model: str | None,
    grid: Mapping[str, Sequence[Any]],
    *,
    target: float | None = None,
    tolerance: float = 0.05,
    least: float | None = None,
    most: float | None = None,
    derive: Mapping[str, Callable[[Mapping[str, Any]], Any]] | None = None,
) -> list[Candidate]:
    """Every choice from `grid` whose parameter count is within `tolerance` of `target`, or from `least` to `most`.

    `grid` has values for parameters of the model, or for names that `derive` makes parameters of: `{"ffn": lambda c:
    int(c["expansion"] * c["hidden"])}`; a name that is no parameter is used up there. In the order of the grid, its
    last name fastest. Raises `SpecError` (a spec of the grid that is none), UserError `unknown-setting`.
    """
    if target is not None:
        least, most = target * (1 - tolerance), target * (1 + tolerance)
    if least is None or most is None:
        raise UserError("unknown-setting", "candidates need a `target`, or both `least` and `most`, of parameters")
    known = set(program_of(file, model).arguments)
    lost = [name for name in grid if name not in known and not derive]
    if lost:
        raise UserError("unknown-setting", f"the model has no parameter `{lost[0]}`, and nothing is derived from it")
    found = []
    for values in product(*grid.values()):
        chosen = dict(zip(grid, values, strict=True))
        chosen |= {name: make(chosen) for name, make in (derive or {}).items()}
        arguments = {name: value for name, value in chosen.items() if name in known}
        program = program_of(file, model, arguments)
        count = program.num_parameters()
        if least <= count <= most:
            found.append(Candidate(arguments, program, count))
    return found
