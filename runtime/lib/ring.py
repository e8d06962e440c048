"""Attention along a sequence that ranks share: each keeps its keys, and is told those of one other rank at a time.

What some keys give to a query is (log of the sum, mean of the values by weight): two such partial results are combined
into that of both (Liu et al. 2023, Ring Attention; Rabe and Staats 2021). So a rank works through the keys of one rank
after the other, and holds no more than its own and those of one other. In the backward pass all is told again, and what
a rank finds out about others' keys goes back to them. Nothing is sent while something is worked out.

Ranks r - d and r talk at distance d, the same distances on all ranks, and none where no mask of the sequence reaches so
far: under a window that is shorter than a rank's rows, neighbours only.

Dims: b batch, t rows of one rank, H heads, V key heads (head h reads key head h // (H // V)), D, E widths.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .blocks import Above, Intervals, Weighed, intervals, lifted, pulled_back
from .dropping import Drop, Dropped
from .mesh import Group
from .product import autocast
from .rows import At, Keys, Mask
from .sources import SAME, Source, remembered, suits

Run = tuple[int, int]
"""Rows start .. end of the whole sequence."""


class Part(NamedTuple):
    """Some queries of this rank before some keys, rows of either counted where they are held.

    seen: "all" or "causal" where that is proved, else bool [b, 1, queries, keys]; intervals: the same for a kernel.
    coordinates: of both, for biases of scores. drop: what drops some of their weights, if anything does.
    """

    queries: slice
    keys: slice
    seen: Callable[[], Tensor | str]
    intervals: Callable[[], Intervals]
    coordinates: Callable[[], tuple[Keys, Keys]]
    drop: Callable[[Tensor], Tensor] | None


def attend_ring(
    q: Tensor, *sources: tuple[Any, ...] | Source, at: At, group: Group, scale: float, order: str | None = None,
    drop: Drop | None = None, kernel: Callable[..., Any] | None = None,
) -> Tensor:  # fmt: skip
    """`attend` of this rank's queries to the keys of all ranks of a group, which share the rows of `at` evenly.

    q [*lead, t, H, D]; sources as in `attend`: those of the sequence itself have this rank's rows, others all. `at` are
    the coordinates of the whole sequence. order "zigzag": while they attend, ranks have rows from both ends of the
    sequence, so that under a causal mask all have as much to do; it costs them an exchange of half their rows. drop as
    in `attend`: what is dropped follows from where queries and keys are in the whole, so it is made again in the
    backward pass. kernel(q, source as `sources.Read`, above, scale=scale) does what `blocks` does for a part, where
    `sources.suits` says that it can. Raises ValueError where rows do not divide.
    """
    dropped = None if drop is None else drop.of(q)
    lead = q.shape[:-3]
    made = [_flat(Source(*source)) for source in sources]
    q, rows = q.flatten(0, -4), at.flat()
    halves = 2 if order == "zigzag" else 1
    if rows.seq % (group.size * halves):
        raise ValueError(f"{rows.seq} tokens a row do not divide over {halves * group.size} parts of a ring")
    if rows.valid is not None:
        size = rows.seq // group.size
        valid = rows.valid[:, group.rank * size : (group.rank + 1) * size, None, None]
        # Selected, not multiplied by 0: padding may hold anything, even NaN.
        made = [s._replace(k=torch.where(valid, s.k, 0), v=torch.where(valid, s.v, 0)) if s.rows is SAME else s
                for s in made]  # fmt: skip
    if halves == 2:
        q, made = _Mirror.apply(q, group), [_folded(s, group) for s in made]
    given = [x for s in made for x in (s.k, s.v, s.query, s.bias) if x is not None]
    q, *given = autocast(q, *given)
    given += [s.slope for s in made if s.slope is not None]
    takes = kernel is not None and dropped is None and suits(q, _given(made, given), rows)
    ring = _Ring(rows, group, scale, halves, made, dropped, kernel if takes else None)
    with torch.autocast(q.device.type, enabled=False):  # what is combined is as precise as it says
        o = _Attend.apply(q, ring, *given)
    return (_Mirror.apply(o, group) if halves == 2 else o).unflatten(0, lead)


def _flat(source: Source) -> Source:
    """Leading dims as one."""
    query, bias = (None if x is None else x.flatten(0, -4) for x in (source.query, source.bias))
    return source._replace(k=source.k.flatten(0, -4), v=source.v.flatten(0, -4), query=query, bias=bias)


# --- which rows meet ------------------------------------------------------------------------------


class _Ring:
    """What a rank has to do: for each source the parts of its own rows, those of others by distance, and the rest."""

    def __init__(
        self, at: At, group: Group, scale: float, halves: int, sources: Sequence[Source], drop: Dropped | None = None,
        kernel: Callable[..., Any] | None = None,
    ) -> None:  # fmt: skip
        self.kernel = kernel
        self.at, self.group, self.scale, self.halves, self.sources = at, group, scale, halves, list(sources)
        self.drop = drop
        self.own = [i for i, s in enumerate(self.sources) if s.rows is SAME]
        self.distances = [d for d in range(1, group.size) if any(map(self._meet, range(group.size), [d] * group.size))]

    def runs(self, rank: int) -> list[Run]:
        """The rows that a rank has while it attends, in its order."""
        size, n = self.at.seq // (self.group.size * self.halves), self.group.size
        places = [rank] if self.halves == 1 else [2 * rank, 2 * n - 1 - 2 * rank]
        return [(p * size, (p + 1) * size) for p in places]

    def _meet(self, rank: int, distance: int) -> bool:
        """Whether a query of a rank may see a key of the one that stands so far before it."""
        theirs = self.runs((rank - distance) % self.group.size)
        return any(_reaches(self.sources[i].mask, a, b) for i in self.own for a in self.runs(rank) for b in theirs)

    def parts(self, i: int, other: int) -> Iterator[Part]:
        """What this rank's queries see of the keys of another rank, or of its own."""
        mask = self.sources[i].mask
        for a, queries in enumerate(self.runs(self.group.rank)):
            for b, keys in enumerate(self.runs(other)):
                if _reaches(mask, queries, keys):
                    size = queries[1] - queries[0]
                    mine, theirs = slice(a * size, (a + 1) * size), slice(b * size, (b + 1) * size)
                    both = partial(self._both, queries, keys)
                    seen, name = partial(self._seen, mask, queries, keys), (mask, queries, keys)
                    intervals = partial(self._intervals, mask, both, name)
                    yield Part(mine, theirs, seen, intervals, both, self._dropping(i, queries, keys))

    def whole(self, i: int) -> Iterator[Part]:
        """What this rank's queries see of keys that all ranks have."""
        source, n = self.sources[i], self.sources[i].k.shape[1]
        where = source.rows if isinstance(source.rows, At) else None
        here = At(source.k.shape[:2], source.k.device).keys() if where is None else where.keys()
        keys = here if where is not None else Keys(here.position, None, None)  # which are of every document
        for a, run in enumerate(self.runs(self.group.rank)) if n else ():
            mine, size = self.at.keys().part(slice(*run)), run[1] - run[0]
            both, name = partial(_pair, mine, keys), (source.mask, run, n if where is None else where)
            seen = partial(source.mask.between, mine, keys)
            intervals = partial(self._intervals, source.mask, both, name)
            rows, dropping = slice(a * size, (a + 1) * size), self._dropping(i, run, (0, n))
            yield Part(rows, slice(0, n), seen, intervals, both, dropping)

    def own_parts(self, i: int) -> Iterator[Part]:
        """What this rank's queries see of the keys that it has."""
        return self.parts(i, self.group.rank) if i in self.own else self.whole(i)

    def _dropping(self, i: int, queries: Run, keys: Run) -> Callable[[Tensor], Tensor] | None:
        """What drops weights of these queries to these keys of a source."""
        if self.drop is None:
            return None
        mine, theirs = (torch.arange(*run, device=self.drop.rows.device) for run in (queries, keys))
        return partial(self.drop.applied, source=i, queries=mine, keys=theirs)

    def _both(self, queries: Run, keys: Run) -> tuple[Keys, Keys]:
        return self.at.keys().part(slice(*queries)), self.at.keys().part(slice(*keys))

    def _intervals(self, mask: Mask, both: Callable[[], tuple[Keys, Keys]], name: Any) -> Intervals:
        """Found once a call for all layers, for one batch row where all have the same coordinates."""

        def found() -> Intervals:
            mine, theirs = both()
            alike = slice(1) if self.at.plain and theirs.valid is None else slice(None)
            return intervals(mask, *(x.part(slice(None), alike) for x in (mine, theirs)))

        return remembered(self.at, ("ring", *name), found)

    def _seen(self, mask: Mask, queries: Run, keys: Run) -> Tensor | str:
        at = self.at
        if at.plain and mask.interval and mask.ahead in (0, None) and mask.behind is None:
            return "causal" if mask.ahead == 0 and queries == keys else "all"
        alike = slice(1) if at.plain else slice(None)
        return mask.between(*(at.keys().part(slice(*run), alike) for run in (queries, keys)))


