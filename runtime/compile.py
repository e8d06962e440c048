"""Compiling: from a spec to a folder with readable source, kept under the hash of its content."""

from __future__ import annotations

import builtins
import importlib.util
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..codegen.emit import digest, emit_module
from ..dsl.layout import Layout
from ..dsl.load import load
from ..dsl.program import Program
from ..lowering.graph import GraphProgram
from ..lowering.pipeline import lower
from .check import proved
from .errors import UserError
from .lib import Model
from .lib.mesh import Mesh
from .paths import split_entry

TARGETS = ("cpu",)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}


@dataclass(frozen=True)
class Artifact:
    """What was compiled: `source` is the text of model.py, `name` is `<model>-<hash>`."""

    name: str
    source: str
    lowered: GraphProgram

    @property
    def program(self) -> Program:
        return self.lowered.program


def build(program: Program, target: str = "cpu", layout: Layout | None = None) -> Artifact:
    """Lower a program and write its source; with a layout, that of one rank of its mesh (all ranks run the same).

    Raises UserError `unknown-target`; `SpecError` for a layout that cannot be.
    """
    if target not in TARGETS:
        raise UserError("unknown-target", f"no target is named `{target}`", help=f"targets: {', '.join(TARGETS)}")
    return emitted(lower(program, layout=layout))


def emitted(lowered: GraphProgram, **how: Any) -> Artifact:
    """The artifact of lowered graphs; `how` as of `emit_module`."""
    source = emit_module(lowered, __version__, **how)
    return Artifact(f"{lowered.program.name}-{digest(source)}", source, lowered)


def write(artifact: Artifact, folder: Path) -> Path:
    """Write the artifact into `folder/<name>/`; a folder of that name already has these bytes and is left alone.

    Raises UserError `cannot-write`.
    """
    out = folder / artifact.name
    if (out / "model.py").is_file():
        return out
    try:
        folder.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=folder))
    except OSError as error:
        raise UserError("cannot-write", f"cannot write to `{folder}`: {error.strerror}") from None
    try:
        (partial / "model.py").write_text(artifact.source, encoding="utf-8")
        (partial / "plan.json").write_text(json.dumps(plan(artifact.lowered), indent=1) + "\n", encoding="utf-8")
        partial.chmod(0o755)
        os.replace(partial, out)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        if (out / "model.py").is_file():
            return out
        raise UserError("cannot-write", f"cannot write `{out}`: {error.strerror}") from None
    return out


def plan(lowered: GraphProgram) -> dict[str, Any]:
    """What the model holds and keeps, as plain data."""
    program = lowered.program
    return {
        "model": program.name,
        "parameters": program.num_parameters(),
        "weights": {p.name: list(p.shape) for p in program.parameters()},
    }


def module_class(source: str, name: str) -> type[Model]:
    """The model's class, from the text of its module."""
    spec = importlib.util.spec_from_loader(f"heddle_artifact_{digest(source)}", loader=None, origin=name)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    module.__file__ = name
    sys.modules[spec.name] = module
    exec(builtins.compile(source, name, "exec"), module.__dict__)
    return module.Model


def instantiate(
    artifact: Artifact, seed: int | None = 0, dtype: torch.dtype | None = None, device: str | None = None,
    mesh: Mesh | None = None,
) -> Model:  # fmt: skip
    """A module of the artifact, filled from the spec's initial values (`seed` None leaves it unfilled). `mesh` says
    which rank's part it is, where it was built with a layout."""
    kind = module_class(artifact.source, f"{artifact.name}/model.py")
    with torch.device(device or "cpu"):
        model = kind()
    model.mesh = mesh
    if seed is not None and device != "meta":
        model.initialise(seed)
    if dtype is not None:
        model.cast(dtype)
    model.program = artifact.program
    model.artifact = artifact
    return model


def compile(  # noqa: A001 (the public name is heddle.compile)
    path: str | Path,
    model: str | None = None,
    target: str = "cpu",
    seed: int = 0,
    dtype: torch.dtype | str | None = None,
    overrides: Mapping[str, Any] | None = None,
    cache: str | Path | None = None,
) -> Model:
    """Compile a model of a spec file to an `nn.Module`: `model(tokens)` gives logits [batch, seq, vocab].

    `model` names one of the file's models (`path` may also be `FILE:MODEL`), `seed` fills its weights, `dtype` casts
    them (fp32, bf16, fp64 or a torch dtype). With `cache`, the source is kept there under the hash of its content.
    Raises `SpecError`, `UserError`.
    """
    file, model = split_entry(path, model)
    artifact = build(proved(load(file), model, overrides), target)
    if cache is not None:
        write(artifact, Path(cache))
    return instantiate(artifact, seed, DTYPES[dtype] if isinstance(dtype, str) else dtype)
