"""What blocks state beside their results in a training step: sums over the data, for when the step is over."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .mesh import Axes, Mesh


class Gathered:
    """Sums of one step over its micro-batches, by the block that made them, and means that are reported.

    sums: {block: {name: tensor}}, added up; means: {(name, axes): [sum, count]} of metrics over places. Where a model
    is laid out over ranks, axes are those of its mesh over which both are sums of parts, and so is `partial` for sums.
    """

    def __init__(self) -> None:
        self.sums: dict[nn.Module, dict[str, Tensor]] = {}
        self.partial: dict[nn.Module, Mapping[str, Axes]] = {}
        self.means: dict[tuple[str, Axes], list[Any]] = {}

    @torch.no_grad()
    def add(self, block: nn.Module, partial: Mapping[str, Axes] | None = None, /, **sums: Tensor) -> None:
        """Add what one micro-batch gives."""
        own = self.sums.setdefault(block, {})
        self.partial[block] = partial or {}
        for name, value in sums.items():
            own[name] = own[name] + value if name in own else value.detach().clone()

    @torch.no_grad()
    def mean(self, name: str, total: Tensor, count: Any, axes: Axes = ()) -> None:
        """Add a metric that is a mean over places."""
        before = self.means.setdefault((name, axes), [0.0, 0])
        self.means[name, axes] = [before[0] + total.detach(), before[1] + count]

    @torch.no_grad()
    def settle(self, mesh: Mesh | None = None, stages: tuple[str, tuple[str, ...]] | None = None) -> dict[str, float]:
        """Update every buffer, and give the metrics; those of one name are averaged over the blocks that state them.

        On a mesh the sums of all its ranks are made first. stages: the axis whose ranks have other blocks each, and all
        names that any of them states.
        """
        if mesh is not None:
            self._sum_over(mesh)
        found: dict[str, list[float]] = {}
        for block, sums in self.sums.items():
            for name, value in block.after_step(sums).items():  # type: ignore[operator]
                found.setdefault(name, []).append(float(value))
        means: dict[str, tuple[float, float]] = {}
        for (name, _), (total, count) in self.means.items():
            before = means.get(name, (0.0, 0))
            means[name] = before[0] + float(total), before[1] + int(count)
        metrics = {name: (sum(values), len(values)) for name, values in found.items()} | means
        if mesh is not None and stages is not None:
            axis, names = stages
            own = torch.tensor([metrics.get(name, (0.0, 0)) for name in names], dtype=torch.float64).view(-1, 2)
            whole = mesh[axis].all_reduce(own)
            metrics = {name: (float(t), float(n)) for name, (t, n) in zip(names, whole, strict=True) if n}
        return {name: total / max(1, count) for name, (total, count) in metrics.items()}

    def _sum_over(self, mesh: Mesh) -> None:
        """Sums of parts become whole, all of the same axes and dtype in one message."""
        waiting: dict[tuple[Axes, torch.dtype], list[tuple[nn.Module, str]]] = {}
        for block, sums in self.sums.items():
            for name, value in sums.items():
                if axes := self.partial[block].get(name, ()):
                    waiting.setdefault((axes, value.dtype), []).append((block, name))
        for (axes, _), places in waiting.items():
            parts = [self.sums[block][name] for block, name in places]
            whole = mesh[axes].all_reduce(torch.cat([p.reshape(-1) for p in parts]))
            pieces = whole.split([p.numel() for p in parts])
            for (block, name), part, piece in zip(places, parts, pieces, strict=True):
                self.sums[block][name] = piece.view_as(part)
        for (name, axes), (total, count) in list(self.means.items()):
            if axes:
                pair = [torch.as_tensor(x, dtype=torch.float64, device=total.device) for x in (total, count)]
                self.means[name, axes] = list(mesh[axes].all_reduce(torch.stack(pair)))
