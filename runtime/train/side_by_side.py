"""Gradients that are summed over ranks, side by side as they are sent: added up there as they come, summed in place."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..lib.mesh import Axes

BUCKET = 1 << 26
"""Numbers of one message at most, as soon as there are several tensors in it."""


class Bucket(NamedTuple):
    """Gradients that one message sums: over which axes, of which parameters, and all of them, flat."""

    axes: Axes
    names: tuple[str, ...]
    flat: Tensor


class SideBySide:
    """Room for the gradients of some parameters, at least fp32: nothing is copied before a message or behind it.

    weights: parameters by name, with the axes over which the gradient of each is a sum.
    """

    def __init__(self, weights: dict[str, tuple[nn.Parameter, Axes]]) -> None:
        self.weights = {name: weight for name, (weight, _) in weights.items()}
        self.has: set[str] = set()
        """Those that got a gradient in this step; the places of others are 0."""
        self.buckets: list[Bucket] = []
        self.places: dict[str, Tensor] = {}
        waiting: dict[tuple[Axes, torch.dtype, torch.device], list[tuple[str, Tensor]]] = {}
        for name, (weight, axes) in weights.items():
            kind = torch.promote_types(weight.dtype, torch.float32)
            waiting.setdefault((axes, kind, weight.device), []).append((name, weight))
        for (axes, kind, device), members in waiting.items():
            for bucket in buckets(members):
                sizes = [p.numel() for _, p in bucket]
                flat = torch.zeros(sum(sizes), dtype=kind, device=device)
                self.buckets.append(Bucket(axes, tuple(name for name, _ in bucket), flat))
                for (name, p), piece in zip(bucket, flat.split(sizes), strict=True):
                    self.places[name] = piece.view(p.shape)
        self._hooks = [w.register_post_accumulate_grad_hook(partial(self._added, n)) for n, w in self.weights.items()]
        self._lend()

    def _added(self, name: str, weight: Tensor) -> None:
        """Autograd is done with a parameter: what is as wide as its place was added there, the rest is now."""
        if weight.grad is self.places[name]:
            self.has.add(name)
        elif weight.grad is not None:
            self._move(name, weight)

    def _move(self, name: str, weight: Tensor) -> None:
        assert weight.grad is not None
        self.put(name, weight.grad, more=name in self.has)
        weight.grad = self.places[name] if weight.dtype == self.places[name].dtype else None

    def let_go(self) -> None:
        """Parameters have gradients of their own again."""
        for hook in self._hooks:
            hook.remove()
        for weight in self.weights.values():
            weight.grad = None

    def _lend(self) -> None:
        """Let autograd add where the gradients lie."""
        for name, weight in self.weights.items():
            weight.grad = self.places[name] if weight.dtype == self.places[name].dtype else None

    @torch.no_grad()
    def gather(self) -> None:
        """Take gradients that came otherwise than by a backward pass."""
        for name, weight in self.weights.items():
            if weight.grad is not None and weight.grad is not self.places[name]:
                self._move(name, weight)

    def put(self, name: str, gradient: Tensor, more: bool = False) -> None:
        """Another gradient, or `more` of it."""
        self.places[name].add_(gradient) if more else self.places[name].copy_(gradient)
        self.has.add(name)

    def get(self, name: str) -> Tensor | None:
        """The gradient of a parameter, None where it got none."""
        return self.places[name] if name in self.has else None

    def clear(self) -> None:
        """Behind a step: none has a gradient."""
        for bucket in self.buckets:
            bucket.flat.zero_()
        self.has.clear()
        self._lend()


def buckets(tensors: list[tuple[str, Tensor]]) -> Iterator[list[tuple[str, Tensor]]]:
    """Neighbours, together as large as a message may be."""
    bucket: list[tuple[str, Tensor]] = []
    size = 0
    for name, tensor in tensors:
        if bucket and size + tensor.numel() > BUCKET:
            yield bucket
            bucket, size = [], 0
        bucket.append((name, tensor))
        size += tensor.numel()
    if bucket:
        yield bucket
