"""Attention: one softmax over the keys of one or more sources, each with its own mask.

Dims: b batch, t queries, k keys, H heads, V key heads (head h reads key head h // (H // V)), D, E widths.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .buffers import Cache, is_past
from .dropping import Drop, Dropped
from .joint import Tile, fits, joint
from .rows import At, Keys, Mask
from .sources import SAME, Source, read
from .weighed import product, weighed

# Queries are taken this many at a time where their mask bounds how far they see, or as many as they see keys.
LEAST_TILE = 256


class _Part(NamedTuple):
    """A source as it is read: k, v [b, V, n, D | E], its keys' coordinates, what is seen of it. `first` is the place of
    its first key among all of the source."""

    k: Tensor
    v: Tensor
    keys: Callable[[], Keys]
    seen: Tensor | str
    source: Source
    first: int = 0


def attend(
    q: Tensor,
    *sources: tuple[Any, ...] | Source,
    at: At | None,
    scale: float,
    past: Any = None,
    kernel: Callable[..., Tensor] | None = None,
    drop: Drop | None = None,
) -> Tensor:
    """softmax(scale q k^T, where the mask sees) v -> [b, t, H, E]; Vaswani et al. 2017, grouped as Ainslie et al. 2023.

    q [b, t, H, D]; sources: what `Source` is made of. at None: the queries are there as a whole. With at None, or
    tokens that have more leading dims, all have these. past: the stream's cache of the source, or a tuple of one cache
    for each. drop: which weights of the softmax are 0, the others scaled up. A query that sees no key gets exactly 0.
    Another document never changes a result: its keys have weight 0 in the same order of summation (finite values).
    kernel(q, *sources as `sources.Read`, scale=scale) does it where it takes what is given (`sources.read`) and nothing
    is dropped; all else goes through torch, and so does one source that is causal or seen as a whole, without
    documents, padding or keys before: torch's own kernels are made for just that.
    """
    dropped = None if drop is None else drop.of(q)
    return _attend(q, [Source(*source) for source in sources], at, scale, past, kernel, dropped)


def _attend(
    q: Tensor, made: list[Source], at: At | None, scale: float, past: Any, kernel: Callable[..., Tensor] | None,
    drop: Dropped | None,
) -> Tensor:  # fmt: skip
    if at is None or len(at.lead) > 1:
        return _whole(q, made, scale, at, kernel, drop)
    caches = past if isinstance(past, (tuple, list)) else (past,) * len(made)
    if len(caches) != len(made) or (len(made) > 1 and isinstance(past, Cache)):
        raise ValueError(f"attend: {len(made)} sources need a cache each")
    plain = drop is not None or _is_plain(made, at, caches)  # the kernel draws no numbers
    if kernel is not None and not plain and (given := read(q, made, at, caches)) is not None:
        return kernel(given[0], *given[1], scale=scale)
    if not at.in_stream and (tile := _tile(at, made)):
        return _tiled(q, made, at, scale, tile, drop)
    parts = [_part(s, at, cache) for s, cache in zip(made, caches, strict=True)]
    if not q.numel() or not sum(p.k.shape[2] for p in parts):  # a step without queries, or before there is a key
        return q.new_zeros(*q.shape[:3], parts[0].v.shape[-1])
    if drop is not None or any(s.scored for s in made):
        return _scored(q, parts, at.keys(), scale, drop)
    return _fused(q, parts, scale)


def _is_plain(sources: list[Source], at: At, caches: Sequence[Any]) -> bool:
    """One source of the queries' own sequence, and no tensor needed to say what is seen of it: in a full pass, and
    where a stream begins with several rows."""
    (one, *more) = sources
    own = one.rows is SAME and not one.scored
    if more or not own or _proved(at, one.mask) is None:
        return False
    if not at.in_stream:
        return True
    return isinstance(at.step.uniform, int) and at.step.uniform == 0 and at.seq > 1 and caches[0].keep is None


def _fused(q: Tensor, parts: list[_Part], scale: float) -> Tensor:
    """One softmax by the library's kernel."""
    if len(parts) > 1:
        # The mask of a source that sees all or is causal is spelled out, so that one softmax covers them together.
        k, v = (_join(list(xs), q.shape[2]) for xs in zip(*(p[:2] for p in parts), strict=True))
        seen: Tensor | str | None = torch.cat([_spell(p.seen, q.shape[1], p.k.shape[2], p.k) for p in parts], -1)
    else:
        k, v, seen = parts[0].k, parts[0].v, parts[0].seen
    causal = seen == "causal" if isinstance(seen, str) else False
    return _softmax(q, k, v, None if isinstance(seen, str) else seen, causal, scale)


