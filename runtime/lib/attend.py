"""Attention: one softmax over the keys of one or more sources, each with its own mask.

Dims: b batch, t queries, k keys, H heads, V key heads (head h reads key head h // (H // V)), D, E widths.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .buffers import Cache, is_past
from .rows import At, Keys, Mask


def attend(q: Tensor, *sources: tuple[Any, ...], at: At | None, scale: float, past: Any = None) -> Tensor:
    """softmax(scale q k^T, where the mask sees) v -> [b, t, H, E]; Vaswani et al. 2017, grouped as Ainslie et al. 2023.

    q [b, t, H, D]; sources: (k [b, k, V, D], v [b, k, V, E], mask), and where the keys are rows of another sequence than
    the queries their coordinates, or None if they are there as a whole. at None: the queries are there as a whole, and
    may have more leading dims. past: the stream's cache of the source, or a tuple of one cache for each. A query that
    sees no key gets exactly 0. Another document never changes a result: its keys have weight 0 in the same order of
    summation (finite values).
    """
    if at is None:
        return _whole(q, sources, scale)
    caches = past if isinstance(past, (tuple, list)) else (past,) * len(sources)
    if len(caches) != len(sources) or (len(sources) > 1 and isinstance(past, Cache)):
        raise ValueError(f"attend: {len(sources)} sources need a cache each")
    keys, values, visible, causal = [], [], [], False
    for (k, v, mask, *other), cache in zip(sources, caches, strict=True):
        rows = other[0] if other else at
        if is_past(cache):
            k, v, seen = cache.extend(k, v, rows, mask, at)
        else:
            k, v, seen = _own(k, v, rows or At(k.shape[:2], k.device), mask, at, rows is None)
        keys.append(k)
        values.append(v)
        visible.append(seen)
    if not q.numel() or not sum(k.shape[2] for k in keys):  # a step without queries, or before there is a key
        return q.new_zeros(*q.shape[:3], values[0].shape[-1])
    if len(sources) > 1:
        # The mask of a source that sees all or is causal is spelled out, so that one softmax covers them together.
        k, v = (_join(parts, q.shape[2]) for parts in (keys, values))
        seen = torch.cat([_spell(s, q.shape[1], x.shape[2], x) for s, x in zip(visible, keys, strict=True)], -1)
    else:
        k, v, seen = keys[0], values[0], visible[0]
    if isinstance(seen, str):
        causal, seen = seen == "causal", None
    return _softmax(q, k, v, seen, causal, scale)


def _whole(q: Tensor, sources: tuple[tuple[Any, ...], ...], scale: float) -> Tensor:
    """Attention along sequences that are there as a whole, for each of any leading dims."""
    lead = q.shape[:-3]
    if not q.numel():  # a step that brings no sequences
        return q.new_zeros(*q.shape[:-1], sources[0][1].shape[-1])
    flat = [tuple(x.flatten(0, x.dim() - 4) for x in source[:2]) + source[2:] for source in sources]
    queries = q.flatten(0, q.dim() - 4)
    at = At(queries.shape[:2], q.device)
    return attend(queries, *flat, at=at, scale=scale).unflatten(0, lead)


def _own(k: Tensor, v: Tensor, at: At, mask: Mask, queries: At, whole: bool) -> tuple[Tensor, Tensor, Tensor | str]:
    """A full forward pass: the keys are rows of this call. -> k, v as [b, V, k, D] and what the queries see."""
    if at.valid is not None:
        # Selected, not multiplied by 0: padding may hold anything, even NaN.
        k, v = (torch.where(at.valid[:, :, None, None], x, 0) for x in (k, v))
    seen = visible_here(at, mask) if queries is at else _visible(queries, at, mask, whole)
    return k.transpose(1, 2), v.transpose(1, 2), seen


def _visible(queries: At, at: At, mask: Mask, whole: bool) -> Tensor:
    """bool [b, 1, t, k] of the rows of another sequence; those of a whole one belong to every document."""
    name = (mask, at.seq if whole else at)
    if name not in queries.memo:
        keys = at.keys()
        if whole:
            keys = Keys(keys.position, None, None)
        if queries.plain and at.plain and not queries.in_stream:
            queries.memo[name] = mask.visible(_first(queries), Keys(*(x if x is None else x[:1] for x in keys)))
        else:
            queries.memo[name] = mask.visible(queries, keys)
    return queries.memo[name]


def _first(at: At) -> At:
    """The coordinates of batch row 0, where all are alike."""
    return At((1, at.seq), at.device)


def visible_here(at: At, mask: Mask) -> Tensor | str:
    """ "all" or "causal" where that is proved, else bool [b, 1, t, t], made once a call for all layers."""
    if at.plain and mask.interval and mask.ahead in (0, None) and mask.behind is None:
        return "causal" if mask.ahead == 0 else "all"
    if mask not in at.memo:
        keys = at.keys()
        if at.plain:
            # Rows of the batch are alike.
            keys = Keys(keys.position[:1], keys.document[:1], None)
            at.memo[mask] = mask.visible(At((1, at.seq), at.device), keys)
        else:
            at.memo[mask] = mask.visible(at, keys)
    return at.memo[mask]


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
