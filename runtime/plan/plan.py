"""A plan: what a layout asks of each rank and what a step takes there, worked out before anything runs."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

from ...dsl.diagnostics import fail
from ...dsl.layout import Layout
from ...dsl.program import Program
from ...lowering.cost import flops_per_token
from ...lowering.graph import GraphProgram
from ...lowering.passes.stream import state_bytes, streaming_errors
from ...lowering.pipeline import lower
from ..compile import build
from ..distributed import check_stored
from ..lib.mesh import Axes, Mesh
from .devices import Device
from .estimate import Times, estimate, is_inside, wire_bytes
from .sizes import Held, block_of, held
from .step import Feed, Step, measure


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank. `saved` waits for the backward pass of a micro-batch; `working` is the most that a micro-batch
    holds at once, with what is saved; `caches` is the state of one sequence that is decoded, None where none can be."""

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
class Stage:
    """Ranks that hold the same: all of a mesh without stages, else those of one. `ranks` are (first, how many)."""

    ranks: tuple[int, int]
    memory: Memory
    step: Step
    weights: list[Held]
    times: Times


@dataclass(frozen=True)
class Plan:
    """What a layout asks. `model_flops` are those of a step that the model needs, forward and backward; `mfu` is their
    share of what the devices could do in the time."""

    program: Program
    layout: Layout
    device: Device
    precision: str
    feed: Feed
    mesh: Mesh
    rows: int
    stages: list[Stage]
    model_flops: float
    helps: list[str] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        """Tokens of a step, of all ranks."""
        return self.rows * self.feed.rows * self.feed.seq * self.feed.microbatches

    @property
    def seconds(self) -> float:
        return max(s.times.total for s in self.stages)

    @property
    def mfu(self) -> float:
        return self.model_flops / (self.seconds * self.layout.ranks * self.device.flops[self.precision])

    @property
    def over(self) -> int:
        """By how many bytes the fullest rank is too full; 0 where all fit."""
        return max(0, max(s.memory.total for s in self.stages) - self.device.memory)


def plan(
    program: Program, layout: Layout, device: Device, precision: str, feed: Feed, steps: Steps | None = None
) -> Plan:
    """Plan a step of a layout. Raises `SpecError`: what the shard pass raises, not-built-yet."""
    refuse(layout)
    steps = steps or Steps()
    artifact = build(program, layout=layout)
    lowered = artifact.lowered
    mesh = Mesh({a.name: a.size for a in lowered.laid.mesh.atoms})
    over = tuple(a for axis in layout.stored_over("optimizer") for a in lowered.laid.mesh.names(axis))
    step = steps.of(artifact, feed, precision, over)
    weights = held(lowered, precision)
    rows, shards = mesh.size(*_row_axes(lowered)), mesh.size(*over)
    memory = Memory(
        sum(w.bytes for w in weights), step.gradient_bytes, step.optimizer_bytes, step.constants_bytes,
        step.saved_bytes, step.working_bytes, device.reserved,
        None if streaming_errors(lowered) else state_bytes(lowered, feed.seq),
    )  # fmt: skip
    moved = memory.optimizer + memory.gradients // shards
    times = estimate(step.micro, step.once, feed.microbatches, moved, mesh, device, precision)
    needed = 3 * flops_per_token(steps.whole(program), feed.seq)
    stage = Stage((0, layout.ranks), memory, step, weights, times)
    made = Plan(program, layout, device, precision, feed, mesh, rows, [stage], 0.0)
    return replace(made, model_flops=needed * made.tokens)


class Steps:
    """Steps that were measured: ranks of meshes that differ only in how many of them do the same are alike."""

    def __init__(self) -> None:
        self._steps: dict[Any, Step] = {}
        self._whole: dict[int, GraphProgram] = {}

    def of(self, artifact: Any, feed: Feed, precision: str, over: Axes) -> Step:
        """The step of an artifact."""
        lines = (line for line in artifact.source.split("\n") if not line.startswith("    axes = "))
        key = ("\n".join(lines), replace(feed, microbatches=1), precision, over)
        if key not in self._steps:
            self._steps[key] = measure(artifact, feed, precision, over)
        return self._steps[key]

    def whole(self, program: Program) -> GraphProgram:
        """The program on one device."""
        if id(program) not in self._whole:
            self._whole[id(program)] = lower(program)
        return self._whole[id(program)]


def refuse(layout: Layout) -> None:
    """Raises `not-built-yet` for what a plan does not count yet."""
    if layout.stages is not None:
        raise fail("not-built-yet", "a plan of stages is not built yet", layout.stages.span)
    check_stored(layout)


