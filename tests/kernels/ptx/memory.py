"""Memory: shared memory of the CTAs of a cluster with its barriers, tensors that TMA knows, tensor memory."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from .text import Instruction

# Where dynamic shared memory begins, behind what is reserved; bits above say which CTA of the cluster.
BASE = 1024
RANK = 24
SIZE = 232_448 + BASE
POISON = 0xA5
# Addresses in parameters: of a parameter itself, and of a tensor in global memory.
PARAM, GLOBAL = 1 << 48, 1 << 40
LANES = 32
ALL = np.ones(LANES, bool)
# What an instruction gives that its warp has to come back to.
BLOCK = object()


class Violation(Exception):
    """Something that the PTX ISA leaves undefined."""


def whole(mask: np.ndarray, ins: Instruction) -> None:
    """Raises Violation where only some lanes of a warp are at what all have to reach together."""
    if mask is not ALL and not mask.all():
        raise Violation(f"only {mask.sum()} lanes of a warp at `{ins.line}`")


@dataclass
class Barrier:
    """An mbarrier: arrivals and bytes that its phase still waits for."""

    count: int
    pending: int
    bytes: int = 0
    phase: int = 0

    def arrive(self, times: int = 1) -> None:
        if times > self.pending:
            raise Violation(f"{times} arrivals at a barrier that waits for {self.pending} of {self.count}")
        self.pending -= times
        self._turn()

    def expect(self, size: int) -> None:
        self.bytes += size

    def complete(self, size: int) -> None:
        self.bytes -= size
        self._turn()

    def _turn(self) -> None:
        if not self.pending and not self.bytes:
            self.pending, self.phase = self.count, self.phase ^ 1


@dataclass
class Shared:
    """Shared memory of one CTA. `dirty`: 1 + the warp whose store no fence has shown to the async proxy yet."""

    data: np.ndarray = field(default_factory=lambda: np.full(SIZE, POISON, np.uint8))
    dirty: np.ndarray = field(default_factory=lambda: np.zeros(SIZE, np.uint8))
    barriers: dict[int, Barrier] = field(default_factory=dict)
    tensor: np.ndarray = field(default_factory=lambda: np.full((128, 512), np.nan, np.float32))

    def barrier(self, at: int) -> Barrier:
        if at not in self.barriers:
            raise Violation(f"no barrier was made at {at}")
        return self.barriers[at]

    def seen(self, at: np.ndarray) -> np.ndarray:
        """16-bit values at addresses, as the async proxy reads them."""
        if self.dirty[at].any():
            raise Violation("the async proxy reads a store that no fence.proxy.async follows")
        return self.data.view(np.uint16)[at // 2]


def swizzled(at: np.ndarray, span: int) -> np.ndarray:
    """Addresses with the 16-byte units of `span` bytes exchanged by the row of 128 bytes that they lie in."""
    return at ^ ((at >> 3) & ({128: 7, 64: 3, 32: 1, 16: 0}[span] << 4))


def matrix_at(descriptor: int, rows: int, blackwell: bool) -> np.ndarray:
    """Byte addresses of 16-bit elements [rows, 16] of a matrix whose rows run along K, from its descriptor."""
    start, stride = (descriptor & 0x3FFF) << 4, ((descriptor >> 32) & 0x3FFF) << 4
    kind = descriptor >> 61 if blackwell else descriptor >> 62
    span = {2: 128, 4: 64, 6: 32, 0: 16}[kind] if blackwell else {1: 128, 2: 64, 3: 32, 0: 16}[kind]
    if span == 16 or (descriptor >> 49) & 7 or (blackwell and (descriptor >> 46) & 3 != 1):
        raise Violation(f"descriptor {descriptor:#x} is not one of swizzled rows along K")
    row, col = np.arange(rows)[:, None], np.arange(16)[None, :]
    return swizzled(start + row // 8 * stride + row % 8 * span + col * 2, span)


@dataclass
class TensorMap:
    """A tensor [rows, columns] of 16-bit values, and the box of it that one copy moves, its rows swizzled."""

    data: np.ndarray
    box: tuple[int, int]
    swizzle: int
    written: np.ndarray | None = None

    def _places(self, row: int, col: int, at: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        rows, cols = row + np.arange(self.box[0])[:, None], col + np.arange(self.box[1])[None, :]
        inside = (rows >= 0) & (rows < self.data.shape[0]) & (cols >= 0) & (cols < self.data.shape[1])
        if self.box[1] * 2 > self.swizzle:
            raise Violation("a box is wider than its swizzle")
        linear = at + np.arange(self.box[0])[:, None] * (self.box[1] * 2) + np.arange(self.box[1])[None, :] * 2
        return rows, cols, inside, swizzled(linear, self.swizzle)

    def load(self, shared: Shared, at: int, row: int, col: int) -> int:
        rows, cols, inside, to = self._places(row, col, at)
        values = np.zeros(self.box, np.uint16)
        values[inside] = self.data[np.broadcast_to(rows, self.box)[inside], np.broadcast_to(cols, self.box)[inside]]
        shared.data.view(np.uint16)[to // 2] = values
        return values.nbytes

    def store(self, shared: Shared, at: int, row: int, col: int) -> None:
        rows, cols, inside, of = self._places(row, col, at)
        place = np.broadcast_to(rows, self.box)[inside], np.broadcast_to(cols, self.box)[inside]
        self.data[place] = shared.seen(of)[inside]
        if self.written is not None:
            np.add.at(self.written, place, 1)
