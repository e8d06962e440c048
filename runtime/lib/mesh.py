"""Meshes of ranks: who one's peers along named axes are, and what ranks tell each other. Nothing here has a gradient.

A mesh is a box of ranks, the outermost axis first: rank = row-major index of the coordinates. `mesh["tensor"]` is the
group of the ranks that differ from this one in that coordinate only. What gradients these operations have depends on
what the tensors mean, and `spmd` says it.
"""

from __future__ import annotations

from itertools import product
from math import prod
from typing import NamedTuple, Protocol

from torch import Tensor

Axes = tuple[str, ...]
REDUCTIONS = ("sum", "max")


class Record(NamedTuple):
    """One operation as this rank saw it: `bytes` is the size of what it put in, `label` the mesh's label then."""

    kind: str
    axes: Axes
    bytes: int
    label: str


class Mesh:
    """This rank's place in a box of ranks. As it is, for one rank; `Processes` and `simulate` make those of many.

    `record`, where it is a list, gets a `Record` of each operation; `label` is what the records are marked with.
    Errors: ValueError for an axis or a group that is not there, RuntimeError from operations that fail.
    """

    def __init__(self, axes: dict[str, int], rank: int = 0) -> None:
        self.axes, self.rank = dict(axes), rank
        if wrong := {axis: size for axis, size in axes.items() if size < 1}:
            raise ValueError(f"an axis has at least one rank: {wrong}")
        if not 0 <= rank < self.size(*axes):
            raise ValueError(f"a mesh {self.axes} has ranks 0 .. {self.size(*axes) - 1}, not {rank}")
        self.coordinates = self.coordinates_of(rank)
        self.record: list[Record] | None = None
        self.label = ""
        self._groups: dict[Axes, Group] = {}

    def __getitem__(self, axes: str | Axes) -> Group:
        """The group of this rank along one or several axes; in the order given, the first one outermost."""
        key = (axes,) if isinstance(axes, str) else axes
        if key not in self._groups:
            self.check(key)
            self._groups[key] = Group(self, key, self._wire(key) if self.size(*key) > 1 else None)
        return self._groups[key]

    def size(self, *axes: str) -> int:
        """How many ranks a group along these axes has."""
        self.check(axes)
        return prod(self.axes[axis] for axis in axes)

    def place(self, *axes: str) -> int:
        """The index of this rank in its group along these axes."""
        self.check(axes)
        return _row_major(self.axes, axes, self.coordinates)

    def members(self, *axes: str) -> tuple[int, ...]:
        """The ranks of this rank's group along these axes, by their index in it."""
        self.check(axes)
        return self.along(axes, self.coordinates)

    def _wire(self, axes: Axes) -> Wire:
        raise ValueError(f"a group along {named(axes)} has {self.size(*axes)} ranks, and this mesh is for one process")

    def check(self, axes: Axes) -> None:
        """ValueError where these are not axes of the mesh, each once."""
        for axis in axes:
            if axis not in self.axes:
                raise ValueError(f"there is no axis `{axis}`; the mesh has {named(tuple(self.axes))}")
        if len(set(axes)) < len(axes):
            raise ValueError(f"an axis twice in {named(axes)}")

    def coordinates_of(self, rank: int) -> dict[str, int]:
        """Where a rank is, by axis."""
        found = {}
        for axis, size in reversed(self.axes.items()):
            rank, found[axis] = divmod(rank, size)
        return {axis: found[axis] for axis in self.axes}

    def along(self, axes: Axes, fixed: dict[str, int]) -> tuple[int, ...]:
        """The ranks that have the coordinates `fixed` but for these axes, row-major over them."""
        places = product(*(range(self.axes[axis]) for axis in axes))
        whole = tuple(self.axes)
        return tuple(_row_major(self.axes, whole, fixed | dict(zip(axes, p, strict=True))) for p in places)


class Wire(Protocol):
    """What carries a group's tensors. All are contiguous; ranks are places in the group."""

    def reduce(self, x: Tensor, op: str) -> Tensor:
        """[...] of each -> their "sum" or "max"."""

    def reduce_(self, x: Tensor, op: str) -> None:
        """The same, written into x."""

    def gather(self, x: Tensor) -> Tensor:
        """[...] -> [ranks, ...]."""

    def scatter(self, x: Tensor) -> Tensor:
        """[ranks, ...] of each -> [...], this rank's row of their sum."""

    def exchange(self, x: Tensor) -> Tensor:
        """[ranks, ...] by where it goes -> [ranks, ...] by where it is from."""

    def broadcast(self, x: Tensor, from_: int) -> Tensor: ...

    def send(self, x: Tensor, to: int) -> None: ...

    def receive(self, like: Tensor, from_: int) -> Tensor: ...

    def swap(self, x: Tensor, to: int, like: Tensor, from_: int) -> Tensor: ...

    def barrier(self) -> None: ...


