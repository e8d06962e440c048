"""In which order a rank of a pipeline runs its stages on micro-batches."""

from __future__ import annotations

from typing import NamedTuple


class Action(NamedTuple):
    """`kind` F (forward), B (backward) or W of a micro-batch, on a chunk of this rank's stages.

    With W, which is the gradients of weights, B is the rest of the backward pass.
    """

    kind: str
    batch: int
    chunk: int = 0

    def __str__(self) -> str:
        return f"{self.kind}{self.batch}.{self.chunk}"


def order(rank: int, ranks: int, batches: int, chunks: int = 1, parts: int = 1) -> tuple[Action, ...]:
    """One forward, one backward; with chunks, interleaved. With a backward pass in two `parts`, zero-bubble: W comes as
    many micro-batches behind its B as there are ranks before this one, so none holds more than the first.

    Source: Narayanan et al. 2021, Efficient Large-Scale Language Model Training on GPU Clusters, section 2.2; in two
    parts Qi et al. 2023, Zero Bubble Pipeline Parallelism, section 3.1, ZB-H1, and with chunks as
    `ScheduleInterleavedZeroBubble` of PyTorch.
    Raises ValueError where a schedule with chunks has micro-batches that are no multiple of the ranks.
    """
    if chunks > 1 and batches % ranks:
        raise ValueError(f"{batches} micro-batches do not divide into groups of {ranks}")
    table = [(m, c) for s in range(0, batches, ranks) for c in range(chunks) for m in range(s, min(s + ranks, batches))]
    total, before = len(table), ranks - rank - 1
    first = min(total, (before if chunks == 1 or parts == 2 else before * 2) + (chunks - 1) * ranks)
    forward = [Action("F", m, c) for m, c in table]
    backward = [Action("B", m, chunks - 1 - c) for m, c in table]
    late = [action._replace(kind="W") for action in backward] if parts == 2 else []
    found = forward[:first]
    for k in range(total):
        found += [*forward[k + first : k + first + 1], backward[k]]
        found += late[k - rank : k - rank + 1] if k >= rank else []
    return (*found, *late[max(0, total - rank) :])
