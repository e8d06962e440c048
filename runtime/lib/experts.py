"""Choice among experts, and the experts on the rows that chose them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .buffers import STATELESS
from .rows import At


def top_k(x: Tensor, k: int, dim: int) -> Tensor:
    """bool like x, true at the k largest along dim; of equal values the earlier is larger."""
    chosen = torch.sort(x, dim=dim, descending=True, stable=True).indices.narrow(dim, 0, k)
    return torch.zeros_like(x, dtype=torch.bool).scatter_(dim, chosen, True)


def route(x: Tensor, routing: Tensor, experts: nn.ModuleList, at: At, *more: Any) -> Tensor:
    """y[..., N] = sum over e of routing[..., e] experts[e](x[..., K]); an expert runs on rows with a weight other than
    0.

    Where no weight is 0 this is the dense sum; a weight of 0 gets no gradient.
    """
    rows, weights = x.flatten(0, -2), routing.flatten(0, -2)
    out: Tensor | None = None
    for e, expert in enumerate(experts):
        index = weights[:, e].nonzero().squeeze(1)
        # Without rows an expert still has gradients, which are zeros, and gives the width of the result. On a mesh
        # other ranks may have rows for it, and it may have to talk to them.
        if not len(index) and out is not None and at.mesh is None and not torch.is_grad_enabled():
            continue
        y = expert(rows[index], at, STATELESS, *more)
        out = y.new_zeros(len(rows), y.shape[-1]) if out is None else out
        out.index_add_(0, index, y * weights[index, e, None].to(y.dtype))
    assert out is not None
    return out.view(*x.shape[:-1], out.shape[-1])
