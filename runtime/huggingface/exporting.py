"""From a model folder to a Hugging Face folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ...dsl.checkpoint import TensorMap, write_config
from ..check import program_of
from ..errors import UserError
from ..folder import read_spec, weights_of
from .folders import copy_beside, new_folder, read_config_file
from .importing import misfit
from .maps import declared, for_program, map_of
from .moving import put_together
from .tensors import Tensors, writing

if TYPE_CHECKING:
    from ..train.pieces import Saved


def export_folder(folder: str | Path, out: str | Path) -> Path:
    """Write `out/config.json` and `out/model.safetensors` from a model folder or a run; gives `out`.

    A config that came with the model keeps the fields of which the map does not speak. `out` appears whole or not at
    all.
    Raises `SpecError`, UserError: no-map, missing-tensor, damaged-weights, cannot-write, already-there.
    """
    folder, out = Path(folder), Path(out)
    if not folder.is_dir():
        raise UserError("no-such-file", f"there is no folder `{folder}`")
    file, model, overrides = read_spec(folder)
    program = program_of(file, model, overrides)
    where, checkpoint = for_program(file, program)
    mapped = map_of(checkpoint, program)
    tensors = weights_of(folder)
    problems = misfits(mapped, tensors)
    if problems:
        raise misfit(problems)
    carried = read_config_file(folder / "config.json") if (folder / "config.json").is_file() else None
    config = write_config(checkpoint, program.arguments, declared(where, checkpoint).parameters, carried)
    config["architectures"] = [checkpoint.target]
    config |= _dtype(config, mapped, tensors)
    with new_folder(out) as partial:
        text = json.dumps(config, indent=2, sort_keys=True) + "\n"
        (partial / "config.json").write_text(text, encoding="utf-8")
        _write_weights(partial / "model.safetensors", mapped, tensors)
        copy_beside(folder, partial)
    return out


def misfits(mapped: TensorMap, tensors: Tensors | Saved) -> list[str]:
    """Each weight of ours that is missing, left over or misshapen; tensors of theirs whose parts differ in dtype."""
    pieces = {p.name: (p, p.shape) for e in mapped.entries for p in e.pieces}
    for name, (last, shape) in pieces.items():
        if last.index is not None:
            pieces[name] = (last, (last.index + 1, *shape))
    problems = [f"missing: `{n}` {list(s)}" for n, (_, s) in pieces.items() if n not in tensors]
    problems += [f"extra: `{n}` {list(tensors.shape(n))}" for n in tensors.names() if n not in pieces]
    problems += [
        f"misshapen: `{n}` is {list(tensors.shape(n))}, the spec says {list(s)}"
        for n, (_, s) in pieces.items()
        if n in tensors and tensors.shape(n) != s
    ]
    for entry in mapped.entries:
        kinds = {str(tensors.dtype(p.name)).removeprefix("torch.") for p in entry.pieces if p.name in tensors}
        if len(kinds) > 1:
            problems.append(f"mixed: `{entry.theirs}` would be made of weights of {' and '.join(sorted(kinds))}")
    return problems


def _dtype(config: dict[str, Any], mapped: TensorMap, tensors: Tensors | Saved) -> dict[str, str]:
    """The field that names the dtype in which a model is loaded: that of most of its bytes."""
    bytes_of: dict[torch.dtype, int] = {}
    for entry in mapped.entries:
        for piece in entry.pieces:
            dtype = tensors.dtype(piece.name)
            bytes_of[dtype] = bytes_of.get(dtype, 0) + dtype.itemsize * int(torch.Size(piece.shape).numel())
    name = str(max(bytes_of, key=lambda d: bytes_of[d])).removeprefix("torch.")
    return {"dtype": name} | ({"torch_dtype": name} if "torch_dtype" in config else {})


def _write_weights(path: Path, mapped: TensorMap, tensors: Tensors | Saved) -> None:
    about = {e.theirs: (tensors.dtype(e.pieces[0].name), e.shape) for e in mapped.entries}
    with writing(path, about) as put:
        for entry in mapped.entries:
            put(entry.theirs, put_together(entry, lambda piece: tensors.get(piece.name, piece.index)))
