"""What would help a layout that does not fit, each with what it saves."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

from ...dsl.diagnostics import SpecError
from ...dsl.layout import Layout, Split
from ...dsl.selectors import Selector
from ...dsl.selectors import Step as Segment
from ..tables import size
from .plan import Plan, Steps, plan
from .sizes import block_of
from .step import Feed


def helps(p: Plan, steps: Steps) -> list[str]:
    """Changes of the layout or the batch and how many bytes a rank each would save, the most first."""
    order = sorted(_tried(p, steps), key=lambda pair: -pair[0])
    return [f"{what} saves {size(saved)} a rank" for saved, what in order if saved > 0]


def _tried(p: Plan, steps: Steps) -> Iterator[tuple[int, str]]:
    """What another layout would hold, planned as this one was."""
    for changed, feed, what in (*_stored(p), *_between(p), *_fewer(p), *_wider(p), *_recompute(p)):
        try:
            other = plan(p.program, changed, p.device, p.precision, feed, steps)
        except SpecError:
            continue
        yield p.fullest.memory.total - other.fullest.memory.total, what


def _stored(p: Plan) -> Iterator[tuple[Layout, Feed, str]]:
    """What the ranks that split a batch could keep parts of."""
    batch = [s for s in p.layout.splits if s.selector.steps[-1].name == "batch"]
    rows = tuple(a for s in batch for a in s.axes if p.layout.size(a) > 1)
    for what in ("optimizer", "parameters"):
        if rows and not p.layout.stored_over(what):
            changed = replace(p.layout, stored=(*p.layout.stored, (what, rows, batch[0].span)))
            yield changed, p.feed, f"`shard {what} over {', '.join(rows)}`"


def _between(p: Plan) -> Iterator[tuple[Layout, Feed, str]]:
    if any(s.between for s in p.layout.splits):
        return
    for axis in _model_axes(p.layout):
        split = Split(Selector((Segment("seq"),)), (axis,), True)
        yield replace(p.layout, splits=(*p.layout.splits, split)), p.feed, f"`shard seq over {axis} between blocks`"


def _fewer(p: Plan) -> Iterator[tuple[Layout, Feed, str]]:
    if p.feed.rows > 1:
        rows = p.feed.rows // 2
        yield p.layout, replace(p.feed, rows=rows), f"--microbatch {rows}"
    elif p.feed.seq > 1:
        yield p.layout, replace(p.feed, seq=p.feed.seq // 2), f"--seq {p.feed.seq // 2}"


def _wider(p: Plan) -> Iterator[tuple[Layout, Feed, str]]:
    stages = p.layout.stages
    deeper = [] if stages is None else [stages.axis]
    for axis in (*_model_axes(p.layout), *deeper):
        mesh = tuple((a, 2 * n if a == axis else n) for a, n in p.layout.mesh)
        yield replace(p.layout, mesh=mesh), p.feed, f"`mesh {axis} = {dict(mesh)[axis]}`"


def _model_axes(layout: Layout) -> list[str]:
    """Axes that split dims of weights."""
    axes = (a for s in layout.splits if not s.between and s.selector.steps[-1].name != "batch" for a in s.axes)
    return [a for a in dict.fromkeys(axes) if layout.size(a) > 1]


def _recompute(p: Plan) -> Iterator[tuple[Layout, Feed, str]]:
    """The blocks for which most is saved, run again in the backward pass instead."""
    saved: Counter[str] = Counter()
    for x in p.fullest.step.saved:
        name = block_of(x.block).split(".")[-1]
        if "." in x.block and name != "*":
            saved[name] += x.bytes
    for name in ("blocks", *(n for n, _ in saved.most_common(2))):
        changed = replace(p.layout, recompute=(*p.layout.recompute, Selector((Segment(name),))))
        yield changed, p.feed, f"`recompute {name}`"
