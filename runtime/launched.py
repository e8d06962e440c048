"""What a model launches: a training step and steps of decoding, run without numbers and without a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from ..dsl.diagnostics import InternalError
from ..lowering.cost import active_share
from ..lowering.target import Target
from .ahead import Built
from .ahead import build as build_ahead
from .compile import DTYPES, Artifact, class_of
from .lib import Gathered, Model, kernels
from .lib.kernels import Launch
from .plan.hollow import Hollow, Unknown
from .plan.step import Feed, inputs
from .plan.uncompiled import uncompiled
from .plan.wires import Planned
from .shorter import shorten


def launched(artifact: Artifact, feed: Feed | None = None, precision: str = "bf16") -> list[Launch]:
    """The launches of the losses and gradients of one micro-batch, then of a prompt and of one token more, those of two
    of all blocks that are alike; what is launched twice alike may be there once. A model without an objective has the
    gradients of its result, and one that does not decode has no prompt.

    Sizes that `feed` says are arguments of kernels: that they are multiples of 16, or 1, is all that a build knows.
    Raises ValueError for a pipeline, and `InternalError` where what is launched depends on numbers of a real run.
    """
    feed = feed or Feed()
    with _hollow(artifact, precision) as model, kernels.launches(elsewhere=True) as told:
        if model.pipe is not None:
            raise ValueError("a pipeline's stages are launched by their schedule")
        tokens, document, given = inputs(model, artifact.lowered, feed)
        if artifact.program.objectives:
            losses = model.losses(tokens, document, gathered=Gathered(), **given)
            torch.stack(list(losses.values())).sum().backward()
        else:  # what trains it stands outside of the spec
            model(tokens, document, **given).sum().backward()
        if model.late is None and tokens.dim() == 2:
            _decode(model.eval(), artifact, feed)
    return told


def built_for(
    artifact: Artifact, target: Target, feed: Feed | None = None, precision: str = "bf16", cache: Path | None = None
) -> list[Built]:
    """The kernels of a model, built for a target, for rows of one document and of several; `feed` has no more tokens
    than the model knows positions for. Raises as `launched` does, and ValueError for a target that is no GPU's."""
    feed = feed or Feed()
    longest = class_of(artifact).longest
    feed = replace(feed, seq=min(feed.seq, longest or feed.seq), documents=False)
    told = launched(artifact, feed, precision)
    try:
        told += launched(artifact, replace(feed, documents=True), precision)
    except ValueError as error:  # a model that takes one row of each document is not fed packed ones
        if "whole documents" not in str(error):
            raise
    return build_ahead(told, target, cache)


@contextmanager
def _hollow(artifact: Artifact, precision: str) -> Iterator[Model]:
    """The model without numbers, with two of all blocks that are alike; of several ranks the first."""
    mode = Hollow(active_share(artifact.lowered))
    with uncompiled(), mode:
        model = class_of(artifact)()
        shorten(model)
        model.cast(DTYPES[precision]).train()
        if model.axes:
            model.mesh = Planned(dict(model.axes), mode, lambda: ("", ""))
        model.chance = 0
        try:
            yield model
        except Unknown:
            raise InternalError("what a model launches depends on numbers of a real run") from None


def _decode(model: Model, artifact: Artifact, feed: Feed) -> None:
    """A prompt and a token, of `feed.rows` sequences, with the rows of other inputs that come with them."""
    _, _, given = inputs(model, artifact.lowered, feed)
    stream = model.stream(feed.rows, feed.seq)
    for seq in (max(1, feed.seq - 16), 1):
        tokens = torch.zeros(feed.rows, seq, dtype=torch.int64)
        more = {
            name: given[name].new_zeros(feed.rows, rows.shape[1], *given[name].shape[2:])
            for name, (rows, _) in model.coming(stream, seq).items()
        }
        model.prefill(tokens, stream, **more)
