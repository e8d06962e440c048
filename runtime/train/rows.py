"""What a rank has of a batch, and what its part of a loss is worth."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..data import Batch, Packed
from ..errors import UserError
from ..lib import Model
from .config import TrainConfig


@dataclass(frozen=True)
class Ranks:
    """What several ranks need to save together: a process group of all of them, for nothing else, and the axes over
    which the optimizer is divided."""

    group: Any
    over: tuple[str, ...] = ()


def check_rows(model: Model | type[Model], config: TrainConfig) -> None:
    """Raises UserError `uneven-batch` where the ranks of a mesh cannot have equally many rows of a micro-batch, or
    equally many tokens of a row."""
    ranks = prod(model.axes[a] for a in model.rows)
    if config.batch % ranks:
        near = [n for n in (config.batch // ranks * ranks, (config.batch // ranks + 1) * ranks) if n]
        raise UserError(
            "uneven-batch",
            f"a micro-batch of {config.batch} rows does not divide over {ranks} ranks",
            help=f"--batch {' or '.join(map(str, near))} does",
        )
    check_cuts(model, config.seq)


def check_cuts(model: Model | type[Model], seq: int) -> None:
    """Raises UserError `uneven-batch` where ranks cannot have equally many tokens of a row."""
    if seq % model.cuts:
        near = [n for n in (seq // model.cuts * model.cuts, (seq // model.cuts + 1) * model.cuts) if n]
        raise UserError(
            "uneven-batch",
            f"rows of {seq} tokens do not divide into the {model.cuts} parts that the layout cuts them into",
            help=f"--seq {' or '.join(map(str, near))} does",
        )


def check_length(model: Model, data: Packed) -> None:
    """Raises UserError `out-of-range` for data with documents longer than a model has positions for."""
    ends = data.corpus.ends
    longest = min(data.seq, int(np.diff(ends, prepend=0).max()))
    if model.longest is not None and longest > model.longest:
        raise UserError(
            "out-of-range",
            f"rows have documents of {longest} tokens, and `{type(model).__name__}` has positions for {model.longest}",
            help=f"--seq {model.longest} cuts them",
        )


def mine(batch: Batch, model: Model) -> Batch:
    """The rows of a batch that this rank has."""
    if model.mesh is None or not model.rows:
        return batch
    size = len(batch.tokens) // model.mesh.size(*model.rows)
    rows = slice(model.mesh.place(*model.rows) * size, (model.mesh.place(*model.rows) + 1) * size)
    return Batch(batch.tokens[rows], batch.document[rows], batch.rows[rows])


def moved(batch: Batch, model: Model) -> Batch:
    """A batch where the model is."""
    return Batch(batch.tokens.to(model.device), batch.document.to(model.device), batch.rows)


def sum_of_parts(model: Model, parts: Mapping[str, Tensor]) -> Tensor:
    """The sum of losses, each of them a sum of parts over its axes; 0-d fp64, the same on every rank."""
    by_axes: dict[tuple[str, ...], Tensor] = {}
    for name, part in parts.items():
        axes = tuple(model.partial.get(name, ()))
        by_axes[axes] = by_axes[axes] + part if axes in by_axes else part
    assert model.mesh is not None
    total = torch.zeros((), dtype=torch.float64, device=model.device)
    for axes, part in by_axes.items():
        total = total + (model.mesh[axes].all_reduce(part) if axes else part)
    return total


def filled(batch: Batch, missing: int) -> Batch:
    """With rows more in which each token is a document, so that there is nothing to predict."""
    if not missing:
        return batch
    tokens = torch.cat([batch.tokens, batch.tokens[:1].expand(missing, -1)])
    alone = torch.arange(batch.tokens.shape[1]).expand(missing, -1)
    return Batch(tokens, torch.cat([batch.document, alone]), (*batch.rows, *batch.rows[:1] * missing))


def another_model(path: Path) -> UserError:
    """What is said where a checkpoint has other tensors."""
    return UserError(
        "other-run",
        f"`{path}` is of a run with another model",
        help="resume with the spec and the --set that it was started with",
    )
