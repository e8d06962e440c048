"""Steps of a model whose layers are stages of a pipeline: the run's micro-batches are those that go through it."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ..data import Batch
from ..errors import UserError
from ..lib import At, Gathered, Model
from ..lib.laid import global_sums
from ..lib.pipeline import pipelined, run_through
from .config import TrainConfig


def check_pipe(model: Model | type[Model], config: TrainConfig) -> None:
    """Raises UserError `uneven-batch` where a step has other micro-batches than the layout's stages are for."""
    if model.pipe is not None and config.accumulate != model.pipe.microbatches:
        raise UserError(
            "uneven-batch",
            f"the stages are for {model.pipe.microbatches} micro-batches a step, and there are {config.accumulate}",
            help=f"--accumulate {model.pipe.microbatches}",
        )


def through_stages(
    model: Model, batches: list[Batch], more: list[Mapping[str, Tensor]], counts: dict[str, Tensor],
    gathered: Gathered | None, gather: Callable[[], None] | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    """The sum of each loss over all ranks, on every rank. With `gather` gradients are made, too: it is called each time
    that a micro-batch has added to those of the weights, and may take them to where they are added up.

    batches: this rank's rows of each micro-batch, the same on all stages; more: the inputs beside tokens, by name.
    """

    def at_of(i: int) -> At:
        assert model.mesh is not None
        model.before = i * len(batches[i].tokens) * model.mesh.size(*model.rows)
        at: At = model._rows(batches[i].tokens, None, batches[i].document, None)
        at.gathered, model.before = gathered, 0
        return at

    inputs = [
        [b.tokens, *(m[name] for name in (model.scored or model.inputs)[1:])]
        for b, m in zip(batches, more, strict=True)
    ]
    if gather is None:
        sums = run_through(model, inputs, counts, at_of)
    else:
        sums = pipelined(model, inputs, counts, at_of, gather)
    sums = global_sums(model, sums)
    return sums if gathered is not None else {name: sums[name] for name in _scored(model)}


def _scored(model: Model) -> list[str]:
    """The losses of the objective alone, without those that blocks state where they are asked."""
    lowered = model.artifact.lowered
    found = [lowered.graphs[name].body.emits for name in lowered.program.objectives.values()]
    return [label for emits in found for keyword, label, _ in emits if keyword == "loss"]


def metrics_of(model: Model) -> tuple[str, ...]:
    """The names of all metrics that blocks of any stage state, in one order on all ranks."""
    graphs = model.artifact.lowered.graphs.values()
    return tuple(sorted({label for g in graphs for keyword, label, _ in g.body.emits if keyword == "metric"}))


def total_of(sums: Mapping[str, Tensor], counts: Mapping[str, Tensor]) -> Tensor:
    """The loss, 0-d fp64."""
    return torch.stack([s.double() / counts[n].clamp(min=1) for n, s in sums.items()]).sum()