class Group:
    """Some ranks, this one among them. A group of one has no wire: it gives back what it is given, and records nothing.

    Each operation has to be called by all of them, in the same order, with tensors of one shape and dtype. The result
    in a group of one may be the argument itself, else it is new.
    """

    def __init__(self, mesh: Mesh, axes: Axes, wire: Wire | None) -> None:
        self.mesh, self.axes, self.wire = mesh, axes, wire
        self.size, self.rank = mesh.size(*axes), mesh.place(*axes)

    def __repr__(self) -> str:
        return f"the group along {named(self.axes)} of {self.size} ranks"

    def all_reduce(self, x: Tensor, op: str = "sum") -> Tensor:
        """The sum or the maximum ("max") over the ranks, element by element."""
        if op not in REDUCTIONS:
            raise ValueError(f"a reduction is one of {REDUCTIONS}, not {op!r}")
        if self.wire is None:
            return x
        self._note("all_reduce", x)
        return self.wire.reduce(x.contiguous(), op)

    def all_reduce_(self, x: Tensor, op: str = "sum") -> None:
        """The same, written into x, which is contiguous."""
        if op not in REDUCTIONS:
            raise ValueError(f"a reduction is one of {REDUCTIONS}, not {op!r}")
        if not x.is_contiguous():
            raise ValueError(f"all_reduce_ of a tensor that is not contiguous: {[*x.shape]}, strides {[*x.stride()]}")
        if self.wire is not None:
            self._note("all_reduce", x)
            self.wire.reduce_(x, op)

    def all_gather(self, x: Tensor) -> Tensor:
        """x of each rank, side by side in a new first dim: [...] -> [size, ...]."""
        if self.wire is None:
            return x[None]
        self._note("all_gather", x)
        return self.wire.gather(x.contiguous())

    def all_gather_into(self, x: Tensor, dim: int) -> Tensor:
        """x of each rank, joined along `dim`: [..., n, ...] -> [..., size * n, ...]."""
        return x if self.wire is None else _joined(self.all_gather(x), dim)

    def reduce_scatter(self, x: Tensor, dim: int) -> Tensor:
        """This rank's part along `dim` of the sum over the ranks: [..., size * n, ...] -> [..., n, ...]."""
        parts = self.parts(x, dim)
        if self.wire is None:
            return x
        self._note("reduce_scatter", x)
        return self.wire.scatter(parts.contiguous())

    def all_to_all(self, x: Tensor, split_dim: int, join_dim: int) -> Tensor:
        """Part k along `split_dim` goes to rank k; what comes is joined along `join_dim` by the rank it is from."""
        parts = self.parts(x, split_dim)
        if self.wire is None:
            return x
        self._note("all_to_all", x)
        return _joined(self.wire.exchange(parts.contiguous()), join_dim)

    def broadcast(self, x: Tensor, from_: int = 0) -> Tensor:
        """x of one rank of the group."""
        if not 0 <= from_ < self.size:
            raise ValueError(f"{self} has no rank {from_}")
        if self.wire is None:
            return x
        self._note("broadcast", x)
        return self.wire.broadcast(x.contiguous(), from_)

    def send(self, x: Tensor, to: int) -> None:
        """Starts x on its way to another rank of the group, and does not wait until it is there; `barrier` does."""
        wire = self._to(to)
        self._note("send", x)
        wire.send(x.contiguous(), to)

    def receive(self, like: Tensor, from_: int) -> Tensor:
        """The oldest that another rank of the group sent to this one. `like` says shape and dtype, and stays."""
        wire = self._to(from_)
        self._note("receive", None)
        return wire.receive(like, from_)

    def swap(self, x: Tensor, to: int, like: Tensor, from_: int) -> Tensor:
        """x goes to one rank while another's comes, of the shape and dtype of `like`: both under way at once, so that
        ranks that swap in a circle do not wait for each other."""
        wire = self._to(to)
        self._to(from_)
        self._note("send", x)
        self._note("receive", None)
        return wire.swap(x.contiguous(), to, like, from_)

    def barrier(self) -> None:
        """Waits until all ranks are here."""
        if self.wire is not None:
            self._note("barrier", None)
            self.wire.barrier()

    def parts(self, x: Tensor, dim: int) -> Tensor:
        """x cut along `dim` into one part a rank, in a new first dim. ValueError where it does not divide."""
        if x.shape[dim] % self.size:
            over = f"the {self.size} ranks along {named(self.axes)}"
            raise ValueError(f"dim {dim} of size {x.shape[dim]} does not divide evenly over {over}")
        return x.unflatten(dim, (self.size, x.shape[dim] // self.size)).movedim(dim, 0)

    def _note(self, kind: str, x: Tensor | None) -> None:
        if self.mesh.record is not None:
            count = 0 if x is None else x.numel() * x.element_size()
            self.mesh.record.append(Record(kind, self.axes, count, self.mesh.label))

    def _to(self, rank: int) -> Wire:
        if self.wire is None or rank == self.rank or not 0 <= rank < self.size:
            raise ValueError(f"rank {self.rank} of {self} has no peer {rank}")
        return self.wire


def named(axes: Axes) -> str:
    """How messages name axes."""
    return " x ".join(f"`{axis}`" for axis in axes) or "no axis"


def _row_major(sizes: dict[str, int], axes: Axes, coordinates: dict[str, int]) -> int:
    index = 0
    for axis in axes:
        index = index * sizes[axis] + coordinates[axis]
    return index


def _joined(rows: Tensor, dim: int) -> Tensor:
    """[ranks, ..., n, ...] -> [..., ranks * n, ...], `dim` counted in the result."""
    return rows.movedim(0, dim).flatten(dim, dim + 1)
