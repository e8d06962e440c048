"""The index along a dim, slopes of heads, and the coordinates of a sequence, counted one by one."""

from __future__ import annotations

import torch
from torch import Tensor


def index(size: int) -> Tensor:
    """-> y[D] = 0, 1, 2, .."""
    return torch.tensor([float(i) for i in range(size)])


def slopes(heads: int) -> Tensor:
    """-> y[D]: of a power of two the geometric series from 2^(-8 / n) that begins with its ratio; of other numbers that
    of the next power below, then every other one of the series of twice as many."""
    if heads & (heads - 1) == 0:
        ratio = 2.0 ** (-8 / heads)
        return torch.tensor([ratio ** (i + 1) for i in range(heads)])
    near = 2 ** (heads.bit_length() - 1)
    return torch.cat([slopes(near), slopes(2 * near)[::2][: heads - near]])


def coordinate(document: Tensor, which: str) -> Tensor:
    """document[b, S] -> y[b, S]: `position` counts rows since the document's first, `document` is what it was."""
    if which == "document":
        return document
    position = torch.zeros_like(document)
    for t in range(1, document.shape[1]):
        position[:, t] = torch.where(document[:, t] == document[:, t - 1], position[:, t - 1] + 1, 0)
    return position
