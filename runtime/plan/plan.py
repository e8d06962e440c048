"""A plan: what a layout asks of each rank and what a step takes there, worked out before anything runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

from ...dsl.layout import Layout
from ...dsl.program import Program
from ...lowering.cost import flops_per_token
from ...lowering.graph import GraphProgram
from ...lowering.passes.stream import state_bytes, streaming_errors
from ...lowering.pipeline import lower
from ..compile import Artifact, build, class_of
from ..distributed import check_stored, over_of
from ..lib.mesh import Axes, Mesh
from ..lib.pipeline import Pipe
from ..train.rows import check_cuts
from .devices import Device
from .estimate import Times, busy_seconds, estimate, sending_seconds
from .schedules import TOWARDS, Box, places_of, timeline, waited
from .sizes import Held, Ranks, held
from .staged import Piped, measure_ranks, scheduled
from .step import Feed, Step, measure


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank. `saved` waits for backward passes, of the micro-batches that are in flight when most does;
    `working` is the most that they hold at once, with what is saved; `caches` is the state of one sequence that is
    decoded, None where none can be."""

    parameters: int
    gradients: int
    optimizer: int
    constants: int
    saved: int
    working: int
    reserved: int
    caches: int | None

    @property
    def total(self) -> int:
        """The most that is there at once in training."""
        return self.parameters + self.gradients + self.optimizer + self.constants + self.working + self.reserved


@dataclass(frozen=True)
class Group:
    """Ranks that hold and do the same: all of a mesh without stages, else those that have the same stages."""

    ranks: Ranks
    memory: Memory
    step: Step
    weights: list[Held]
    times: Times


@dataclass(frozen=True)
class Pipeline:
    """The schedule of a step: what each rank along the axis does when, and `seconds` until all are done. `places` says
    which of them has each stage, `near` has pairs of them that are in one node wherever they are on other axes."""

    pipe: Pipe
    schedule: str
    rows: list[list[Box]]
    seconds: float
    places: dict[int, int]
    near: frozenset[tuple[int, int]]

    @property
    def bubble(self) -> float:
        """Time that ranks wait as a share of the time that they work, all ranks together."""
        idle = sum(waited(row, self.seconds) for row in self.rows)
        return idle / (self.seconds * len(self.rows) - idle)


@dataclass(frozen=True)
class Plan:
    """What a layout asks. `model_flops` are those of a step that the model needs, forward and backward; `mfu` is their
    share of what the devices could do in the time. Groups are by their place in the pipeline where there is one."""

    program: Program
    layout: Layout
    device: Device
    precision: str
    feed: Feed
    mesh: Mesh
    rows: int
    groups: list[Group]
    model_flops: float
    pipeline: Pipeline | None = None
    helps: list[str] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        """Tokens of a step, of all ranks."""
        return self.rows * self.feed.rows * self.feed.seq * self.feed.microbatches

    @property
    def seconds(self) -> float:
        return max(g.times.total for g in self.groups)

    @property
    def mfu(self) -> float:
        return self.model_flops / (self.seconds * self.layout.ranks * self.device.flops[self.precision])

    @property
    def fullest(self) -> Group:
        """The ranks that hold most."""
        return max(self.groups, key=lambda g: g.memory.total)

    @property
    def over(self) -> int:
        """By how many bytes the fullest rank is too full; 0 where all fit."""
        return max(0, self.fullest.memory.total - self.device.memory)


def plan(
    program: Program, layout: Layout, device: Device, precision: str, feed: Feed, steps: Steps | None = None
) -> Plan:
    """Plan a step of a layout; one with stages says itself how many micro-batches a step has. Raises `SpecError`: what
    the shard pass raises, not-built-yet; UserError: uneven-batch for rows that it cannot cut."""
    check_stored(layout)
    steps = steps or Steps()
    if layout.stages is not None:
        feed = replace(feed, microbatches=layout.stages.microbatches)
    artifact = build(program, layout=layout)
    kind = class_of(artifact)
    check_cuts(kind, feed.seq)
    mesh, over = Mesh(dict(kind.axes)), over_of(artifact, layout)
    of = _Planned(artifact, layout, device, precision, feed, mesh, over)
    pipeline = None
    if kind.pipe is None:
        every = Ranks(0, layout.ranks, layout.ranks, 1)
        groups = [of.group(every, steps.of(artifact, feed, precision, over), held(artifact.lowered, precision))]
    else:
        groups, pipeline = of.piped(kind.pipe, steps.along(artifact, kind.pipe, feed, precision, over))
    needed = 3 * flops_per_token(steps.whole(program), feed.seq)
    made = Plan(program, layout, device, precision, feed, mesh, mesh.size(*kind.rows), groups, 0.0, pipeline)
    return replace(made, model_flops=needed * made.tokens)


