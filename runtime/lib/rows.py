"""Where rows are: the coordinates that masks, resets, rotations and losses read.

Dims: b batch, t seq (rows of this call), k keys.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .gathered import Gathered


class Coordinates(NamedTuple):
    """What a mask may ask about queries (int64 [b, t, 1]) or keys (int64 [b, 1, k]); `b` may be 1."""

    position: Tensor
    document: Tensor


class Keys(NamedTuple):
    """Coordinates of stored rows: position, document int64 [b, k], document None where the rows belong to none; valid
    bool [b, k], or None where all count."""

    position: Tensor
    document: Tensor | None
    valid: Tensor | None

    def part(self, rows: slice, batch: slice = slice(None)) -> Keys:
        """The coordinates of some of the rows."""
        document, valid = (x if x is None else x[batch, rows] for x in (self.document, self.valid))
        return Keys(self.position[batch, rows], document, valid)


@dataclass(frozen=True, slots=True)
class Step:
    """One step of a stream. `uniform`: ticks before it when all rows agree and no rollback is kept, else None; int64
    [1] on the device in a step that is captured, to be replayed at other places.

    tick, high, count: int64 [b]: rows stored before the step, the most ever stored, rows that arrive.
    """

    stream: Any
    uniform: int | Tensor | None
    tick: Tensor
    high: Tensor
    count: Tensor


class At:
    """Coordinates of the rows [batch, seq] of one call. Tokens may have more leading dims (`lead`): each combination of
    them is a batch row here, and `merge` and `split` go between the two.

    position: int64 [seq] or as the tokens; None counts rows from 0, or from the start of each document.
    document: int64 [batch, seq], equal on the rows of one document, which are neighbours; None is one document.
    valid:    bool [batch, seq]; rows that are False are padding: they see and change nothing.
    told:     whether positions were given, so that they may be in any order.
    starts:   bool [batch, seq], rows that start a document; None where only row 0 of each batch row does.
    step:     the stream's `Step`, in prefill and decode only.
    before: how many rows of the batch, the first of `lead`, stand before these: on other ranks, in other micro-batches.
    chance: what random numbers of this call depend on; None draws it from torch's generator when it is first asked.
    mesh: where this rank stands among others, in a module that is laid out over several.
    gathered: takes what blocks state beside their results, in training; None where nobody asked. `losses` are theirs.
    """

    def __init__(
        self,
        tokens_shape: tuple[int, ...] | torch.Size,
        device: torch.device | str | None = None,
        position: Tensor | None = None,
        document: Tensor | None = None,
        valid: Tensor | None = None,
    ) -> None:
        self.lead = tuple(tokens_shape[:-1])
        batch, seq = prod(self.lead), tokens_shape[-1]
        self.batch, self.seq, self.device = batch, seq, device
        self.starts: Tensor | None = None
        self._step: Step | None = None
        self.first: int | Tensor = 0
        self.memo: dict[Any, Any] = {}
        self.gathered: Gathered | None = None
        self.mesh: Any = None
        self.before = 0
        self.chance: int | Tensor | None = None
        self.uses: dict[Any, int] = {}
        self.losses: dict[str, Tensor] = {}
        position, document, valid = (x if x is None else self._flat(x) for x in (position, document, valid))
        self._position = position
        if document is not None:
            self.starts = torch.ones(batch, seq, dtype=torch.bool, device=document.device)
            self.starts[:, 1:] = document[:, 1:] != document[:, :-1]
        self.document, self.valid = document, valid
        self.plain = position is None and document is None and valid is None
        self.told = position is not None

    def _flat(self, x: Tensor) -> Tensor:
        """A coordinate of rows in the shape of the tokens, or one that broadcasts to [batch, seq], as [batch, seq]."""
        return self.merge(x.expand(*self.lead, self.seq)) if x.dim() > 2 else x.expand(self.batch, self.seq)

    def merge(self, x: Tensor) -> Tensor:
        """x[*lead, ..] -> [batch, ..]."""
        return x if len(self.lead) == 1 else x.flatten(0, len(self.lead) - 1)

    def split(self, x: Tensor) -> Tensor:
        """x[batch, ..] -> [*lead, ..]."""
        return x if len(self.lead) == 1 else x.unflatten(0, self.lead)

    @classmethod
    def uniform(cls, shape: tuple[int, int], device: torch.device, step: Step) -> At:
        """Rows of a stream whose batch rows all hold `step.uniform` rows of one document."""
        assert step.uniform is not None
        at = cls(shape, device)
        at._step, at.first = step, step.uniform
        return at

    @classmethod
    def ragged(cls, shape: tuple[int, int], step: Step, keys: Keys, starts: Tensor) -> At:
        """Rows of a stream in its general form; `keys` are their own coordinates."""
        at = cls(shape, keys.position.device, keys.position, None, keys.valid)
        at.document, at.starts, at._step, at.told = keys.document, starts, step, False
        return at

    @property
    def step(self) -> Step:
        """What the stream says of these rows; an error where there is no stream."""
        if self._step is None:
            raise RuntimeError("rows of a full forward pass were given to a stream")
        return self._step

    @property
    def position(self) -> Tensor:
        """int64 [batch, seq]."""
        if self._position is None:
            self._position = self.since if self.starts is not None else self.row.expand(self.batch, self.seq)
        return self._position

    @property
    def row(self) -> Tensor:
        """int64 [1, seq]: place in the call, or in the stream where batch rows agree."""
        return (torch.arange(self.seq, device=self.device) + self.first)[None]

    @property
    def since(self) -> Tensor:
        """int64 [batch, seq]: rows since the document started, 0 on its first row."""
        if "since" not in self.memo:
            if self._step is not None:
                since = self.position
            elif self.starts is None:
                since = self.row.expand(self.batch, self.seq)
            else:
                since = self.row - torch.where(self.starts, self.row, 0).cummax(1).values
            self.memo["since"] = since
        return self.memo["since"]

    @property
    def segment(self) -> Tensor:
        """int64 [batch, seq]: 0, 1, .. for the documents of this call; needs `starts`."""
        if "segment" not in self.memo:
            assert self.starts is not None
            self.memo["segment"] = self.starts.cumsum(1)
        return self.memo["segment"]

    @property
    def validity(self) -> Tensor:
        """bool [batch, seq]: `valid`, also where all rows are."""
        return self.valid if self.valid is not None else torch.ones_like(self.position, dtype=torch.bool)

    def part(self, *axes: str) -> At:
        """The rows of this rank, where the sequence is split over axes of the mesh."""
        if ("part", axes) not in self.memo:
            group = self.mesh[axes]
            if self.seq % group.size:
                raise ValueError(f"{self.seq} tokens a row do not divide over the {group.size} ranks of {axes}")
            size = self.seq // group.size
            here = slice(group.rank * size, group.rank * size + size)
            made = At((self.batch, size), self.device)
            made.mesh, made.plain, made.told = self.mesh, False, self.told
            made._position = self.position[:, here]
            made.document, made.valid = (x if x is None else x[:, here] for x in (self.document, self.valid))
            first = torch.zeros(self.batch, size, dtype=torch.bool, device=self.position.device)
            if self.starts is not None:
                made.starts = self.starts[:, here]
            else:
                first[:, 0] = not group.rank
                made.starts = first
            made.memo["since"] = self.since[:, here]
            self.memo["part", axes] = made
        return self.memo["part", axes]

    def flat(self) -> At:
        """The same rows as [batch, seq]; what is found for them once a call is found for both."""
        if len(self.lead) == 1:
            return self
        flat = copy(self)  # not kept in the memo that it shares: what refers to itself stays until it is collected
        flat.lead = (self.batch,)
        return flat

    def draw(self) -> int | Tensor:
        """The number that this call's random numbers depend on."""
        if self.chance is None:
            self.chance = int(torch.randint(2**62, ()))
        return self.chance

    def quiet(self) -> At:
        """These coordinates for another model, whose losses and sums nobody asks for."""
        other = copy(self)
        other.gathered, other.losses = None, {}
        return other

    def count(self) -> int | Tensor:
        """How many rows are valid."""
        return self.batch * self.seq if self.valid is None else self.valid.sum()

    def lose(self, label: str, value: Tensor) -> None:
        """Add to a loss that blocks state, a 0-d sum."""
        self.losses[label] = self.losses[label] + value if label in self.losses else value

    @property
    def in_stream(self) -> bool:
        """Whether these rows are a step of a stream."""
        return self._step is not None

    def keys(self) -> Keys:
        """This call's own rows, as keys."""
        document = self.document if self.document is not None else torch.zeros_like(self.position)
        return Keys(self.position, document, self.valid)


