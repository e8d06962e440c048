"""The matrix product of linear maps: several weights at once, and low precision where a processor is slow at it.

Dims: M rows, K columns of a weight, N rows of it.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .constant import constant
from .later import Later, Weight, waiting

# Rows converted at a time: their fp32 copies stay in the cache. Fewer rows in all are left to the native kernel, which
# then reads half the bytes: at M = 32 both are equal, at M = 512, K = 512, N = 4112 7.6 ms against 13.
BLOCK_ROWS = 512
LEAST_ROWS = 64


def product(x: Tensor, weight: Tensor, bias: Tensor | None, widths: list[int]) -> tuple[Tensor, ...]:
    """x [..., K], weight [N, K], bias [N] -> x weight^T + bias in pieces of `widths` columns, side by side; N and K of
    a weight may be several dims."""
    x = x.to(weight.dtype)  # constants keep the dtype that they were computed in until they meet a weight
    x, weight, bias = autocast(x, weight, bias) if torch.is_grad_enabled() else (x, weight, bias)
    flat, store = (sum(widths), x.shape[-1]), waiting()
    if store is not None and (weight.requires_grad or bias is not None and bias.requires_grad):
        of = Weight.of(weight, flat), None if bias is None else Weight.of(bias, flat[:1])
        return _LaterProduct.apply(x, store.anchor, *of, widths, store)
    if weight.dim() > 2:
        weight, bias = weight.reshape(flat), None if bias is None else bias.reshape(-1)
    if not torch.is_grad_enabled():
        y = _forward(x, weight, bias)
        return (y,) if len(widths) == 1 else torch.split_with_sizes(y, widths, -1)
    if len(widths) == 1 and not upcasts(x):
        return (F.linear(x, weight, bias),)
    return _Product.apply(x, weight, bias, widths)


def autocast(*tensors: Tensor | None) -> list[Any]:
    """The tensors in the dtype that autocast asks for, if it is on: custom functions are unknown to it."""
    kind = next(x for x in tensors if x is not None).device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return list(tensors)
    dtype = torch.get_autocast_dtype(kind)
    return [x if x is None or x.dtype == torch.float64 else x.to(dtype) for x in tensors]


@cache
def _capabilities() -> dict[str, Any]:
    return dict(torch.cpu.get_capabilities())


@constant
def _has_tiles() -> bool:
    return bool(_capabilities().get("amx_bf16", False))


class _Elsewhere(threading.local):
    """How many times this thread has said that what it runs is only to tell what another machine would do."""

    depth = 0


ELSEWHERE = _Elsewhere()


def upcasts(x: Tensor) -> bool:
    """Whether products of x run in fp32: a bf16 product is one with fp32 sums, so only the result is rounded.

    Without AMX the bf16 kernels of a processor with AVX512-BF16 reach half the speed of its fp32 ones (167 against
    320 GFLOP/s on two cores).
    """
    if ELSEWHERE.depth or x.dtype != torch.bfloat16 or x.device.type != "cpu" or _has_tiles():
        return False
    return x.numel() >= LEAST_ROWS * x.shape[-1]


def _forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if not upcasts(x):
        return F.linear(x, weight, bias)
    flat, w, b = x.reshape(-1, x.shape[-1]), weight.float().T, None if bias is None else bias.float()
    y = x.new_empty(len(flat), len(weight))
    room = torch.empty(min(BLOCK_ROWS, len(y)), len(weight), dtype=torch.float32)
    for rows in _blocks(len(y)):
        part = room[: rows.stop - rows.start]
        torch.mm(flat[rows].float(), w, out=part) if b is None else torch.addmm(b, flat[rows].float(), w, out=part)
        y[rows] = part
    return y.view(*x.shape[:-1], len(weight))


def _blocks(rows: int) -> list[slice]:
    return [slice(s, min(s + BLOCK_ROWS, rows)) for s in range(0, rows, BLOCK_ROWS)]


class _Product(torch.autograd.Function):
    """Backward takes the gradient of each piece as it comes; autograd would first copy them all into one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, widths: list[int]) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x, weight)
        ctx.widths, ctx.has_bias = widths, bias is not None
        ctx.set_materialize_grads(False)
        return tuple(_forward(x, weight, bias).split(widths, -1))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight = ctx.needs_input_grad[:2]
        return *_gradients(x, weight, ctx.widths, grads, needs_x, needs_weight, ctx.has_bias), None


class _LaterProduct(torch.autograd.Function):
    """The same, but the gradients of the weights wait."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, anchor: Tensor, weight: Weight, bias: Weight | None, widths: list[int], store: Later
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x, weight.value)
        ctx.weights = weight.without_value(), None if bias is None else bias.without_value()
        ctx.widths, ctx.store = widths, store
        ctx.set_materialize_grads(False)
        return tuple(_forward(x, weight.value, None if bias is None else bias.value).split(widths, -1))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        x, weight = (saved.detach() for saved in ctx.saved_tensors)  # what waits must not keep the graph
        widths, kept = ctx.widths, [g for g in grads if g is not None]

        def of_weights(weight: bool, bias: bool) -> Tensor:
            found = _gradients(x, None, widths, grads, False, weight, bias)[1 if weight else 2]
            assert found is not None
            return found

        if kept:
            ctx.store.put(ctx.weights[0], lambda: of_weights(True, False), x, *kept)
            if ctx.weights[1] is not None:
                ctx.store.put(ctx.weights[1], lambda: of_weights(False, True), *kept)
        of_x = _gradients(x, weight, widths, grads, ctx.needs_input_grad[0], False, False)[0]
        return of_x, None, None, None, None, None


def _gradients(
    x: Tensor, weight: Tensor | None, widths: list[int], grads: Sequence[Tensor | None], needs_x: bool,
    needs_weight: bool, needs_bias: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """Those of x (which asks for the weight), weight and bias, from those of the pieces."""
    kind = torch.float32 if upcasts(x) else x.dtype
    flat, w = x.reshape(-1, x.shape[-1]), None if weight is None else weight.to(kind)
    blocks = _blocks(len(flat)) if upcasts(x) else [slice(0, len(flat))]
    grad_x = torch.empty_like(flat) if needs_x else None
    grad_weight = flat.new_zeros(sum(widths), flat.shape[1], dtype=kind) if needs_weight else None
    grad_bias = flat.new_zeros(sum(widths), dtype=kind) if needs_bias else None
    for rows in blocks:
        x_now = flat[rows].to(kind)
        sum_x = None
        start = 0
        for grad, width in zip(grads, widths, strict=True):
            columns = slice(start, start + width)
            start += width
            if grad is None:
                continue
            g = grad.reshape(-1, width)[rows].to(kind)
            if needs_x:
                assert w is not None
                sum_x = g @ w[columns] if sum_x is None else sum_x.addmm_(g, w[columns])
            if grad_weight is not None:
                grad_weight[columns].addmm_(g.T, x_now, beta=0 if rows.start == 0 else 1)
            if grad_bias is not None:
                grad_bias[columns] += g.sum(0)
        if grad_x is not None:
            grad_x[rows] = 0 if sum_x is None else sum_x
    found = (None if grad_x is None else grad_x.view(x.shape), grad_weight, grad_bias)
    of_x, of_weight, of_bias = (None if g is None else g.to(x.dtype) for g in found)
    return of_x, of_weight, of_bias
