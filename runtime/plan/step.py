"""One training step of one rank without numbers: what the generated module keeps, does and sends."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from ...codegen.names import class_names
from ...dsl.diagnostics import InternalError
from ...lowering.cost import active_share
from ...lowering.graph import Graph, GraphProgram
from ..compile import DTYPES, Artifact, class_of
from ..lib import Gathered, Model
from ..lib.clocks import Clock
from ..lib.laid import global_counts
from ..lib.mesh import Axes
from ..shorter import shorten
from ..train.config import TrainConfig
from ..train.divided import Divided
from ..train.optimizer import Optimizer
from ..train.rows import sum_of_parts
from .blocks import Blocks, Saved
from .hollow import Hollow, Ledger, Shape, Unknown
from .uncompiled import uncompiled
from .wires import Planned


@dataclass(frozen=True)
class Feed:
    """What a rank is fed: `rows` sequences of `seq` tokens a micro-batch, `microbatches` of them a step. `documents`:
    rows may hold several documents, as those of `heddle train` do."""

    rows: int = 1
    seq: int = 4096
    microbatches: int = 1
    documents: bool = True


@dataclass(frozen=True)
class Part:
    """One action of a stage of a pipeline on a micro-batch. `rise` bytes are the most that is there more than when it
    began; when it has ended `kept` bytes stay for later actions, and `saved` of them wait for the backward pass."""

    ledger: Ledger
    rise: int
    kept: int
    saved: tuple[Saved, ...]

    @property
    def saved_bytes(self) -> int:
        return sum(s.bytes for s in self.saved)


@dataclass(frozen=True)
class Stage:
    """What a stage of a pipeline does with one micro-batch, by the kinds of actions; `in_flight` is of how many
    micro-batches it keeps something at most, under its schedule."""

    number: int
    parts: dict[str, Part]
    in_flight: int = 0


@dataclass
class Step:
    """What one step of one rank does. `saved` waits for the backward pass when most does, between actions;
    `working_bytes` is the most that micro-batches hold at once, what is saved included, weights and gradients not.

    `micro` has the work and messages of one micro-batch (phases "counts", "forward", "backward"), `once` those of the
    step (phase "sync"). `optimizer_bytes` are masters, moments and counts of steps, `gradient_bytes` the gradients that
    are summed over micro-batches.
    """

    saved: list[Saved]
    working_bytes: int
    micro: Ledger
    once: Ledger
    parameter_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    constants_bytes: int
    stages: tuple[Stage, ...] = ()

    @property
    def saved_bytes(self) -> int:
        return sum(s.bytes for s in self.saved)


def measure(artifact: Artifact, feed: Feed, precision: str = "fp32", over: Axes = (), short: bool = False) -> Step:
    """Run one step of an artifact, as rank 0 of its mesh, without numbers. The optimizer is divided along `over`;
    `short` as of `opened`.

    Raises `InternalError` where what runs depends on numbers in a way that `Hollow` does not know.
    """
    with opened(artifact, precision, short) as (model, blocks):
        return _step(model, blocks, feed, artifact.lowered, Divided(model, config_of(precision), over))


@contextmanager
def opened(artifact: Artifact, precision: str, short: bool = False) -> Iterator[tuple[Model, Blocks]]:
    """A model without numbers, as rank 0 of its mesh has it, and what runs its blocks; `short`: of all that are alike
    it has two. Raises `InternalError` where what runs inside depends on numbers that `Hollow` does not know."""
    program = artifact.lowered
    mode = Hollow(active_share(program))
    with uncompiled(), mode, _uncollected():
        model = class_of(artifact)()
        if short:
            shorten(model)
        model.cast(DTYPES[precision]).train()
        model.artifact = artifact
        names = class_names(program.graphs)
        free = frozenset(names[g] for g in program.emitting)
        # Where a backward pass has two parts, what a block leaves for the second is its own each time.
        in_two = model.pipe is not None and model.pipe.parts == 2
        blocks = Blocks(mode, model, artifact.source, None if in_two else free)
        model.mesh = Planned(dict(model.axes), mode, blocks.where)
        model.chance = mode.tensor(Shape((), (), torch.int64))  # what follows from it has no numbers to be worked out
        try:
            yield model, blocks
        except Unknown:
            raise InternalError(f"what runs in `{mode.block}` depends on numbers of a real run") from None


def config_of(precision: str) -> TrainConfig:
    """How a model of a precision is trained."""
    return TrainConfig.model_validate({"dtype": precision})


@contextmanager
def _uncollected() -> Iterator[None]:
    """Nothing is collected inside: a step makes very many small objects, and nearly no cycles of them."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _step(model: Model, blocks: Blocks, feed: Feed, program: GraphProgram, optimizer: Divided) -> Step:
    """As the training loop: counts, losses and gradients, then what is made once a step."""
    mode = blocks.mode
    for name, weight in optimizer.weights.items():
        if name not in optimizer.summed.places:  # what has become a gradient is counted as one, and no longer as work
            weight.register_post_accumulate_grad_hook(lambda w: mode.settle(w.grad))
    base, mode.peak = mode.live, mode.live
    tokens, document, given = inputs(model, program, feed)
    micro = mode.ledger = Ledger()
    mode.phase = "counts"
    counts = model.counts(tokens, document, **given)
    once = mode.ledger = Ledger()
    mode.phase = "sync"
    counts = global_counts(model, counts)
    mode.ledger, mode.phase = micro, "forward"
    gathered = Gathered()
    with blocks.keeping() as kept:
        sums = model.losses(tokens, document, gathered=gathered, **given)
        shares = {n: s / counts[n].clamp(min=1) for n, s in sums.items()}
        loss = torch.stack(list(shares.values())).sum()
    saved = list(kept.values())
    mode.phase = "backward"
    loss.backward()
    working = mode.peak - base
    mode.ledger, mode.phase, mode.block, mode.unknown = once, "sync", "", 0.0
    optimizer.gather()
    gradients = gradient_bytes(optimizer)
    sum_of_parts(model, {n: s.detach().double() for n, s in shares.items()})
    optimizer.reduce()
    optimizer.clip(1.0)
    optimizer.step(1e-3)
    gathered.settle(model.mesh)
    return Step(
        saved, working, micro, once, bytes_of(model.parameters()), gradients, state_bytes(optimizer),
        bytes_of(model.buffers()),
    )  # fmt: skip


