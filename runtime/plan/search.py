"""Which sizes of a layout's mesh serve best on so many devices, and why the others do not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from ...dsl.diagnostics import SpecError
from ...dsl.layout import Layout
from ...dsl.program import Program
from ..errors import UserError
from ..tables import size
from .devices import Device
from .plan import Plan, Steps, plan
from .step import Feed


@dataclass(frozen=True)
class Candidate:
    """A layout that was tried: its plan where it can be, and why it is not the best."""

    mesh: tuple[tuple[str, int], ...]
    between: bool
    plan: Plan | None
    why: str = ""


def search(
    program: Program, layout: Layout, ranks: int, device: Device, precision: str, feed: Feed, batch: int | None = None
) -> list[Candidate]:
    """Every way to share `ranks` out over the axes of a layout, with and without its rules between blocks: those that
    fit by MFU, then those that do not fit by how much, then those that cannot be. With `batch` all take so many rows
    a step, in as many micro-batches as it takes; else in one, or with stages in as many as the layout says.

    Raises UserError `no-layout-fits` where no candidate can be laid out at all.
    """
    steps = Steps()
    tried = [_tried(program, c, device, precision, feed, batch, steps) for c in _layouts(layout, ranks)]
    if all(c.plan is None for c in tried):
        reasons = "\n".join(f"{_named(c)}: {c.why}" for c in tried)
        raise UserError("no-layout-fits", f"no mesh of {ranks} ranks can be\n{reasons}")
    fitting = sorted((c for c in tried if c.plan and not c.plan.over), key=lambda c: -_mfu(c))
    full = sorted((c for c in tried if c.plan and c.plan.over), key=lambda c: c.plan.over if c.plan else 0)
    best = _mfu(fitting[0]) if fitting else 0.0
    ranked = [replace(c, why=f"{_mfu(c) / best:.0%} of the best one's speed: {waits(c.plan)}" if i else "the best")
              for i, c in enumerate(fitting) if c.plan]  # fmt: skip
    ranked += [replace(c, why=f"does not fit: {size(c.plan.over)} too much") for c in full if c.plan]
    return ranked + [c for c in tried if c.plan is None]


def _mfu(c: Candidate) -> float:
    return c.plan.mfu if c.plan else 0.0


def _named(c: Candidate) -> str:
    return ", ".join(f"{a} = {n}" for a, n in c.mesh)


def _layouts(layout: Layout, ranks: int) -> Iterator[Layout]:
    """A layout on every mesh of its axes with so many ranks."""
    axes = [a for a, _ in layout.mesh]
    plain = replace(layout, splits=tuple(s for s in layout.splits if not s.between))
    for sizes in _factored(ranks, len(axes)):
        mesh = tuple(zip(axes, sizes, strict=True))
        yield replace(layout, mesh=mesh)
        if plain.splits != layout.splits and any(dict(mesh)[a] > 1 for s in layout.splits if s.between for a in s.axes):
            yield replace(plain, mesh=mesh)


def _factored(number: int, parts: int) -> Iterator[tuple[int, ...]]:
    """All tuples of so many factors."""
    if parts == 1:
        yield (number,)
        return
    for first in (n for n in range(1, number + 1) if number % n == 0):
        yield from ((first, *rest) for rest in _factored(number // first, parts - 1))


def _tried(
    program: Program, layout: Layout, device: Device, precision: str, feed: Feed, batch: int | None, steps: Steps
) -> Candidate:
    between = any(s.between for s in layout.splits)
    try:
        if batch is not None and layout.stages is not None:  # as many micro-batches as the batch makes
            few = replace(layout.stages, microbatches=layout.size(layout.stages.axis))
            rows = plan(program, replace(layout, stages=few), device, precision, feed, steps).rows
            many = replace(few, microbatches=shared(feed, batch, rows).microbatches)
            layout = replace(layout, stages=many)
        made = plan(program, layout, device, precision, feed, steps)
        if batch is not None:
            made = plan(program, layout, device, precision, shared(feed, batch, made.rows, layout), steps)
        return Candidate(layout.mesh, between, made)
    except SpecError as error:
        first = error.diagnostics[0]
        return Candidate(layout.mesh, between, None, f"{first.code}: {first.message}")
    except UserError as error:
        return Candidate(layout.mesh, between, None, f"{error.code}: {error.message}")


def shared(feed: Feed, batch: int, rows: int, layout: Layout | None = None) -> Feed:
    """Micro-batches that make a batch of so many rows: as many as a layout with stages says. Raises UserError
    `uneven-batch`."""
    if batch % (rows * feed.rows):
        raise UserError(
            "uneven-batch", f"a batch of {batch} rows is no multiple of {rows} ranks x {feed.rows} rows",
            help=f"{rows * feed.rows * max(1, batch // (rows * feed.rows))} is",
        )  # fmt: skip
    many = batch // (rows * feed.rows)
    told = None if layout is None else layout.stages
    if told is not None and told.microbatches != many:
        raise UserError(
            "uneven-batch",
            f"the stages are for {told.microbatches} micro-batches a step, and a batch of {batch} rows makes {many} of "
            f"{rows} ranks x {feed.rows} rows",
            help=f"--batch {rows * feed.rows * told.microbatches} does, or `microbatches = {many}` in `{layout.name}`"
            if layout is not None else None,
        )  # fmt: skip
    return replace(feed, microbatches=many)


def waits(p: Plan | None) -> str:
    """What a step's time goes to, the most first."""
    assert p is not None
    times = max((g.times for g in p.groups), key=lambda t: t.total)
    parts = {"kernels": times.compute, **{f"collectives over {a}": t for a, t in times.collectives.items()},
             "waiting for other stages": times.waiting, "sums of gradients": times.sums,
             "the optimizer": times.optimizer}  # fmt: skip
    top = sorted(parts.items(), key=lambda item: -item[1])[:2]
    return ", ".join(f"{t / times.total:.0%} {name}" for name, t in top)