def _pair(a: Keys, b: Keys) -> tuple[Keys, Keys]:
    return a, b


def _reaches(mask: Mask, queries: Run, keys: Run) -> bool:
    """Whether a mask lets any of some queries see any of some keys, wherever documents begin."""
    first, last = keys[0] - (queries[1] - 1), keys[1] - 1 - queries[0]
    return (mask.ahead is None or first <= mask.ahead) and (mask.behind is None or last >= -mask.behind)


# --- both passes ----------------------------------------------------------------------------------


class _Attend(torch.autograd.Function):
    """Keeps what it is given, its result and the logarithms of its sums: nothing of other ranks, and no scores."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, ring: _Ring, *given: Tensor) -> Tensor:
        sources = _given(ring.sources, given)
        state = Weighed.nothing(q.transpose(1, 2), sources[0].v.shape[-1])
        for i, source in enumerate(sources):
            for part in ring.own_parts(i):
                state.add(part.queries, lifted(q, source, part, ring.scale, ring.kernel))
        for distance in ring.distances:
            _hear(state, q, ring, sources, distance)
        out = state.out.to(q.dtype).transpose(1, 2).contiguous()
        ctx.ring = ring
        ctx.save_for_backward(q, out, state.whole, *given)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        q, out, whole, *given = ctx.saved_tensors
        ring, of_q, grads = ctx.ring, torch.zeros_like(q), [torch.zeros_like(x) for x in given]
        sources, found = _given(ring.sources, given), _given(ring.sources, grads)
        above = (grad, out, torch.where(whole.isinf(), torch.inf, whole))  # a row that sees nothing weighs nothing
        for i, source in enumerate(sources):
            for part in ring.own_parts(i):
                pulled_back(q, source, part, ring.scale, above, of_q, found[i], ring.kernel)
        for distance in ring.distances:
            _answer(q, ring, sources, distance, above, of_q, found)
        return of_q, None, *grads


def _hear(state: Weighed, q: Tensor, ring: _Ring, sources: Sequence[Source], distance: int) -> None:
    """Take in the keys of one other rank; what came is gone when this returns."""
    other, told = _told(ring, sources, distance)
    for i, source in told.items():
        for part in ring.parts(i, other):
            state.add(part.queries, lifted(q, source, part, ring.scale, ring.kernel))


def _answer(
    q: Tensor, ring: _Ring, sources: Sequence[Source], distance: int, above: Above, of_q: Tensor, found: list[Source]
) -> None:
    """The same in the backward pass: what is found out about another rank's keys goes back to it."""
    theirs = _found_out(q, ring, sources, distance, above, of_q, found)
    for i in ring.own:
        of_k, of_v = theirs.pop(0)
        found[i].k.add_(_swapped(ring.group, of_k, -distance))
        found[i].v.add_(_swapped(ring.group, of_v, -distance))