def _row_axes(lowered: GraphProgram) -> tuple[str, ...]:
    """The factors of the mesh over which the rows of a batch are split."""
    inputs = lowered.model.body.inputs
    return lowered.model.dims[inputs[0].type.dims[0]].axes if inputs and inputs[0].type.dims else ()


# --- as data -----------------------------------------------------------------------------------------


def to_json(p: Plan) -> dict[str, Any]:
    """A plan as plain data."""
    return {
        "model": p.program.name,
        "parameters": p.program.num_parameters(),
        "layout": p.layout.name,
        "mesh": dict(p.layout.mesh),
        "factors": p.mesh.axes,
        "ranks": p.layout.ranks,
        "device": p.device.name,
        "precision": p.precision,
        "microbatch": p.feed.rows,
        "seq": p.feed.seq,
        "microbatches": p.feed.microbatches,
        "batch": p.rows * p.feed.rows * p.feed.microbatches,
        "documents": p.feed.documents,
        "tokens": p.tokens,
        "fits": not p.over,
        "over_bytes": p.over,
        "helps": p.helps,
        "seconds": p.seconds,
        "tokens_per_second": p.tokens / p.seconds,
        "model_flops": p.model_flops,
        "mfu": p.mfu,
        "stages": [_stage(p, i, s) for i, s in enumerate(p.stages)],
    }


def _stage(p: Plan, i: int, s: Stage) -> dict[str, Any]:
    m = s.memory
    return {
        "stage": i,
        "ranks": {"first": s.ranks[0], "count": s.ranks[1]},
        "parameters": sum(w.count for w in s.weights),
        "bytes": {**{k: getattr(m, k) for k in m.__dataclass_fields__}, "total": m.total, "capacity": p.device.memory},
        "blocks": _blocks(p, s),
        "lines": _lines(s),
        "collectives": _collectives(p, s),
        "flops": p.feed.microbatches * sum(n * w.flops for w, n in s.step.micro.work.items()),
        "times": {
            "compute": s.times.compute, "collectives": s.times.collectives, "sums": s.times.sums,
            "optimizer": s.times.optimizer, "bubble": s.times.bubble, "total": s.times.total,
        },
        "weights": [
            {"path": w.path, "dims": list(w.dims), "whole": list(w.whole), "shape": list(w.shape),
             "split": [list(a) for a in w.splits], "bytes": w.bytes}
            for w in s.weights
        ],
    }  # fmt: skip


def _blocks(p: Plan, s: Stage) -> list[dict[str, Any]]:
    """Parameters, what is saved, operations and bytes sent of each block, iterations in one."""
    rows: dict[str, dict[str, Any]] = {}

    def row(block: str) -> dict[str, Any]:
        return rows.setdefault(
            block, {"block": block, "parameters": 0, "saved": 0, "flops": 0, "messages": 0, "message_bytes": 0}
        )

    for w in s.weights:
        row(w.block)["parameters"] += w.count
    for saved in s.step.saved:
        row(block_of(saved.block))["saved"] += saved.bytes
    for work, n in s.step.micro.work.items():
        row(block_of(work.block))["flops"] += n * work.flops * p.feed.microbatches
    for message, n in s.step.micro.messages.items():
        found = row(block_of(message.block))
        found["messages"] += n * p.feed.microbatches
        found["message_bytes"] += n * message.bytes * p.feed.microbatches
    return list(rows.values())


def _lines(s: Stage) -> list[dict[str, Any]]:
    """Lines of the spec by what is saved for them, the most first, with their weights."""
    saved: Counter[str] = Counter()
    for x in s.step.saved:
        saved[x.line] += x.bytes
    weights: Counter[str] = Counter()
    for w in s.weights:
        weights[w.line] += w.bytes
    order = sorted({*saved, *weights}, key=lambda line: (-saved[line] - weights[line], line))
    return [{"line": line, "saved": saved[line], "parameters": weights[line]} for line in order]


def _collectives(p: Plan, s: Stage) -> list[dict[str, Any]]:
    """Collectives of a step by phase, kind, axes and line; bytes are those that a rank puts in, wire those it sends."""
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    for ledger, times in ((s.step.micro, p.feed.microbatches), (s.step.once, 1)):
        for m, n in ledger.messages.items():
            size = p.mesh.size(*m.axes)
            row = rows.setdefault(
                (m.phase, m.kind, m.axes, m.line),
                {"phase": m.phase, "kind": m.kind, "axes": list(m.axes), "line": m.line, "ranks": size,
                 "inside_node": is_inside(p.mesh, m.axes, p.device.node), "count": 0, "bytes": 0, "wire_bytes": 0.0},
            )  # fmt: skip
            row["count"] += n * times
            row["bytes"] += n * times * m.bytes
            row["wire_bytes"] += n * times * wire_bytes(m, size)
    return list(rows.values())