def _scored(
    q: Tensor, parts: list[_Part], queries: Keys, scale: float, drop: Dropped | None, first: int = 0
) -> Tensor:
    """One softmax over scores that each source makes in its own way, and whose weights are kept. `first` is the number
    of the first query."""
    scores, visible = [], []
    for part in parts:
        source = part.source
        score = product(scale * (q if source.query is None else source.query).transpose(1, 2), part.k.mT)
        scores.append(source.shifted(score, queries, part.keys()) if source.scored else score)
        visible.append(_spell(part.seen, q.shape[1], part.k.shape[2], part.k))
    weights = weighed(_beside(scores), _beside(visible)).split([p.k.shape[2] for p in parts], -1)
    summed = []
    for i, (weight, part) in enumerate(zip(weights, parts, strict=True)):
        if drop is not None:
            keys = torch.arange(part.first, part.first + part.k.shape[2], device=q.device)
            weight = drop.applied(weight, i, drop.queries[first : first + q.shape[1]], keys)
        summed.append(product(weight, part.v))
    return torch.stack(summed).sum(0).transpose(1, 2) if len(summed) > 1 else summed[0].transpose(1, 2)


def _beside(parts: list[Tensor]) -> Tensor:
    return torch.cat(parts, -1) if len(parts) > 1 else parts[0]


def _whole(
    q: Tensor, sources: list[Source], scale: float, at: At | None, kernel: Callable[..., Tensor] | None,
    drop: Dropped | None,
) -> Tensor:  # fmt: skip
    """Attention along sequences that are there as a whole, for each of any leading dims; `at` are their coordinates."""
    lead = q.shape[:-3]
    if not q.numel():  # a step that brings no sequences
        return q.new_zeros(*q.shape[:-1], sources[0].v.shape[-1])

    def flat(x: Tensor | None) -> Any:
        return None if x is None else x.flatten(0, x.dim() - 4)

    queries = flat(q)
    each = [s._replace(k=flat(s.k), v=flat(s.v), query=flat(s.query), bias=flat(s.bias)) for s in sources]
    rows = At(queries.shape[:2], q.device) if at is None else at.flat()
    return _attend(queries, each, rows, scale, None, kernel, drop).unflatten(0, lead)


def _rows(source: Source, at: At) -> tuple[Tensor, Tensor, Keys, Any]:
    """Keys and values of a full pass as [b, V, k, D], their coordinates, and a name for these in the call's memo."""
    k, v = source.k, source.v
    where = at if source.rows is SAME else source.rows
    if not isinstance(where, At):  # rows that are there as a whole are of every document
        keys = At(k.shape[:2], k.device).keys()
        return k.transpose(1, 2), v.transpose(1, 2), Keys(keys.position, None, None), k.shape[1]
    if where.valid is not None:
        # Selected, not multiplied by 0: padding may hold anything, even NaN.
        k, v = (torch.where(where.valid[:, :, None, None], x, 0) for x in (k, v))
    return k.transpose(1, 2), v.transpose(1, 2), where.keys(), where


def _part(source: Source, at: At, cache: Any) -> _Part:
    """A source with what a stream kept of it, or the rows of this call."""
    if is_past(cache):
        where = at if source.rows is SAME else source.rows
        assert isinstance(where, At)
        k, v, seen = cache.extend(source.k, source.v, where, source.mask, at)
        return _Part(k, v, lambda: cache.keys(where, k.shape[2]), seen, source)
    k, v, keys, name = _rows(source, at)
    seen = visible_here(at, source.mask) if name is at else _visible(at, keys, source.mask, name)
    return _Part(k, v, _known(keys), seen, source)


def _visible(at: At, keys: Keys, mask: Mask, name: Any, start: int = 0, end: int | None = None) -> Tensor:
    """bool [b, 1, t, k] of the queries start .. end, made once a call for all layers; b is 1 where rows are alike."""
    if (mask, name, start) not in at.memo:
        alike = at.plain and not at.in_stream and keys.valid is None
        batch = slice(1) if alike else slice(None)
        at.memo[mask, name, start] = mask.between(
            at.keys().part(slice(start, end), batch), keys.part(slice(None), batch)
        )
    return at.memo[mask, name, start]


def visible_here(at: At, mask: Mask) -> Tensor | str:
    """ "all" or "causal" where that is proved, else bool [b, 1, t, t], made once a call for all layers."""
    return _proved(at, mask) or _visible(at, at.keys(), mask, "here")


def _proved(at: At, mask: Mask) -> str | None:
    if at.plain and mask.interval and mask.ahead in (0, None) and mask.behind is None:
        return "causal" if mask.ahead == 0 else "all"
    return None


# --- tiles ----------------------------------------------------------------------------------------


