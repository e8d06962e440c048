"""Activations and rotations that keep less for the backward pass than autograd would, with the same values."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def relu2(x: Tensor) -> Tensor:
    """max(x, 0)^2 (So et al. 2021)."""
    return _Relu2.apply(x) if torch.is_grad_enabled() else x.relu().square_()


class _Relu2(torch.autograd.Function):
    """Keeps its result, which the next product keeps anyway, and nothing else.

    max(x, 0) is the square root of the result, to the last bit: rounding to nearest undoes a rounded square wherever
    the square is a normal number. In fp16 it often is not, so there max(x, 0) is kept.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        positive = x.relu()
        ctx.squared = x.dtype != torch.float16
        y = positive.square_() if ctx.squared else positive.square()
        ctx.save_for_backward(y if ctx.squared else positive)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (kept,) = ctx.saved_tensors
        return (kept.sqrt().mul_(grad) if ctx.squared else kept * grad).mul_(2)


def silu_mul(y: Tensor, z: Tensor) -> Tensor:
    """y * silu(z), elementwise on equal shapes. Keeps y and z, not silu(z)."""
    return _SiluMul.apply(y, z) if torch.is_grad_enabled() else F.silu(z).mul_(y)


class _SiluMul(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, z: Tensor) -> Tensor:
        ctx.save_for_backward(y, z)
        return F.silu(z).mul_(y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        y, z = ctx.saved_tensors
        grad_z = grad * y
        torch.ops.aten.silu_backward.grad_input(grad_z, z, grad_input=grad_z)
        return F.silu(z).mul_(grad), grad_z


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x[*, t, h, d] by cos, sin [*, t, pairs]; -> the same shape and dtype.

    Dim j turns with dim j + pairs (NeoX layout, Su et al. 2021) for j < pairs; dims from 2 * pairs on pass through.
    Raises ValueError where 2 * pairs > d.
    """
    if 2 * cos.shape[-1] > x.shape[-1]:
        raise ValueError(f"rotate: {cos.shape[-1]} pairs need {2 * cos.shape[-1]} dims, found {x.shape[-1]}")
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    return _Rotate.apply(x, cos, sin) if torch.is_grad_enabled() else _turn(x, cos, sin, 1)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        learned = cos.requires_grad or sin.requires_grad
        ctx.save_for_backward(cos, sin, x if learned else None)
        return _turn(x, cos, sin, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        cos, sin, x = ctx.saved_tensors
        if x is None:
            return _turn(grad, cos, sin, -1), None, None
        pairs = cos.shape[-1]
        (a, b), (p, q) = ((t[..., :pairs], t[..., pairs : 2 * pairs]) for t in (x, grad))
        by_cos, by_sin = a * p + b * q, a * q - b * p
        return _turn(grad, cos, sin, -1), by_cos.sum_to_size(cos.shape), by_sin.sum_to_size(sin.shape)


def _turn(x: Tensor, cos: Tensor, sin: Tensor, sign: int) -> Tensor:
    """x rotated by `sign` times the angle; the backward of a rotation is the rotation back."""
    pairs = cos.shape[-1]
    a, b, rest = x[..., :pairs], x[..., pairs : 2 * pairs], x[..., 2 * pairs :]
    first = torch.addcmul(a * cos, b, sin, value=-sign)
    second = torch.addcmul(b * cos, a, sin, value=sign)
    if x.dtype != first.dtype:
        first, second = first.to(x.dtype), second.to(x.dtype)
    return torch.cat((first, second, rest) if rest.shape[-1] else (first, second), -1)
