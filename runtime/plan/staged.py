"""One training step of each rank of a pipeline without numbers: each action of its stages once, then the schedule."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from ..compile import Artifact
from ..lib import At, Gathered, Model, pipeline
from ..lib.laid import global_counts, global_sums
from ..lib.mesh import Axes
from ..lib.pipeline import Pipe, keep_stages
from ..lib.schedules import Action
from ..train.divided import Divided
from ..train.piped import metrics_of
from .alike import alike
from .blocks import Blocks, Saved
from .hollow import Ledger
from .sizes import line_of
from .step import Feed, Part, Stage, Step, bytes_of, config_of, gradient_bytes, inputs, opened, state_bytes
from .wires import Planned

BORDER = "stage border"
"""The block of what goes from one stage to the next."""
LATER = "gradients of weights"
"""The block of what waits for the second part of a backward pass."""


@dataclass(frozen=True)
class Piped:
    """What one rank of a pipeline does whatever the schedule: its stages by chunk, on one micro-batch each; `counts` is
    what it does for a micro-batch before the first stage runs. The rest as of `Step`."""

    stages: tuple[Stage, ...]
    counts: Ledger
    once: Ledger
    parameter_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    constants_bytes: int


def measure_ranks(artifact: Artifact, feed: Feed, precision: str = "fp32", over: Axes = ()) -> list[Piped]:
    """What each rank along the axis of a pipeline does, the first along all others; those that are alike but for their
    layers' numbers are run once. Raises as `measure`."""
    with opened(artifact, precision) as (model, blocks):
        pipe: Pipe = model.pipe  # type: ignore[assignment]
        run = _Ranks(model, blocks, artifact, feed, over, precision)
        known: dict[Any, Piped] = {}
        found = []
        for place in range(pipe.size):
            key = alike(artifact.lowered, pipe, place)
            piped = known[key] if key in known else run.rank(place)
            if key is not None:
                known[key] = piped
            stages = zip(piped.stages, pipe.of(place), strict=True)
            found.append(replace(piped, stages=tuple(replace(stage, number=number) for stage, number in stages)))
        return found


