"""Checkpoints of a run: folders that appear whole or not at all.

`checkpoints/step-00000123/` has `model.safetensors` (weights by their paths in the spec), `optimizer.safetensors`,
`state.json` (step, data position, settings) and `manifest.json`, written last, with every file's size and hash. Where
several ranks wrote it (`together.py`), folders `model` and `optimizer` stand in place of the two files, with a file of
each rank's pieces; names and tensors are the same.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from ..errors import UserError

FILES = ("model.safetensors", "optimizer.safetensors", "state.json")
MANIFEST = "manifest.json"


def save(
    folder: Path, step: int, model: dict[str, Tensor], optimizer: dict[str, Tensor], state: dict[str, Any], keep: int
) -> Path:
    """Write a checkpoint, then remove all but the newest `keep`. If it cannot be written, older ones are as they were.

    Raises UserError `cannot-write`.
    """
    out = folder / f"step-{step:08d}"
    partial = folder / f".step-{step:08d}.partial"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob(".step-*.partial"):
            shutil.rmtree(left, ignore_errors=True)
        partial.mkdir()
        _save_tensors(model, partial / FILES[0])
        _save_tensors(optimizer, partial / FILES[1])
        (partial / FILES[2]).write_text(json.dumps(state, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        manifest = {name: about(partial / name) for name in FILES}
        write_through(partial / MANIFEST, json.dumps(manifest, indent=1) + "\n")
        put_in_place(partial, out)
        sync_folder(folder)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise UserError(
            "cannot-write", f"cannot save `{out}`: {error.strerror or error}", help="older checkpoints are as they were"
        ) from None
    remove_old(folder, keep)
    return out


def remove_old(folder: Path, keep: int) -> None:
    """Remove all but the newest whole checkpoints."""
    for old in whole(folder)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)


def put_in_place(partial: Path, out: Path) -> None:
    """Rename. A checkpoint of the same step stands aside as `<name>.old`, where it is found, until the new one is
    there."""
    aside = out.with_name(f"{out.name}.old")
    if out.exists():
        shutil.rmtree(aside, ignore_errors=True)
        os.replace(out, aside)
    try:
        os.replace(partial, out)
    except OSError:
        if aside.exists():
            aside.rename(out)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    from safetensors import SafetensorError

    try:
        save_file({n: t.detach().contiguous() for n, t in tensors.items()}, path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(str(error)) from None
    with path.open("rb") as file:
        os.fsync(file.fileno())


def write_through(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def about(path: Path) -> dict[str, Any]:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}


def whole(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first; one that is damaged is named in a warning and left out."""
    found = []
    for path in sorted(folder.glob("step-*"), key=lambda p: (p.stem, p.suffix == "")) if folder.is_dir() else []:
        try:
            sizes = all((path / name).stat().st_size == entry["bytes"] for name, entry in _manifest(path).items())
        except (OSError, ValueError, KeyError, TypeError):
            sizes = False
        if sizes:
            found.append(path)
        else:
            warnings.warn(f"the checkpoint `{path}` is damaged and is not used", stacklevel=2)
    return found


def _manifest(path: Path) -> dict[str, Any]:
    """The files of a checkpoint, with size and hash. Raises OSError, ValueError, KeyError, TypeError."""
    manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    if all(name in manifest for name in FILES):
        return {name: manifest[name] for name in FILES}
    kinds = {name.split("/")[0] for name in manifest}
    if not {"model", FILES[2]} <= kinds <= {"model", "optimizer", FILES[2]}:
        raise ValueError("a file is missing")
    return dict(manifest)


def latest(folder: Path) -> Path | None:
    """The newest whole checkpoint, or None."""
    found = whole(folder)
    return found[-1] if found else None


def files_of(path: Path, kind: str) -> list[Path]:
    """The files with the tensors of a checkpoint: "model" or "optimizer"."""
    one = path / f"{kind}.safetensors"
    return [one] if one.is_file() else sorted((path / kind).glob("*.safetensors"))


def verify(path: Path, share: slice = slice(None)) -> None:
    """Hold the files of a checkpoint against their hashes, or a share of them. Raises `damaged-weights`."""
    try:
        saved = _manifest(path)
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError("damaged-weights", f"`{path / MANIFEST}` is not what was saved") from None
    for name in list(saved)[share]:
        if not (path / name).is_file() or about(path / name) != saved[name]:
            raise UserError("damaged-weights", f"`{path / name}` is not what was saved: its hash differs")


def state_of(path: Path) -> dict[str, Any]:
    """Step, data position and settings."""
    return dict(json.loads((path / FILES[2]).read_text(encoding="utf-8")))


def load(path: Path) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]]:
    """(weights, optimizer, state) of a checkpoint; its files are held against their hashes. Raises
    `damaged-weights`."""
    verify(path)
    return _tensors(path, "model"), _tensors(path, "optimizer"), state_of(path)


def _tensors(path: Path, kind: str) -> dict[str, Tensor]:
    files = files_of(path, kind)
    if files == [path / f"{kind}.safetensors"]:
        return load_file(files[0])
    from .pieces import Saved

    saved = Saved(files)
    return {name: saved.get(name) for name in saved.names()}
