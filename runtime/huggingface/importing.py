"""From a Hugging Face folder to a model folder."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...dsl import syntax as sx
from ...dsl.checkpoint import TensorMap, read_config
from ...dsl.checkpoint.config import field_of, lines, shown, target
from ...dsl.diagnostics import SpecError
from ...dsl.load import File, load, load_text, shipped_folder
from ...dsl.program import Program
from ..check import program_of
from ..errors import UserError
from .folders import architecture, copy_beside, new_folder, open_folder
from .maps import declared, for_architecture, map_of
from .moving import fits, take_apart
from .tensors import Tensors, writing

MOST_SHOWN = 40


def import_folder(source: str | Path, out: str | Path) -> Path:
    """Write `out/model.spec`, `out/model.safetensors` and `out/config.json` (kept for the way back) from a folder with
    config.json and safetensors; gives `out`.

    Everything is checked before a weight is written, and `out` appears whole or not at all.
    Raises `SpecError` (the map does not hold), UserError: broken-config, unknown-architecture, missing-tensor,
    damaged-weights, no-weights, no-such-file, cannot-write, already-there.
    """
    source, out = Path(source), Path(out)
    config, tensors = open_folder(source)
    file, checkpoint = for_architecture(architecture(config, source))
    family = declared(file, checkpoint)
    arguments = read_config(checkpoint, config, family.parameters)
    with new_folder(out) as partial:
        program = _program(partial, source, file, checkpoint, family, arguments)
        mapped = map_of(checkpoint, program)
        problems = misfits(mapped, tensors)
        if problems:
            raise misfit(problems, _contradicting(file, checkpoint, family, program, arguments, tensors))
        _write_weights(partial / "model.safetensors", program, mapped, tensors)
        shutil.copyfile(source / "config.json", partial / "config.json")
        copy_beside(source, partial)
    return out


def _program(
    partial: Path, source: Path, file: File, checkpoint: sx.Checkpoint, family: sx.Function,
    arguments: Mapping[str, Any],
) -> Program:  # fmt: skip
    """The model that a config describes; its spec is written. Raises UserError `broken-config`."""
    (partial / "model.spec").write_text(spec_text(file, family.name, arguments), encoding="utf-8")
    try:
        return program_of(load(partial / "model.spec", root=partial))
    except SpecError as error:
        said = list(dict.fromkeys(d.message for d in error.diagnostics))
        text = "\n  ".join([f"`{source / 'config.json'}` describes no model that can be built", *said])
        raise UserError("broken-config", text, help=_origins(checkpoint, family, text)) from None


def _origins(checkpoint: sx.Checkpoint, family: sx.Function, text: str) -> str | None:
    """Which fields the parameters named in a message come from."""
    names = {p.name: p for p in family.parameters}
    found: dict[str, str] = {}
    for selector, line in lines(checkpoint):
        name, field = target(selector, names), field_of(line.theirs)
        if name is not None and field is not None and f"`{name}`" in text:
            found.setdefault(name, f"`{name}` is `{field}` of the config")
    return "; ".join(found.values()) or None


def spec_text(file: File, family: str, arguments: Mapping[str, Any]) -> str:
    """A spec of one model with all its arguments, as the formatter writes it."""
    used = file.path.relative_to(shipped_folder()).as_posix()
    given = ",\n".join(f"    {name} = {shown(value)}" for name, value in arguments.items())
    return f'use {family} from "{used}"\n\nmodel imported = {family}(\n{given})\n'


# --- do the tensors fit --------------------------------------------------------------------------


def misfits(mapped: TensorMap, tensors: Tensors) -> list[str]:
    """Each tensor that is missing, left over or misshapen."""
    wanted = {e.theirs: e for e in mapped.entries}
    missing = [f"missing: `{n}` {list(e.shape)}" for n, e in wanted.items() if n not in tensors]
    extra = [
        f"extra: `{n}` {list(tensors.shape(n))}"
        for n in tensors.names()
        if n not in wanted and not mapped.is_ignored(n)
    ]
    wrong = [
        f"misshapen: `{n}` is {list(tensors.shape(n))}, the spec says {list(e.shape)}"
        for n, e in wanted.items()
        if n in tensors and not fits(e, tensors.shape(n))
    ]
    kinds: dict[str, set[str]] = {}
    for entry in mapped.entries:
        for piece in entry.pieces:
            if entry.theirs in tensors:
                kinds.setdefault(piece.name, set()).add(str(tensors.dtype(entry.theirs)).removeprefix("torch."))
    mixed = [f"mixed: `{n}` is made of tensors of {' and '.join(sorted(k))}" for n, k in kinds.items() if len(k) > 1]
    return missing + extra + wrong + mixed


def misfit(problems: list[str], help: str | None = None) -> UserError:
    """All that is wrong with the tensors, as one error."""
    more = [f"and {len(problems) - MOST_SHOWN} more"] if len(problems) > MOST_SHOWN else []
    count = f"{len(problems)} tensor{' does' if len(problems) == 1 else 's do'}"
    text = "\n".join([f"the weights and the spec disagree: {count} not fit", *problems[:MOST_SHOWN], *more])
    return UserError("missing-tensor", text, help=help)


def _contradicting(
    file: File, checkpoint: sx.Checkpoint, family: sx.Function, program: Program, arguments: Mapping[str, Any],
    tensors: Tensors,
) -> str | None:  # fmt: skip
    """The truth value of the config that the tensors contradict: with its opposite everything would fit."""
    for name, value in program.arguments.items():
        if not isinstance(value, bool):
            continue
        try:
            other = program_of(load_text(spec_text(file, family.name, {**arguments, name: not value})))
            if misfits(map_of(checkpoint, other), tensors):
                continue
        except SpecError:
            continue
        said = (field_of(line.theirs) for selector, line in lines(checkpoint) if target(selector, {name: None}) == name)
        return (
            f"the config says `{next(filter(None, said), name)}` = {shown(value)}, "
            f"these are the tensors of a model where it is {shown(not value)}"
        )
    return None


def _write_weights(path: Path, program: Program, mapped: TensorMap, tensors: Tensors) -> None:
    dtypes = {p.name: tensors.dtype(e.theirs) for e in mapped.entries for p in e.pieces}
    with writing(path, {p.name: (dtypes[p.name], p.shape) for p in program.tensors()}) as put:
        for entry in mapped.entries:
            for piece, tensor in take_apart(entry, tensors.get(entry.theirs)):
                put(piece.name, tensor, piece.index)
