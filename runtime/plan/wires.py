"""A mesh whose ranks are not there: what is sent is written down, what comes back has the right shape."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from math import prod

import torch
from torch import Tensor

from ..lib.mesh import Axes, Group, Mesh, Record, Wire
from .hollow import Hollow, Message


class Planned(Mesh):
    """The mesh of one rank of any number. A group remembers for which block and line it was asked, so that what its
    gradient sends belongs there, too; `where` gives (block, line)."""

    def __init__(self, axes: dict[str, int], mode: Hollow, where: Callable[[], tuple[str, str]]) -> None:
        super().__init__(axes)
        self._mode, self.where = mode, where

    def stand(self, axis: str, place: int) -> None:
        """Be another rank from here on: the one at this place of an axis, and first along the others."""
        self.coordinates = {**dict.fromkeys(self.axes, 0), axis: place}
        self.rank = place * prod(list(self.axes.values())[list(self.axes).index(axis) + 1 :])

    def __getitem__(self, axes: str | Axes) -> Group:
        key = (axes,) if isinstance(axes, str) else axes
        self.check(key)
        mine = copy(self)
        mine.record = _Book(self._mode, *self.where())  # type: ignore[assignment]
        return Group(mine, key, _Shapes(self.size(*key), self.place(*key)) if self.size(*key) > 1 else None)


class _Book:
    """Takes the records of one place in the model."""

    def __init__(self, mode: Hollow, block: str, line: str) -> None:
        self.mode, self.block, self.line = mode, block, line

    def append(self, record: Record) -> None:
        message = Message(self.mode.phase, self.block, self.line, record.kind, record.axes, record.bytes)
        self.mode.ledger.messages[message] += 1


class _Shapes(Wire):
    """A wire to nobody."""

    def __init__(self, size: int, place: int) -> None:
        self.size, self.place = size, place

    def reduce(self, x: Tensor, op: str) -> Tensor:
        return x.clone()

    def reduce_(self, x: Tensor, op: str) -> None:
        pass

    def gather(self, x: Tensor) -> Tensor:
        return x.expand(self.size, *x.shape).clone(memory_format=torch.contiguous_format)

    def scatter(self, x: Tensor) -> Tensor:
        return x[self.place].clone()

    def exchange(self, x: Tensor) -> Tensor:
        return x.clone()

    def broadcast(self, x: Tensor, from_: int) -> Tensor:
        return x.clone()

    def send(self, x: Tensor, to: int) -> None:
        pass

    def receive(self, like: Tensor, from_: int) -> Tensor:
        return torch.empty_like(like)

    def swap(self, x: Tensor, to: int, like: Tensor, from_: int) -> Tensor:
        return torch.empty_like(like)

    def barrier(self) -> None:
        pass
