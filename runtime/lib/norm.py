"""Norms over compound dims. Statistics and the product with the weight are at least fp32, the result as the input."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .linear import empty


class RmsNorm(nn.Module):
    """x[..., *over] * weight / rms(x), the rms over all of `over`, or over each of `groups` equal parts of it."""

    def __init__(self, over: tuple[int, ...], eps: float, groups: int = 1) -> None:
        super().__init__()
        self.over, self.eps, self.groups = tuple(over), eps, groups
        self.weight = empty(*self.over)

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps, self.groups)


class LayerNorm(nn.Module):
    """(x - mean) / std * weight + bias over `over`; a zero-centred weight is stored without its 1 (LayerNorm1p)."""

    def __init__(self, over: tuple[int, ...], eps: float, zero_centred: bool = False, bias: bool = True) -> None:
        super().__init__()
        self.over, self.eps, self.zero_centred = tuple(over), eps, zero_centred
        self.weight = empty(*self.over)
        self.bias = empty(*self.over) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return layer_norm(x, self.weight, self.bias, self.eps, self.zero_centred)


def wide(x: Tensor) -> Tensor:
    """x in at least fp32."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def rms_norm(x: Tensor, weight: Tensor | None, eps: float, groups: int = 1) -> Tensor:
    """x[..., *over] -> the same shape and dtype. weight [*over] or None (1).

    Source: Zhang and Sennrich 2019; grouped as in Mamba-2 (Dao and Gu 2024).
    """
    shape = x.shape
    dims = 1 if weight is None else weight.dim()
    if dims > 1 or groups > 1:
        x = x.reshape(*shape[: len(shape) - dims], groups, -1)
        weight = None if weight is None else weight.view(groups, -1)
    y = _RmsNorm.apply(x, weight, eps) if torch.is_grad_enabled() else _normalise(x, weight, eps)[0]
    return y.view(shape) if dims > 1 or groups > 1 else y


@cache
def _constant(value: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A 0-d tensor, made once: a step of decoding is so short that making it shows."""
    with torch.inference_mode(False):
        return torch.tensor(value, dtype=dtype, device=device)


def _normalise(x: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """x [..., d] * weight / rms and 1 / rms [..., 1]."""
    wx = wide(x)
    length = torch.linalg.vector_norm(wx, 2, -1, True)
    scale = torch.addcmul(_constant(eps, wx.dtype, wx.device), length, length, value=1 / x.shape[-1]).rsqrt_()
    y = wx * scale
    if weight is not None:
        y *= weight
    return (y if y.dtype == x.dtype else y.to(x.dtype)), scale


class _RmsNorm(torch.autograd.Function):
    """x[.., d] and weight[d], or [.., g, d] and [g, d]. Keeps x and a number a row; autograd keeps x three times."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
        y, scale = _normalise(x, weight, eps)
        ctx.save_for_backward(x, weight, scale)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scale = ctx.saved_tensors
        grad, unit = wide(grad), wide(x) * scale
        product = grad * unit
        grad_weight = None
        if weight is None:
            along = product.sum(-1, keepdim=True)
        else:
            if ctx.needs_input_grad[1]:
                rows = product.dim() - weight.dim()
                grad_weight = (product.sum(tuple(range(rows))) if rows else product.clone()).to(weight.dtype)
            along = product.mul_(weight).sum(-1, keepdim=True)
            grad = torch.mul(grad, weight, out=product)
        # d y / d x of x / rms(x): what points along x does not change it.
        return unit.mul_(along.div_(-x.shape[-1])).add_(grad).mul_(scale).to(x.dtype), grad_weight, None


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, zero_centred: bool = False) -> Tensor:
    """x[..., *over] -> the same shape and dtype; weight, bias [*over] or None (1, 0). Source: Ba et al. 2016."""
    over = (x.shape[-1],) if weight is None else tuple(weight.shape)
    gain = wide(weight) if weight is not None else None
    if gain is not None and zero_centred:
        gain = gain + 1
    if x.dtype in (torch.float32, torch.float64):
        return F.layer_norm(x, over, _like(gain, x), _like(bias, x), eps)
    return F.layer_norm(wide(x), over, gain, None if bias is None else wide(bias), eps).to(x.dtype)


def _like(weight: Tensor | None, x: Tensor) -> Tensor | None:
    return None if weight is None else weight.to(x.dtype)


# --- in parts: what ranks sum together, and what each does with the sum -----------------------------


def group_squares(x: Tensor, dims: int, groups: int) -> Tensor:
    """Sums of squares of x[..., *over] in each of `groups` equal runs of its last `dims` dims; -> [..., groups]."""
    wx = wide(x).flatten(-dims) if dims > 1 else wide(x)
    return (wx * wx).unflatten(-1, (groups, -1)).sum(-1)


def scaled_rows(x: Tensor, weight: Tensor, squares: Tensor, count: int, eps: float) -> Tensor:
    """x[..., *over] * weight / sqrt(squares / count + eps), squares [..., groups] of the run that a place is in."""
    scale = (squares / count + eps).rsqrt()
    dims, groups = weight.dim(), squares.shape[-1]
    if dims > 1 or groups > 1:
        y = (wide(x).flatten(-dims).unflatten(-1, (groups, -1)) * scale[..., None]).view(x.shape)
    else:
        y = wide(x) * scale
    return (y * weight).to(x.dtype)


def row_sums(x: Tensor, dims: int) -> Tensor:
    """Sums over the last `dims` dims of x, at least fp32: a mean of fewer bits is off in every place."""
    return wide(x).sum(tuple(range(-dims, 0)))


def centred_squares(x: Tensor, total: Tensor, dims: int, count: int) -> Tensor:
    """Sums over the last `dims` dims of (x - total / count)^2; -> [...]."""
    over = tuple(range(-dims, 0))
    centred = wide(x) - (wide(total) / count).reshape(*total.shape, *[1] * dims)
    return (centred * centred).sum(over)


def centred_rows(
    x: Tensor, weight: Tensor, bias: Tensor | None, total: Tensor, squares: Tensor, count: int, eps: float,
    zero_centred: bool,
) -> Tensor:  # fmt: skip
    """(x - total / count) / sqrt(squares / count + eps) * weight + bias, the sums over all ranks' parts of a row."""
    ones = [1] * weight.dim()
    mean, scale = (wide(total) / count).reshape(*total.shape, *ones), (squares / count + eps).rsqrt()
    y = (wide(x) - mean) * scale.reshape(*scale.shape, *ones) * (weight + 1 if zero_centred else weight)
    return (y if bias is None else y + bias).to(x.dtype)
