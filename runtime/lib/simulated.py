"""All ranks of a mesh as threads of this process: sharded modules are tried out, and their mistakes found, on a laptop.

A collective is a meeting of its group: each rank brings a copy of its tensor, and all leave with the result, summed in
the order of the ranks in the tensor's dtype. A backward on a CPU runs in the thread that asked for it, so it may meet
as well. What would hang or spoil numbers on real processes is an error here: ranks that call different operations, wait
for each other, or stop while others wait.
"""

from __future__ import annotations

import threading
from collections import defaultdict, deque
from collections.abc import Callable
from math import prod
from time import monotonic
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from .mesh import Axes, Mesh, Wire, named

T = TypeVar("T")
GRACE_S = 5.0  # how long the other ranks get to reach their next collective, and stop there, after a failure


def simulate(axes: dict[str, int], run: Callable[[Mesh], T], timeout: float = 60.0) -> list[T]:
    """What `run` returns for the mesh of each rank, by rank. All run at once, in the caller's grad mode.

    RuntimeError: the first error of a rank, with `rank N:` in front; a disagreement, with what each rank called; or
    that nothing happened for `timeout` seconds, with where each rank is. Random numbers: each rank needs a generator
    of its own, for the global one is shared.
    """
    world = _World(prod(axes.values()))
    results: dict[int, T] = {}
    has_grad = torch.is_grad_enabled()

    def one(mesh: Mesh) -> None:
        torch.set_grad_enabled(has_grad)
        try:
            results[mesh.rank] = run(mesh)
        except _Stopped:
            pass
        except BaseException as error:
            world.fail(f"rank {mesh.rank}: {type(error).__name__}: {error}", error)
        finally:
            world.leave(mesh.rank)

    meshes = [Simulated(axes, rank, world) for rank in range(world.size)]
    threads = [threading.Thread(target=one, args=(mesh,), name=f"rank {mesh.rank}", daemon=True) for mesh in meshes]
    for thread in threads:
        thread.start()
    world.watch(timeout)
    end = monotonic() + GRACE_S
    for thread in threads:
        thread.join(max(0.0, end - monotonic()))
    if world.failure is not None:
        raise RuntimeError(world.failure) from world.cause
    return [results[rank] for rank in range(world.size)]


class Key(NamedTuple):
    """A group: its axes and its ranks by place."""

    axes: Axes
    ranks: tuple[int, ...]


class Simulated(Mesh):
    """The mesh of one rank of `simulate`. Any group can be asked for."""

    def __init__(self, axes: dict[str, int], rank: int, world: _World) -> None:
        super().__init__(axes, rank)
        self.world = world

    def _wire(self, axes: Axes) -> Wire:
        return _Meetings(self.world, Key(axes, self.members(*axes)), self.rank)


class _Stopped(BaseException):
    """Another rank failed. It is no Exception, so that a rank's own handlers let it pass."""


class _Wait(NamedTuple):
    what: str
    is_over: Callable[[], bool]


class _Meeting:
    """One group's collectives, in order: the next cannot end before all have left the last, for it needs them."""

    def __init__(self) -> None:
        self.count = 0  # how many ended
        self.arrived: dict[int, tuple[str, Tensor]] = {}
        self.brought: list[Tensor] = []


