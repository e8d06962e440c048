"""y = W x + b, in fp64. K contracted dims, N results; W [N, K]."""

from __future__ import annotations

from torch import Tensor


def linear(x: Tensor, W: Tensor, b: Tensor | None = None) -> Tensor:
    """x[*, K], W[N, K], b[N] -> y[*, N]."""
    y = x @ W.transpose(-1, -2)
    return y if b is None else y + b


def partial(x: Tensor, W: Tensor) -> Tensor:
    """What a part of K contributes: partial sums add up to the product."""
    return x @ W.transpose(-1, -2)
