"""y = W[id], as the product with a one-hot vector. V rows, N columns."""

from __future__ import annotations

import torch
from torch import Tensor


def embed(ids: Tensor, W: Tensor) -> Tensor:
    """ids[*], W[V, N] -> y[*, N]."""
    one_hot = (ids[..., None] == torch.arange(len(W))).to(W.dtype)
    return one_hot @ W


def partial(ids: Tensor, W: Tensor, offset: int) -> Tensor:
    """What rows [offset, offset + len(W)) of the table contribute; the parts of a split table add up."""
    one_hot = (ids[..., None] == offset + torch.arange(len(W))).to(W.dtype)
    return one_hot @ W
