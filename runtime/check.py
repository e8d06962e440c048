"""Checking a spec: names, sizes, dims and types, without torch and without networkx."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..dsl import syntax as sx
from ..dsl.checkpoint import tensor_map
from ..dsl.diagnostics import Diagnostic, SpecError, fail
from ..dsl.elaborate import Lent, elaborate, entries, is_complete
from ..dsl.layout import layout_of
from ..dsl.load import File, Found, load, load_text, standard_index
from ..dsl.names import check_names
from ..dsl.program import Program
from ..dsl.source import Span
from ..lowering import op as hooks
from ..lowering.ops import table


@dataclass(frozen=True)
class Checked:
    """A file whose names resolve, and its models that can be elaborated, by name."""

    file: File
    programs: dict[str, Program]


def program_of(
    file: File,
    model: str | None = None,
    overrides: Mapping[str, Any] | None = None,
    objective: str = "next_token",
    settings: Mapping[str, Any] | None = None,
    lent: Mapping[str, Lent] | None = None,
) -> Program:
    """Elaborate one model of a file, the one named or else the last that needs no arguments, with a block that trains
    it.

    `settings` are parameters of that block; `lent` gives it other models, `{"teacher": (file, model, overrides)}`.
    Raises `SpecError`.
    """
    return elaborate(file, table(), hooks, model, overrides, objective, settings, lent)


def check_file(file: File) -> Checked:
    """Check every declaration of a file and elaborate every model whose parameters are known.

    Raises `SpecError` with all independent diagnostics.
    """
    if not file.declared:
        raise fail(
            "nothing-declared",
            f"`{file.source.name}` declares nothing",
            Span(file.source, 0, 0),
            help="a spec has at least one `block`, `model`, `layout`, `precision`, `recipe` or `pipeline`",
        )
    found: list[Diagnostic] = list(check_names(file))
    if any(d.severity == "error" for d in found):
        raise SpecError(found)
    programs = {}
    variants = [d.value for d in file.declared.values() if isinstance(d, sx.Variant)]
    bases = {v.function.id for v in variants if isinstance(v, sx.Call) and isinstance(v.function, sx.Name)}
    for name in entries(file):
        if not is_complete(Found(file.declared[name], file)) and (name in bases or _is_function(file, name)):
            continue  # a family, or what variants have in common
        try:
            programs[name] = program_of(file, name)
        except SpecError as error:
            found.extend(d for d in error.diagnostics if d not in found)
    found.extend(_layout_errors(file, programs))
    if found:
        raise SpecError(found)
    return Checked(file, programs)


def _layout_errors(file: File, programs: dict[str, Program]) -> list[Diagnostic]:
    """What is wrong with the layouts that a file declares, by themselves and for its last model."""
    found: list[Diagnostic] = []
    own = [name for name, d in file.declared.items() if getattr(d, "keyword", "") == "layout"]
    for name in own:
        try:
            layout = layout_of(file, name)
            if programs:
                from ..lowering.pipeline import lower  # networkx: only where there is a layout

                lower(list(programs.values())[-1], layout=layout)
        except SpecError as error:
            found.extend(d for d in error.diagnostics if d not in found)
    return found


def proved(file: File, model: str | None = None, overrides: Mapping[str, Any] | None = None) -> Program:
    """A model as `program_of` gives it, every map of its family proved total and one-to-one on its weights.

    One that rules have changed is no member of its family any more. Raises `SpecError`, for maps with the codes
    map-collision, map-shape and map-unused-line.
    """
    program = program_of(file, model, overrides)
    kinds = frozenset(standard_index()) | frozenset(table())
    for candidate in file.all_files() if not program.is_changed else ():
        for checkpoint in candidate.checkpoints:
            if checkpoint.model.id == program.family:
                tensor_map(checkpoint, program.tensors(), program.arguments, kinds)
    return program


def _is_function(file: File, name: str) -> bool:
    return isinstance(file.declared[name], sx.Function)


def check(path: str | Path, model: str | None = None) -> Program:
    """Check a spec and give the program of one of its models, the last if none is named. Raises `SpecError`."""
    file = load(Path(path))
    checked = check_file(file)
    if model is None and checked.programs:
        return list(checked.programs.values())[-1]
    return program_of(file, model)


def check_text(text: str, name: str = "<string>", folder: Path | None = None) -> Checked:
    """Check a spec that is given as text."""
    return check_file(load_text(text, name, folder))
