"""Cross entropy as a sum over the rows that are scored, so that micro-batches add up exactly.

Dims: R rows, V vocab. It works on a few rows at a time: a second tensor [R, V] costs more in memory traffic than the
arithmetic does.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .kernels import suits
from .norm import wide

# Numbers and least rows of one block of logits.
BLOCK, LEAST_ROWS = 1 << 21, 16


def known(target: Tensor) -> Tensor:
    """How many targets are known (not -1); 0-d int64."""
    return (target >= 0).sum()


def cross_entropy(logits: Tensor, target: Tensor, kernel: Any = None) -> Tensor:
    """Sum of -log softmax(logits)[target] over rows whose target is not -1; 0-d, at least fp32.

    logits [..., V], target int64 [...]. Rows that are not scored get exactly zero gradient. kernel: a generated one for
    this vocabulary.
    """
    if kernel is not None and suits(logits):
        return kernel(logits.reshape(-1, logits.shape[-1]), target.reshape(-1)).sum()
    return _CrossEntropy.apply(logits.reshape(-1, logits.shape[-1]), target.reshape(-1))


def _blocks(rows: int, vocab: int) -> Iterator[slice]:
    size = max(LEAST_ROWS, BLOCK // vocab)
    return (slice(s, min(s + size, rows)) for s in range(0, rows, size))


def score(logits: Tensor, target: Tensor, room: Tensor) -> tuple[Tensor, Tensor]:
    """logits [n, V] -> log sum exp [n, 1], and the block's loss; room [n, V] may be written."""
    most = logits.amax(1, keepdim=True)
    picked = logits.gather(1, target.clamp_min(0)[:, None])
    total = torch.sub(logits, most, out=room).exp_().sum(1, keepdim=True).log_().add_(most)
    return total, torch.where((target >= 0)[:, None], total - picked, 0).sum()


def slope_along(softmax: Tensor, target: Tensor) -> Tensor:
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
            totals[part], block = score(rows, target[part], room)
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
            slope_along(torch.sub(rows, totals[part], out=room).exp_(), target[part]).mul_(grad)
            if room.dtype != out.dtype:
                out[part] = room
        return out, None


# --- in parts of the vocabulary ---------------------------------------------------------------------


def sum_exp(logits: Tensor, most: Tensor) -> Tensor:
    """The sum of exp(logits - most) over the columns that are here; logits [..., V], most [...] -> [...].

    A row whose sum gets no gradient gives none: it may hold anything, even NaN.
    """
    total: Tensor = _SumExp.apply(logits.reshape(-1, logits.shape[-1]), most.reshape(-1))
    return total.view(most.shape)


class _SumExp(torch.autograd.Function):
    """Keeps the logits and a number a row; the exponentials are made again, block by block."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, most: Tensor) -> Tensor:
        total = logits.new_empty(len(logits), dtype=wide(logits[:0]).dtype)
        for part in _blocks(*logits.shape):
            total[part] = torch.sub(wide(logits[part]), most[part, None]).exp_().sum(1)
        ctx.save_for_backward(logits, most, total)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        logits, most, total = ctx.saved_tensors
        none, out = grad == 0, torch.empty_like(logits)
        for part in _blocks(*logits.shape):
            slope = torch.sub(wide(logits[part]), most[part, None]).exp_().mul_(grad[part, None])
            out[part] = slope.masked_fill_(none[part, None], 0)
        return out, (-grad * total).masked_fill(none, 0).to(most.dtype)


def picked(logits: Tensor, target: Tensor, start: int) -> Tensor:
    """The target's logit where it is among columns start, start + 1, ..; else 0. logits [..., V] -> [...]."""
    column = target - start
    here = (column >= 0) & (column < logits.shape[-1])
    found = logits.gather(-1, torch.where(here, column, 0)[..., None])[..., 0]
    return torch.where(here, wide(found), 0)


def nll(total: Tensor, target: Tensor, found: Tensor, most: Tensor) -> Tensor:
    """Sum of log(total) + most - found over rows whose target is known (not -1); 0-d."""
    known = target >= 0
    # Selected before the logarithm, too: its gradient at NaN is NaN even times 0.
    return torch.where(known, torch.where(known, total, 1).log() + wide(most) - found, 0).sum()
