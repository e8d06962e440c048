"""A plan as plain data."""

from __future__ import annotations

from collections import Counter
from itertools import groupby
from typing import Any

from .estimate import is_inside, wire_bytes
from .plan import Group, Pipeline, Plan
from .schedules import waited
from .sizes import block_of
from .step import Stage


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
        "groups": [_group(p, i, g) for i, g in enumerate(p.groups)],
        "pipeline": None if p.pipeline is None else _pipeline(p.pipeline),
    }


def _group(p: Plan, i: int, g: Group) -> dict[str, Any]:
    m = g.memory
    return {
        "group": i,
        "ranks": {"first": g.ranks.first, "count": g.ranks.count, "runs": [list(run) for run in g.ranks.runs()]},
        "parameters": sum(w.count for w in g.weights),
        "bytes": {**{k: getattr(m, k) for k in m.__dataclass_fields__}, "total": m.total, "capacity": p.device.memory},
        "stages": [] if p.pipeline is None else [_stage(p, p.pipeline, g, s) for s in g.step.stages],
        "blocks": _blocks(p, g),
        "lines": _lines(g),
        "collectives": _collectives(p, i, g),
        "flops": p.feed.microbatches * sum(n * w.flops for w, n in g.step.micro.work.items()),
        "times": {
            "compute": g.times.compute, "collectives": g.times.collectives, "sums": g.times.sums,
            "optimizer": g.times.optimizer, "waiting": g.times.waiting, "bubble": g.times.bubble,
            "total": g.times.total,
        },
        "weights": [
            {"path": w.path, "dims": list(w.dims), "whole": list(w.whole), "shape": list(w.shape),
             "split": [list(a) for a in w.splits], "bytes": w.bytes}
            for w in g.weights
        ],
    }  # fmt: skip


def _stage(p: Plan, pipeline: Pipeline, g: Group, s: Stage) -> dict[str, Any]:
    """A stage of a rank: `in_flight` micro-batches of it wait at most, `saved` bytes for each; seconds and bytes that
    are sent to the next and the last stage are those of one micro-batch, by action; FLOP those of a step."""
    boxes = [box for box in pipeline.rows[pipeline.places[s.number]] if box.stage == s.number]
    weights = [w for w in g.weights if s.number in pipeline.pipe.stages_of(w.path)]
    sent = {
        kind: sum(n * m.bytes for m, n in part.ledger.messages.items() if m.kind == "send")
        for kind, part in s.parts.items()
    }
    flops = {kind: sum(n * w.flops for w, n in part.ledger.work.items()) for kind, part in s.parts.items()}
    return {
        "stage": s.number,
        "chunk": pipeline.pipe.of(pipeline.places[s.number]).index(s.number),
        "holds": owned(pipeline.pipe.owns[s.number]),
        "parameters": sum(w.count for w in weights),
        "parameter_bytes": sum(w.bytes for w in weights),
        "saved": s.parts["F"].saved_bytes,
        "in_flight": s.in_flight,
        "flops": p.feed.microbatches * sum(flops.values()),
        "seconds": {kind: next(b.end - b.start for b in boxes if b.action.kind == kind) for kind in s.parts},
        "sent": sent,
    }


def owned(paths: tuple[str, ...]) -> list[str]:
    """What a stage owns, iterations that are neighbours in one: `["embedding", "layer 0..9"]`."""
    named = [path.rpartition(".") for path in paths]
    keys = [(h, int(t) - i) if t.isdigit() else (h or t, None) for i, (h, _, t) in enumerate(named)]
    found = []
    for (name, start), members in groupby(zip(keys, named, strict=True), key=lambda pair: pair[0]):
        tails = [tail for _, (_, _, tail) in members]
        found.append(name if start is None else f"{name} {tails[0]}" + (f"..{tails[-1]}" if len(tails) > 1 else ""))
    return list(dict.fromkeys(found))


def _pipeline(line: Pipeline) -> dict[str, Any]:
    """The schedule as it runs; a row of `timeline` is [kind, micro-batch, stage, start, end] for each action of a rank,
    in seconds, `bubble` the waiting of all ranks as a share of their work."""
    return {
        "axis": line.pipe.axis,
        "schedule": line.schedule,
        "ranks": line.pipe.size,
        "chunks": line.pipe.chunks,
        "stages": line.pipe.size * line.pipe.chunks,
        "seconds": line.seconds,
        "bubble": line.bubble,
        "waiting": [waited(row, line.seconds) for row in line.rows],
        "timeline": [[[b.action.kind, b.action.batch, b.stage, b.start, b.end] for b in row] for row in line.rows],
    }


def _blocks(p: Plan, g: Group) -> list[dict[str, Any]]:
    """Parameters, what is saved, operations and bytes sent of each block, iterations in one."""
    rows: dict[str, dict[str, Any]] = {}

    def row(block: str) -> dict[str, Any]:
        return rows.setdefault(
            block, {"block": block, "parameters": 0, "saved": 0, "flops": 0, "messages": 0, "message_bytes": 0}
        )

    for w in g.weights:
        row(w.block)["parameters"] += w.count
    for saved in g.step.saved:
        row(block_of(saved.block))["saved"] += saved.bytes
    for work, n in g.step.micro.work.items():
        row(block_of(work.block))["flops"] += n * work.flops * p.feed.microbatches
    for message, n in g.step.micro.messages.items():
        found = row(block_of(message.block))
        found["messages"] += n * p.feed.microbatches
        found["message_bytes"] += n * message.bytes * p.feed.microbatches
    return list(rows.values())


def _lines(g: Group) -> list[dict[str, Any]]:
    """Lines of the spec by what is saved for them, the most first, with their weights."""
    saved: Counter[str] = Counter()
    for x in g.step.saved:
        saved[x.line] += x.bytes
    weights: Counter[str] = Counter()
    for w in g.weights:
        weights[w.line] += w.bytes
    order = sorted({*saved, *weights}, key=lambda line: (-saved[line] - weights[line], line))
    return [{"line": line, "saved": saved[line], "parameters": weights[line]} for line in order]


def _collectives(p: Plan, place: int, g: Group) -> list[dict[str, Any]]:
    """Messages of a step by phase, kind, axes and line: collectives, and what is sent to other stages. Bytes are those
    that a rank puts in, wire those it sends."""
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    for ledger, times in ((g.step.micro, p.feed.microbatches), (g.step.once, 1)):
        for m, n in ledger.messages.items():
            if m.kind == "receive":  # the other end of what is sent
                continue
            size, axes = p.mesh.size(*m.axes), [a for a in m.axes if p.mesh.axes[a] > 1]
            inside = is_inside(p.mesh, m.axes, p.device.node)
            if m.kind == "send" and p.pipeline is not None:
                to = (place + (1 if m.phase == "forward" else -1)) % p.pipeline.pipe.size
                inside = (place, to) in p.pipeline.near
            row = rows.setdefault(
                (m.phase, m.kind, m.axes, m.line),
                {"phase": m.phase, "kind": m.kind, "axes": axes, "line": m.line, "ranks": size,
                 "inside_node": inside, "count": 0, "bytes": 0, "wire_bytes": 0.0},
            )  # fmt: skip
            row["count"] += n * times
            row["bytes"] += n * times * m.bytes
            row["wire_bytes"] += n * times * wire_bytes(m, size)
    return list(rows.values())
