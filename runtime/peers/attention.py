"""Peers for attention that come with torch: FlexAttention, and its fused attention with a mask spelled out."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...lowering.alone import Alone
from ..counted import Counted
from ..lib.rows import At, Coordinates, Keys
from ..lib.sources import SAME, Source
from .seam import NotServed, Peer, Plain, calling


def _sources(given: tuple[Any, ...], past: Any, drop: Any) -> list[Source]:
    """As the library's `attend` is given them; of a full pass, with scores that are a product alone."""
    sources = [s if isinstance(s, Source) else Source(*s) for s in given]
    if drop is not None or any(s.query is not None or s.bias is not None for s in sources):
        raise NotServed("its scores have biases or queries of their own, or its weights are dropped")
    return sources


def _joined(sources: list[Source]) -> tuple[Tensor, Tensor]:
    """Keys and values [b, V, k, D | E] of all sources, one behind the other: there is one softmax over them."""
    k, v = [s.k.transpose(1, 2) for s in sources], [s.v.transpose(1, 2) for s in sources]
    return (torch.cat(k, 2), torch.cat(v, 2)) if len(sources) > 1 else (k[0], v[0])


def _keys(source: Source, at: At) -> Keys:
    where = at if source.rows is SAME else source.rows
    if isinstance(where, At):
        if where.valid is not None and not bool(where.valid.all()):
            raise NotServed("some rows are padding")
        return where.keys()._replace(valid=None, document=where.keys().document if at.starts is not None else None)
    return Keys(torch.arange(source.k.shape[1], device=source.k.device)[None], None, None)


def _flex(alone: Alone, plain: Plain) -> Any:
    def attend(
        q: Tensor, *given: Any, at: At, scale: float, past: Any = None, drop: Any = None, kernel: Any = None
    ) -> Tensor:
        sources = _sources(given, past, drop)
        if "flex" not in at.memo:  # once a step for all layers, as our bounds are
            at.memo["flex"] = _blocks(sources, at)
        k, v = _joined(sources)
        shared = q.shape[2] > k.shape[1]
        o: Tensor = _attention(q.device.type)(
            q.transpose(1, 2), k, v, block_mask=at.memo["flex"], scale=scale, enable_gqa=shared
        )
        return o.transpose(1, 2)

    return calling(plain(), attend=attend)