class _World:
    """What the ranks share, under one lock: the meetings, what was sent, who waits for what, and what went wrong."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.changed = threading.Condition()
        self.meetings: defaultdict[Key, _Meeting] = defaultdict(_Meeting)
        self.letters: defaultdict[tuple[Key, int, int], deque[Tensor]] = defaultdict(deque)
        self.waits: dict[int, _Wait] = {}
        self.left: set[int] = set()
        self.failure: str | None = None
        self.cause: BaseException | None = None
        self.last = monotonic()

    def meet(self, key: Key, rank: int, call: str, x: Tensor) -> list[Tensor]:
        """The tensors that all ranks of a group bring to their next meeting, by their place in it."""
        with self.changed:
            meeting = self.meetings[key]
            mine = meeting.count
            meeting.arrived[rank] = call, x.detach().clone()
            if len(meeting.arrived) == len(key.ranks):
                self._end(key, meeting)
            self._wait(rank, f"{call} along {named(key.axes)}", lambda: meeting.count > mine)
            return meeting.brought

    def send(self, key: Key, rank: int, to: int, x: Tensor) -> None:
        with self.changed:
            self.letters[key, rank, to].append(x.detach().clone())
            self.changed.notify_all()

    def receive(self, key: Key, rank: int, from_: int) -> Tensor:
        with self.changed:
            letters = self.letters[key, from_, rank]
            self._wait(rank, f"receive from rank {from_} along {named(key.axes)}", lambda: bool(letters))
            return letters.popleft()

    def leave(self, rank: int) -> None:
        with self.changed:
            self.left.add(rank)
            self._check_progress()

    def fail(self, message: str, cause: BaseException | None = None) -> None:
        """The first failure counts; all ranks stop where they meet next."""
        with self.changed:
            if self.failure is None:
                self.failure, self.cause = message, cause
            self.changed.notify_all()

    def watch(self, timeout: float) -> None:
        """Until all ranks have left, one failed, or nothing happened for too long."""
        with self.changed:
            while len(self.left) < self.size and self.failure is None:
                remaining = self.last + timeout - monotonic()
                if remaining <= 0:
                    self.fail(f"nothing happened for {timeout:g} s: {self._places()}")
                self.changed.wait(max(0.0, remaining))

    def _wait(self, rank: int, what: str, is_over: Callable[[], bool]) -> None:
        self.waits[rank] = _Wait(what, is_over)
        self._check_progress()
        while self.failure is None and not is_over():
            self.changed.wait()
        if self.failure is not None:
            raise _Stopped
        del self.waits[rank]

    def _end(self, key: Key, meeting: _Meeting) -> None:
        if len({call for call, _ in meeting.arrived.values()}) > 1:
            calls = "; ".join(f"rank {rank}: {meeting.arrived[rank][0]}" for rank in key.ranks)
            self.fail(f"the ranks along {named(key.axes)} do not call the same: {calls}")
            return
        meeting.brought = [meeting.arrived[rank][1] for rank in key.ranks]
        meeting.arrived = {}
        meeting.count += 1

    def _check_progress(self) -> None:
        """Something happened: is there still a rank that can go on?"""
        self.last = monotonic()
        self.changed.notify_all()
        staying = [rank for rank in range(self.size) if rank not in self.left]
        if staying and all(rank in self.waits and not self.waits[rank].is_over() for rank in staying):
            self.fail(f"no rank can go on: {self._places()}")

    def _places(self) -> str:
        def place(rank: int) -> str:
            if rank in self.left:
                return "has returned"
            return f"waits in {self.waits[rank].what}" if rank in self.waits else "computes"

        return "; ".join(f"rank {rank}: {place(rank)}" for rank in range(self.size))


class _Meetings:
    """A wire between threads."""

    def __init__(self, world: _World, key: Key, rank: int) -> None:
        self.world, self.key, self.rank, self.place = world, key, rank, key.ranks.index(rank)

    def reduce(self, x: Tensor, op: str) -> Tensor:
        return _reduced(self._all(f"all_reduce {op}", x), op)

    def reduce_(self, x: Tensor, op: str) -> None:
        x.copy_(self.reduce(x, op))

    def gather(self, x: Tensor) -> Tensor:
        return torch.stack(self._all("all_gather", x))

    def scatter(self, x: Tensor) -> Tensor:
        return _reduced([rows[self.place] for rows in self._all("reduce_scatter", x)], "sum")

    def exchange(self, x: Tensor) -> Tensor:
        return torch.stack([rows[self.place] for rows in self._all("all_to_all", x)])

    def broadcast(self, x: Tensor, from_: int) -> Tensor:
        return self._all(f"broadcast from {from_}", x)[from_].clone()

    def send(self, x: Tensor, to: int) -> None:
        self.world.send(self.key, self.rank, self.key.ranks[to], x)

    def receive(self, like: Tensor, from_: int) -> Tensor:
        got = self.world.receive(self.key, self.rank, self.key.ranks[from_])
        if (got.shape, got.dtype) != (like.shape, like.dtype):
            sent = f"rank {self.key.ranks[from_]} sent {_described(got)}"
            raise RuntimeError(f"receive along {named(self.key.axes)}: {sent}, and {_described(like)} is expected")
        return got

    def swap(self, x: Tensor, to: int, like: Tensor, from_: int) -> Tensor:
        self.send(x, to)
        return self.receive(like, from_)

    def barrier(self) -> None:
        self._all("barrier", torch.empty(0))

    def _all(self, call: str, x: Tensor) -> list[Tensor]:
        return self.world.meet(self.key, self.rank, f"{call} of {_described(x)}", x)


def _reduced(tensors: list[Tensor], op: str) -> Tensor:
    made = tensors[0].clone()
    for x in tensors[1:]:
        made = made + x if op == "sum" else torch.maximum(made, x)
    return made


def _described(x: Tensor) -> str:
    return f"{str(x.dtype).removeprefix('torch.')}{[*x.shape]}"
