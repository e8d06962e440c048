"""When the ranks of a pipeline work and when they wait; their orders are those of `lib.schedules`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from ...dsl.diagnostics import InternalError
from ..lib.pipeline import Pipe
from ..lib.schedules import Action


def bubble(ranks: int, microbatches: int, chunks: int = 1) -> float:
    """Time that ranks wait as a share of the time that they work: (p - 1) / (v m), for one forward, one backward, plain
    or interleaved, where all stages take equally long (Narayanan et al. 2021, section 2.2)."""
    return (ranks - 1) / microbatches / chunks


def held(order: Iterable[Action]) -> int:
    """The most micro-batches, each through one chunk, whose activations wait at once: until the gradients of weights
    are made of them, where these come later."""
    actions = list(order)
    last = "W" if any(action.kind == "W" for action in actions) else "B"
    waiting = most = 0
    for action in actions:
        waiting += {"F": 1, last: -1}.get(action.kind, 0)
        most = max(most, waiting)
    return most


TOWARDS = {"F": 1, "B": -1}
"""What an action of a kind gives goes to so many stages further on."""


class Box(NamedTuple):
    """An action of a rank on one of its stages, from `start` to `end`, seconds since the first rank began."""

    action: Action
    stage: int
    start: float
    end: float


def timeline(
    pipe: Pipe, orders: Sequence[Sequence[Action]], seconds: Callable[[str, int], float],
    sending: Callable[[str, int], float],
) -> list[list[Box]]:  # fmt: skip
    """What each rank does when, if each action begins as soon as its rank is free and what it reads has come.

    seconds: of an action of a kind on a stage; sending: from its end until the stage that reads it has what it gives. A
    rank does not wait for what it sends; from one rank to another one message comes after the other. Raises
    `InternalError` for orders that stand still.
    """
    places = places_of(pipe)
    rows: list[list[Box]] = [[] for _ in orders]
    come: dict[tuple[str, int, int], float] = {}  # when what (kind, micro-batch, stage) gave is there
    taken: dict[tuple[int, int | None], float] = {}  # until when the way from one rank to another is
    moving = True
    while moving:
        moving = False
        for rank, actions in enumerate(orders):
            while len(rows[rank]) < len(actions):
                action = actions[len(rows[rank])]
                stage, step = pipe.of(rank)[action.chunk], TOWARDS.get(action.kind, 0)
                read = (action.kind, action.batch, stage - step)
                is_given = not step or stage - step not in places
                if not is_given and read not in come:
                    break
                start = max(rows[rank][-1].end if rows[rank] else 0.0, 0.0 if is_given else come[read])
                end = start + seconds(action.kind, stage)
                way = (rank, places.get(stage + step))
                taken[way] = max(end, taken.get(way, 0.0)) + sending(action.kind, stage)
                come[action.kind, action.batch, stage] = taken[way]
                rows[rank].append(Box(action, stage, start, end))
                moving = True
    if any(len(row) < len(actions) for row, actions in zip(rows, orders, strict=True)):
        raise InternalError("a schedule stands still: every rank waits for another")
    return rows


def places_of(pipe: Pipe) -> dict[int, int]:
    """The rank along the axis that has each stage."""
    return {stage: rank for rank in range(pipe.size) for stage in pipe.of(rank)}


def waited(row: Sequence[Box], end: float) -> float:
    """Seconds of `end` in which a rank does nothing."""
    return end - sum(box.end - box.start for box in row)