class _Ranks:
    """One model that is each rank's part in turn: blocks that are alike run once for all of them."""

    def __init__(
        self, model: Model, blocks: Blocks, artifact: Artifact, feed: Feed, over: Axes, precision: str
    ) -> None:
        assert model.pipe is not None and isinstance(model.mesh, Planned)
        self.model, self.blocks, self.mode = model, blocks, blocks.mode
        self.pipe, self.mesh, self.over, self.config = model.pipe, model.mesh, over, config_of(precision)
        layout = artifact.lowered.layout
        assert layout is not None and layout.stages is not None
        self.line = line_of(layout.stages.span)
        self.settled: set[int] = set()
        for weight in model.parameters():
            weight.register_post_accumulate_grad_hook(self._settle)
        self.tokens, self.document, self.given = inputs(model, artifact.lowered, feed)
        self.gathered = Gathered()
        self.at = model._rows(self.tokens, None, self.document, None)
        self.at.gathered = self.gathered

    def _settle(self, weight: Tensor) -> None:
        """What has become a gradient is counted as one, and no longer as work; what is added to it goes."""
        if id(weight) not in self.settled:
            self.settled.add(id(weight))
            self.mode.settle(weight.grad)

    def rank(self, place: int) -> Piped:
        """A step of the rank at a place, as the training loop has it."""
        model, mode = self.model, self.mode
        self.mesh.stand(self.pipe.axis, place)
        mode.ledger = Ledger()  # the optimizer is made once a run, not in a step
        with self._held():
            optimizer = Divided(model, self.config, self.over)
            self.settled = {id(optimizer.weights[name]) for name in optimizer.summed.places}  # these have their room
            for stated in (self.gathered.sums, self.gathered.partial, self.gathered.means):
                stated.clear()
            each = mode.ledger = Ledger()
            mode.phase, mode.block = "counts", ""
            counts = model.counts(self.tokens, self.document, **self.given)
            once = mode.ledger = Ledger()
            mode.phase = "sync"
            counts = global_counts(model, counts)
            stages, sums = self._stages(counts)
            mode.ledger, mode.phase, mode.block, mode.unknown = once, "sync", "", 0.0
            self.mesh[self.pipe.axis].barrier()
            global_sums(model, sums)
            optimizer.gather()
            gradients = gradient_bytes(optimizer)
            optimizer.reduce()
            optimizer.clip(1.0)
            optimizer.step(1e-3)
            state = state_bytes(optimizer)
            optimizer.summed.let_go()  # the next rank has an optimizer of its own
            self.gathered.settle(self.mesh, (self.pipe.axis, metrics_of(model)))
            mode.unknown = None
            self.settled.clear()
            return Piped(
                stages, each, once, bytes_of(model.parameters()), gradients, state,
                bytes_of(model.buffers()),
            )  # fmt: skip

    @contextmanager
    def _held(self) -> Iterator[None]:
        """The model without what this rank does not hold, inside; whole again behind."""
        tables: list[dict[str, Any]] = [t for m in self.model.modules() for t in (m._parameters, m._buffers)]
        before = [(own, dict(own)) for own in tables]
        keep_stages(self.model)
        try:
            yield
        finally:
            for own, whole in before:
                own.update(whole)

    def _stages(self, counts: dict[str, Tensor]) -> tuple[tuple[Stage, ...], dict[str, Tensor]]:
        """Each stage of the rank on one micro-batch, and the sums of the losses that they state."""
        used: list[At] = []

        def at_of(_: int) -> At:
            used.append(self.blocks.around.again(self.at))
            return used[-1]

        batch = [self.tokens, *(self.given[n] for n in (self.model.scored or self.model.inputs)[1:])]
        self.mesh.where, where = (lambda: (BORDER, self.line)), self.mesh.where
        step = pipeline._Step(self.model, [batch], counts, at_of)
        self.mesh.where = where
        return tuple(self._stage(step, chunk, used) for chunk in range(self.pipe.chunks)), step.sums

    def _stage(self, step: pipeline._Step, chunk: int, used: list[At]) -> Stage:
        mode, number = self.mode, self.pipe.of(step.rank)[chunk]
        begun = mode.live


        def ran() -> Part:
            left, late = step.ran.get((number, 0)), step.left.get((number, 0))
            held = [] if left is None else [(BORDER, x) for x in (*left.taken, *left.given)]
            held += [] if late is None else [(LATER, x) for x in late.kept()]
            found = {place: w.saved for place, w in waiting.items()}
            for block, storage in ((block, x.untyped_storage()) for block, x in held):
                if self.blocks.waits(storage):
                    found.setdefault(storage.data_ptr(), Saved(block, self.line, storage.nbytes()))
            return Part(mode.ledger, mode.peak - before, mode.live - begun, tuple(found.values()))

        mode.ledger, mode.phase, mode.block = Ledger(), "forward", ""
        before = mode.peak = mode.live
        with self.blocks.keeping():
            waiting = self.blocks.waiting
            step.forward(Action("F", 0, chunk))
        self.at = self.blocks.around.again(used.pop())
        forward = ran()
        mode.ledger, mode.phase, mode.block = Ledger(), "backward", ""
        before = mode.peak = mode.live
        step.backward(Action("B", 0, chunk))
        parts = {"F": forward, "B": ran()}
        if self.pipe.parts == 2:
            mode.ledger = Ledger()
            before = mode.peak = mode.live
            step.weights(Action("W", 0, chunk))
            parts["W"] = ran()
        return Stage(number, parts)


def scheduled(piped: Piped, order: Sequence[Action]) -> Step:
    """The step of a rank that takes its actions in this order, as many micro-batches as there are in it."""
    by_chunk = piped.stages
    micro = Ledger()
    for ledger in (piped.counts, *(part.ledger for stage in by_chunk for part in stage.parts.values())):
        micro.work.update(ledger.work)
        micro.messages.update(ledger.messages)
    waiting: dict[tuple[int, int], Part] = {}
    kept = saved = working = most = 0
    full: list[Part] = []
    flying, in_flight = Counter[int](), Counter[int]()
    for action in order:
        key, part = (action.chunk, action.batch), by_chunk[action.chunk].parts[action.kind]
        working = max(working, kept + part.rise)
        before = waiting.pop(key, None)
        if before is not None:
            kept, saved = kept - before.kept, saved - before.saved_bytes
            flying[action.chunk] -= 1
        if part.saved:
            waiting[key] = part
            kept, saved = kept + part.kept, saved + part.saved_bytes
            flying[action.chunk] += 1
        in_flight[action.chunk] = max(in_flight[action.chunk], flying[action.chunk])
        if saved > most:
            most, full = saved, list(waiting.values())
    together = Counter[tuple[str, str]]()
    for number, times in Counter(map(id, full)).items():
        for s in next(part for part in full if id(part) == number).saved:
            together[s.block, s.line] += times * s.bytes
    return Step(
        [Saved(block, line, size) for (block, line), size in together.items()], working, micro, piped.once,
        piped.parameter_bytes, piped.gradient_bytes, piped.optimizer_bytes, piped.constants_bytes,
        tuple(replace(stage, in_flight=in_flight[chunk]) for chunk, stage in enumerate(by_chunk)),
    )  # fmt: skip
