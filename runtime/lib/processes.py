"""Meshes of processes, over torch.distributed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .mesh import Axes, Group, Mesh, Wire, named

OPS = torch.ops._c10d_functional  # the form of the collectives that torch.compile can trace


class Processes(Mesh):
    """A mesh of processes, over torch.distributed, which is initialised already (nccl, gloo, or fake for counting).

    groups: what is asked for along which axes; making a group needs every process, so all give the same list. For a
    group made so, RuntimeError says what failed, along which axes and on which rank, at the latest after `timeout` s.
    """

    def __init__(self, axes: dict[str, int], groups: Iterable[str | Axes], timeout: float = 1800.0) -> None:
        if dist.get_world_size() != prod(axes.values()):
            raise ValueError(f"a mesh {axes} has {prod(axes.values())} ranks, and there are {dist.get_world_size()}")
        super().__init__(axes, dist.get_rank())
        for group in groups:
            key = (group,) if isinstance(group, str) else group
            self.check(key)
            wire = self._connected(key, timeout) if self.size(*key) > 1 else None
            self._groups[key] = Group(self, key, wire)

    def _wire(self, axes: Axes) -> Wire:
        there = ", ".join(map(named, self._groups)) or "none"
        raise ValueError(f"no group along {named(axes)} was made with the mesh; there are: {there}")

    def _connected(self, axes: Axes, timeout: float) -> Wire:
        """All groups along these axes, of which this rank keeps its own."""
        mine = None
        for rank in range(self.size(*self.axes)):
            fixed = self.coordinates_of(rank)
            if any(fixed[axis] for axis in axes):
                continue
            members = self.along(axes, fixed)
            made = dist.new_group(sorted(members), timeout=timedelta(seconds=timeout))
            if self.rank in members:
                mine = _Connection(made, members, f"along {named(axes)} on rank {self.rank}")
        assert mine is not None
        return mine


class _Connection:
    """A wire of torch.distributed. Process groups sort their ranks: where a mesh does not, places are translated."""

    def __init__(self, group: Any, members: tuple[int, ...], where: str) -> None:
        self.group, self.name, self.size, self.where = group, group.group_name, len(members), where
        self.index = [sorted(members).index(rank) for rank in members]  # place -> rank in the process group
        self.place = [members.index(rank) for rank in sorted(members)]  # and back
        self.is_sorted = self.index == self.place == list(range(self.size))
        self.sent: list[tuple[Any, Tensor]] = []

    def reduce(self, x: Tensor, op: str) -> Tensor:
        return self._waited("all_reduce", lambda: OPS.all_reduce(x, op, self.name))

    def reduce_(self, x: Tensor, op: str) -> None:
        self._waited("all_reduce", lambda: OPS.all_reduce_(x, op, self.name))

    def gather(self, x: Tensor) -> Tensor:
        made = self._waited("all_gather", lambda: OPS.all_gather_into_tensor(x[None], self.size, self.name))
        return made if self.is_sorted else made[self.index]

    def scatter(self, x: Tensor) -> Tensor:
        rows = x if self.is_sorted else x[self.place]
        return self._waited("reduce_scatter", lambda: OPS.reduce_scatter_tensor(rows, "sum", self.size, self.name))[0]

    def exchange(self, x: Tensor) -> Tensor:
        rows, one = x if self.is_sorted else x[self.place], [1] * self.size
        made = self._waited("all_to_all", lambda: OPS.all_to_all_single(rows, one, one, self.name))
        return made if self.is_sorted else made[self.index]

    def broadcast(self, x: Tensor, from_: int) -> Tensor:
        return self._waited("broadcast", lambda: OPS.broadcast(x, self.index[from_], self.name))

    def send(self, x: Tensor, to: int) -> None:
        self.sent = [(work, kept) for work, kept in self.sent if not work.is_completed()]
        with self._named("send"):
            self.sent.append((dist.isend(x, group=self.group, group_dst=self.index[to]), x))

    def receive(self, like: Tensor, from_: int) -> Tensor:
        made = torch.empty(like.shape, dtype=like.dtype, device=like.device)
        with self._named("receive"):
            dist.recv(made, group=self.group, group_src=self.index[from_])
        return made

    def swap(self, x: Tensor, to: int, like: Tensor, from_: int) -> Tensor:
        made = torch.empty(like.shape, dtype=like.dtype, device=like.device)
        there = dist.P2POp(dist.isend, x, group=self.group, group_peer=self.index[to])
        back = dist.P2POp(dist.irecv, made, group=self.group, group_peer=self.index[from_])
        with self._named("swap"):
            for work in dist.batch_isend_irecv([there, back]):
                work.wait()
        return made

    def barrier(self) -> None:
        with self._named("barrier"):
            for work, _ in self.sent:
                work.wait()
            dist.barrier(self.group)
        self.sent = []

    def _waited(self, kind: str, start: Callable[[], Tensor]) -> Tensor:
        if torch.compiler.is_compiling():  # a traced program has no handlers
            return OPS.wait_tensor(start())
        with self._named(kind):
            return OPS.wait_tensor(start())

    @contextmanager
    def _named(self, kind: str) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise RuntimeError(f"{kind} {self.where} failed: {error}") from error
