"""What some keys give to some queries under one softmax: a partial result, to be combined with that of other keys.

Dims: b batch, t queries, n keys, H heads, V key heads, D, E widths. Queries and sources are [b, rows, heads, width].
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .attend import _spell
from .intervals import askers, bounds, cuts
from .joint import _BACKWARD, _KERNEL, _added, _repeated, _summed, fits
from .rows import Keys, Mask
from .sources import Read, Source

Above = tuple[Tensor, Tensor, Tensor]
Kernel = Callable[..., Any]


class Intervals(NamedTuple):
    """What queries see of keys, as a kernel reads it: the fields of a `sources.Read` by these names."""

    low: Tensor
    high: Tensor
    first: Tensor
    last: Tensor
    valid: Tensor | None


def intervals(mask: Mask, queries: Keys, keys: Keys) -> Intervals:
    """Of a mask that `intervals.cuts` has cuts of, between rows with these coordinates."""
    found = cuts(mask)
    assert found is not None
    low, high = bounds(found, queries, keys)
    return Intervals(low, high, *askers(low, high, keys.position.shape[1]), keys.valid)


@dataclass
class Weighed:
    """Of all keys so far: the mean of their values by weight, out [b, H, t, E], and the logarithm of the sum of their
    weights, whole [b, H, t]; 0 and minus infinity before there are any. fp32, or fp64 where the queries are."""

    out: Tensor
    whole: Tensor

    @classmethod
    def nothing(cls, q: Tensor, width: int) -> Weighed:
        """Of no keys, for q [b, H, t, D]."""
        kind = torch.float64 if q.dtype == torch.float64 else torch.float32
        out = torch.zeros(*q.shape[:3], width, dtype=kind, device=q.device)
        return cls(out, torch.full(q.shape[:3], -torch.inf, dtype=kind, device=q.device))

    def add(self, rows: slice, more: tuple[Tensor, Tensor]) -> None:
        """Combine some queries with what further keys give them."""
        out, whole = more
        before = self.whole[:, :, rows]
        both = torch.logaddexp(before, whole)
        # Where no key was seen yet, minus infinity less itself would be NaN.
        safe = torch.where(both.isinf(), 0, both)
        old, new = (before - safe).exp()[..., None], (whole - safe).exp()[..., None]
        self.out[:, :, rows] = self.out[:, :, rows] * old + out * new
        self.whole[:, :, rows] = both


def lifted(q: Tensor, source: Source, part: Any, scale: float, kernel: Kernel | None) -> tuple[Tensor, Tensor]:
    """(out, whole) of one part. q [b, t, H, D]."""
    if kernel is not None:
        got, lse = kernel(q[:, part.queries], _as_read(source, part), scale=scale)
        return got.transpose(1, 2), _by_heads(lse, q.shape[2])
    mine, k, v = _rows(q, source, part)
    seen = part.seen()
    if _is_plain(source, part, mine, k, v):
        got, whole = _KERNEL(mine, k, v, 0.0, seen == "causal" if isinstance(seen, str) else False,
                             attn_mask=_mask(seen, mine), scale=scale)  # fmt: skip
        if isinstance(seen, str):
            return got, whole
        some = seen.any(-1)  # the kernel's sum of nothing differs between versions
        return torch.where(some[..., None], got, 0), torch.where(some, whole, -torch.inf)
    score = _score(mine, k, _of_rows(source, part), part, scale, seen)
    whole = score.logsumexp(-1)
    weight = (score - torch.where(whole.isinf(), 0, whole)[..., None]).exp()
    weight = weight if part.drop is None else part.drop(weight)  # of the sum, which is of all weights, nothing goes
    return weight @ v.to(weight.dtype), whole


def pulled_back(
    q: Tensor, source: Source, part: Any, scale: float, above: Above, of_q: Tensor, found: Source, kernel: Kernel | None
) -> None:
    """Add the gradients of one part to `of_q` and to those of the source's tensors. above: the gradient and the result
    of the whole, [b, t, H, E], and its logarithms of sums [b, H, t]."""
    whole = above[2][:, :, part.queries]
    if kernel is not None:
        rows = *(x[:, part.queries].contiguous() for x in above[:2]), _by_rows(whole, source.k.shape[2])
        by_q, by_k, by_v = kernel(q[:, part.queries], _as_read(source, part), rows, scale=scale)
        of_q[:, part.queries] += by_q
        found.k[:, part.keys] += by_k
        found.v[:, part.keys] += by_v
        return
    mine, k, v = _rows(q, source, part)
    grad, out = (x[:, part.queries].transpose(1, 2) for x in above[:2])
    seen = part.seen()
    own = of_q if source.query is None else found.query
    assert own is not None
    if _is_plain(source, part, mine, k, v):
        got, by_k, by_v = _BACKWARD(
            grad, mine, k, v, out, whole, 0.0, seen == "causal" if isinstance(seen, str) else False,
            attn_mask=_mask(seen, mine), scale=scale,
        )  # fmt: skip
        by_k, by_v = (_summed(x, source.k.shape[2]) for x in (by_k, by_v))
    else:
        beside = _of_rows(source, part)
        with torch.enable_grad():
            leaves = [x.detach().requires_grad_() for x in (mine, k, v)]
            own_bias, slope = (None if x is None else x.detach().requires_grad_() for x in (beside.bias, beside.slope))
            leaves += [x for x in (own_bias, slope) if x is not None]
            score = _score(leaves[0], leaves[1], beside._replace(bias=own_bias, slope=slope), part, scale, seen)
            weight = (score - whole[..., None]).exp()
            wide = grad.to(weight.dtype)
            by_weight = wide @ leaves[2].to(weight.dtype).mT
            by_weight = by_weight if part.drop is None else part.drop(by_weight)
            # Of p = exp(score - whole) with the sum as a number, this has the gradients that the softmax has.
            total = (weight * (by_weight - (wide * out).sum(-1, keepdim=True))).sum()
        got, by_k, by_v, *more = torch.autograd.grad(total, leaves)
        by_k, by_v = (_summed(x, source.k.shape[2]) for x in (by_k, by_v))
        if found.bias is not None:
            found.bias[:, part.queries] += more[0]
        if found.slope is not None:
            found.slope.add_(more[-1])
    own[:, part.queries] += got.transpose(1, 2)
    found.k[:, part.keys] += by_k.transpose(1, 2)
    found.v[:, part.keys] += by_v.transpose(1, 2)


def _as_read(source: Source, part: Any) -> Read:
    """A source's part as a kernel is given it."""
    return Read(source.k[:, part.keys], source.v[:, part.keys], *part.intervals())


