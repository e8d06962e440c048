"""Which spec and map go with an architecture, and the map of a model that is elaborated."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

from ...dsl import syntax as sx
from ...dsl.checkpoint import TensorMap, tensor_map
from ...dsl.diagnostics import did_you_mean, fail
from ...dsl.load import File, load, shipped_folder, standard_index
from ...dsl.program import Program
from ...lowering.ops import table
from ..errors import UserError

MAP = "huggingface"
_DECLARED = re.compile(rf'^checkpoint[ ]+{MAP}[ ]+"([^"]+)"', re.MULTILINE)


@cache
def architectures() -> dict[str, Path]:
    """The shipped file with the map of each architecture."""
    found = {}
    for path in sorted(shipped_folder().glob("*/*.spec")):
        found.update(dict.fromkeys(_DECLARED.findall(path.read_text(encoding="utf-8")), path))
    return found


def for_architecture(name: str) -> tuple[File, sx.Checkpoint]:
    """The file and the map. Raises UserError `unknown-architecture`."""
    path = architectures().get(name)
    if path is None:
        known = ", ".join(architectures())
        raise UserError(
            "unknown-architecture",
            f"no spec maps the architecture `{name}`",
            help=did_you_mean(name, architectures(), "an architecture") or f"known: {known}",
        )
    file = load(path, root=shipped_folder())
    return file, next(c for c in file.checkpoints if c.name == MAP and c.target == name)


def for_program(file: File, program: Program) -> tuple[File, sx.Checkpoint]:
    """The map of a model's family, from the files that its spec uses. Raises UserError `no-map`."""
    for candidate in file.all_files():
        for checkpoint in candidate.checkpoints:
            if checkpoint.name == MAP and checkpoint.model.id == program.family:
                return candidate, checkpoint
    raise UserError(
        "no-map",
        f"no file that `{program.name}` uses declares a `{MAP}` map for `{program.family}`",
        help=f'add `checkpoint {MAP} "..." for {program.family}:` to its spec',
    )


def declared(file: File, checkpoint: sx.Checkpoint) -> sx.Function:
    """The family that a map is for. Raises `SpecError` `not-a-function`."""
    found = file.lookup(checkpoint.model.id)
    if found is None or not isinstance(found.declaration, sx.Function):
        raise fail(
            "not-a-function",
            f"a map is for a model with a body, `{checkpoint.model.id}` is none",
            checkpoint.model.span,
        )
    return found.declaration


def map_of(checkpoint: sx.Checkpoint, program: Program) -> TensorMap:
    """The proved map of a model's weights."""
    kinds = frozenset(standard_index()) | frozenset(table())
    return tensor_map(checkpoint, program.tensors(), program.arguments, kinds)
