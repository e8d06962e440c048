"""The index along a dim, and the coordinates of a sequence, counted one by one."""

from __future__ import annotations

import torch
from torch import Tensor


def index(size: int) -> Tensor:
    """-> y[D] = 0, 1, 2, .."""
    return torch.tensor([float(i) for i in range(size)])


def coordinate(document: Tensor, which: str) -> Tensor:
    """document[b, S] -> y[b, S]: `position` counts rows since the document's first, `document` is what it was."""
    if which == "document":
        return document
    position = torch.zeros_like(document)
    for t in range(1, document.shape[1]):
        position[:, t] = torch.where(document[:, t] == document[:, t - 1], position[:, t - 1] + 1, 0)
    return position
