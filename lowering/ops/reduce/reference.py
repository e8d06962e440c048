"""Reductions, and for each the monoid of its partial results."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

State = tuple[Tensor, ...]


def sum(x: Tensor) -> Tensor:  # noqa: A001
    """x[*, D] -> y[*]."""
    return x.sum(-1)


def mean(x: Tensor) -> Tensor:
    """x[*, D] -> y[*]."""
    return x.sum(-1) / x.shape[-1]


def max_over(x: Tensor) -> Tensor:
    """x[*, D] -> y[*]."""
    return x.amax(-1)


def count(x: Tensor) -> Tensor:
    """bool x[*, D] -> y[*]: how many are true."""
    return (x != 0).double().sum(-1)


class Partial(NamedTuple):
    """`identity(x)` of no elements of x[*, D], `lift(x)` of some, `combine` of two parts, `finish` to y[*]."""

    identity: Callable[[Tensor], State]
    lift: Callable[[Tensor], State]
    combine: Callable[[State, State], State]
    finish: Callable[[State], Tensor]


def _zero(x: Tensor) -> Tensor:
    return torch.zeros(x.shape[:-1], dtype=x.dtype)


def _number(x: Tensor, value: float) -> Tensor:
    return torch.tensor(float(value), dtype=x.dtype)


def _add(a: State, b: State) -> State:
    return tuple(s + t for s, t in zip(a, b, strict=True))


PARTIAL = {
    "sum": Partial(lambda x: (_zero(x),), lambda x: (x.sum(-1),), _add, lambda state: state[0]),
    "mean": Partial(
        lambda x: (_number(x, 0), _zero(x)),
        lambda x: (_number(x, x.shape[-1]), x.sum(-1)),
        _add,
        lambda state: state[1] / state[0],
    ),
    "count": Partial(lambda x: (_zero(x),), lambda x: ((x != 0).to(x.dtype).sum(-1),), _add, lambda state: state[0]),
    "max_over": Partial(
        lambda x: (torch.full(x.shape[:-1], -torch.inf, dtype=x.dtype),),
        lambda x: (x.amax(-1),),
        lambda a, b: (torch.maximum(a[0], b[0]),),
        lambda state: state[0],
    ),
}
