"""Layer normalisation (Ba, Kiros and Hinton 2016, eq. 3): y = (x - mu) / sqrt(sigma^2 + eps) * g + b."""

from __future__ import annotations

import torch
from torch import Tensor

State = tuple[Tensor, Tensor, Tensor]


def layer_norm(x: Tensor, g: Tensor, b: Tensor | None = None, eps: float = 1e-5, zero_centred: bool = False) -> Tensor:
    """x[*, D], g[D], b[D] -> y[*, D]; zero-centred stores g - 1."""
    mu = x.mean(-1, keepdim=True)
    sigma2 = ((x - mu) ** 2).mean(-1, keepdim=True)
    y = (x - mu) / torch.sqrt(sigma2 + eps) * (1 + g if zero_centred else g)
    return y if b is None else y + b


def row_sums(x: Tensor) -> Tensor:
    """x[*, D] -> t[*]."""
    return x.sum(-1)


def centred_squares(x: Tensor, total: Tensor, count: int) -> Tensor:
    """x[*, D], total[*] -> s[*]: the sum over D of (x - mu)^2, mu = total / count."""
    return ((x - (total / count)[..., None]) ** 2).sum(-1)


def centred_rows(
    x: Tensor,
    g: Tensor,
    b: Tensor | None,
    total: Tensor,
    squares: Tensor,
    count: int,
    eps: float = 1e-5,
    zero_centred: bool = False,
) -> Tensor:
    """x[*, D], total[*], squares[*] -> y[*, D], with mu = total / count and sigma^2 = squares / count."""
    state = torch.tensor(float(count), dtype=x.dtype), total / count, squares
    return finish(state, x, g, b, eps, zero_centred)


def identity(x: Tensor) -> State:
    """The state of no elements."""
    zero = torch.zeros(x.shape[:-1], dtype=x.dtype)
    return torch.zeros((), dtype=x.dtype), zero, zero.clone()


def lift(x: Tensor) -> State:
    """(count, mean, sum of squared deviations) of a part of D."""
    mean = x.mean(-1)
    return torch.tensor(float(x.shape[-1]), dtype=x.dtype), mean, ((x - mean[..., None]) ** 2).sum(-1)


def combine(a: State, b: State) -> State:
    """Both parts (Chan, Golub and LeVeque 1979)."""
    count = a[0] + b[0]
    share = torch.where(count > 0, b[0] / count.clamp(min=1), torch.zeros_like(count))
    delta = b[1] - a[1]
    return count, a[1] + delta * share, a[2] + b[2] + delta**2 * a[0] * share


def finish(
    state: State, x: Tensor, g: Tensor, b: Tensor | None = None, eps: float = 1e-5, zero_centred: bool = False
) -> Tensor:
    """A part of y, from the statistic of all parts."""
    count, mean, deviations = state
    y = (x - mean[..., None]) / torch.sqrt(deviations / count + eps)[..., None] * (1 + g if zero_centred else g)
    return y if b is None else y + b