@dataclass(frozen=True)
class _Planned:
    """What is planned, and for what."""

    artifact: Artifact
    layout: Layout
    device: Device
    precision: str
    feed: Feed
    mesh: Mesh
    over: Axes

    def group(self, ranks: Ranks, step: Step, weights: list[Held], waiting: float = 0.0, decodes: bool = True) -> Group:
        """Ranks that take the same step."""
        lowered, feed = self.artifact.lowered, self.feed
        memory = Memory(
            sum(w.bytes for w in weights), step.gradient_bytes, step.optimizer_bytes, step.constants_bytes,
            step.saved_bytes, step.working_bytes, self.device.reserved,
            None if not decodes or streaming_errors(lowered) else state_bytes(lowered, feed.seq),
        )  # fmt: skip
        moved = memory.optimizer + memory.gradients // self.mesh.size(*self.over)
        sums = step.micro, step.once, feed.microbatches, moved
        times = estimate(*sums, self.mesh, self.device, self.precision, waiting)
        return Group(ranks, memory, step, weights, times)

    def piped(self, pipe: Pipe, ranks: Sequence[Piped]) -> tuple[list[Group], Pipeline]:
        """The ranks along the axis of a pipeline, each for all that have the same stages."""
        orders = [pipe.order(place, self.feed.microbatches) for place in range(pipe.size)]
        parts = {stage.number: stage.parts for piped in ranks for stage in piped.stages}
        places, sizes = places_of(pipe), (self.mesh, self.device, self.precision)
        near = _near(self.mesh, pipe, self.device.node)

        @cache
        def busy(kind: str, stage: int) -> float:
            return busy_seconds(parts[stage][kind].ledger, *sizes)

        @cache
        def sending(kind: str, stage: int) -> float:
            way = places[stage], places.get(stage + TOWARDS.get(kind, 0), places[stage])
            return sending_seconds(parts[stage][kind].ledger, way in near, self.device)

        rows = timeline(pipe, orders, busy, sending)
        end = max(row[-1].end for row in rows)
        told = self.layout.stages
        assert told is not None
        weights = held(self.artifact.lowered, self.precision)
        groups = []
        for place, piped in enumerate(ranks):
            mine = [w for w in weights if set(pipe.of(place)) & set(pipe.stages_of(w.path))]
            step = scheduled(piped, orders[place])
            inner = Ranks.along(self.mesh.axes, pipe.axis, place)
            groups.append(self.group(inner, step, mine, waited(rows[place], end), decodes=False))
        return groups, Pipeline(pipe, told.schedule, rows, end, places, near)


def _near(mesh: Mesh, pipe: Pipe, node: int) -> frozenset[tuple[int, int]]:
    """Pairs of places of a pipeline that are in one node for all ranks; ranks are numbered node by node."""
    nodes = [[rank // node for rank in Ranks.along(mesh.axes, pipe.axis, place).all()] for place in range(pipe.size)]
    return frozenset((a, b) for a in range(pipe.size) for b in range(pipe.size) if nodes[a] == nodes[b])


class Steps:
    """Steps that were measured: ranks of meshes that differ only in how many of them do the same are alike."""

    def __init__(self) -> None:
        self._steps: dict[Any, Step] = {}
        self._piped: dict[Any, list[Piped]] = {}
        self._whole: dict[int, GraphProgram] = {}

    def of(self, artifact: Artifact, feed: Feed, precision: str, over: Axes) -> Step:
        """The step of an artifact."""
        key = (_alike(artifact.source), replace(feed, microbatches=1), precision, over)
        if key not in self._steps:
            self._steps[key] = measure(artifact, feed, precision, over)
        return self._steps[key]

    def along(self, artifact: Artifact, pipe: Pipe, feed: Feed, precision: str, over: Axes) -> list[Piped]:
        """What each rank along the axis of a pipeline does, whatever the number of micro-batches."""
        key = (_alike(artifact.source), replace(feed, microbatches=1), precision, over, pipe.size, pipe.chunks)
        if key not in self._piped:
            self._piped[key] = measure_ranks(artifact, feed, precision, over)
        return self._piped[key]

    def whole(self, program: Program) -> GraphProgram:
        """The program on one device."""
        if id(program) not in self._whole:
            self._whole[id(program)] = lower(program)
        return self._whole[id(program)]


def _alike(source: str) -> str:
    """A module without its numbers of ranks and micro-batches."""
    lines = source.split("\n")
    numbers = next((i + 1 for i, line in enumerate(lines) if line.startswith("    pipe = ")), None)
    return "\n".join(line for i, line in enumerate(lines) if i != numbers and not line.startswith("    axes = "))
