"""What the pointwise ops compute, in the letters of their sources."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    "neg": lambda x: -x,
    "exp": torch.exp,
    "log": torch.log,
    "sqrt": torch.sqrt,
    "abs": torch.abs,
    "sigmoid": lambda x: 1 / (1 + torch.exp(-x)),
    "silu": lambda x: x / (1 + torch.exp(-x)),
    "relu": lambda x: x * (x > 0),
    "relu2": lambda x: (x * (x > 0)) ** 2,
    "gelu": lambda x: x * 0.5 * (1 + torch.erf(x / math.sqrt(2))),
    "gelu_tanh": lambda x: 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "tanh": lambda x: (torch.exp(2 * x) - 1) / (torch.exp(2 * x) + 1),
    "softplus": lambda x: torch.log(1 + torch.exp(-x.abs())) + x.clamp(min=0),
    "log_sigmoid": lambda x: -(torch.log(1 + torch.exp(-x.abs())) + (-x).clamp(min=0)),
    "sin": torch.sin,
    "cos": torch.cos,
}
BINARY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": lambda x, y: x + y,
    "sub": lambda x, y: x - y,
    "mul": lambda x, y: x * y,
    "div": lambda x, y: x / y,
    "pow": lambda x, y: torch.exp(y * torch.log(x)),
    "max": lambda x, y: torch.where(x > y, x, y),
    "min": lambda x, y: torch.where(x < y, x, y),
}
