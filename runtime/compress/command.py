"""`heddle prune`: a model folder made of a larger one."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ...dsl.load import load
from ..check import program_of
from ..data import Packed, open_corpus
from ..errors import UserError
from ..folder import load as load_folder
from ..folder import write_spec
from ..huggingface.folders import copy_beside, new_folder
from ..lib import Model
from ..paths import split_entry
from ..running import tokenizer_of
from .dims import Dims
from .importance import importance
from .layers import layer_importance
from .pruning import prune
from .scores import Scores

BESIDE = ("tokenizer.txt", "config.json")


def prune_folder(
    folder: Path, spec: str, overrides: dict[str, Any], out: Path, data: list[Path] | None = None, samples: int = 1024,
    seq: int = 512, batch: int = 8, depth: str = "bi", keep: dict[str, list[int]] | None = None,
    scores: Path | None = None,
) -> Path:  # fmt: skip
    """Prune the model of a folder to a model of a spec and write it to `out`, which appears whole or not at all.

    What stays is said by `scores`, a file of `Scores`, or measured on `data` (`samples` rows of `seq` tokens), or given
    by `keep`. Raises `SpecError`, UserError: what loading, measuring, pruning and writing raise.
    """
    from safetensors.torch import save_file

    path, name = split_entry(spec)
    file = load(path)
    student = program_of(file, name, overrides)
    teacher = load_folder(folder)
    by = Scores.load(scores) if scores is not None else None
    if by is None and data:
        vocab = teacher.program.arguments.get("vocab")
        corpus = open_corpus(data, tokenizer_of(folder), vocab=vocab if isinstance(vocab, int) else None)
        by = measured(teacher, Packed(corpus, seq), samples, batch, depth)
    weights = prune(teacher.program, teacher.state_dict(), student, by, keep)
    with new_folder(out) as partial:
        write_spec(partial, file, student.name, overrides)
        save_file(weights, partial / "model.safetensors", {"format": "pt"})
        copy_beside(folder, partial)
        for beside in BESIDE:
            if (folder / beside).is_file():
                shutil.copyfile(folder / beside, partial / beside)
    return out


def measured(
    teacher: Model, rows: Packed, samples: int, at_once: int, depth: str, batch: str = "l2", seq: str = "mean"
) -> Scores:
    """Scores of dims, and of layers where the model has a residual loop, on the first rows of some data. `batch` and
    `seq` are `importance`'s."""
    count = min(samples, rows.num_rows)
    chosen = [list(range(i, min(i + at_once, count))) for i in range(0, count, at_once)]
    batches = [{n: x.to(teacher.device) for n, x in _batch(rows, some).items()} for some in chosen]
    found = importance(teacher, batches, batch=batch, seq=seq)
    if any(loop.is_residual for loop in Dims(teacher.program).loops.values()):
        found = found.with_layers(layer_importance(teacher, batches, depth))
    return found


def _batch(rows: Packed, chosen: Sequence[int]) -> dict[str, Tensor]:
    batch = rows.rows(list(chosen))
    return {"tokens": batch.tokens, "document": batch.document}


def kept(pairs: list[str] | None) -> dict[str, list[int]]:
    """`["layer=0..14,31"]` as places; both ends of a range count. Raises UserError `bad-override`."""
    found: dict[str, list[int]] = {}
    for pair in pairs or []:
        name, equals, text = pair.partition("=")
        try:
            found[name.strip()] = [i for piece in text.split(",") for i in _places(piece)]
        except ValueError:
            equals = ""
        if not equals or not name.strip():
            raise UserError(
                "bad-override", f"`--keep {pair}` is not NAME=PLACES", help="for example --keep layer=0..14,31"
            )
    return found


def _places(piece: str) -> range:
    first, dots, last = piece.partition("..")
    return range(int(first), int(last if dots else first) + 1)
