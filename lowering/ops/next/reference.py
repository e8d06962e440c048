"""The token some places later, -1 where the document or the row ends before."""

from __future__ import annotations

import torch
from torch import Tensor


def next_token(ids: Tensor, document: Tensor | None = None, by: int = 1) -> Tensor:
    """ids[b, S], document[b, S] -> y[b, S]."""
    later = torch.full_like(ids, -1)
    for t in range(ids.shape[1] - by):
        same = torch.ones_like(ids[:, 0]) > 0 if document is None else document[:, t] == document[:, t + by]
        later[:, t] = torch.where(same, ids[:, t + by], -1)
    return later


def is_known(ids: Tensor) -> Tensor:
    """ids[*] -> y[*]."""
    return ids != -1
