"""Model folders: a spec and its weights side by side, opened by `heddle.load`."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..dsl.diagnostics import SpecError
from ..dsl.load import File, shipped_folder
from ..dsl.load import load as load_file
from .check import program_of
from .compile import build, instantiate, tell
from .errors import UserError
from .lib import Model

if TYPE_CHECKING:
    from .huggingface.tensors import Tensors
    from .train.pieces import Saved

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


def weights_files(folder: Path) -> list[Path]:
    """The weights of a model folder: its own, or those of the latest whole checkpoint; several files where several
    ranks wrote them. Raises UserError."""
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    from .train.checkpoint import files_of, latest

    found = latest(folder / "checkpoints")
    if found is None:
        raise UserError("no-weights", f"`{folder}` holds no weights", help="train it, or import a checkpoint")
    return files_of(found, "model")


def weights_of(folder: Path) -> Tensors | Saved:
    """The weights of a model folder, to be read one at a time. Raises UserError: no-weights, damaged-weights."""
    from .huggingface.tensors import Tensors
    from .train.pieces import Saved

    files = weights_files(folder)
    if len(files) == 1 and files[0].name == "model.safetensors":
        return Tensors(files)

    return Saved(files)


def weights_identity(folder: Path) -> str:
    """What tells weights from others: the same for the same files."""
    from .retrieval.index import checksum

    sums = [checksum(path) for path in weights_files(folder)]
    return sums[0] if len(sums) == 1 else hashlib.sha256("".join(sums).encode()).hexdigest()


def load(
    folder: str | Path, dtype: torch.dtype | str | None = None, settings: dict[str, Any] | None = None,
    target: str = "cpu",
) -> Model:  # fmt: skip
    """Open a model folder: compile its spec and load its weights. `settings` are other values of the model's
    parameters; an optional input that is None is left out, and the weights that only it needs with it. `target` as of
    `heddle.compile`. Raises `SpecError`, `UserError`."""
    from .compile import DTYPES

    folder = Path(folder)
    if not folder.is_dir():
        raise UserError("no-such-file", f"there is no folder `{folder}`")
    file, model, overrides = read_spec(folder)
    artifact = build(program_of(file, model, {**overrides, **(settings or {})}), target)
    tell(artifact)
    made = instantiate(artifact, seed=None)
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
    """Load the weights of a model folder; a rank of several takes its part. Raises UserError: no-such-file,
    no-weights, damaged-weights, weights-do-not-fit."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file as load_tensors

    if not folder.is_dir():
        raise UserError("no-such-file", f"there is no folder `{folder}`")
    files = weights_files(folder)
    if model.mesh is not None or len(files) > 1:
        _take_pieces(model, files, folder)
        return
    try:
        state = load_tensors(files[0])
    except (SafetensorError, OSError) as error:
        raise UserError("damaged-weights", f"`{files[0]}` cannot be read: {error}") from None
    if any(name not in model.state_dict() for name in state):
        left_out = _left_out(model, folder)
        state = {name: tensor for name, tensor in state.items() if name not in left_out}
    _fill(model, state, files[0])


def _take_pieces(model: Model, files: list[Path], folder: Path) -> None:
    """Fill a model with its parts of what files have."""
    from .train.laying import Laying
    from .train.pieces import Saved

    saved, laying = Saved(files), Laying(model)
    boxes = {name: laying.box(name) for name in laying.tensors}
    path = files[0] if len(files) == 1 else files[0].parent
    more = any(name not in boxes for name in saved.names())
    left_out = _left_out(model, folder) if more else set()
    given = {n: saved.shape(n) for n in saved.names() if n not in left_out and (model.pipe is None or n in boxes)}
    _check_fit({n: b.whole for n, b in boxes.items()}, given, path)
    if any(saved.dtype(n) == torch.bfloat16 for n in saved.names()):
        model.cast(torch.bfloat16)
        laying = Laying(model)
    with torch.no_grad():
        for name, tensor in laying.tensors.items():
            tensor.copy_(saved.read({name: boxes[name]})[name])


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
    own, given = ({n: tuple(t.shape) for n, t in tensors.items()} for tensors in (model.state_dict(), state))
    _check_fit(own, given, path)
    kinds = {t.dtype for t in state.values() if t.is_floating_point()}
    if kinds == {torch.bfloat16} or torch.bfloat16 in kinds:
        model.cast(torch.bfloat16)
    model.load_state_dict(state)


def _check_fit(own: Mapping[str, tuple[int, ...]], given: Mapping[str, tuple[int, ...]], path: Path) -> None:
    """Raises UserError `weights-do-not-fit` with all that is missing, unknown or of another shape."""
    missing = [k for k in own if k not in given]
    extra = [k for k in given if k not in own]
    wrong = [f"{k} is {list(given[k])}, the spec says {list(own[k])}" for k in own if k in given and own[k] != given[k]]
    problems = (
        [f"missing: {', '.join(missing)}"] * bool(missing) + [f"unknown: {', '.join(extra)}"] * bool(extra) + wrong
    )
    if problems:
        raise UserError("weights-do-not-fit", f"`{path}` does not fit the spec: {'; '.join(problems)}")