def _tile(at: At, sources: list[Source]) -> int | None:
    """How many queries to take at a time: where masks bound what is seen of their own sequence, cost and memory follow
    what is seen, not the square of the sequence. None where the sequence is not much longer than that."""
    own = [s.mask for s in sources if s.rows is SAME]
    if not own or any(m.behind is None or m.ahead is None for m in own):
        return None
    reach = max(m.behind + m.ahead for m in own if m.behind is not None and m.ahead is not None)
    tile = max(LEAST_TILE, (reach + 1) // 4)
    return tile if at.seq > 2 * (tile + reach) else None


def _tiled(q: Tensor, sources: list[Source], at: At, scale: float, tile: int, drop: Dropped | None) -> Tensor:
    """Attention of `tile` queries at a time to the keys that their masks can reach."""
    whole = [_rows(s, at) for s in sources]
    tiles = []
    for start in range(0, at.seq, tile):
        end = min(start + tile, at.seq)
        reached = []
        for (k, _, keys, name), source in zip(whole, sources, strict=True):
            low, high = 0, k.shape[2]
            if source.rows is SAME:
                low, high = max(0, start - (source.mask.behind or 0)), min(high, end + (source.mask.ahead or 0))
            seen = _visible(at, keys.part(slice(low, high)), source.mask, (name, tile), start, end)
            if source.rows is not SAME and high:
                low, high, seen = _narrow(at, (source.mask, name, tile, start), seen)
            reached.append((low, high, seen))
        tiles.append(Tile(start, end, tuple(reached)))
    plain = drop is None and not any(s.scored for s in sources)
    if plain and all(fits(q, k, v) for k, v, _, _ in whole):
        return joint(q.transpose(1, 2), scale, [(k, v) for k, v, _, _ in whole], tiles).transpose(1, 2)
    found = []
    for start, end, pieces in tiles:
        parts = []
        for (k, v, keys, _), (low, high, seen), source in zip(whole, pieces, sources, strict=True):
            mine = source._replace(
                query=None if source.query is None else source.query[:, start:end],
                bias=None if source.bias is None else source.bias[:, start:end],
            )
            some = _known(keys.part(slice(low, high)))
            parts.append(_Part(k[:, :, low:high], v[:, :, low:high], some, seen, mine, low))
        here, queries = q[:, start:end], at.keys().part(slice(start, end))
        found.append(_fused(here, parts, scale) if plain else _scored(here, parts, queries, scale, drop, start))
    return torch.cat(found, 1)


def _narrow(at: At, name: Any, seen: Tensor) -> tuple[int, int, Tensor]:
    """The first key that some query sees, one behind the last, and what is seen of those; found once for all layers."""
    if (name, "narrow") not in at.memo:
        some = seen.flatten(0, 2).any(0).nonzero()
        first, last = (int(some[0]), int(some[-1]) + 1) if len(some) else (0, 1)
        at.memo[name, "narrow"] = first, last, seen[..., first:last]
    found: tuple[int, int, Tensor] = at.memo[name, "narrow"]
    return found


def _known(keys: Keys) -> Callable[[], Keys]:
    """Coordinates that need not be worked out: asked only where scores have biases."""
    return lambda: keys


def _spell(seen: Tensor | str, t: int, k: int, like: Tensor) -> Tensor:
    """bool [b, 1, t, k]."""
    if isinstance(seen, str):
        full = torch.ones(t, k, dtype=torch.bool, device=like.device)
        seen = (full.tril() if seen == "causal" else full)[None, None]
    return seen.expand(like.shape[0], 1, t, k)


def _join(parts: list[Tensor], heads: int) -> Tensor:
    """Keys or values of several sources along k; key heads are repeated only where their numbers differ."""
    if len({x.shape[1] for x in parts}) > 1:
        parts = [x.repeat_interleave(heads // x.shape[1], 1) for x in parts]
    return torch.cat(parts, 2)


def _softmax(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, causal: bool, scale: float) -> Tensor:
    """q [b, t, H, D], k and v [b, V, k, D | E] -> [b, t, H, E]."""
    b, t, heads, width = q.shape
    groups = k.shape[1]
    if t == 1 and groups < heads and (seen is None or seen.shape[1] == 1):
        # The heads of a group are queries of one key head: no repeated keys, and a matrix instead of a vector.
        o = F.scaled_dot_product_attention(q.view(b, groups, heads // groups, width), k, v, attn_mask=seen, scale=scale)
        return o.reshape(b, 1, heads, v.shape[-1])
    o = F.scaled_dot_product_attention(
        q.transpose(1, 2), k, v, attn_mask=seen, is_causal=causal, scale=scale, enable_gqa=groups < heads
    )
    return o.transpose(1, 2)
