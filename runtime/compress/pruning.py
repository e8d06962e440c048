"""Pruning: a student's weights are the teacher's, on the places that are kept of each dim and in the layers that stay.

Nothing here knows a model. What belongs together follows from the dims of the two programs: a dim that is one dim in
the teacher is cut on the same places everywhere, one that a layer has for itself on places of its own; every weight and
every buffer that carries it follows. Source: Muralidharan et al. 2024; groups: Taghibakhshi et al. 2025.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ...dsl.diagnostics import Label, SpecError, fail, listed
from ...dsl.program import Parameter, Program
from .choosing import Choice, check_places
from .dims import Dims, Loop, Path, is_named, text
from .merging import merges, mixture
from .scores import Scores


def prune(
    teacher: Program,
    weights: Mapping[str, Tensor],
    student: Program,
    by: Scores | None = None,
    keep: Mapping[str, Sequence[int]] | None = None,
    ranked: bool = False,
    merge_heads: bool = False,
) -> dict[str, Tensor]:
    """The student's weights and buffers by path, made of the teacher's; what is not cut is the same tensor.

    `by` ranks the places of dims, and layers where it has scores of them; `keep` says instead which places of a dim
    (`hidden`, `mlp.ffn`, `layer.3.mlp.ffn`) or which iterations of a loop (`layer`) stay. Places keep their order, or
    with `ranked` come the best first (within each group). `merge_heads` adds what the heads that go differ by.

    Raises `SpecError`: not-a-part, cannot-cut, no-scores, out-of-range, unknown-dim.
    """
    plan = Plan(teacher, student, by, keep or {}, ranked, merge_heads)
    return {name: plan.cut(name, weights) for name in plan.student.tensors}


class Plan:
    """How a student comes out of a teacher: `sources` are the teacher's paths of its weights, `choice` what is kept."""

    def __init__(
        self, teacher: Program, student: Program, by: Scores | None = None,
        keep: Mapping[str, Sequence[int]] | None = None, ranked: bool = False, merge_heads: bool = False,
    ) -> None:  # fmt: skip
        _check_family(teacher, student)
        self.teacher, self.student, self.by, self.keep = Dims(teacher), Dims(student), by, dict(keep or {})
        self.merge_heads = merge_heads
        self._check_names()
        self.choice = Choice(self.teacher, self.student, by, self.keep, ranked)
        self._iterations: dict[Path, list[int]] = {}
        # Experts are chosen before what stands inside of them is matched.
        names = sorted(self.student.tensors, key=lambda n: len(self._experts_around(n)))
        self.sources = {name: self._source(name) for name in names}
        for name in names:
            self._match(name)
            self.sources[name] = self._source(name, chosen=True)
        for key in self.choice.matched:
            self.choice.kept(key)

    def cut(self, name: str, weights: Mapping[str, Tensor]) -> Tensor:
        """A weight of the student."""
        source = self.sources[name]
        tensor = weights[source]
        _, dims = self.teacher.tensors[source]
        for axis, key in enumerate(dims):
            if self.merge_heads and merges(self.choice, key):
                mixed = mixture(self.choice, key).to(tensor.device, torch.promote_types(tensor.dtype, torch.float32))
                tensor = torch.tensordot(mixed, tensor.to(mixed.dtype), ([1], [axis])).movedim(0, axis).to(tensor.dtype)
                continue
            kept = self.choice.kept(key)
            if len(kept) != tensor.shape[axis] or not torch.equal(kept, torch.arange(len(kept))):
                tensor = tensor.index_select(axis, kept.to(tensor.device))
        return tensor.contiguous()

    # --- matching ---------------------------------------------------------------------------------

    def _experts_around(self, name: str) -> list[Path]:
        place = self.student.tensor_places[name]
        return [path for path in self.student.experts if place[: len(path)] == path]

    def _source(self, name: str, chosen: bool = False) -> str:
        """The teacher's weight that a weight of the student comes from."""
        parameter, _ = self.student.tensors[name]
        path = list(parameter.path)
        for path_of, loop in self.student.loops.items():
            if parameter.path[: len(path_of)] == path_of:
                at = tuple(path[: len(path_of)])
                path[len(path_of)] = self._iteration(at, loop, int(path[len(path_of)]))
        if chosen:
            for path_of in self._experts_around(name):
                at = tuple(path[: len(path_of)])
                kept = self.choice.kept(self.teacher.experts[at].over)
                path[len(path_of)] = int(kept[int(path[len(path_of)])])
        found = text(tuple(path))
        if found not in self.teacher.tensors:
            raise self._absent(parameter, found)
        return found

    def _iteration(self, path: Path, loop: Loop, i: int) -> int:
        """The teacher's iteration that an iteration of the student comes from."""
        if path not in self._iterations:
            mine = self.teacher.loops.get(path)
            if mine is None:
                raise fail("not-a-part", f"the teacher has no loop `{text(path)}`", loop.span, "in the student")
            self._iterations[path] = self._kept_layers(path, mine, loop)
        return self._iterations[path][i]

    def _kept_layers(self, path: Path, mine: Loop, theirs: Loop) -> list[int]:
        told = [list(v) for k, v in self.keep.items() if is_named(text(path), k)]
        have, want = len(mine.kinds), len(theirs.kinds)
        if told:
            check_places(text(path), told[-1], want, have, self.student.program)
            wrong = next((j for j, i in enumerate(told[-1]) if mine.kinds[i] != theirs.kinds[j]), None)
            if wrong is not None:
                raise self._other_kind(
                    mine, theirs, f"layer {wrong} of the student and {told[-1][wrong]} of the teacher"
                )
            return told[-1]
        if mine.kinds == theirs.kinds:
            return list(range(have))
        return self._best_layers(path, mine, theirs)

    def _best_layers(self, path: Path, mine: Loop, theirs: Loop) -> list[int]:
        """The layers with the best scores in all, among those that have the student's kinds in its order."""
        for kind in dict.fromkeys(theirs.kinds):
            have, want = (sum(k == kind for k in loop.kinds) for loop in (mine, theirs))
            if not have:
                raise self._other_kind(mine, theirs, f"layer {theirs.kinds.index(kind)} of the student")
            if want > have:
                raise fail(
                    "not-a-part",
                    f"the student has {want} layers `{text(path)}` of a kind of which the teacher has {have}",
                    theirs.span, "in the student", [Label(mine.span, "in the teacher")] * (mine.span != theirs.span),
                )  # fmt: skip
        first = subsequence(mine.kinds, theirs.kinds, [0.0] * len(mine.kinds))
        if first is None:
            raise fail(
                "not-a-part",
                f"the teacher has the layers `{text(path)}` of the student, but in another order",
                theirs.span, "in the student", [Label(mine.span, "in the teacher")] * (mine.span != theirs.span),
                f"a list of layers for `{text(path)}` puts them into another order",
            )  # fmt: skip
        if self.by is not None and text(path) in self.by.layers:
            return subsequence(mine.kinds, theirs.kinds, self.by.layers[text(path)].tolist()) or first
        backwards = subsequence(mine.kinds[::-1], theirs.kinds[::-1], [0.0] * len(mine.kinds)) or []
        if first != [len(mine.kinds) - 1 - i for i in backwards[::-1]]:
            raise fail(
                "no-scores",
                f"nothing says which {len(theirs.kinds)} of the {len(mine.kinds)} layers `{text(path)}` to keep",
                self.student.program.span,
                help=f"importance of layers, or a list of them for `{text(path)}`, says it",
            )
        return first

    def _match(self, name: str) -> None:
        source = self._source(name, chosen=True)
        (ours, mine), (theirs, their) = self.teacher.tensors[source], self.student.tensors[name]
        if len(mine) != len(their):
            raise fail(
                "not-a-part",
                f"`{name}` has the dims [{', '.join(d for d, _ in theirs.dims)}] in the student, "
                f"[{', '.join(d for d, _ in ours.dims)}] in the teacher",
                theirs.weight.span, "in the student", [Label(ours.weight.span, "in the teacher")],
            )  # fmt: skip
        for a, b in zip(mine, their, strict=True):
            self.choice.match(a, b)

    # --- what does not fit ------------------------------------------------------------------------

    def _check_names(self) -> None:
        known = [*self.teacher.carried, *(loop.name for loop in self.teacher.loops.values())]
        known += [e.over for e in self.teacher.experts.values()]
        for name in self.keep:
            if not any(is_named(key, name) for key in known):
                raise fail(
                    "unknown-dim",
                    f"the teacher has no dim or loop `{name}` to keep places of",
                    self.teacher.program.span,
                )

    def _absent(self, parameter: Parameter, path: str) -> SpecError:
        at = parameter.weight.span
        return fail(
            "not-a-part",
            f"the student has the weight `{parameter.name}`, for which the teacher has none",
            at,
            f"`{path}` would be its weight in the teacher",
        )

    def _other_kind(self, mine: Loop, theirs: Loop, which: str) -> SpecError:
        labels = [] if mine.span == theirs.span else [Label(mine.span, "in the teacher")]
        return fail(
            "not-a-part", f"{which} are of different kinds" if " and " in which else f"{which} is of a kind that the "
            "teacher has not", theirs.span, "in the student", labels,
        )  # fmt: skip


def subsequence(have: Sequence[object], want: Sequence[object], scores: Sequence[float]) -> list[int] | None:
    """The places of `have` that are `want`, in order, with the largest sum of scores; of equal sums the earlier places.
    None where there are none."""
    best = [[0.0 if j == len(want) else -math.inf for j in range(len(want) + 1)] for _ in range(len(have) + 1)]
    for i in reversed(range(len(have))):
        for j in reversed(range(len(want))):
            taken = scores[i] + best[i + 1][j + 1] if have[i] == want[j] else -math.inf
            best[i][j] = max(taken, best[i + 1][j])
    if best[0][0] == -math.inf:
        return None
    found: list[int] = []
    for i, kind in enumerate(have):
        j = len(found)
        if j < len(want) and kind == want[j] and scores[i] + best[i + 1][j + 1] == best[i][j]:
            found.append(i)
    return found


def _check_family(teacher: Program, student: Program) -> None:
    if teacher.family != student.family:
        raise fail(
            "not-a-part",
            f"`{student.name}` is of the family `{student.family}`, its teacher `{teacher.name}` of `{teacher.family}`",
            student.span,
            "the student",
            [Label(teacher.span, "the teacher")],
            f"a student and its teacher are variants of one model: {listed([student.family])}",
        )
