"""What the pointwise ops compute, in the letters of their sources."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor


def log_sum(x: Tensor) -> Tensor:
    """log(e^0 + e^x), wherever x is."""
    return torch.logaddexp(torch.zeros_like(x), x)


def sigmoid(x: Tensor) -> Tensor:
    """1 / (1 + e^-x) = e^-log(1 + e^-x), which no large x overflows."""
    return torch.exp(-log_sum(-x))


def clip(x: Tensor, low: float | None = None, high: float | None = None) -> Tensor:
    """x[D] -> z[D], in [low, high]."""
    x = x if low is None else torch.where(x < low, low, x)
    return x if high is None else torch.where(x > high, high, x)


def where(mask: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """mask[D], x[D], y[D] -> z[D]: x where it is true, else y."""
    return torch.where(mask, x, y)


def outer(x: Tensor, y: Tensor) -> Tensor:
    """x[A], y[B] -> z[A, B]; z[a, b] = x[a] y[b]."""
    return torch.tensordot(x, y, 0)


UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    "neg": lambda x: -x,
    "exp": torch.exp,
    "log": torch.log,
    "sqrt": torch.sqrt,
    "abs": torch.abs,
    "sign": lambda x: (x > 0).to(x.dtype) - (x < 0).to(x.dtype),
    "sigmoid": sigmoid,
    "silu": lambda x: x * sigmoid(x),
    "relu": lambda x: x * (x > 0),
    "relu2": lambda x: (x * (x > 0)) ** 2,
    "gelu": lambda x: x * 0.5 * (1 + torch.erf(x / math.sqrt(2))),
    "gelu_tanh": lambda x: 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "tanh": lambda x: 2 * sigmoid(2 * x) - 1,
    "softplus": log_sum,
    "log_sigmoid": lambda x: -log_sum(-x),
    "sin": torch.sin,
    "cos": torch.cos,
    "constant": lambda x: x.detach(),
}
LOGIC: dict[str, Callable[..., Tensor]] = {
    "lt": lambda x, y: x < y,
    "le": lambda x, y: x <= y,
    "gt": lambda x, y: x > y,
    "ge": lambda x, y: x >= y,
    "eq": lambda x, y: x == y,
    "ne": lambda x, y: x != y,
    "logical_not": lambda x: ~x,
    "logical_and": lambda x, y: x & y,
    "logical_or": lambda x, y: x | y,
}
BINARY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": lambda x, y: x + y,
    "sub": lambda x, y: x - y,
    "mul": lambda x, y: x * y,
    "div": lambda x, y: x / y,
    "floordiv": lambda x, y: torch.floor(x / y),
    "pow": torch.pow,
    "max": lambda x, y: torch.where(x > y, x, y),
    "min": lambda x, y: torch.where(x < y, x, y),
}
