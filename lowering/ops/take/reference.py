"""One row of a dim; parts of it know where they begin."""

from __future__ import annotations

import torch
from torch import Tensor

State = tuple[Tensor]


def take(x: Tensor, index: int) -> Tensor:
    """x[*, S] -> y[*]."""
    return x[..., index]


def identity(x: Tensor) -> State:
    """The state of no rows."""
    return (torch.zeros_like(x[..., 0]),)


def lift(x: Tensor, first: int, index: int) -> State:
    """The row, if it is among those of x, which begin at `first`."""
    return (x[..., index - first] if first <= index < first + x.shape[-1] else torch.zeros_like(x[..., 0]),)


def combine(a: State, b: State) -> State:
    """Only one of two parts has the row."""
    return (a[0] + b[0],)


def finish(state: State) -> Tensor:
    """-> y[*]."""
    return state[0]
