"""How long the ranks of a pipeline wait, and how much of it they hold meanwhile; their orders are `lib.schedules`."""

from __future__ import annotations

from collections.abc import Iterable

from ..lib.schedules import Action


def bubble(ranks: int, microbatches: int, chunks: int = 1) -> float:
    """Time that ranks wait as a share of the time that they work: (p - 1) / (v m), for one forward, one backward, plain
    or interleaved (Narayanan et al. 2021, section 2.2)."""
    return (ranks - 1) / microbatches / chunks


def held(order: Iterable[Action]) -> int:
    """The most micro-batches, each through one chunk, whose activations wait at once."""
    waiting = most = 0
    for action in order:
        waiting += 1 if action.kind == "F" else -1
        most = max(most, waiting)
    return most
