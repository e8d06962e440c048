"""Clusters of CTAs of warps, which take turns at random; what hardware does beside them ends at random, in its order.

A seed also says what is late: that then happens when the kernel waits for it, or nothing else can, and not before.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .memory import ALL, BASE, BLOCK, LANES, PARAM, RANK, Shared, TensorMap, Violation
from .text import Program

# What is late in a run, by its seed: all of a kind, or loads or turns of some warps.
LATE: tuple[tuple[str, Callable[[int], bool]], ...] = (
    ("load", lambda warp: warp % 2 == 0), ("load", lambda warp: warp % 2 == 1), ("store", lambda warp: True),
    ("product", lambda warp: True), ("turn", lambda warp: warp < 4), ("turn", lambda warp: warp >= 4),
    ("", lambda warp: False),
)  # fmt: skip


class Deadlock(Exception):
    """No warp can go on, and nothing is under way."""


@dataclass
class Async:
    """Something that hardware does once, now or later: a load, a store or a product, begun by a warp."""

    kind: str
    by: int
    do: Callable[[], None]
    done: bool = False

    def run(self) -> None:
        if not self.done:
            self.done = True
            self.do()


@dataclass(eq=False)
class Warp:
    """Registers as [lane]; `pc` where each lane is, one number where all are. Products and stores under way, by group."""

    rank: int
    number: int
    shared: Shared
    pc: Any = 0
    alive: np.ndarray = field(default_factory=lambda: ALL)
    registers: dict[str, np.ndarray] = field(default_factory=dict)
    products: deque[Async] = field(default_factory=deque)
    open_products: list[Async] = field(default_factory=list)
    product_groups: list[list[Async]] = field(default_factory=list)
    sums: Any = None
    open_stores: list[Async] = field(default_factory=list)
    store_groups: list[list[Async]] = field(default_factory=list)
    unread: bool = False
    waits: Any = None


@dataclass
class Cta:
    rank: int
    index: int
    shared: Shared
    warps: list[Warp]
    bars: dict[int, tuple[int, int]] = field(default_factory=dict)  # arrived threads, turns
    tensor_work: deque[Async] = field(default_factory=deque)


class Machine:
    """Runs a kernel. `values`: parameters by index, numbers or arrays of 16-bit values or what TMA knows of a tensor."""

    def __init__(self, program: Program, values: Mapping[int, Any], grid: int, cluster: int, seed: int) -> None:
        from .instructions import compiled

        self.program, self.values, self.grid, self.cluster = program, values, grid, cluster
        self.random = random.Random(seed)
        self.late, self.of = LATE[seed % len(LATE)]
        self.code = [compiled(i, self) for i in program.code]
        self.streams: list[deque[Async]] = []
        self.ctas: list[Cta] = []
        self.steps = 0

    def maps(self, address: int) -> TensorMap:
        return self.values[(address - PARAM) >> 12]

    def memory(self, address: int) -> np.ndarray:
        """The 16-bit values of the tensor that an address lies in."""
        return self.values[(address >> 40) - 1].reshape(-1)

    def shared_at(self, address: int) -> tuple[Cta, int]:
        return self.ctas[address >> RANK], address & ((1 << RANK) - 1)

    def start(self, work: Async, stream: deque[Async] | None = None) -> None:
        stream = deque() if stream is None else stream
        if not any(s is stream for s in self.streams):
            self.streams.append(stream)
        stream.append(work)

    def run(self, most: int = 4_000_000) -> int:
        """All clusters, one after another; the number of instructions of warps."""
        if self.grid % self.cluster:
            raise Violation("the grid is not made of whole clusters")
        for first in range(0, self.grid, self.cluster):
            self._run_cluster(first, most)
        return self.steps

    def _run_cluster(self, first: int, most: int) -> None:
        self.streams, self.ctas, self.arrived, self.turn = [], [], 0, 0
        for rank in range(self.cluster):
            shared = Shared()
            warps = [Warp(rank, n, shared) for n in range(self.program.threads // LANES)]
            self.ctas.append(Cta(rank, first + rank, shared, warps))
        running = [w for cta in self.ctas for w in cta.warps]
        blocked: set[int] = set()
        while running:
            ready = [w for w in running if id(w) not in blocked]
            if not ready or self.random.random() < 0.2:
                if self._advance(must=not ready):
                    blocked.clear()
                elif not ready:
                    raise Deadlock(self._where(running))
                continue
            warp = self.random.choice([w for w in ready if not self._is_late("turn", w.number)] or ready)
            moved = self._turn_of(warp, self.random.choice((1, 10, 100, 400)))
            if moved:
                blocked.clear()
            if warp.alive is not ALL and not warp.alive.any():
                running.remove(warp)
            elif not moved:
                blocked.add(id(warp))
            if self.steps > most:
                raise Deadlock(f"{most} instructions did not end it; {self._where(running)}")
        while self._advance(must=True):
            pass

    def _advance(self, must: bool) -> bool:
        """Let hardware end one thing; one of the kind that is late in this run only if it `must` and nothing else is."""
        self.streams = [s for s in self.streams if s]
        soon = [s for s in self.streams if not self._is_late(s[0].kind, s[0].by)] or (self.streams if must else [])
        if not soon:
            return False
        self.random.choice(soon).popleft().run()
        return True

    def _is_late(self, kind: str, warp: int) -> bool:
        return kind == self.late and self.of(warp)

    def _where(self, running: Sequence[Warp]) -> str:
        places = {}
        for w in running:
            at = w.pc if isinstance(w.pc, int) else int(w.pc[w.alive].min())
            places.setdefault(self.program.code[at].line, []).append(f"{w.rank}.{w.number}")
        return "; ".join(f"{', '.join(who)} at `{line}`" for line, who in places.items())

    def _turn_of(self, warp: Warp, times: int) -> int:
        for done in range(times):
            if not self._step(warp):
                return done
            if warp.alive is not ALL and not warp.alive.any():
                return done + 1
        return times

    def _step(self, warp: Warp) -> bool:
        """One instruction of the lanes that are furthest behind."""
        together = isinstance(warp.pc, int)
        at = warp.pc if together else int(warp.pc[warp.alive].min())
        mask = warp.alive if together else warp.alive & (warp.pc == at)
        guard, active, target = self.program.code[at].guard, mask, None
        if guard is not None:
            active = mask & (self.read(warp, guard[0]) ^ guard[1])
            active = mask if (active == mask).all() else active
        if guard is None or active is mask or active.any():
            target = self.code[at](warp, active)
            if target is BLOCK:
                return False
        self.steps += 1
        if together and (target is None or active is mask):
            warp.pc = at + 1 if target is None else target
            return True
        pc = np.full(LANES, warp.pc) if isinstance(warp.pc, int) else warp.pc
        pc[mask] = at + 1
        if target is not None:
            pc[active] = target
        here = pc[warp.alive]
        warp.pc = int(here[0]) if len(here) and (here == here[0]).all() else pc
        return True

    # --- registers ------------------------------------------------------------------------------------------------------

    def width(self, name: str) -> int:
        widths = self.program.widths
        return widths[name] if name in widths else widths[name.rstrip("0123456789")]

    def read(self, warp: Warp, name: str) -> np.ndarray:
        found = warp.registers.get(name)
        if found is None:
            kind = {1: np.bool_, 16: np.uint16, 32: np.uint32, 64: np.uint64}[self.width(name)]
            found = warp.registers[name] = np.zeros(LANES, kind)
        return found

    def special(self, warp: Warp, name: str) -> np.ndarray:
        values = {"%tid.x": warp.number * LANES + np.arange(LANES), "%ctaid.x": self.ctas[warp.rank].index,
                  "%nctaid.x": self.grid, "%cluster_ctarank": warp.rank, "%laneid": np.arange(LANES)}  # fmt: skip
        return np.broadcast_to(np.asarray(values[name], np.uint64), LANES)

    def symbol(self, warp: Warp, name: str) -> int:
        """An address: of dynamic shared memory, or of a parameter."""
        if name == "__dynamic_shmem__0":
            return BASE | warp.rank << RANK
        return PARAM + (self.program.params[name] << 12)
