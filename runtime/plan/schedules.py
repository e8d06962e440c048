"""Orders of a pipeline's work, as functions: who runs which micro-batch when, and how long ranks wait.

p ranks, v chunks of the model on each (piece c p + r on rank r), m micro-batches. Narayanan et al. 2021.
"""

from __future__ import annotations

from typing import NamedTuple


class Action(NamedTuple):
    """Forward ("F") or backward ("B") of a micro-batch through one chunk of a rank."""

    kind: str
    microbatch: int
    chunk: int = 0

    def __str__(self) -> str:
        return f"{self.kind}{self.microbatch}.{self.chunk}"


def gpipe(ranks: int, microbatches: int, rank: int) -> list[Action]:
    """All forwards, then all backwards (Huang et al. 2019)."""
    each = range(microbatches)
    return [Action("F", m) for m in each] + [Action("B", m) for m in each]


def one_forward_one_backward(ranks: int, microbatches: int, rank: int) -> list[Action]:
    """1F1B: as many forwards ahead as there are ranks behind, then one of each in turn."""
    ahead = min(ranks - rank - 1, microbatches)
    made = [Action("F", m) for m in range(ahead)]
    for m in range(microbatches - ahead):
        made += [Action("F", m + ahead), Action("B", m)]
    return made + [Action("B", m) for m in range(microbatches - ahead, microbatches)]


def table(microbatches: int, chunks: int, group: int) -> list[tuple[int, int]]:
    """(micro-batch, chunk) of the k-th forward: groups of micro-batches pass one chunk after the other."""
    return [
        (m, c)
        for start in range(0, microbatches, group)
        for c in range(chunks)
        for m in range(start, min(start + group, microbatches))
    ]


def interleaved(ranks: int, microbatches: int, chunks: int, rank: int, group: int | None = None) -> list[Action]:
    """Interleaved 1F1B. Raises ValueError where the groups of micro-batches cannot be."""
    group = ranks if group is None else group
    rest = microbatches % group
    if not ranks <= group <= microbatches or rest and rest < ranks:
        raise ValueError(f"groups of {group} of {microbatches} micro-batches do not fill {ranks} ranks")
    order = table(microbatches, chunks, group)
    forward = [Action("F", m, c) for m, c in order]
    backward = [Action("B", m, chunks - 1 - c) for m, c in order]
    ahead = min((ranks - rank - 1) * 2 + (chunks - 1) * group, len(order))
    made = forward[:ahead]
    for k in range(len(order) - ahead):
        made += [forward[k + ahead], backward[k]]
    return made + backward[len(order) - ahead :]


def bubble(schedule: str, ranks: int, microbatches: int, chunks: int = 1) -> float:
    """Time that ranks wait, as a share of the time that they work: (p - 1) / (v m), and a third of it where the
    gradients of weights fill it (zero bubble, Qi et al. 2023: p - 1 units of three)."""
    base = (ranks - 1) / microbatches
    shares = {"gpipe": base, "1f1b": base, "interleaved": base / chunks, "zero_bubble": base / 3}
    return shares[schedule]


def held(order: list[Action]) -> int:
    """The most micro-batches (of chunks) whose activations wait at once."""
    waiting = most = 0
    for action in order:
        waiting += 1 if action.kind == "F" else -1
        most = max(most, waiting)
    return most
