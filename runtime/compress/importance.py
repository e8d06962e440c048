"""Importance of the places of dims, from forward passes alone (Muralidharan et al. 2024, section 2.2)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ...dsl.program import Program
from ..errors import UserError
from ..lib import Model
from .dims import Dims, Experts, Path
from .scores import Running, Scores, Site
from .sites import Where, sites
from .watching import module_at, watch

Batch = Tensor | Mapping[str, Tensor]


def importance(
    made: Model,
    batches: Iterable[Batch],
    *,
    batch: str = "l2",
    seq: str = "mean",
    at: Mapping[str, str] | None = None,
    program: Program | None = None,
) -> Scores:
    """Scores of every dim that enters a product with a weight, and of experts, by what a model does on `batches`.

    Each batch is tokens int64[batch, seq], or the arguments of the model by name; what is not `valid` does not count.
    `seq` and `batch` say how activations are put together over places, then over samples: mean, l2 or var (`Running`).
    `at` names for a block the variable by which its own dims are scored (`sites`). An expert is scored by the length
    of what it adds, over the tokens of the model. The model is left as it was.
    Raises `SpecError`: unknown-name, not-built-yet; UserError: unknown-setting, no-data.
    """
    dims = Dims(program if program is not None else made.program)
    watcher = _Watcher(made, dims, batch, seq)
    with watcher.watching(sites(dims, at)):
        watcher.run(batches)
    return watcher.scores()


class _Watcher:
    """Statistics of one model while it runs."""

    def __init__(self, model: Model, dims: Dims, batch: str, seq: str) -> None:
        self.model, self.dims, self.how = model, dims, (batch, seq)
        Running(batch, seq)  # says what is wrong before anything runs
        self.found: dict[str, tuple[Where, Running]] = {}
        self.routing: dict[Path, Tensor] = {}
        self.added: dict[str, Tensor] = {}
        self.tokens = 0
        self.valid: Tensor | None = None
        self.seq = 0

    @contextmanager
    def watching(self, wheres: list[Where]) -> Iterator[None]:
        handles: list[Any] = []
        try:
            for path, experts in self.dims.experts.items():
                handles += self._watch_experts(path, experts)
            for where in wheres:
                running = Running(*self.how)
                self.found[where.name] = (where, running)
                handles += watch(self.model, self.dims, where, self._seer(where, running))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def run(self, batches: Iterable[Batch]) -> None:
        was_training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad():
                for given in batches:
                    named = {"tokens": given} if isinstance(given, Tensor) else dict(given)
                    tokens = named["tokens"]
                    self.valid, self.seq = named.get("valid"), tokens.shape[1]
                    self.tokens += tokens.numel() if self.valid is None else int(self.valid.sum())
                    self.model(**named)
        finally:
            self.model.train(was_training)
        if not self.tokens:
            raise UserError("no-data", "importance needs at least one batch of tokens")

    def scores(self) -> Scores:
        made = [
            Site(where.name, where.dims, running.finish()) for where, running in self.found.values() if running.samples
        ]
        made += [Site(f"{key} added", (key,), total / self.tokens) for key, total in self.added.items()]
        batch, seq = self.how
        return Scores(tuple(made), {}, {"batch": batch, "seq": seq, "tokens": self.tokens})

    # --- what is seen -----------------------------------------------------------------------------

    def _seer(self, where: Where, running: Running) -> Any:
        place = self.dims.places[where.path]
        experts = [p for p in self.dims.experts if where.path[: len(p)] == p]
        if place.routed and experts:
            around = max(experts, key=len)
            return lambda x: self._see_routed(x, where, running, around, int(where.path[len(around)]))
        dims = place.body.values()[where.value].type.dims
        sequence = [i for i, d in enumerate(dims[: -len(where.local)]) if place.body.dim(d).sequence]
        return lambda x: self._see(x, where, running, sequence[-1] if sequence else None)

    def _see(self, x: Tensor, where: Where, running: Running, along: int | None) -> None:
        """x [*leading, *dims]; the sequence is the leading dim `along`, the others are samples."""
        shape = [self.dims.sizes[d] for d in where.dims]
        x = (
            x.reshape(*x.shape[: x.dim() - len(shape)], *shape)
            if x.shape[x.dim() - len(shape) :] != tuple(shape)
            else x
        )
        leading = x.dim() - len(shape)
        counts = self.valid
        if along is None:
            x, counts = x.reshape(-1, 1, *shape), None
        else:
            x = x.movedim(along, leading - 1).flatten(0, leading - 2) if leading > 2 else x
            x = x.unsqueeze(0) if leading == 1 else x
            counts = None if counts is None or tuple(counts.shape) != tuple(x.shape[:2]) else counts
        running.add(x, counts)

    def _see_routed(self, x: Tensor, where: Where, running: Running, around: Path, expert: int) -> None:
        """Rows that were routed here: those of one sample together."""
        weights = self.routing.get(around)
        shape = [self.dims.sizes[d] for d in where.dims]
        rows = x.reshape(len(x), *shape)
        if weights is None or not len(rows):
            return
        index = weights[:, expert].nonzero().squeeze(1)
        if self.valid is not None:
            real = self.valid.flatten()[index]
            rows, index = rows[real], index[real]
        sample = index // self.seq
        for one in sample.unique():
            running.add(rows[sample == one][None])

    def _watch_experts(self, path: Path, experts: Experts) -> list[Any]:
        """Note which rows go to which expert, and how much each expert adds."""
        place = self.dims.places[experts.place]
        local = tuple(place.body.values()[str(experts.node.operands[1])].type.dims)
        routing = Where(experts.place, str(experts.node.operands[1]), local[-1:], (experts.over,))

        def note(weights: Tensor) -> None:
            self.routing[path] = weights.flatten(0, -2)

        handles = watch(self.model, self.dims, routing, note)
        modules = module_at(self.model, path)
        assert isinstance(modules, nn.ModuleList)
        for e, module in enumerate(modules):
            handles.append(module.register_forward_hook(self._adder(path, experts.over, e)))
        return handles

    def _adder(self, path: Path, key: str, expert: int) -> Any:
        def add(module: nn.Module, args: Any, out: Tensor) -> None:
            weights = self.routing[path][:, expert]
            index = weights.nonzero().squeeze(1)
            lengths = torch.linalg.vector_norm(out.double() * weights[index, None].double(), 2, -1)
            if self.valid is not None:
                lengths = lengths[self.valid.flatten()[index]]
            total = self.added.setdefault(key, torch.zeros(self.dims.sizes[key], dtype=torch.float64))
            total[expert] += lengths.sum().cpu()

        return add
