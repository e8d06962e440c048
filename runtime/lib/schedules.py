"""In which order a rank of a pipeline runs its stages on micro-batches."""

from __future__ import annotations

from typing import NamedTuple


class Action(NamedTuple):
    """`kind` F (forward) or B (backward) of a micro-batch, on a chunk of this rank's stages."""

    kind: str
    batch: int
    chunk: int = 0

    def __str__(self) -> str:
        return f"{self.kind}{self.batch}.{self.chunk}"


def order(rank: int, ranks: int, batches: int, chunks: int = 1) -> tuple[Action, ...]:
    """One forward, one backward (PipeDream-Flush); with chunks, interleaved.

    Source: Narayanan et al. 2021, Efficient Large-Scale Language Model Training on GPU Clusters, section 2.2.
    Raises ValueError where an interleaved schedule has micro-batches that are no multiple of the ranks.
    """
    if chunks > 1 and batches % ranks:
        raise ValueError(f"{batches} micro-batches do not divide into groups of {ranks}")
    table = [(m, c) for s in range(0, batches, ranks) for c in range(chunks) for m in range(s, min(s + ranks, batches))]
    total = len(table)
    first = min(total, ranks - rank - 1 if chunks == 1 else (ranks - rank - 1) * 2 + (chunks - 1) * ranks)
    forward = [Action("F", m, c) for m, c in table]
    backward = [Action("B", m, chunks - 1 - c) for m, c in table]
    found = forward[:first]
    for k in range(total - first):
        found += [forward[k + first], backward[k]]
    return (*found, *backward[total - first :])
