"""Cross entropy as a sum over the rows that are scored, so that micro-batches add up exactly.

Dims: R rows, V vocab, K hidden. Both forms work on a few rows at a time: a second tensor [R, V] costs more in memory
traffic than the arithmetic does.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .norm import wide
from .product import autocast, upcasts

# Numbers and least rows of one block of logits: at 1 << 21 the fused form is as fast as its products alone allow.
BLOCK, LEAST_ROWS = 1 << 21, 16


def known(target: Tensor) -> Tensor:
    """How many targets are known (not -1); 0-d int64."""
    return (target >= 0).sum()


def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Sum of -log softmax(logits)[target] over rows whose target is not -1; 0-d, at least fp32.

    logits [..., V], target int64 [...]. Rows that are not scored get exactly zero gradient.
    """
    return _CrossEntropy.apply(logits.reshape(-1, logits.shape[-1]), target.reshape(-1))


def linear_cross_entropy(x: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None = None) -> Tensor:
    """cross_entropy(x weight^T + bias, target), without the logits ever existing at once.

    x [..., K], weight [V, K], bias [V], target int64 [...]. Gradients are made together with the value: each block of
    logits is multiplied out once. Products are in x's dtype, sums at least fp32.
    """
    x, weight, bias = autocast(x, weight, bias)
    return _LinearCrossEntropy.apply(x.reshape(-1, x.shape[-1]), weight, bias, target.reshape(-1))


def _blocks(rows: int, vocab: int) -> Iterator[slice]:
    size = max(LEAST_ROWS, BLOCK // vocab)
    return (slice(s, min(s + size, rows)) for s in range(0, rows, size))


def _score(logits: Tensor, target: Tensor, room: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """logits [n, V] -> log sum exp [n, 1], sum exp(. - max) [n, 1], and the block's loss.

    room [n, V], which may be the logits, is left holding exp(logits - max).
    """
    most = logits.amax(1, keepdim=True)
    picked = logits.gather(1, target.clamp_min(0)[:, None])
    shares = torch.sub(logits, most, out=room).exp_().sum(1, keepdim=True)
    total = shares.log().add_(most)
    return total, shares, torch.where((target >= 0)[:, None], total - picked, 0).sum()


def _slope(softmax: Tensor, target: Tensor) -> Tensor:
    """d loss / d logits = softmax - one hot, in place."""
    softmax.scatter_add_(1, target.clamp_min(0)[:, None], softmax.new_full((len(softmax), 1), -1.0))
    # Selected, not multiplied by 0: a row that is not scored may hold anything, even NaN.
    return softmax.masked_fill_((target < 0)[:, None], 0)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor) -> Tensor:
        kind = wide(logits[:0]).dtype
        totals = logits.new_empty(len(logits), 1, dtype=kind)
        loss = totals.new_zeros(())
        room: Tensor | None = None
        for part in _blocks(*logits.shape):
            rows = wide(logits[part])
            room = torch.empty_like(rows) if room is None else room[: len(rows)]
            totals[part], _, block = _score(rows, target[part], room)
            loss += block
        ctx.save_for_backward(logits, target, totals)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        logits, target, totals = ctx.saved_tensors
        out = torch.empty_like(logits)
        for part in _blocks(*logits.shape):
            rows = wide(logits[part])
            room = out[part] if out.dtype == rows.dtype else torch.empty_like(rows)
            _slope(torch.sub(rows, totals[part], out=room).exp_(), target[part]).mul_(grad)
            if room.dtype != out.dtype:
                out[part] = room
        return out, None


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor) -> Tensor:
        kind = wide(x[:0]).dtype
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        grad_x = torch.empty_like(x) if needs_x else None
        grad_weight = torch.zeros_like(weight, dtype=kind) if needs_weight else None
        grad_bias = x.new_zeros(len(weight), dtype=kind) if needs_bias else None
        loss = x.new_zeros((), dtype=kind)
        dtypes = x.dtype, weight.dtype, None if bias is None else bias.dtype
        if upcasts(x):
            x, weight = x.float(), weight.float()
        room: Tensor | None = None
        for part in _blocks(len(x), len(weight)):
            rows = x[part]
            room = x.new_empty(len(rows), len(weight)) if room is None else room[: len(rows)]
            logits = wide(torch.mm(rows, weight.T, out=room))
            if bias is not None:
                logits += bias
            _, shares, block = _score(logits, target[part], logits)
            loss += block
            if not (needs_x or needs_weight or needs_bias):
                continue
            slope = _slope(logits.div_(shares), target[part])
            if grad_bias is not None:
                grad_bias += slope.sum(0)
            slope = slope.to(x.dtype)
            if grad_x is not None:
                grad_x[part] = slope @ weight
            if grad_weight is not None and grad_weight.dtype == x.dtype:
                grad_weight.addmm_(slope.T, x[part])
            elif grad_weight is not None:
                grad_weight += slope.T @ x[part]
        ctx.save_for_backward(grad_x, grad_weight, grad_bias)
        ctx.dtypes = dtypes
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        pairs = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        return *(None if x is None else (x * grad).to(dtype) for x, dtype in pairs), None
