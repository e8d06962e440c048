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


def attend(q: Tensor, *sources: tuple[Tensor, Tensor, Mask], at: At, scale: float, past: Any = None) -> Tensor:
    """softmax(scale q k^T, where the mask sees) v -> [b, t, H, E]; Vaswani et al. 2017, grouped as Ainslie et al. 2023.

    q [b, t, H, D]; sources: (k [b, t, V, D], v [b, t, V, E], mask). past: the stream's cache of the source, or a tuple
    of one cache for each. A query that sees no key gets exactly 0. Another document never changes a result: its keys
    have weight 0 in the same order of summation (finite values).
    """
    caches = past if isinstance(past, (tuple, list)) else (past,) * len(sources)
    if len(caches) != len(sources) or (len(sources) > 1 and isinstance(past, Cache)):
        raise ValueError(f"attend: {len(sources)} sources need a cache each")
    keys, values, visible, causal = [], [], [], False
    for (k, v, mask), cache in zip(sources, caches, strict=True):
        k, v, seen = cache.extend(k, v, at, mask) if is_past(cache) else _own(k, v, at, mask)
        keys.append(k)
        values.append(v)
        visible.append(seen)
    if len(sources) > 1:
        # The mask of a source that sees all or is causal is spelled out, so that one softmax covers them together.
        k, v = (_join(parts, q.shape[2]) for parts in (keys, values))
        seen = torch.cat([_spell(s, q.shape[1], x.shape[2], x) for s, x in zip(visible, keys, strict=True)], -1)
    else:
        k, v, seen = keys[0], values[0], visible[0]
    if isinstance(seen, str):
        causal, seen = seen == "causal", None
    return _softmax(q, k, v, seen, causal, scale)


def _own(k: Tensor, v: Tensor, at: At, mask: Mask) -> tuple[Tensor, Tensor, Tensor | str]:
    """A full forward pass: the keys are the rows of this call. -> k, v as [b, V, k, D] and what is seen."""
    if at.valid is not None:
        # Selected, not multiplied by 0: padding may hold anything, even NaN.
        k, v = (torch.where(at.valid[:, :, None, None], x, 0) for x in (k, v))
    return k.transpose(1, 2), v.transpose(1, 2), visible_here(at, mask)


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
