"""One training step of one rank without numbers: what the generated module keeps, does and sends."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...codegen.names import class_names
from ...dsl.diagnostics import InternalError
from ...lowering.cost import active_share
from ...lowering.graph import Graph, GraphProgram
from ..compile import DTYPES, Artifact, module_class
from ..lib import Gathered, Model
from ..lib.clocks import Clock
from ..lib.laid import global_counts, gradient_norm, sync_gradients
from .blocks import Blocks, Saved
from .hollow import Hollow, Ledger, Unknown
from .wires import Planned


@dataclass(frozen=True)
class Feed:
    """What a rank is fed: `rows` sequences of `seq` tokens a micro-batch, `microbatches` of them a step. `documents`:
    rows may hold several documents, as those of `heddle train` do."""

    rows: int = 1
    seq: int = 4096
    microbatches: int = 1
    documents: bool = True


@dataclass
class Step:
    """What one step of one rank does. `saved` waits for the backward pass of a micro-batch; `working_bytes` is the most
    that a micro-batch holds at once, what is saved included, weights and gradients not.

    `micro` has the work and messages of one micro-batch (phases "counts", "forward", "backward"), `once` those of the
    step (phase "sync"). `parameters` are (name, number, bytes a number, bytes a number of its gradient that is kept).
    """

    saved: list[Saved]
    working_bytes: int
    micro: Ledger
    once: Ledger
    parameters: list[tuple[str, int, int, int]]
    constants_bytes: int

    @property
    def saved_bytes(self) -> int:
        return sum(s.bytes for s in self.saved)


def measure(artifact: Artifact, feed: Feed, precision: str = "fp32") -> Step:
    """Run one step of an artifact, as rank 0 of its mesh, without numbers.

    Raises `InternalError` where what runs depends on numbers in a way that `Hollow` does not know.
    """
    program = artifact.lowered
    mode = Hollow(active_share(program))
    with mode:
        kind = module_class(artifact.source, f"{artifact.name}/model.py")
        model = kind()
        model.cast(DTYPES[precision]).train()
        names = class_names(program.graphs)
        blocks = Blocks(mode, model, artifact.source, frozenset(names[g] for g in program.emitting))
        model.mesh = Planned(dict(model.axes), mode, blocks.where)
        try:
            return _step(model, mode, blocks, feed, program)
        except Unknown:
            raise InternalError(f"what runs in `{mode.block}` depends on numbers of a real run") from None


def _step(model: Model, mode: Hollow, blocks: Blocks, feed: Feed, program: GraphProgram) -> Step:
    """As the training loop: counts of all micro-batches, losses and gradients, then the sums of the step."""
    for weight in model.parameters():  # what has become a gradient is counted as one, and no longer as work
        weight.register_post_accumulate_grad_hook(lambda w: mode.settle(w.grad))
    base, mode.peak = mode.live, mode.live
    tokens, document, given = inputs(model, program, feed)
    mode.ledger, mode.phase = Ledger(), "counts"
    micro = mode.ledger
    counts = model.counts(tokens, document, **given)
    mode.phase = "forward"
    with blocks.keeping() as kept:
        sums = model.losses(tokens, document, gathered=Gathered(), **given)
        loss = torch.stack([s / torch.as_tensor(counts[n]).clamp(min=1) for n, s in sums.items()]).sum()
    saved = list(kept.values())
    mode.phase = "backward"
    loss.backward()
    working = mode.peak - base
    mode.ledger, mode.phase, mode.block = Ledger(), "sync", ""
    if model.axes:
        global_counts(model, counts)
        sync_gradients(model)
        gradient_norm(model)
    parameters = [(n, p.numel(), p.element_size(), max(4, p.element_size())) for n, p in model.named_parameters()]
    constants = sum(b.numel() * b.element_size() for b in model.buffers())
    return Step(saved, working, micro, mode.ledger, parameters, constants)


def inputs(model: Model, program: GraphProgram, feed: Feed) -> tuple[Tensor, Tensor | None, dict[str, Tensor]]:
    """(tokens, documents, the other inputs) of a micro-batch of one rank, all zeros."""
    tokens = torch.zeros(feed.rows, feed.seq, dtype=torch.int64)
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
