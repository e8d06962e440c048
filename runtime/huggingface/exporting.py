"""From a model folder to a Hugging Face folder."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

from ...dsl.checkpoint import CallValue, TensorMap, write_config
from ...dsl.program import Program
from ..check import program_of
from ..errors import UserError
from ..folder import read_spec, weights_file
from .importing import TOKENIZER_FILES, read_config_file
from .maps import for_program, map_of
from .moving import put_together
from .tensors import Tensors, writing

NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float64: "float64"}


def export_folder(folder: str | Path, out: str | Path) -> Path:
    """Write `out/config.json` and `out/model.safetensors` from a model folder or a run; gives `out`.

    A config that came with the model keeps the fields that the map does not speak of. `out` appears whole or not at all.
    Raises `SpecError`, UserError: no-map, missing-tensor, damaged-weights, cannot-write, already-there.
    """
    folder, out = Path(folder), Path(out)
    if not folder.is_dir():
        raise UserError("no-such-file", f"there is no folder `{folder}`")
    file, model, overrides = read_spec(folder)
    program = program_of(file, model, overrides)
    _, checkpoint = for_program(file, program)
    mapped = map_of(checkpoint, program, program.arguments)
    tensors = Tensors([weights_file(folder)])
    _check_ours(mapped, tensors)
    config = _config(folder, checkpoint.target, write_config(checkpoint, program.arguments), tensors, mapped)
    if out.exists():
        raise UserError("already-there", f"`{out}` exists already", help="choose another folder with -o")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=out.parent))
    except OSError as error:
        raise UserError("cannot-write", f"cannot write to `{out.parent}`: {error.strerror}") from None
    try:
        (partial / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        _write_weights(partial / "model.safetensors", mapped, tensors)
        for name in TOKENIZER_FILES:
            if (folder / name).is_file():
                shutil.copyfile(folder / name, partial / name)
        partial.chmod(0o755)
        partial.rename(out)
    except OSError as error:
        raise UserError("cannot-write", f"cannot write `{out}`: {error.strerror}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return out


def _check_ours(mapped: TensorMap, tensors: Tensors) -> None:
    pieces = {p.name: p for e in mapped.entries for p in e.pieces}
    problems = [f"missing: `{n}` {list(p.shape)}" for n, p in pieces.items() if n not in tensors]
    problems += [f"extra: `{n}`" for n in tensors.names() if n not in pieces]
    problems += [f"misshapen: `{n}` is {list(tensors.shape(n))}, the spec says {list(p.shape)}"
                 for n, p in pieces.items() if n in tensors and tensors.shape(n) != p.shape]
    if problems:
        raise UserError("missing-tensor", "the weights do not fit the spec\n  " + "\n  ".join(problems[:12]))


def _config(
    folder: Path, architecture: str, written: dict[str, Any], tensors: Tensors, mapped: TensorMap
) -> dict[str, Any]:
    base = read_config_file(folder / "config.json") if (folder / "config.json").is_file() else {}
    config = _merged(base, written)
    config["architectures"] = [architecture]
    first = mapped.entries[0].pieces[0].name
    config["dtype"] = NAMES.get(tensors.dtype(first), "float32")
    return config


def _merged(base: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in new.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merged(merged[key], value) if both else value
    return merged


def _write_weights(path: Path, mapped: TensorMap, tensors: Tensors) -> None:
    about = {e.theirs: (tensors.dtype(e.pieces[0].name), e.shape) for e in mapped.entries}
    with writing(path, about) as put:
        for entry in mapped.entries:
            put(entry.theirs, put_together(entry, {p.name: tensors.get(p.name) for p in entry.pieces}))


__all__ = ["CallValue", "Program", "export_folder"]
