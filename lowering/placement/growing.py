"""What rooms and the reading of uses see of a graph that is being placed."""

from __future__ import annotations

from typing import Any

from ...dsl.program import Dim, Node, Type, Value
from .assign import fitting


class View:
    """What the reading of uses asks of a graph, with values that a walk has added."""

    def __init__(self, walk: Any):
        self._walk = walk
        self.values = walk.values

    @property
    def dims(self) -> dict[str, Dim]:
        return {**self._walk._extra, **self._walk.graph.dims}


class Growing:
    """What an op's `lift` adds its parts through: each is placed as soon as it is added."""

    def __init__(self, walk: Any):
        self._walk = walk

    def size(self, dim: str) -> int | None:
        """The size of the whole dim."""
        return self._walk.whole(dim).size

    def type_of(self, name: str) -> Type:
        """The type of an operand, on whole dims."""
        return self._walk.values[name].type

    def dim(self, base: str, size: int) -> str:
        """A new dim."""
        names = {**self._walk.graph.dims, **self._walk._extra}
        name, n = base, 1
        while name in names:
            n += 1
            name = f"{base}_{n}"
        self._walk._extra[name] = Dim(name, size)
        return name

    def split_like(self, dim: str, first: str) -> None:
        """Split a new dim over the outer factors of another that it has places for."""
        walk = self._walk
        atoms = fitting(walk.whole(dim).size, walk.mine.get(first, ()), walk.mesh)
        walk.mine = {**walk.mine, dim: atoms}

    def add(
        self, op: str, operands: tuple[str | None, ...], dims: tuple[str, ...], like: Node, kind: str = "real",
        name: str | None = None, bindings: tuple[tuple[str, tuple[str, ...]], ...] = (), **attrs: Any,
    ) -> str:  # fmt: skip
        """Add one use; gives the name of its result (`name`, or a fresh one)."""
        result = Value(self._walk.fresh(op) if name is None else name, Type(kind, dims))
        self._walk._op(Node((result,), op, operands, tuple(attrs.items()), bindings, like.spans))
        return result.name

    def add_all(
        self, op: str, operands: tuple[str | None, ...], results: dict[str, tuple[str, ...]], like: Node,
        bindings: tuple[tuple[str, tuple[str, ...]], ...] = (), **attrs: Any,
    ) -> tuple[str, ...]:  # fmt: skip
        """Add one use with several results, each with its dims."""
        made = tuple(Value(self._walk.fresh(n), Type("real", dims)) for n, dims in results.items())
        self._walk._op(Node(made, op, operands, tuple(attrs.items()), bindings, like.spans))
        return tuple(v.name for v in made)
