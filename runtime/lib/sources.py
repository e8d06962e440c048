"""Sources of attention: keys, values and who sees them, and what a kernel is told of them.

Dims: b batch, t queries, k keys, H heads, V key heads, D, E widths, N places of a bias.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from .buffers import is_past
from .clocks import Groups
from .intervals import askers, bounds, cuts, places, rises, terms
from .kernels import FLOATS
from .product import autocast
from .rows import At, Coordinates, Keys, Mask

T = TypeVar("T")


class Same:
    """The keys are rows of the sequence that the queries are of."""


SAME = Same()


class Source(NamedTuple):
    """Keys k [b, k, V, D], values v [b, k, V, E] and who sees them.

    rows: the coordinates of the keys where they are of another sequence than the queries; None: they are there as a
    whole. query: takes the place of the queries for this source. bias [b, t, H, N] is added to the scores, at the place
    that `distance` of the coordinates says; or slope [H] times it is.
    """

    k: Tensor
    v: Tensor
    mask: Mask
    rows: At | Same | None = SAME
    query: Tensor | None = None
    bias: Tensor | None = None
    distance: Callable[[Coordinates, Coordinates], Any] | None = None
    slope: Tensor | None = None

    @property
    def scored(self) -> bool:
        """Whether scores are more than products of the queries with keys."""
        return self.query is not None or self.distance is not None

    def shifted(self, score: Tensor, queries: Keys, keys: Keys) -> Tensor:
        """score [b, H, t, n] with what the distance of keys adds, worked out in fp32 at least."""
        if self.distance is None:
            return score
        far = self.distance(_along(queries, 2), _along(keys, 1))
        if self.bias is not None:
            place = far.clamp(0, self.bias.shape[-1] - 1)[:, None].expand(*score.shape)
            score = score + self.bias.transpose(1, 2).to(score.dtype).gather(-1, place)
        if self.slope is not None:
            wide = torch.promote_types(score.dtype, torch.float32)
            score = score + (self.slope.to(wide)[:, None, None] * far[:, None]).to(score.dtype)
        return score


def _along(rows: Keys, axis: int) -> Coordinates:
    """Coordinates that broadcast to [b, queries, keys]; `axis` is the one of length 1."""
    document = torch.zeros_like(rows.position) if rows.document is None else rows.document
    return Coordinates(rows.position.unsqueeze(axis), document.unsqueeze(axis))


class Read(NamedTuple):
    """A source as a kernel is given it: k [b, k, V, D], v [b, k, V, E] however they lie.

    low, high int32 [b, t]: the keys that a query sees, none where low > high; first, last int32 [b, k]: queries among
    which are all that see a key, for gradients only. valid bool [b, k]: keys that count, None where bounds say it all.
    query [b, t, H, D]: in place of the queries. bias [b, t, H, N]: added to scores, at the place asks [b, t] + holds
    [b, k]; or slope [H], times that.
    """

    k: Tensor
    v: Tensor
    low: Tensor
    high: Tensor
    first: Tensor | None = None
    last: Tensor | None = None
    valid: Tensor | None = None
    query: Tensor | None = None
    bias: Tensor | None = None
    asks: Tensor | None = None
    holds: Tensor | None = None
    slope: Tensor | None = None


def read(q: Tensor, sources: Sequence[Source], at: At, caches: Sequence[Any]) -> tuple[Tensor, list[Read]] | None:
    """q and the sources as a kernel takes them; None where it does not, and then nothing was remembered.

    That is: other dtypes than a kernel computes on, or several of them (slopes may have any); key heads that differ; a
    mask that does not let each query see one interval of keys; positions that were given and fall; two keys at one
    place of a bias; a distance that is no sum of what is the query's and what is the key's.
    """
    q, *tensors = autocast(q, *(x for s in sources for x in (s.k, s.v, s.query, s.bias)))
    sources = [s._replace(k=k, v=v, query=query, bias=bias)
               for s, k, v, query, bias in zip(sources, *(tensors[i::4] for i in range(4)), strict=True)]  # fmt: skip
    if not q.numel() or not suits(q, sources, at, caches):
        return None
    given = [q, *(x for s in sources for x in (s.k, s.v, s.query, s.bias, s.slope))]
    grads = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in given)
    return q, [_read(source, at, cache, grads) for source, cache in zip(sources, caches, strict=True)]


def suits(q: Tensor, sources: Sequence[Source], at: At, caches: Sequence[Any] | None = None) -> bool:
    """Whether a kernel takes these; without caches there are none."""
    heads = sources[0].k.shape[2]
    if q.dtype not in FLOATS or not heads or q.shape[2] % heads:
        return False
    for source, cache in zip(sources, caches or [None] * len(sources), strict=True):
        given = (source.k, source.v, source.query, source.bias)
        if any(x is not None and x.dtype != q.dtype for x in given) or source.k.shape[2] != heads:
            return False
        if is_past(cache) and cache.stream.dtype != q.dtype or cuts(source.mask) is None:
            return False
        where = at if source.rows is SAME else source.rows
        ordered, apart = _order(where, source.bias is not None) if isinstance(where, At) else (True, True)
        if not ordered or source.bias is not None and not apart:
            return False
        if source.distance is not None and _terms(source) is None:
            return False
    return True


def _order(at: At, bias: bool) -> tuple[bool, bool]:
    """`rises` of rows; asked of the device only where positions were given, or where padding may cut a group in two,
    and there are two rows of one place."""
    tokens = at.tokens if isinstance(at, Groups) else at
    cut = bias and at is not tokens and tokens.valid is not None and not at.in_stream
    if not (tokens.told or cut):
        return True, True
    if "rises" not in at.memo:
        at.memo["rises"] = rises(at.keys())
    return at.memo["rises"]


def _terms(source: Source) -> Any:
    """The distance of keys as a sum; where it says places of a bias, no two keys of a row share one."""
    assert source.distance is not None
    return terms(source.distance) if source.bias is None else places(source.distance)


def _read(source: Source, at: At, cache: Any, grads: bool) -> Read:
    where = at if source.rows is SAME else source.rows
    k, v, valid = source.k, source.v, None
    keys: Callable[[], Keys]
    if is_past(cache):
        assert isinstance(where, At)
        k, v = (x.transpose(1, 2) for x in cache.store(k, v, where))
        count, name, rows = k.shape[1], cache.name, where
        keys = lambda: cache.keys(rows, count)  # noqa: E731
    elif isinstance(where, At):
        keys, name, valid = where.keys, where, where.valid
    else:  # rows that are there as a whole are of every document
        count, name = k.shape[1], k.shape[1]
        keys = lambda: Keys(torch.arange(count, device=k.device)[None], None, None)  # noqa: E731
    low, high = remembered(at, ("bounds", source.mask, name), lambda: _bounds(source.mask, at, keys()))
    first = last = asks = holds = None
    if grads:
        number = k.shape[1]
        first, last = remembered(at, ("askers", source.mask, name), lambda: askers(low, high, number))
    if source.distance is not None:
        asks, holds = remembered(at, ("places", source.distance, name), lambda: _numbers(source, at, keys()))
    return Read(k, v, low, high, first, last, valid, source.query, source.bias, asks, holds, source.slope)


def remembered(at: At, name: Any, make: Callable[[], T]) -> T:
    """What is made once a call for all layers."""
    if name not in at.memo:
        at.memo[name] = make()
    found: T = at.memo[name]
    return found


def _bounds(mask: Mask, at: At, keys: Keys) -> tuple[Tensor, Tensor]:
    found = cuts(mask)
    assert found is not None
    batch = _batch(at, keys)
    return bounds(found, at.keys().part(slice(None), batch), keys.part(slice(None), batch))


def _batch(at: At, keys: Keys) -> slice:
    """One batch row where all have the same coordinates."""
    return slice(1) if at.plain and not at.in_stream and keys.valid is None else slice(None)


def _numbers(source: Source, at: At, keys: Keys) -> tuple[Tensor, Tensor]:
    """The distance of keys as int32 [b, t] of queries and int32 [b, k] of keys, of which it is the sum."""
    found, batch = _terms(source), _batch(at, keys)
    asked, held = (x.part(slice(None), batch).position for x in (at.keys(), keys))
    own = torch.full_like(asked, found.number) + (0 if found.query is None else found.query(asked))
    key = torch.zeros_like(held) if found.key is None else found.key(held)
    return tuple(x.clamp(-(2**30), 2**30).int() for x in (own, key))  # type: ignore[return-value]