class Mask:
    """Which keys a query sees, from coordinates alone; documents and padding are added by `attend`.

    predicate: (query, key) -> bool, broadcast from [b, t, 1] and [b, 1, k]; None sees everything.
    behind, ahead: its hull, keys in [query - behind, query + ahead]; None is unbounded.
    interval: True where the predicate is proved to be exactly its hull, so that fast kernels may serve it.
    Raises ValueError where the predicate provably has another hull.
    """

    def __init__(self, predicate: Callable[[Any, Any], Any] | None, behind: int | None, ahead: int | None) -> None:
        self.predicate, self.behind, self.ahead = predicate, behind, ahead
        proved = _Interval(None, None) if predicate is None else _prove(predicate)
        self.interval = proved is not None
        if proved is not None and proved != _Interval(None if behind is None else -behind, ahead):
            raise ValueError(
                f"mask: the predicate sees keys from {proved.low} to {proved.high} relative to the query,"
                f" but behind = {behind}, ahead = {ahead} were given"
            )

    def sees(self, query: Coordinates, key: Coordinates) -> Any:
        """bool [b, t, k], or what broadcasts to it, one bool, too."""
        if self.predicate is None:
            return torch.ones((), dtype=torch.bool, device=query.position.device)
        return self.predicate(query, key)

    def visible(self, at: At, keys: Keys) -> Tensor:
        """bool [b, 1, t, k]: what the rows of a call see."""
        return self.between(at.keys(), keys)

    def between(self, queries: Keys, keys: Keys) -> Tensor:
        """bool [b, 1, t, k]: the predicate, the document and the validity of keys together."""
        document = queries.document if queries.document is not None else torch.zeros_like(queries.position)
        query = Coordinates(queries.position[:, :, None], document[:, :, None])
        theirs = keys.document if keys.document is not None else torch.zeros_like(keys.position)
        key = Coordinates(keys.position[:, None], theirs[:, None])
        seen = self.sees(query, key)
        if not isinstance(seen, Tensor):  # filled on the device: a number of the host's would have to be sent there
            seen = torch.full((), seen, dtype=torch.bool, device=keys.position.device)
        if keys.document is not None:
            seen = seen & (query.document == key.document)
        if keys.valid is not None:
            seen = seen & keys.valid[:, None]
        shape = (max(len(query.position), len(key.position)), query.position.shape[1], key.position.shape[2])
        return seen.expand(shape)[:, None]