def _by_heads(lse: Tensor, heads: int) -> Tensor:
    """A kernel's sums, log2 [b, V, rows (t, g)] and infinity where nothing is seen, as ours: log [b, H, t]."""
    b, groups, _ = lse.shape
    whole = math.log(2) * lse.view(b, groups, -1, heads // groups).transpose(2, 3).reshape(b, heads, -1)
    return torch.where(whole == torch.inf, -torch.inf, whole)


def _by_rows(whole: Tensor, groups: int) -> Tensor:
    """Ours, with infinity where nothing is seen, as a kernel's."""
    b, heads, t = whole.shape
    return (whole / math.log(2)).view(b, groups, heads // groups, t).transpose(2, 3).reshape(b, groups, -1)


def _rows(q: Tensor, source: Source, part: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The queries, keys and values of a part, for every head: [b, H, rows, width]."""
    own = q if source.query is None else source.query
    k, v = (_repeated(x[:, part.keys].transpose(1, 2), q.shape[2]) for x in (source.k, source.v))
    return own[:, part.queries].transpose(1, 2), k, v


def _is_plain(source: Source, part: Any, q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether the library's kernel does it: it draws other numbers than ours."""
    return source.distance is None and part.drop is None and fits(q, k, v)


def _mask(seen: Tensor | str, like: Tensor) -> Tensor | None:
    return None if isinstance(seen, str) else _added(seen, like)


def _of_rows(source: Source, part: Any) -> Source:
    """With the biases of some queries."""
    return source if source.bias is None else source._replace(bias=source.bias[:, part.queries])


def _score(q: Tensor, k: Tensor, source: Source, part: Any, scale: float, seen: Tensor | str) -> Tensor:
    """[b, H, t, n] in fp32, or fp64 where queries are; minus infinity where nothing is seen."""
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    score = scale * q.to(wide) @ k.to(wide).mT
    if source.distance is not None:
        score = source.shifted(score, *part.coordinates())
    return score.masked_fill(~_spell(seen, q.shape[2], k.shape[2], k), -torch.inf)
