"""One softmax over several sources of attention, without putting their keys side by side.

Each source goes through the library's kernel for itself; the logarithms of their sums say what each weighs in the whole
(Rabe and Staats 2021). The gradient of a source needs the whole's result and sum only, so nothing that is as large as
the scores is kept. Dims: b batch, H heads, V key heads, t queries, n keys, D width.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_KERNEL = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
_DTYPES = (torch.float32, torch.float64, torch.bfloat16)


class Tile(NamedTuple):
    """Queries start .. end, and for each source which keys low .. high they are given and which of these they see,
    bool [b or 1, 1, end - start, high - low]."""

    start: int
    end: int
    keys: tuple[tuple[int, int, Tensor], ...]


def fits(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether the kernel takes these: on a CPU, in its dtypes, keys as wide as values, some of each."""
    return q.device.type == "cpu" and q.dtype in _DTYPES and k.shape[-1] == v.shape[-1] and k.numel() > 0


def joint(q: Tensor, scale: float, sources: list[tuple[Tensor, Tensor]], tiles: list[Tile]) -> Tensor:
    """q [b, H, t, D], each source k, v [b, V, n, D] -> [b, H, t, D]; a query that sees nothing gets exactly 0.

    The tiles are all queries, each once.
    """
    made: Tensor = _Joint.apply(q, scale, tiles, *(x for source in sources for x in source))
    return made


class _Joint(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, scale: float, tiles: list[Tile], *tensors: Tensor) -> Tensor:
        out = torch.empty_like(q)
        kind = torch.float64 if q.dtype == torch.float64 else torch.float32
        whole = torch.empty(q.shape[:3], dtype=kind, device=q.device)
        for tile in tiles:
            rows = slice(tile.start, tile.end)
            outs, sums = [], []
            for i, (low, high, seen) in enumerate(tile.keys):
                k, v = (_repeated(x[:, :, low:high], q.shape[1]) for x in tensors[2 * i : 2 * i + 2])
                got, total = _KERNEL(q[:, :, rows], k, v, 0.0, False, attn_mask=_added(seen, q), scale=scale)
                some = seen.any(-1)  # the kernel's sum of nothing differs between versions
                outs.append(torch.where(some[..., None], got, 0))
                sums.append(torch.where(some, total, -torch.inf))
            if len(outs) > 1:
                whole[:, :, rows] = torch.stack(sums).logsumexp(0)
                parts = [(s - whole[:, :, rows]).exp().nan_to_num(0)[..., None] for s in sums]
                out[:, :, rows] = torch.stack([o * p for o, p in zip(outs, parts, strict=True)]).sum(0)
            else:
                whole[:, :, rows], out[:, :, rows] = sums[0], outs[0]
        ctx.scale, ctx.tiles = scale, tiles
        ctx.save_for_backward(q, out, whole, *tensors)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        q, out, whole, *tensors = ctx.saved_tensors
        whole = torch.where(whole.isinf(), torch.inf, whole)  # every weight of a row that sees nothing is 0
        of_q, of_others = torch.zeros_like(q), [torch.zeros_like(x) for x in tensors]
        for tile in ctx.tiles:
            rows = slice(tile.start, tile.end)
            mine, here, there, sums = grad[:, :, rows], q[:, :, rows], out[:, :, rows], whole[:, :, rows]
            for i, (low, high, seen) in enumerate(tile.keys):
                k, v = (_repeated(x[:, :, low:high], q.shape[1]) for x in tensors[2 * i : 2 * i + 2])
                mask = _added(seen, q)
                got, *others = _BACKWARD(mine, here, k, v, there, sums, 0.0, False, attn_mask=mask, scale=ctx.scale)
                of_q[:, :, rows] += got
                for whole_grad, part in zip(of_others[2 * i : 2 * i + 2], others, strict=True):
                    whole_grad[:, :, low:high] += _summed(part, whole_grad.shape[1])
        return of_q, None, None, *of_others


def _added(mask: Tensor, like: Tensor) -> Tensor:
    """0 where something is seen, else minus infinity."""
    return torch.zeros(mask.shape, dtype=like.dtype, device=like.device).masked_fill_(~mask, -torch.inf)


def _repeated(x: Tensor, heads: int) -> Tensor:
    """Keys or values for each query head."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], 1)


def _summed(grad: Tensor, heads: int) -> Tensor:
    """The gradient of keys or values that several query heads read."""
    return grad if grad.shape[1] == heads else grad.unflatten(1, (heads, -1)).sum(2)