class _Interval(NamedTuple):
    """Offsets key - query in [low, high]; None is unbounded."""

    low: int | None
    high: int | None

    def __and__(self, other: _Interval) -> _Interval:
        low = [x for x in (self.low, other.low) if x is not None]
        high = [x for x in (self.high, other.high) if x is not None]
        return _Interval(max(low, default=None), min(high, default=None))


class _Line:
    """query * a + key * b + c, compared with another such line. Supports no more than intervals need."""

    def __init__(self, a: int, b: int, c: int) -> None:
        self.a, self.b, self.c = a, b, c

    def _of(self, other: _Line | int) -> _Line:
        if isinstance(other, int):
            return _Line(0, 0, other)
        if isinstance(other, _Line):
            return other
        raise TypeError("not a line")

    def __add__(self, other: _Line | int) -> _Line:
        o = self._of(other)
        return _Line(self.a + o.a, self.b + o.b, self.c + o.c)

    __radd__ = __add__

    def __neg__(self) -> _Line:
        return _Line(-self.a, -self.b, -self.c)

    def __sub__(self, other: _Line | int) -> _Line:
        return self + -self._of(other)

    def __rsub__(self, other: int) -> _Line:
        return -self + other

    def _positive(self) -> _Interval:
        """Offsets where this line is >= 0."""
        if (self.a, self.b) == (1, -1):
            return _Interval(None, self.c)
        if (self.a, self.b) == (-1, 1):
            return _Interval(-self.c, None)
        raise TypeError("not a comparison of a query with a key")

    def __ge__(self, other: _Line | int) -> _Interval:
        return (self - other)._positive()

    def __le__(self, other: _Line | int) -> _Interval:
        return (-self + other)._positive()

    def __gt__(self, other: _Line | int) -> _Interval:
        return (self - other - 1)._positive()

    def __lt__(self, other: _Line | int) -> _Interval:
        return (-self + other - 1)._positive()


