"""What all layers read: coordinates of rows, and what is worked out of them once for all."""

from __future__ import annotations

from collections.abc import Iterator
from copy import copy
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor

from ..lib.rows import At
from .hollow import Hollow

Name = tuple[Any, ...]


class Around:
    """Coordinates under `Hollow`. Those of two stages are alike: whole numbers that were worked out for one hold for
    the other, and cost nothing; what has no numbers each works out for itself."""

    def __init__(self, mode: Hollow) -> None:
        self.mode = mode
        self._first: WeakKeyDictionary[At, At] = WeakKeyDictionary()

    def again(self, at: At) -> At:
        """The same coordinates for another run: as new, but for whole numbers."""
        return self._copied(at, {}, {})

    def _copied(self, at: At, made: dict[int, At], memos: dict[int, dict[Any, Any]]) -> At:
        if id(at) in made:
            return made[id(at)]
        other = made[id(at)] = copy(at)
        self._first[other] = self._first.get(at, at)
        other.losses, other.uses = {}, {}
        for name, value in vars(at).items():
            if isinstance(value, At):
                setattr(other, name, self._copied(value, made, memos))
        if id(at.memo) in memos:  # two views of the same rows find for both
            other.memo = memos[id(at.memo)]
            return other
        other.memo = memos[id(at.memo)] = {}
        for key, value in at.memo.items():
            if isinstance(value, At):
                other.memo[key] = self._copied(value, made, memos)
            elif not any(self.mode.is_hollow(x) for x in _tensors(value)):
                other.memo[key] = value
        return other

    def tensors(self, at: At) -> dict[Name, Tensor]:
        """All tensors that are there to be read, by where they are."""
        return dict(_named(at, (), set()))

    def hollow(self, at: At) -> dict[Name, Tensor]:
        """Those that have no numbers: work, or part of what is kept."""
        return {name: x for name, x in self.tensors(at).items() if self.mode.is_hollow(x)}

    def described(self, at: At) -> Any:
        """Equal where a block that is given them does the same."""
        return id(self._first.get(at, at)), frozenset(self.hollow(at))


def _named(at: At, path: Name, seen: set[int]) -> Iterator[tuple[Name, Tensor]]:
    """Tensors of coordinates, and of others that were worked out of them."""
    if id(at) in seen:
        return
    seen.add(id(at))
    for where, table in (("", vars(at)), ("memo", at.memo)):
        if where and id(table) in seen:
            return
        seen.add(id(table))
        for key, value in table.items():
            if isinstance(value, At):
                yield from _named(value, (*path, where, key), seen)
            else:
                yield from (((*path, where, key, i), x) for i, x in enumerate(_tensors(value)))


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [x for item in value for x in _tensors(item)] if isinstance(value, (tuple, list)) else []