def _found_out(
    q: Tensor, ring: _Ring, sources: Sequence[Source], distance: int, above: Above, of_q: Tensor, found: list[Source]
) -> list[tuple[Tensor, Tensor]]:
    """The gradients of another rank's keys and values."""
    other, told = _told(ring, sources, distance)
    theirs = []
    for i, source in told.items():
        of_k, of_v = torch.zeros_like(source.k), torch.zeros_like(source.v)
        for part in ring.parts(i, other):
            into = found[i]._replace(k=of_k, v=of_v)
            pulled_back(q, source, part, ring.scale, above, of_q, into, ring.kernel)
        theirs.append((of_k, of_v))
    return theirs


def _given(sources: Sequence[Source], given: Sequence[Tensor]) -> list[Source]:
    """The sources with the tensors that are given for theirs."""
    left, found = list(given), []
    for source in sources:
        k, v = left.pop(0), left.pop(0)
        query, bias = (None if x is None else left.pop(0) for x in (source.query, source.bias))
        found.append(source._replace(k=k, v=v, query=query, bias=bias))
    return [s if s.slope is None else s._replace(slope=left.pop(0)) for s in found]


def _told(ring: _Ring, sources: Sequence[Source], distance: int) -> tuple[int, dict[int, Source]]:
    """The rank that stands so far before this one, and its keys and values; the one behind is told this one's."""
    told = {}
    for i in ring.own:
        k, v = (_swapped(ring.group, x, distance) for x in (sources[i].k, sources[i].v))
        told[i] = sources[i]._replace(k=k, v=v)
    return (ring.group.rank - distance) % ring.group.size, told


def _swapped(group: Group, x: Tensor, distance: int) -> Tensor:
    """x goes to the rank so far behind this one, that of the one before comes."""
    return group.swap(x, (group.rank + distance) % group.size, x, (group.rank - distance) % group.size)


# --- zig-zag --------------------------------------------------------------------------------------


class _Mirror(torch.autograd.Function):
    """Rows [b, t, ...] of which each rank gives the second half to the rank that stands as far from the end as it from
    the start, and takes that rank's. It is its own inverse, and its own transpose."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        half, peer = x.shape[1] // 2, group.size - 1 - group.rank
        if peer == group.rank:
            return x.clone()
        mine = x[:, half:].contiguous()
        return torch.cat([x[:, :half], group.swap(mine, peer, mine, peer)], 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return _Mirror.apply(grad, ctx.group), None


def _folded(source: Source, group: Group) -> Source:
    """A source whose rows are from both ends: its keys if they are the sequence's own, and what goes with queries."""
    names = ("k", "v", "query", "bias") if source.rows is SAME else ("query", "bias")
    moved = {n: _Mirror.apply(x, group) for n in names if (x := getattr(source, n)) is not None}
    return source._replace(**moved)
