"""Cross entropy of what a linear map gives, without all of its logits in memory: a buffer holds those of some rows.

Dims: R rows, K columns of x, V vocab. The buffer is overwritten by the slope of the loss, and the gradients are made in
the forward pass while it is there: three matrix products in all, as with logits that are kept (Hsu et al. 2024,
section 3.2). A gradient of the whole is a number, so the backward pass is a product with it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .kernels import suits
from .later import waiting
from .loss import cross_entropy, score, slope_along
from .norm import wide
from .product import autocast, product

# Bytes of the buffer, and the least rows that a matrix product is fast with. A small buffer is dear: with each, the
# gradient of the weight (fp32, V K numbers) is read and written once.
BUFFER, LEAST_ROWS = 1 << 29, 128


def linear_cross_entropy(
    x: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None = None, scale: float | None = None,
    softcap: float | None = None, kernel: Any = None,
) -> Tensor:  # fmt: skip
    """Sum of -log softmax(y)[target] over rows whose target is not -1, y = x weight^T + bias; 0-d, at least fp32.

    x [..., *ins], weight [V, *ins], bias [V], target int64 [...]. The logits are rounded to the dtype of weight, then
    multiplied by `scale`, then kept below a bound by softcap * tanh(y / softcap). Rows that are not scored give exactly
    zero gradient. kernel: a generated one for this vocabulary, scale and softcap.
    """
    x = x.to(weight.dtype).reshape(-1, weight[0].numel())
    weight, target = weight.flatten(1), target.reshape(-1)
    if waiting() is not None:
        # Gradients of weights are to wait for their time; those that are made here would be kept until then.
        (y,) = product(x, weight, bias, [len(weight)])
        return cross_entropy(_shaped(y, scale, softcap), target)
    x, weight, bias = autocast(x, weight, bias)
    kernel = kernel if suits(x, weight, bias) else None
    return _LinearLoss.apply(x, weight, bias, target, scale, softcap, kernel, torch.is_grad_enabled())


def _shaped(y: Tensor, scale: float | None, softcap: float | None) -> Tensor:
    y = y if scale is None else y * scale
    return y if softcap is None else softcap * torch.tanh(y / softcap)


def _steps(rows: int, vocab: int, bytes_each: int) -> list[slice]:
    """Rows of each buffer: as equal as can be."""
    most = max(LEAST_ROWS, BUFFER // max(1, vocab * bytes_each))
    count = max(1, -(-rows // most))
    size = -(-rows // count)
    return [slice(s, min(s + size, rows)) for s in range(0, rows, size)] if rows else []


class _LinearLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, scale: float | None,
        softcap: float | None, kernel: Any, trained: bool,
    ) -> Tensor:  # fmt: skip
        needs = [trained and needed for needed in ctx.needs_input_grad[:3]]
        loss = wide(x[:0]).new_zeros(())
        steps = _steps(len(x), len(weight), x.element_size())
        # One product rounds once; sums of several are kept in fp32 until the last.
        kind = weight.dtype if len(steps) == 1 else wide(weight[:0]).dtype
        dx = torch.empty_like(x) if needs[0] else None
        dweight = torch.zeros_like(weight, dtype=kind) if needs[1] else None
        dbias = wide(weight[:0]).new_zeros(len(weight)) if needs[2] else None
        room = x.new_empty(steps[0].stop if steps else 0, len(weight))
        for rows in steps:
            y = room[: rows.stop - rows.start]
            _logits(x[rows], weight, bias, y)
            if kernel is not None:
                loss += kernel(y, target[rows], any(needs)).sum()
            else:
                loss += _score(y, target[rows], scale, softcap, any(needs))
            if dx is not None:
                torch.mm(y, weight, out=dx[rows])
            if dweight is not None:
                _add_product(dweight, y, x[rows])
            if dbias is not None:
                dbias += y.sum(0, dtype=dbias.dtype)
        ctx.save_for_backward(dx, dweight, dbias)
        ctx.dtype = weight.dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # Into new memory: what is saved is read again where a graph is kept. One rounding from fp32.
        found = [
            None if d is None else torch.mul(d, grad, out=torch.empty_like(d, dtype=ctx.dtype))
            for d in ctx.saved_tensors
        ]
        return *found, None, None, None, None, None


def _logits(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    if bias is None:
        torch.mm(x, weight.T, out=out)
    else:
        torch.addmm(bias, x, weight.T, out=out)


def _score(y: Tensor, target: Tensor, scale: float | None, softcap: float | None, slope: bool) -> Tensor:
    """The loss of rows of logits y [n, V], which become its slope along them; as the kernels do."""
    z = wide(_shaped(wide(y), scale, softcap))
    room = torch.empty_like(z)
    total, loss = score(z, target, room)
    if slope:
        found = slope_along(torch.sub(z, total, out=room).exp_(), target)
        if softcap is not None:
            # Selected: a row that is not scored may hold anything, and its slope is 0.
            found *= torch.where((target < 0)[:, None], 0, 1 - (z / softcap) ** 2)
        y.copy_(found if scale is None else found * scale)
    return loss


def _add_product(total: Tensor, slope: Tensor, x: Tensor) -> None:
    """total [V, K] += slope [n, V]^T x [n, K], summed in the dtype of `total`."""
    if total.dtype == x.dtype:
        total.addmm_(slope.T, x)
    elif x.is_cuda:
        torch.addmm(total, slope.T, x, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(slope.T.to(total.dtype), x.to(total.dtype))
