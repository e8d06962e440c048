"""Loads and stores, the barriers of threads and of what hardware does, and who sees what was written."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from .memory import BLOCK, GLOBAL, PARAM, Barrier, Violation, whole
from .text import Instruction

if TYPE_CHECKING:
    from .instructions import Run, Scope
    from .machine import Machine, Warp

# --- memory -----------------------------------------------------------------------------------------------------------


def load(ins: Instruction, scope: Scope) -> Run:
    """From shared memory, from a tensor in global memory, or a parameter."""
    space, size = ins.words[1], int(ins.words[-1][1:]) // 8
    to = ins.operands[0] if isinstance(ins.operands[0], tuple) else (ins.operands[0],)
    write, address = [scope.put(t) for t in to], scope.address(str(ins.operands[1]))
    machine = scope.machine

    def run(w: Warp, mask: np.ndarray) -> None:
        at = address(w)
        if space == "param":
            value = machine.values[(int(at[0]) - PARAM) >> 12]
            for put in write:
                put(w, mask, np.full(32, value if isinstance(value, int) else GLOBAL * (1 + ((int(at[0]) - PARAM) >> 12))))
            return
        if space == "shared":
            data, place = _own(w, at, mask, machine), at & 0xFFFFFF
        else:
            data, place = machine.memory(int(at[mask][0])), at & (GLOBAL - 1)
        data, place = data.view(f"u{size}"), place // size
        if (place[mask] < 0).any() or (place[mask] + len(write) > data.size).any():
            raise Violation(f"`{ins.line}` reads beside what has {data.size} elements")
        place = np.where(mask, place, 0)
        for i, put in enumerate(write):
            put(w, mask, data[np.minimum(place + i, data.size - 1)])

    return run


def _own(w: Warp, at: np.ndarray, mask: np.ndarray, machine: Machine) -> np.ndarray:
    """Shared memory, of the one CTA whose it is for all lanes."""
    ranks = np.unique(at[mask] >> 24)
    if len(ranks) != 1:
        raise NotImplementedError("lanes that reach shared memory of several CTAs")
    return machine.ctas[int(ranks[0])].shared.data


def store(ins: Instruction, scope: Scope) -> Run:
    of = ins.operands[1] if isinstance(ins.operands[1], tuple) else (ins.operands[1],)
    size, address = int(ins.words[-1][1:]) // 8, scope.address(str(ins.operands[0]))
    read = [scope.get(o, f"u{size * 8}") for o in of]

    def run(w: Warp, mask: np.ndarray) -> None:
        at = address(w)
        data, place = _own(w, at, mask, scope.machine).view(f"u{size}"), (at & 0xFFFFFF)[mask] // size
        for i, r in enumerate(read):
            data[place + i] = r(w)[mask]
            w.shared.dirty.view(f"u{size}")[place + i] = int.from_bytes(bytes([w.number + 1] * size), "little")

    return run


def matrices(ins: Instruction, scope: Scope) -> Run:
    """ldmatrix and stmatrix of four matrices of 8 x 8: lane 8 j + i has the address of row i of matrix j."""
    store = ins.op.startswith("stmatrix")
    where, of = ins.operands if store else ins.operands[::-1]
    address = scope.address(str(where))
    read, write = [scope.get(o, "u32") for o in of], [scope.put(o) for o in of]
    row, col = np.arange(32) // 4, np.arange(32) % 4 * 4

    def run(w: Warp, mask: np.ndarray) -> None:
        whole(mask, ins)
        at = address(w) & 0xFFFFFF
        if (at % 16).any():
            raise Violation(f"a row is not aligned at `{ins.line}`")
        words = w.shared.data.view(np.uint32)
        for j in range(len(of)):
            place = (at[8 * j + row] + col) // 4
            if store:
                words[place] = read[j](w).astype(np.uint32)
                w.shared.dirty.view(np.uint32)[place] = (w.number + 1) * 0x01010101
            else:
                write[j](w, mask, words[place])

    return run


def fence(ins: Instruction, scope: Scope) -> Run:
    def run(w: Warp, mask: np.ndarray) -> None:
        dirty = w.shared.dirty
        dirty[dirty == w.number + 1] = 0

    return run if ins.op.startswith("fence.proxy.async") else (lambda w, mask: None)


# --- barriers ---------------------------------------------------------------------------------------------------------


def barrier_init(ins: Instruction, scope: Scope) -> Run:
    address, count = scope.address(str(ins.operands[0])), scope.get(ins.operands[1], "u32")

    def run(w: Warp, mask: np.ndarray) -> None:
        lane = int(np.flatnonzero(mask)[0])
        cta, offset = scope.machine.shared_at(int(address(w)[lane]))
        cta.shared.barriers[offset] = Barrier(int(count(w)[lane]), int(count(w)[lane]))

    return run


def arrive(ins: Instruction, scope: Scope) -> Run:
    """Each active lane arrives, after it says for how many bytes the phase waits."""
    address, count = scope.address(str(ins.operands[1])), scope.get(ins.operands[2], "u32")
    expects = "expect_tx" in ins.op

    def run(w: Warp, mask: np.ndarray) -> None:
        if w.unread:
            raise Violation(f"a load of tensor memory is not waited for at `{ins.line}`")
        for lane in np.flatnonzero(mask):
            cta, offset = scope.machine.shared_at(int(address(w)[lane]))
            barrier = cta.shared.barrier(offset)
            if expects:
                barrier.expect(int(count(w)[lane]))
            barrier.arrive(1 if expects else int(count(w)[lane]))

    return run


def try_wait(ins: Instruction, scope: Scope) -> Run:
    done, address, parity = scope.put(str(ins.operands[0])), scope.address(str(ins.operands[1])), scope.get(ins.operands[2], "u32")

    def run(w: Warp, mask: np.ndarray) -> Any:
        for lane in np.flatnonzero(mask):
            cta, offset = scope.machine.shared_at(int(address(w)[lane]))
            if cta.shared.barrier(offset).phase == parity(w)[lane]:
                return BLOCK
        return done(w, mask, np.ones(32, bool))

    return run


def bar_sync(ins: Instruction, scope: Scope) -> Run:
    """The threads of a CTA that a numbered barrier counts; a warp counts once, and whole."""
    number, count = int(str(ins.operands[0])), int(str(ins.operands[1])) if len(ins.operands) > 1 else scope.machine.program.threads

    def run(w: Warp, mask: np.ndarray) -> Any:
        whole(mask, ins)
        bars = scope.machine.ctas[w.rank].bars
        arrived, turns = bars.get(number, (0, 0))
        if w.waits is None:
            w.waits, arrived = ("bar", turns), arrived + 32
            if arrived == count:
                arrived, turns = 0, turns + 1
            bars[number] = arrived, turns
        if turns == w.waits[1]:
            return BLOCK
        w.waits = None
        return None

    return run


def cluster_barrier(ins: Instruction, scope: Scope) -> Run:
    def run(w: Warp, mask: np.ndarray) -> Any:
        machine = scope.machine
        if "arrive" in ins.op:
            w.waits = ("cluster", machine.turn)
            machine.arrived += int(mask.sum())
            if machine.arrived == machine.cluster * machine.program.threads:
                machine.arrived, machine.turn = 0, machine.turn + 1
            return None
        if machine.turn == w.waits[1]:
            return BLOCK
        w.waits = None
        return None

    return run


def mapa(ins: Instruction, scope: Scope) -> Run:
    read, rank, write = scope.get(ins.operands[1], "u32"), scope.get(ins.operands[2], "u32"), scope.put(str(ins.operands[0]))
    return lambda w, mask: write(w, mask, (read(w) & 0xFFFFFF) | rank(w) << 24)
