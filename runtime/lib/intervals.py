"""What queries see as one interval of keys each: kernels read these, and never a mask.

A mask is run on symbols once. Where it compares what never falls (or never rises) along the keys with something of the
query, each comparison cuts the keys at one place; `and` cuts again, and documents always do. All places are found by
bisection: memory and time follow queries plus keys, not their product. Dims: b batch, t queries, k keys.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .rows import Keys, Mask

Value = Callable[[Tensor], Tensor]
"""Of positions, int64 of any shape."""
NEVER = 2**31 - 1
"""The lower bound of a query that sees nothing; its upper bound is 0."""
_SPAN = 2**32


class Sum:
    """query(position of the query) + key(position of the key) + number, of whole numbers.

    rising: 1 where `key` never falls along the keys, -1 where it never rises, 0 where there is none; even: it moves by
    one a position. Raises TypeError for what is no such sum.
    """

    def __init__(
        self, query: Value | None = None, key: Value | None = None, number: int = 0, rising: int = 0, even: bool = False
    ) -> None:
        self.query, self.key, self.number, self.rising, self.even = query, key, number, rising, even

    def __add__(self, other: Sum | int) -> Sum:
        o = _sum(other)
        if self.rising and o.rising and self.rising != o.rising:
            raise TypeError("what rises and what falls along the keys has no direction together")
        even = (self.even and not o.rising) or (o.even and not self.rising)
        query, key = _both(self.query, o.query), _both(self.key, o.key)
        return Sum(query, key, self.number + o.number, self.rising or o.rising, even)

    __radd__ = __add__

    def __mul__(self, by: int) -> Sum:
        if not isinstance(by, int):
            raise TypeError("a factor is a number")
        if not by:
            return Sum()
        query, key = (None if f is None else _times(f, by) for f in (self.query, self.key))
        return Sum(query, key, self.number * by, self.rising * (1 if by > 0 else -1), self.even and abs(by) == 1)

    __rmul__ = __mul__

    def __neg__(self) -> Sum:
        return self * -1

    def __sub__(self, other: Sum | int) -> Sum:
        return self + -_sum(other)

    def __rsub__(self, other: int) -> Sum:
        return -self + other

    def __floordiv__(self, by: int) -> Sum:
        if not isinstance(by, int) or by < 1 or (self.query is not None and self.key is not None):
            raise TypeError("a query and a key are not divided together")
        query, key = (None if f is None else _divided(f, self.number, by) for f in (self.query, self.key))
        return Sum(query, key, self.number // by if query is key is None else 0, self.rising, self.even and by == 1)

    def __le__(self, other: Sum | int) -> Cuts:
        """Where this is at most the other."""
        less = self - other
        return Cuts((), ((less,),)) if less.rising >= 0 else Cuts(((less,),), ())

    def __ge__(self, other: Sum | int) -> Cuts:
        return -self <= -_sum(other)

    def __lt__(self, other: Sum | int) -> Cuts:
        return self + 1 <= other

    def __gt__(self, other: Sum | int) -> Cuts:
        return self >= _sum(other) + 1

    def __eq__(self, other: Any) -> Any:
        return (self <= other) & (self >= other)

    def __ne__(self, other: Any) -> Any:
        return ~(self == other)

    __hash__ = None  # type: ignore[assignment]


class Cuts:
    """Sums that are to be at most 0, of which each clause needs one: `low` cut keys off at the front, `high` behind."""

    def __init__(self, low: tuple[tuple[Sum, ...], ...], high: tuple[tuple[Sum, ...], ...]) -> None:
        self.low, self.high = low, high

    def __and__(self, other: Any) -> Cuts:
        o = _cuts(other)
        return Cuts(self.low + o.low, self.high + o.high)

    __rand__ = __and__

    def __or__(self, other: Any) -> Cuts:
        o = _cuts(other)
        if not (self.low or self.high) or not (o.low or o.high):
            return Cuts((), ())
        if (self.low or o.low) and (self.high or o.high):
            raise TypeError("what is cut off on different sides is no interval together")
        low, high = (tuple(a + b for a in mine for b in theirs)
                     for mine, theirs in ((self.low, o.low), (self.high, o.high)))  # fmt: skip
        return Cuts(low, high)

    __ror__ = __or__

    def __invert__(self) -> Cuts:
        clauses = self.low + self.high
        if not clauses:
            return _cuts(False)
        none_of = [_all(tuple(s >= 1 for s in clause)) for clause in clauses]
        found = none_of[0]
        for more in none_of[1:]:
            found = found | more
        return found


def _all(parts: tuple[Cuts, ...]) -> Cuts:
    found = Cuts((), ())
    for part in parts:
        found = found & part
    return found


def _sum(x: Any) -> Sum:
    if isinstance(x, int) and not isinstance(x, bool):
        return Sum(number=x)
    if isinstance(x, Sum):
        return x
    raise TypeError("not a sum of a query and a key")


def _cuts(x: Any) -> Cuts:
    if isinstance(x, bool):
        return Cuts((), () if x else ((Sum(number=1),),))
    if isinstance(x, Cuts):
        return x
    raise TypeError("not a comparison")


def _both(a: Value | None, b: Value | None) -> Value | None:
    return b if a is None else a if b is None else lambda p: a(p) + b(p)


def _times(f: Value, by: int) -> Value:
    return lambda p: f(p) * by


def _divided(f: Value, number: int, by: int) -> Value:
    return lambda p: (f(p) + number) // by


class _Symbol(NamedTuple):
    """A query or a key as a mask reads it; what a mask says of documents is not looked into."""

    position: Sum


def _as_is(position: Tensor) -> Tensor:
    return position


_QUERY, _KEY = _Symbol(Sum(query=_as_is)), _Symbol(Sum(key=_as_is, rising=1, even=True))


@cache
def cuts(mask: Mask) -> Cuts | None:
    """A mask as cuts; None where it is not proved to let each query see one interval of keys."""
    if mask.predicate is None:
        return Cuts((), ())
    try:
        return _cuts(mask.predicate(_QUERY, _KEY))
    except (TypeError, AttributeError, ZeroDivisionError):
        return None


@cache
def terms(distance: Callable[..., Any]) -> Sum | None:
    """A distance as a sum of one number a query and one a key; None where it is not proved to be one."""
    try:
        return _sum(distance(_QUERY, _KEY))
    except (TypeError, AttributeError, ZeroDivisionError):
        return None


def places(distance: Callable[..., Any]) -> Sum | None:
    """The place of a bias as such a sum, no two keys of a document at the same."""
    found = terms(distance)
    return found if found is not None and found.even else None


class Bounds(NamedTuple):
    """Keys low .. high that a query sees, int32 [b, t] (NEVER and 0: none), and the queries first .. last among which
    those are that see a key, int32 [b, k]; b may be 1."""

    low: Tensor
    high: Tensor
    first: Tensor
    last: Tensor


def settled(keys: Keys) -> Keys:
    """The same keys, with the coordinates of those that do not count like the one before: what is written on padding
    and on rows that are free again never falls out of order."""
    if keys.valid is None or not keys.valid.shape[1]:
        return keys
    row = torch.arange(keys.valid.shape[1], device=keys.valid.device).expand_as(keys.valid)
    last = torch.where(keys.valid, row, -1).cummax(1).values
    last = torch.where(last < 0, keys.valid.int().argmax(1, keepdim=True), last)
    document, position = (x if x is None else x.expand_as(last).gather(1, last) for x in (keys.document, keys.position))
    assert position is not None
    return Keys(position, document, keys.valid)


def rises(keys: Keys) -> tuple[bool, bool]:
    """Whether positions never fall along the rows of a document, and whether they rise with each that counts; waits for
    the device."""
    keys = settled(keys)
    step = keys.position.diff(dim=1)
    other = False if keys.document is None else keys.document.diff(dim=1) != 0
    skipped = False if keys.valid is None else ~(keys.valid[:, 1:] & keys.valid[:, :-1])
    return bool(((step >= 0) | other).all()), bool(((step >= 1) | other | skipped).all())


def bounds(found: Cuts, queries: Keys, keys: Keys) -> tuple[Tensor, Tensor]:
    """int32 [b, t]: the keys low .. high that each query sees. Positions of keys never fall along a document, and its
    rows are neighbours; keys that do not count are left out where they are first or last."""
    keys, count = settled(keys), keys.position.shape[1]
    batch = max(len(queries.position), len(keys.position))
    asked = queries.position.expand(batch, -1).contiguous()
    held = keys.position.expand(batch, -1).contiguous()
    mine, theirs = _documents(queries, keys, asked, held)
    low = torch.searchsorted(theirs, mine)
    high = torch.searchsorted(theirs, mine, right=True)

    def cut(one: Sum, behind: bool) -> Tensor:
        """How many keys are before the cut."""
        limit = (0 if one.query is None else one.query(asked)) + torch.full_like(asked, one.number)
        if one.key is None:
            return torch.where((limit <= 0) == behind, count, 0)
        sign = 1 if behind else -1
        along = theirs * _SPAN + _within(sign * one.key(held))
        return torch.searchsorted(along, mine * _SPAN + _within(-sign * limit), right=behind)

    for clause in found.low:
        each = [cut(one, False) for one in clause]
        low = torch.maximum(low, _fold(torch.minimum, each))
    for clause in found.high:
        each = [cut(one, True) for one in clause]
        high = torch.minimum(high, _fold(torch.maximum, each))
    if keys.valid is not None and count:
        ends = keys.valid.int().argmax(1, keepdim=True), count - keys.valid.flip(1).int().argmax(1, keepdim=True)
        low, high = torch.maximum(low, ends[0]), torch.minimum(high, torch.where(keys.valid.any(1, True), ends[1], 0))
    some = low < high
    return torch.where(some, low, NEVER).int(), torch.where(some, high, 0).int()


def askers(low: Tensor, high: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """int32 [b, k]: for each of `count` keys the queries first .. last among which are all that see it, from bounds
    [b, t]; just these where bounds never fall."""
    key = torch.arange(count, device=low.device, dtype=torch.int32).expand(len(low), -1).contiguous()
    if not low.shape[1]:
        return torch.zeros_like(key), torch.zeros_like(key)
    first = torch.searchsorted(high.cummax(1).values.contiguous(), key, right=True)
    last = torch.searchsorted(low.flip(1).cummin(1).values.flip(1).contiguous(), key, right=True)
    return first.int(), last.int()


def _documents(queries: Keys, keys: Keys, asked: Tensor, held: Tensor) -> tuple[Tensor, Tensor]:
    """Documents of queries and keys, counted along the keys; -1 for one that no key is of."""
    if keys.document is None:
        return torch.zeros_like(asked), torch.zeros_like(held)
    theirs = keys.document.expand_as(held)
    new = torch.zeros_like(held)
    new[:, 1:] = theirs.diff(dim=1) != 0
    counted = new.cumsum(1)
    mine = queries.document.expand_as(asked) if queries.document is not None else torch.zeros_like(asked)
    if not held.shape[1]:
        return torch.full_like(asked, -1), counted
    ordered, order = theirs.sort(dim=1, stable=True)
    place = torch.searchsorted(ordered.contiguous(), mine.contiguous()).clamp_max(held.shape[1] - 1)
    same = ordered.gather(1, place) == mine
    return torch.where(same, counted.gather(1, order.gather(1, place)), -1), counted


def _within(value: Tensor) -> Tensor:
    """Numbers as what is told apart beside a document."""
    return value.clamp(2 - 2**31, 2**31 - 2)


def _fold(how: Callable[[Tensor, Tensor], Tensor], each: list[Tensor]) -> Tensor:
    found = each[0]
    for more in each[1:]:
        found = how(found, more)
    return found
