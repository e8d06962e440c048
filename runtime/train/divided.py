"""The optimizer of one rank of a model that is laid out over several.

Gradients are summed once a step, the norm is that of the whole gradient, and where the layout stores `optimizer` over
axes, each of their ranks steps a part of what it has (ZeRO-1, Rajbhandari et al. 2020, section 5.1).
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..lib import Model
from ..lib.laid import Laid, laid_parameters
from ..lib.mesh import Axes, Mesh
from .config import TrainConfig
from .laying import is_first_of
from .optimizer import Optimizer
from .side_by_side import SideBySide, buckets


def divides(splits: Sequence[Axes], over: Axes) -> bool:
    """Whether ranks along `over` step parts of a parameter: where these axes do not split it already."""
    return bool(over) and not any(a in axes for a in over for axes in splits)


def spread(order: Axes, splits: Sequence[Axes], over: Axes) -> Axes:
    """The axes whose ranks step different parts of a parameter."""
    held = {a for axes in splits for a in axes} | set(over if divides(splits, over) else ())
    return tuple(a for a in order if a in held)


class Owed(NamedTuple):
    """What the gradient of a parameter of which a part is enough here still needs: the axes over which it is a sum."""

    axes: Axes
    dtype: torch.dtype


class Divided(Optimizer):
    """AdamW on one rank. What is stepped for a parameter is a flat part of it, padded with zeros to one size on all
    ranks along `over`, unless these axes split the parameter already."""

    def __init__(self, model: Model, config: TrainConfig, over: Axes = ()):
        assert model.mesh is not None
        self.mesh: Mesh = model.mesh
        self.model, self.pipe, self.tied, self.over = model, model.pipe, model.tied, over
        names = {id(p): name for name, p in model.named_parameters()}
        self.laid: dict[str, Laid] = {names[id(laid.holder)]: laid for laid in laid_parameters(model)}
        self.sums: dict[str, Tensor] = {}
        super().__init__(model, config)
        owed = {n: (p, self.laid[n].sync) for n, p in self.weights.items() if p.requires_grad}
        self.summed = SideBySide({n: (p, axes) for n, (p, axes) in owed.items() if axes and not self.is_divided(n)})

    def is_divided(self, name: str) -> bool:
        """Whether a rank steps a part of what it has of a parameter."""
        return divides(self.laid[name].splits, self.over)

    def _master(self, name: str, weight: nn.Parameter) -> Tensor:
        if not self.is_divided(name):
            return super()._master(name, weight)
        wide = torch.promote_types(weight.dtype, torch.float32)
        return self._part(name, weight.detach()).to(wide).clone().requires_grad_()

    def _part(self, name: str, value: Tensor) -> Tensor:
        return self._rows(value)[self.mesh.place(*self.over)] if self.is_divided(name) else value

    def _rows(self, value: Tensor) -> Tensor:
        """[...] -> [ranks, n]: flat parts for the ranks along `over`."""
        flat = value.reshape(-1)
        return F.pad(flat, (0, -flat.numel() % self.mesh.size(*self.over))).view(self.mesh.size(*self.over), -1)

    def _whole(self, name: str, value: Tensor) -> Tensor:
        if not self.is_divided(name):
            return value
        shape = self.weights[name].shape
        return self.mesh[self.over].all_gather(value).reshape(-1)[: prod(shape)].view(shape)

    # --- gradients --------------------------------------------------------------------------------

    def gather(self, scale: float | Tensor = 1.0) -> None:
        """Add the gradients of a micro-batch to those before; none is whole yet."""
        self.summed.gather()
        for name, weight in self.weights.items():
            if name not in self.summed.places and weight.grad is not None and weight.dtype.itemsize < 4:
                grad = weight.grad.float()
                self.sums[name] = self.sums[name].add_(grad) if name in self.sums else grad
                weight.grad = None

    def gradient(self, name: str) -> Tensor | None:
        """What was gathered so far for a parameter, None where it got nothing."""
        if name in self.summed.places:
            return self.summed.get(name)
        return self.sums.get(name, self.weights[name].grad)

    @torch.no_grad()
    def reduce(self) -> None:
        """Make the sums that gradients still are: each once, those of the same axes in messages of `BUCKET`."""
        self._tie()
        for bucket in self.summed.buckets:
            if any(name in self.summed.has for name in bucket.names):
                self.mesh[bucket.axes].all_reduce_(bucket.flat)
        waiting: dict[Owed, list[tuple[str, Tensor]]] = {}
        for name in self.weights:
            grad = self.gradient(name)
            if grad is not None and self.is_divided(name):
                waiting.setdefault(Owed(self.laid[name].sync, grad.dtype), []).append((name, grad))
            else:
                self._owe(name, grad)
        for owed, gradients in waiting.items():
            for some in buckets(gradients):
                for (name, _), grad in zip(some, self._divided(owed, some), strict=True):
                    self._owe(name, grad)
        self.sums = {}

    def _owe(self, name: str, grad: Tensor | None) -> None:
        """What is stepped gets its gradient."""
        weight, master = self.weights[name], self.masters[name]
        if master is not weight:
            weight.grad = None
        master.grad = grad

    def _tie(self) -> None:
        """The gradient of a weight that several stages have is the sum over them; other ranks add nothing."""
        mine = {laid.path: name for name, laid in self.laid.items()}
        for path, like in self.tied.items() if self.pipe is not None else ():
            assert self.pipe is not None
            name = mine.get(path)
            own = None if name is None else self.gradient(name)
            wide = torch.promote_types(like.dtype, torch.float32)
            nothing = torch.zeros_like(like, dtype=wide, device=self.model.device)
            whole = self.mesh[self.pipe.axis].all_reduce(nothing if own is None else own)
            if name in self.summed.places:
                self.summed.put(name, whole)
            elif name is not None and self.weights[name].dtype.itemsize < 4:
                self.sums[name] = whole
            elif name is not None:
                self.weights[name].grad = whole

    def _divided(self, owed: Owed, bucket: list[tuple[str, Tensor]]) -> list[Tensor]:
        """This rank's parts, flat. What is a sum over all of `over` is summed and divided in one step, and then the
        part over the other axes; else the whole is summed first."""
        rows = [self._rows(g) for _, g in bucket]
        sizes, flat = [r.shape[1] for r in rows], torch.cat(rows, 1)
        if set(self.over) <= set(owed.axes):
            rest = tuple(a for a in owed.axes if a not in self.over)
            own = self.mesh[self.over].reduce_scatter(flat, 0)[0]
            own = self.mesh[rest].all_reduce(own) if rest else own
        else:
            whole = self.mesh[owed.axes].all_reduce(flat) if owed.axes else flat
            own = whole[self.mesh.place(*self.over)]
        return list(own.split(sizes))

    @torch.no_grad()
    def norm(self) -> Tensor:
        """The norm of the whole gradient, fp64, on every rank: squares of parts are summed over the axes that split
        them."""
        squares: dict[Axes, list[Tensor]] = {}
        for name, master in self.masters.items():
            if master.grad is not None and is_first_of(self.laid[name].path, self.model):
                squares.setdefault(self.spread(name), []).append(master.grad.double().square().sum())
        total = torch.zeros((), dtype=torch.float64, device=self.model.device)
        for axes, found in squares.items():
            own = torch.stack(found).sum()
            total = total + (self.mesh[axes].all_reduce(own) if axes else own)
        return (total if self.pipe is None else self.mesh[self.pipe.axis].all_reduce(total)).sqrt()

    def spread(self, name: str) -> Axes:
        """The axes whose ranks step different parts of a parameter."""
        return spread(tuple(self.mesh.axes), self.laid[name].splits, self.over)

    def clip(self, most: float) -> Tensor:
        """Scale the gradient to a norm of at most `most`; gives the norm before."""
        norm = self.norm()
        factor = (most / (norm + 1e-6)).clamp(max=1.0)  # as torch.nn.utils.clip_grad_norm_ has it
        for master in self.masters.values():
            if master.grad is not None:
                master.grad.mul_(factor.to(master.grad.dtype))
        return norm

    def step(self, rate: float) -> None:
        """One update, then the weights follow: parts of them are gathered."""
        super().step(rate)
        for weight in self.weights.values():
            weight.grad = None
        self.summed.clear()

    @torch.no_grad()
    def _follow(self) -> None:
        whole = {n: m for n, m in self.masters.items() if not self.is_divided(n)}
        for name, master in whole.items():
            if master is not self.weights[name]:
                self.weights[name].copy_(master)
        waiting: dict[torch.dtype, list[tuple[str, Tensor]]] = {}
        for name, master in self.masters.items():
            if name not in whole:
                kind = self.weights[name].dtype
                waiting.setdefault(kind, []).append((name, master.detach().to(kind)))
        for parts in waiting.values():
            for bucket in buckets(parts):
                rows = self.mesh[self.over].all_gather(torch.cat([p for _, p in bucket]))
                for (name, _), row in zip(bucket, rows.split([p.numel() for _, p in bucket], 1), strict=True):
                    weight = self.weights[name]
                    weight.copy_(row.reshape(-1)[: weight.numel()].view_as(weight))
