"""Heads that go leave what they differ by in those that stay (Muralidharan et al. 2024, section 2.3)."""

from __future__ import annotations

import torch
from torch import Tensor

from ...dsl.diagnostics import fail
from ...lowering.ops import table
from .choosing import Choice
from .sites import contractions


def merges(choice: Choice, key: str) -> bool:
    """Whether a dim is cut and is one of heads that can be merged: heads of queries, and keys' heads if each has its
    own.

    Only what linear maps make and read can be added up: a state's decay cannot.
    """
    if not choice.is_cut(key):
        return False
    dims = choice.teacher
    of = [h for h, ties in dims.ties.items() for t in ties if t.by == key and t.count == dims.sizes[h]]
    if key not in dims.grouped and not of:
        return False
    owners = {p.weight.op for p, carried in dims.tensors.values() if key in carried}
    return all(op in table() and contractions(table()[op]) for op in owners)


def mixture(choice: Choice, key: str) -> Tensor:
    """fp64 [kept, all]: each kept head as a sum of heads of the teacher. Raises `SpecError`: cannot-cut, no-scores.

    With L heads by importance of which K stay, head i of 2K - L + 1 .. K becomes head_i + (head_i - head_(2K - i + 1));
    within each group where heads are grouped.
    """
    size, kept, score = choice.teacher.sizes[key], choice.kept(key).tolist(), choice.score(key)
    runs = choice.runs_of(key)
    if all(len(run) == 1 for run in runs):  # each head has keys of its own, so all are one group
        runs = [torch.arange(size)]
    rows = torch.zeros(len(kept), size, dtype=torch.float64)
    place_of = {head: place for place, head in enumerate(kept)}
    rows[range(len(kept)), kept] = 1
    for run in runs:
        ranked = run[torch.sort(score[run], descending=True, stable=True).indices].tolist()
        order = [h for h in ranked if h in place_of] + [h for h in ranked if h not in place_of]
        stay = sum(h in place_of for h in ranked)
        if len(order) > 2 * stay:
            raise fail(
                "cannot-cut",
                f"heads of `{key}` cannot be merged: of {len(order)} only {stay} stay, at least half must",
                choice.student.span_of(choice.matched[key]),
            )
        for i in range(2 * stay - len(order), stay):
            place = place_of[order[i]]
            rows[place, order[i]] += 1
            rows[place, order[2 * stay - i - 1]] -= 1
    return rows
