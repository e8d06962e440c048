"""Model folders: a spec and its weights side by side, opened by `heddle.load`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..dsl.diagnostics import SpecError
from ..dsl.load import File, shipped_folder
from ..dsl.load import load as load_file
from .check import program_of
from .compile import build, instantiate
from .errors import UserError
from .lib import Model

RECORD = "model.json"


def write_spec(out: Path, file: File, model: str, overrides: dict[str, Any] | None = None) -> None:
    """Copy a spec and the files that it uses into `out/spec/`, and note which model is meant. The standard library is
    not copied; other shipped specs are, so that a later version of Heddle does not change what the model is."""
    files = file.all_files()
    shipped = shipped_folder()
    own = [f.path for f in files if not f.path.is_relative_to(shipped)]
    base = _common_folder(own) if own else shipped
    for f in files:
        target = out / "spec" / f.path.relative_to(shipped if f.path.is_relative_to(shipped) else base)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(f.path, target)
    entry = Path("spec") / file.path.relative_to(shipped if file.path.is_relative_to(shipped) else base)
    record = {"entry": entry.as_posix(), "model": model, "overrides": overrides or {}}
    (out / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def _common_folder(paths: list[Path]) -> Path:
    first = paths[0].parent
    while not all(p.is_relative_to(first) for p in paths):
        first = first.parent
    return first


def read_spec(folder: Path) -> tuple[File, str | None, dict[str, Any]]:
    """The spec of a model folder: (file, model, overrides). Raises UserError `not-a-model`."""
    record = folder / RECORD
    if record.is_file():
        try:
            known = json.loads(record.read_text(encoding="utf-8"))
            return load_file(folder / known["entry"]), known["model"], known["overrides"]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError("not-a-model", f"`{record}` is damaged: {error}") from None
    if (folder / "model.spec").is_file():
        return load_file(folder / "model.spec"), None, {}
    raise UserError("not-a-model", f"`{folder}` holds no model", help="a model folder has model.json or model.spec")


def weights_file(folder: Path) -> Path:
    """The weights of a model folder: its own, or those of the latest whole checkpoint. Raises UserError."""
    if (folder / "model.safetensors").is_file():
        return folder / "model.safetensors"
    from .train.checkpoint import latest

    found = latest(folder / "checkpoints")
    if found is None:
        raise UserError("no-weights", f"`{folder}` holds no weights", help="train it, or import a checkpoint")
    return found / "model.safetensors"


def load(
    folder: str | Path, dtype: torch.dtype | str | None = None, settings: dict[str, Any] | None = None
) -> Model:
    """Open a model folder: compile its spec and load its weights. `settings` are other values of the model's
    parameters; an optional input that is None is left out, and the weights that only it needs with it. Raises
    `SpecError`, `UserError`."""
    from .compile import DTYPES

    folder = Path(folder)
    if not folder.is_dir():
        raise UserError("no-such-file", f"there is no folder `{folder}`")
    file, model, overrides = read_spec(folder)
    made = instantiate(build(program_of(file, model, {**overrides, **(settings or {})})), seed=None)
    take_weights(made, folder)
    if dtype is not None:
        made.cast(DTYPES[dtype] if isinstance(dtype, str) else dtype)
    return made.eval()


def lend(model: Model, folders: Mapping[str, Path]) -> Model:
    """Lend a model those of folders, each compiled to give what the objective asks it for. Raises what `load` does."""
    for name, program in model.program.lent.items():
        made = instantiate(build(program), seed=None)
        take_weights(made, folders[name])
        model.lend(**{name: made})
    return model


def take_weights(model: Model, folder: Path) -> None:
    """Load the weights of a model folder. Raises UserError: no-such-file, no-weights, damaged-weights,
    weights-do-not-fit."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file as load_tensors

    if not folder.is_dir():
        raise UserError("no-such-file", f"there is no folder `{folder}`")
    path = weights_file(folder)
    try:
        state = load_tensors(path)
    except (SafetensorError, OSError) as error:
        raise UserError("damaged-weights", f"`{path}` cannot be read: {error}") from None
    if any(name not in model.state_dict() for name in state):
        left_out = _left_out(model, folder)
        state = {name: tensor for name, tensor in state.items() if name not in left_out}
    _fill(model, state, path)


def _left_out(model: Model, folder: Path) -> set[str]:
    """Weights of the folder's model that it has only for optional inputs which this one does without."""
    try:
        file, name, overrides = read_spec(folder)
        whole = program_of(file, name, overrides)
        absent = dict.fromkeys(v.name for v in whole.model.inputs if v.name not in model.inputs)
        if not absent:
            return set()
        alone = program_of(file, name, {**overrides, **absent})
    except (SpecError, UserError):  # nothing is left out, and what does not fit is said
        return set()
    return {t.name for t in whole.tensors()} - {t.name for t in alone.tensors()}


def _fill(model: Model, state: dict[str, torch.Tensor], path: Path) -> None:
    own = model.state_dict()
    missing = [k for k in own if k not in state]
    extra = [k for k in state if k not in own]
    wrong = [
        f"{k} is {list(state[k].shape)}, the spec says {list(own[k].shape)}"
        for k in own
        if k in state and own[k].shape != state[k].shape
    ]
    problems = (
        [f"missing: {', '.join(missing)}"] * bool(missing) + [f"unknown: {', '.join(extra)}"] * bool(extra) + wrong
    )
    if problems:
        raise UserError("weights-do-not-fit", f"`{path}` does not fit the spec: {'; '.join(problems)}")
    kinds = {t.dtype for t in state.values() if t.is_floating_point()}
    if kinds == {torch.bfloat16} or torch.bfloat16 in kinds:
        model.cast(torch.bfloat16)
    model.load_state_dict(state)
