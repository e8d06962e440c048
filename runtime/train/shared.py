"""What a rank of several has in place of files of its own: a divided optimizer, and saves with the others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError
from ..lib import Model
from . import checkpoint
from .config import TrainConfig
from .divided import Divided
from .laying import Box, Laying
from .pieces import Saved
from .rows import Ranks, another_model
from .together import Together


class Shared:
    """What a rank of several has in place of files of its own: a divided optimizer, and saves with the others."""

    def __init__(self, model: Model, config: TrainConfig, folder: Path, ranks: Ranks):
        assert model.mesh is not None
        if model.beside is not None:
            raise UserError("not-built-yet", "an objective that owns weights is not built yet for several ranks")
        self.everyone = model.mesh[tuple(model.axes)]
        self.optimizer = Divided(model, config, ranks.over)
        self.laying = Laying(model)
        self.saves = Together(folder, config.keep, ranks.group)

    def save(self, step: int, state: dict[str, Any]) -> Path:
        weights = self.laying.pieces((n, n, t) for n, t in self.laying.tensors.items())
        moments = self.laying.pieces(self.optimizer.states())
        return self.saves.start(step, weights, moments, state)

    def verify(self, path: Path) -> None:
        """Hold a checkpoint against its hashes, each rank a share of the files. Raises `damaged-weights` on all."""
        wrong: UserError | None = None
        try:
            checkpoint.verify(path, slice(self.everyone.rank, None, self.everyone.size))
        except UserError as error:
            wrong = error
        if bool(self.everyone.all_reduce(torch.tensor(int(wrong is not None)), "max")):
            raise wrong or UserError("damaged-weights", f"`{path}` is not what was saved, another rank says where")

    def take_up(self, path: Path) -> None:
        """Fill the model and its optimizer from what any layout saved. Raises UserError `other-run`,
        `damaged-weights`."""
        weights, moments = (Saved(checkpoint.files_of(path, kind)) for kind in ("model", "optimizer"))
        boxes = {name: self.laying.box(name) for name in self.laying.tensors}
        have = {n: weights.shape(n) for n in weights.names()}
        extra = set(have) - set(boxes) if self.laying.model.pipe is None else set()  # other stages have the rest
        if extra or any(have.get(n) != b.whole for n, b in boxes.items()):
            raise another_model(path)
        with torch.no_grad():
            for name, tensor in weights.read(boxes).items():
                self.laying.tensors[name].copy_(tensor)

        def take(key: str, name: str) -> Tensor | None:
            if key not in moments:
                return None
            box = boxes[name] if moments.shape(key) else Box((), (), ())
            return moments.read({key: box})[key]

        try:
            self.optimizer.load(take)
        except KeyError as error:
            raise UserError("damaged-weights", f"`{path}` lacks {error} for the optimizer") from None
