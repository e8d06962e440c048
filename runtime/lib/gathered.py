"""What blocks state beside their results in a training step: sums over the data, for when the step is over."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Gathered:
    """Sums of one step over its micro-batches, by the block that made them, and means that are reported.

    sums: {block: {name: tensor}}, added up; means: {name: [sum, count]} of metrics over places.
    """

    def __init__(self) -> None:
        self.sums: dict[nn.Module, dict[str, Tensor]] = {}
        self.means: dict[str, list[Any]] = {}

    @torch.no_grad()
    def add(self, block: nn.Module, **sums: Tensor) -> None:
        """Add what one micro-batch gives."""
        own = self.sums.setdefault(block, {})
        for name, value in sums.items():
            own[name] = own[name] + value if name in own else value.detach().clone()

    @torch.no_grad()
    def mean(self, name: str, total: Tensor, count: Any) -> None:
        """Add a metric that is a mean over places."""
        before = self.means.setdefault(name, [0.0, 0])
        self.means[name] = [before[0] + total.detach(), before[1] + count]

    @torch.no_grad()
    def settle(self) -> dict[str, float]:
        """Update every buffer, and give the metrics; those of one name are averaged over the blocks that state them."""
        found: dict[str, list[float]] = {}
        for block, sums in self.sums.items():
            for name, value in block.after_step(sums).items():  # type: ignore[operator]
                found.setdefault(name, []).append(float(value))
        metrics = {name: sum(values) / len(values) for name, values in found.items()}
        return metrics | {name: float(total) / max(1, int(count)) for name, (total, count) in self.means.items()}