@cache
def _attention(device: str) -> Any:
    """Compiled where there is a GPU, which is how it is fused; else its math as it stands."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention) if device == "cuda" else flex_attention


def _blocks(sources: list[Source], at: At) -> Any:
    """The mask of all sources over their joined keys, and which of its blocks are empty or full."""
    from torch.nn.attention.flex_attention import create_block_mask

    keys = [_keys(source, at) for source in sources]
    ends, total = [], 0
    for one in keys:
        total += one.position.shape[1]
        ends.append(total)
    documents = at.starts is not None
    plain = len(sources) == 1 and sources[0].rows is SAME and at.plain
    rows = max(one.position.shape[0] for one in keys)
    positions = torch.cat([one.position.expand(rows, -1) for one in keys], 1)
    none = torch.zeros_like(positions[:, :1])
    theirs = torch.cat(
        [(none if k.document is None else k.document).expand(rows, k.position.shape[1]) for k in keys], 1
    )
    asked, own = at.position, at.keys().document
    assert own is not None

    def sees(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        if plain:  # places are positions: nothing is looked up
            zero = torch.zeros_like(query)
            return torch.as_tensor(sources[0].mask.sees(Coordinates(query, zero), Coordinates(key, zero)))
        asks = Coordinates(asked[b, query], own[b, query])
        row = b if rows > 1 else torch.zeros_like(b)
        holds = Coordinates(positions[row, key], theirs[row, key])
        same = asks.document == holds.document if documents else None
        seen, start = None, 0
        for source, one, end in zip(sources, keys, ends, strict=True):
            mine = source.mask.sees(asks, holds) & ((key >= start) & (key < end))
            if same is not None and one.document is not None:
                mine = mine & same
            seen, start = mine if seen is None else seen | mine, end
        assert seen is not None
        return seen

    batch = None if plain or at.plain and rows == 1 else at.batch
    return create_block_mask(sees, batch, None, at.seq, total, device=positions.device)


def _spelled(alone: Alone, plain: Plain) -> Any:
    def attend(
        q: Tensor, *given: Any, at: At, scale: float, past: Any = None, drop: Any = None, kernel: Any = None
    ) -> Tensor:
        sources = _sources(given, past, drop)
        if "spelled" not in at.memo:
            batch = slice(1) if at.plain else slice(None)
            rows = at.keys().part(slice(None), batch)
            masks = [s.mask.between(rows, _keys(s, at).part(slice(None), batch)) for s in sources]
            at.memo["spelled"] = torch.cat([m.expand(max(len(x) for x in masks), *m.shape[1:]) for m in masks], -1)
        k, v = _joined(sources)
        shared = q.shape[2] > k.shape[1]
        o = F.scaled_dot_product_attention(
            q.transpose(1, 2), k, v, attn_mask=at.memo["spelled"], scale=scale, enable_gqa=shared
        )
        return o.transpose(1, 2)

    return calling(plain(), attend=attend)


# --- what they do, without a GPU --------------------------------------------------------------------------------------


def _given(plain: Plain, forward: Callable[[Any], object]) -> tuple[Tensor, list[Source], At]:
    """What a use of attention is given."""
    seen: list[tuple[Tensor, list[Source], At]] = []

    def attend(q: Tensor, *given: Any, at: At, scale: float, past: Any = None, drop: Any = None) -> Tensor:
        seen.append((q, _sources(given, past, drop), at))
        return q.new_empty(*q.shape[:-1], seen[-1][1][0].v.shape[-1])

    forward(calling(plain(), attend=attend))
    return seen[0]


def _passes(name: str, q: Tensor, sources: list[Source], pairs: int, scores: int, mask: int = 0) -> list[Counted]:
    """Both passes over so many pairs of a query and a key, in all heads. Backward makes the scores and the slopes of
    weights `scores` times, beside three products of gradients."""
    size, width, value_width = q.element_size(), q.shape[-1], sources[0].v.shape[-1]
    keys = sum(s.k.numel() + s.v.numel() for s in sources) * size
    asked, o = q.numel() * size, q.numel() // width * value_width * size
    forward, backward = asked + keys + o + mask, 2 * (asked + keys) + 2 * o + mask
    products = 2.0 * pairs * (width + value_width)
    grads = 2.0 * pairs * (2 * width + value_width) + scores * products
    return [Counted(f"{name}, forward", 0, forward, forward, products),
            Counted(f"{name}, backward", 0, backward, backward, grads)]  # fmt: skip


def _flex_counts(plain: Plain, forward: Callable[[Any], object]) -> list[Counted]:
    """All pairs of blocks that are not empty; backward has a part for queries and one for keys, and each makes scores
    and slopes."""
    q, sources, at = _given(plain, forward)
    blocks = _blocks(sources, at)
    found = blocks.kv_num_blocks.sum() + blocks.full_kv_num_blocks.sum()
    shared = q.shape[0] // len(blocks.kv_num_blocks)
    pairs = int(found) * blocks.BLOCK_SIZE[0] * blocks.BLOCK_SIZE[1] * q.shape[2] * shared
    return _passes("flex_attention", q, sources, pairs, 2)


def _spelled_counts(plain: Plain, forward: Callable[[Any], object]) -> list[Counted]:
    """All pairs, whatever the mask says, which is read in both passes."""
    q, sources, _ = _given(plain, forward)
    mask = q.shape[0] * q.shape[1] * sum(s.k.shape[1] for s in sources)
    return _passes("scaled_dot_product_attention", q, sources, mask * q.shape[2], 1, mask)


PEERS = (
    Peer("flex", None, (("attend",),), _flex, _flex_counts),
    Peer("sdpa", None, (("attend",),), _spelled, _spelled_counts),
)
