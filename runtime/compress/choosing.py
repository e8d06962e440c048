"""Which places of the teacher's dims a student keeps: by scores or as told, within what ops take in equal runs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ...dsl.diagnostics import Label, SpecError, fail
from ...dsl.program import Program
from .dims import Dims, Tie, is_named
from .scores import Scores


class Choice:
    """The kept places of each dim of a teacher, for the sizes of a student.

    `matched` maps a dim of the teacher to the dim of the student that has its place; only such dims can be asked for.
    """

    def __init__(
        self, teacher: Dims, student: Dims, by: Scores | None, keep: Mapping[str, Sequence[int]], ranked: bool
    ) -> None:
        self.teacher, self.student, self.by, self.keep, self.ranked = teacher, student, by, keep, ranked
        self.matched: dict[str, str] = {}
        self._kept: dict[str, Tensor] = {}

    def match(self, ours: str, theirs: str) -> None:
        """Note that a dim of the teacher is this dim of the student. Raises `SpecError`: not-a-part, cannot-cut."""
        have, want = self.teacher.sizes[ours], self.student.sizes[theirs]
        if want > have:
            raise self._failure(
                "not-a-part", ours, theirs, f"the student asks for {want} of `{ours}`, the teacher has {have}"
            )
        other = self.matched.setdefault(ours, theirs)
        if other != theirs and self.student.sizes[other] != want:
            raise self._failure(
                "cannot-cut", ours, theirs,
                f"`{ours}` is one dim in the teacher, and two in the student: {self.student.sizes[other]} and {want}",
            )  # fmt: skip
        rivals = [t for t, s in self.matched.items() if s == theirs and t != ours]
        if rivals and want != have:
            raise self._failure(
                "cannot-cut", ours, theirs,
                f"`{theirs}` is one dim in the student, but `{rivals[0]}` and `{ours}` in the teacher",
            )  # fmt: skip

    def is_cut(self, key: str) -> bool:
        return self.size(key) != self.teacher.sizes[key]

    def size(self, key: str) -> int:
        """How many places of a dim of the teacher are kept."""
        return self.student.sizes[self.matched[key]] if key in self.matched else self.teacher.sizes[key]

    def kept(self, key: str) -> Tensor:
        """int64 places of the teacher's dim, in the order in which the student has them.

        Raises `SpecError`: cannot-cut, no-scores, out-of-range.
        """
        if key not in self._kept:
            self._kept[key] = self._choose(key)
        return self._kept[key]

    # --- choosing ---------------------------------------------------------------------------------

    def _choose(self, key: str) -> Tensor:
        have, want = self.teacher.sizes[key], self.size(key)
        told = self._told(key)
        if key in self.teacher.rigid and (have != want or told is not None and told != list(range(have))):
            op, span = self.teacher.rigid[key]
            raise self._failure(
                "cannot-cut", key, self.matched[key],
                f"`{key}` cannot be cut from {have} to {want}: `{op}` needs its places as they are",
                [Label(span, "here")],
            )  # fmt: skip
        runs = self._runs(key)
        if have == want and told is None:
            return torch.cat(runs)
        if told is not None:
            self._check_told(key, told, runs)
            return torch.tensor(told, dtype=torch.int64)
        return self._best(self.score(key), runs, want)

    def _best(self, score: Tensor, runs: list[Tensor], want: int) -> Tensor:
        """The best of each run, the same number in each; of equal scores the earlier place."""
        each = want // len(runs)
        found = []
        for run in runs:
            best = run[torch.sort(score[run], descending=True, stable=True).indices[:each]]
            found.append(best if self.ranked else best.sort().values)
        return torch.cat(found)

    def runs_of(self, key: str) -> list[Tensor]:
        """The runs of a dim that is kept evenly in each."""
        return self._runs(key)

    def _runs(self, key: str) -> list[Tensor]:
        """The runs of which the same number of places is kept in each; those that go as a whole are not among them."""
        have, want = self.teacher.sizes[key], self.size(key)
        ties = self.teacher.ties.get(key, ())
        if not ties:
            return [torch.arange(have)]
        counts = [self._student_count(key, tie, i) for i, tie in enumerate(ties)]
        if len(ties) == 1:
            tie = ties[0]
            places = torch.arange(have).view(tie.count, -1)
            if tie.by is not None:
                places = places[self.kept(tie.by)]
        else:
            moved = any(t.by is not None and not _is_whole(self.kept(t.by), t.count) for t in ties)
            fine = math.lcm(*(t.count for t in ties))
            if moved or counts != [t.count for t in ties] or have % fine or want % fine:
                raise self._uneven(key, ties[0], want, [Label(t.span, f"{t.count} runs for `{t.op}`") for t in ties])
            tie, places = ties[0], torch.arange(have).view(fine, -1)
        if want % len(places) or want // len(places) > places.shape[1]:
            raise self._uneven(key, tie, want, [Label(tie.span, f"{places.shape[1]} of `{key}` a run")])
        return list(places)

    def _student_count(self, key: str, tie: Tie, i: int) -> int:
        """How many runs the student has in place of these."""
        if tie.by is not None and tie.by in self.matched:
            return self.size(tie.by)
        theirs = self.student.ties.get(self.matched[key], ())
        count = theirs[i].count if i < len(theirs) else 1
        if count != tie.count:
            raise self._uneven(
                key, tie, self.size(key), [Label(tie.span, f"{tie.count} runs, the student has {count}")]
            )
        return count

    def _uneven(self, key: str, tie: Tie, want: int, labels: list[Label]) -> SpecError:
        return self._failure(
            "cannot-cut", key, self.matched[key],
            f"`{key}` cannot be cut from {self.teacher.sizes[key]} to {want} evenly: `{tie.op}` takes it in runs",
            labels,
        )  # fmt: skip

    # --- what says which --------------------------------------------------------------------------

    def score(self, key: str) -> Tensor:
        """fp64 [size of the dim]: by its own sites, else by what it numbers the runs of. Raises `no-scores`."""
        if self.by is not None and key in self.by:
            # Channels are ranked once for all heads, then heads by the channels that are left.
            free = {k: self.kept(k) for k in self._beside(key) if k not in self.teacher.ties}
            return self.by.within(key, free if key in self.teacher.ties else {})
        for other, ties in self.teacher.ties.items():
            for tie in ties:
                if tie.by == key and self.by is not None and other in self.by:
                    return torch.linalg.vector_norm(self.score(other).view(tie.count, -1), 2, 1)
        raise self._failure(
            "no-scores", key, self.matched[key],
            f"nothing says which {self.size(key)} of the {self.teacher.sizes[key]} places of `{key}` to keep",
            help=f"scores of {_some(self.by.dims)} are known" if self.by is not None and self.by.dims
            else "importance of the teacher, or a list of places, says it",
        )  # fmt: skip

    def _beside(self, key: str) -> list[str]:
        """Dims that are scored together with one, and are known to the student."""
        assert self.by is not None
        found = dict.fromkeys(d for site in self.by.sites if key in site.dims for d in site.dims)
        return [d for d in found if d != key and d in self.matched]

    def _told(self, key: str) -> list[int] | None:
        """What `keep` says of a dim; a name that is a dim's whole means no other that ends with it."""
        known = self.teacher.sizes
        found = [list(v) for name, v in self.keep.items() if name == key or name not in known and is_named(key, name)]
        return found[-1] if found else None

    def _check_told(self, key: str, told: list[int], runs: list[Tensor]) -> None:
        have, want = self.teacher.sizes[key], self.size(key)
        check_places(key, told, want, have, self.student.program)
        each = want // len(runs)
        width = len(runs[0])
        parts = [told[i : i + each] for i in range(0, want, each)]
        if any({p // width for p in part} != {int(run[0]) // width} for part, run in zip(parts, runs, strict=True)):
            tie = self.teacher.ties[key][0]
            raise self._uneven(key, tie, want, [Label(tie.span, f"{each} of each {width} stay")])

    def _failure(
        self, code: str, key: str, theirs: str, message: str, more: Sequence[Label] = (), help: str | None = None
    ) -> SpecError:
        labels = [Label(self.student.span_of(theirs), f"a weight of the student with `{theirs}`"), *more]
        span = self.student.program.span
        return fail(code, message, span, "the student", [x for x in labels if x.span != span], help)


def check_places(name: str, told: Sequence[int], want: int, have: int, student: Program) -> None:
    """Raises `out-of-range` unless `told` are `want` different places below `have`."""
    wrong = next((i for i in told if not 0 <= i < have), None)
    if wrong is not None:
        raise fail("out-of-range", f"`{name}` has no place {wrong}, it has {have}", student.span)
    if len(set(told)) != len(told):
        raise fail("out-of-range", f"the places to keep of `{name}` name one twice", student.span)
    if len(told) != want:
        raise fail(
            "out-of-range", f"{len(told)} places of `{name}` are given to keep, the student has {want}", student.span
        )


def _is_whole(kept: Tensor, size: int) -> bool:
    return torch.equal(kept, torch.arange(size))


def _some(names: Sequence[str], most: int = 4) -> str:
    shown = ", ".join(f"`{n}`" for n in names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