def state_bytes(optimizer: Optimizer) -> int:
    """What an optimizer holds beside the weights, once it has stepped."""
    weights = set(map(id, optimizer.weights.values()))
    masters = [m for m in optimizer.masters.values() if id(m) not in weights]
    slots = (x for m in optimizer.masters.values() for x in optimizer.adam.state[m].values())
    return bytes_of([*masters, *slots])


def gradient_bytes(optimizer: Divided) -> int:
    """What gradients take, once those of all micro-batches are added up."""
    return bytes_of(g for n in optimizer.weights if (g := optimizer.gradient(n)) is not None)


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """What tensors take that share nothing."""
    return sum(x.numel() * x.element_size() for x in tensors)


def inputs(model: Model, program: GraphProgram, feed: Feed) -> tuple[Tensor, Tensor | None, dict[str, Tensor]]:
    """(tokens, documents, the other inputs) of a micro-batch of one rank, all zeros."""
    between = [size or 1 for size in model.shape[1:-1]]  # several sequences for each row
    tokens = torch.zeros(feed.rows, *between, feed.seq, dtype=torch.int64)
    document = torch.zeros_like(tokens) if feed.documents else None
    graphs = [program.graphs[name] for name in program.program.objectives.values()] + [program.model]
    values = {v.name: (g, v) for g in graphs for v in g.body.inputs}
    given: dict[str, Tensor] = {}
    for name in (model.scored or model.inputs)[1:]:
        graph, value = values[name]
        sizes = [_size(graph, d, i, feed, model.follows.get(name)) for i, d in enumerate(value.type.dims)]
        given[name] = torch.zeros(sizes, dtype=torch.float32 if value.type.kind == "real" else torch.int64)
    return tokens, document, given


def _size(graph: Graph, dim: str, place: int, feed: Feed, clock: Clock | None) -> int:
    """The size of an input's dim: rows, then tokens or groups of them, then what the spec says."""
    known = graph.dims[dim]
    if known.size is not None:
        return known.size
    if place == 0:
        return feed.rows
    return feed.seq if clock is None or not known.sequence else clock.groups(feed.seq)
