"""The loss on data that a model does not learn from."""

from __future__ import annotations

from math import prod
from typing import Any

import torch

from ..data import Packed
from ..lib import Model
from ..lib.laid import global_counts
from .piped import through_stages
from .rows import filled, mine, moved, sum_of_parts


@torch.no_grad()
def evaluate(model: Model, data: Packed, batch: int, rows: int | None = None) -> float:
    """Mean loss in nats a scored token over the first `rows` rows (all if None); on a mesh, of all its ranks."""
    was_training = model.training
    model.eval()
    count = min(data.num_rows, rows or data.num_rows)
    ranks = prod(model.axes[a] for a in model.rows)
    total, scored = 0.0, 0
    for start in range(0, count, batch):
        chosen = list(range(start, min(start + batch, count)))
        piece = mine(filled(data.rows(chosen), -len(chosen) % ranks), model)
        more: dict[str, Any] = {name: x.to(model.device) for name, x in data.inputs(piece).items()}
        piece = moved(piece, model)
        counts: dict[str, Any] = model.counts(piece.tokens, piece.document, **more)
        if model.mesh is not None:
            counts = global_counts(model, counts)
        if model.pipe is not None:
            sums = through_stages(model, [piece], [more], counts, None)
            total += sum(float(v) for v in sums.values())
        else:
            sums = model.losses(piece.tokens, piece.document, **more)
            alone = model.mesh is None
            parts = {n: v.double() for n, v in sums.items()}
            total += sum(float(v) for v in sums.values()) if alone else float(sum_of_parts(model, parts))
        scored += sum(int(counts[name]) for name in sums)
    model.train(was_training)
    return total / max(1, scored)