def _prove(predicate: Callable[[Any, Any], Any]) -> _Interval | None:
    """The interval that the predicate is, found by running it on symbols; None where it is not one.

    A probe of sizes would prove less: a window and a piece of equal width differ only past their width.
    """

    class Symbol(NamedTuple):
        position: _Line

    try:
        found = predicate(Symbol(_Line(1, 0, 0)), Symbol(_Line(0, 1, 0)))
    except (TypeError, AttributeError):
        return None
    return found if isinstance(found, _Interval) else None


def take_row(x: Tensor, axis: int, index: int, at: At) -> Tensor:
    """Row `index` of the tokens of each batch row. Raises ValueError where a batch row is not one whole document."""
    if at.document is not None or at.in_stream:
        raise ValueError("take: one row for each batch row needs whole documents, one in each row of the batch")
    return x.select(axis, index)


def next_token(tokens: Tensor, at: At, by: int = 1) -> Tensor:
    """The token `by` rows later, int64 [*, seq]; -1 where the document or the padding-free part ends before."""
    if len(at.lead) > 1:
        return at.split(_next(at.merge(tokens), at, by))
    return _next(tokens, at, by)


def _next(tokens: Tensor, at: At, by: int) -> Tensor:
    target = torch.full_like(tokens, -1)
    if by >= tokens.shape[1]:
        return target
    ahead = tokens[:, by:]
    if at.starts is not None:
        ahead = ahead.masked_fill(at.segment[:, by:] != at.segment[:, :-by], -1)
    if at.valid is not None:
        ahead = ahead.masked_fill(~(at.valid[:, by:] & at.valid[:, :-by]), -1)
    target[:, :-by] = ahead
    return target


def reduce_rows(
    x: Tensor, how: str, dims: tuple[int, ...], at: At, rows: tuple[int, ...], where: Tensor | None = None
) -> Tensor:
    """Reduce dims of x, among them the sequence: "sum", "mean", "max_over" or "count" over the valid rows.

    rows: the axes of x that the dims of the tokens are, if it has them; where bool like x: the places that count.
    """
    valid = _valid(x, at, rows)
    if where is not None:
        valid = where if valid is None else where & valid
    if how == "max_over":
        return (x if valid is None else x.masked_fill(~valid, -torch.inf)).amax(dims)
    if how == "count":
        return (x if valid is None else x & valid).sum(dims).float()
    total = (x if valid is None else torch.where(valid, x, 0)).sum(dims)
    if how == "sum":
        return total
    ones = torch.ones_like(x) if valid is None else valid.expand(x.shape).to(x.dtype)
    return total / ones.sum(dims).clamp_min(1)


def count_rows(where: Tensor, at: At, rows: tuple[int, ...]) -> Tensor:
    """How many places of a mask are true on valid rows, 0-d int64."""
    valid = _valid(where, at, rows)
    return (where if valid is None else where & valid).sum()


def _valid(x: Tensor, at: At, rows: tuple[int, ...]) -> Tensor | None:
    """The validity of rows in a shape that x broadcasts with, or None where all are valid."""
    if at.valid is None or not rows:
        return None
    shape = [1] * x.dim()
    valid = at.split(at.valid)
    for axis, size in zip(rows, valid.shape, strict=True):
        shape[axis] = size
    return valid.reshape(shape)
