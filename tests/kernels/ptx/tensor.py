"""Copies of TMA, and products of wgmma and tcgen05: they begin here and end when the machine says so."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from .memory import RANK, Shared, TensorMap, Violation, matrix_at
from .text import Instruction

if TYPE_CHECKING:
    from .instructions import Run, Scope
    from .machine import Warp

# A NaN that no computation makes: what a register holds before a product or a load ends.
_NOT_YET = 0x7FD5D5D5


def _floats(bits: np.ndarray, kind: str) -> np.ndarray:
    return bits.view(np.float16).astype(np.float32) if kind == "f16" else (bits.astype(np.uint32) << 16).view(np.float32)


def copy(ins: Instruction, scope: Scope) -> Run:
    """cp.async.bulk.tensor.2d: a box of a tensor to shared memory, maybe of several CTAs, or from it."""
    from .machine import Async

    machine = scope.machine
    load = ".global.shared" not in ins.op

    def split(word: Any) -> tuple[Any, list[Any]]:
        base, _, rest = str(word).strip("[]").partition(",")
        return scope.address(base), [scope.get(c.strip(), "s32") for c in rest.strip(" {}").split(",")]

    tensor, coords = split(ins.operands[1] if load else ins.operands[0])
    address = scope.address(str(ins.operands[0] if load else ins.operands[1]))
    barrier = scope.address(str(ins.operands[2])) if load else None
    mask_of = scope.get(ins.operands[3], "u16") if "multicast" in ins.op else None

    def load_box(known: TensorMap, to: Shared, at: int, corner: tuple[int, int], told: Shared, done: int) -> None:
        told.barrier(done).complete(known.load(to, at & 0xFFFFFF, *corner))

    def run(w: Warp, mask: np.ndarray) -> None:
        for lane in np.flatnonzero(mask):
            known = machine.maps(int(tensor(w)[lane]))
            col, row = (int(c(w)[lane]) for c in coords)
            at = int(address(w)[lane])
            if at % 128:
                raise Violation(f"shared memory at {at} is not aligned at `{ins.line}`")
            if load:
                assert barrier is not None
                done = int(barrier(w)[lane])
                ranks = [r for r in range(machine.cluster) if int(mask_of(w)[lane]) >> r & 1] if mask_of else [at >> RANK]
                for rank in ranks:
                    # With a mask, place and barrier are those of each CTA in it.
                    told = machine.ctas[rank if mask_of else done >> RANK].shared
                    work = partial(load_box, known, machine.ctas[rank].shared, at, (row, col), told, done & 0xFFFFFF)
                    machine.start(Async("load", w.number, work))
            else:
                work = Async("store", w.number, partial(known.store, w.shared, at & 0xFFFFFF, row, col))
                machine.start(work)
                w.open_stores.append(work)

    return run


def commit_stores(ins: Instruction, scope: Scope) -> Run:
    def run(w: Warp, mask: np.ndarray) -> None:
        w.store_groups.append(w.open_stores)
        w.open_stores = []

    return run


def wait_stores(ins: Instruction, scope: Scope) -> Run:
    """Of the groups of stores all but the last few have read shared memory."""
    keep = int(str(ins.operands[0]))

    def run(w: Warp, mask: np.ndarray) -> None:
        for group in w.store_groups[: len(w.store_groups) - keep]:
            for work in group:
                work.run()

    return run


def wgmma(ins: Instruction, scope: Scope) -> Run:
    """D[64, n] (+)= A[64, 16] B[n, 16]^T; this warp has rows 16 (number mod 4) and the 15 after them."""
    from .machine import Async

    registers = list(ins.operands[0])
    read_x, read_w = scope.get(ins.operands[1], "u64"), scope.get(ins.operands[2], "u64")
    adds = scope.get(ins.operands[3], "pred")
    kind, machine = ins.words[-1], scope.machine
    n = 2 * len(registers)
    put = [scope.put(r) for r in registers]
    get = [scope.get(r, "f32") for r in registers]
    i = np.arange(len(registers))[:, None]
    lane = np.arange(32)[None, :]
    row, col = lane // 4 + 8 * (i // 2 % 2), 8 * (i // 4) + 2 * (lane % 4) + i % 2

    def run(w: Warp, mask: np.ndarray) -> None:
        if not mask.all():
            raise Violation("a part of a warp at wgmma")
        if w.sums is None:
            w.sums = np.zeros((16, n), np.float32)
            w.sums[row, col] = np.stack([g(w) for g in get])
            for p in put:
                p(w, mask, np.full(32, _NOT_YET))
        sums, more = w.sums, bool(adds(w)[0])
        x_at, w_at = int(read_x(w)[0]) & (2**64 - 1), int(read_w(w)[0]) & (2**64 - 1)

        def multiply() -> None:
            first = 16 * (w.number % 4)
            x = _floats(w.shared.seen(matrix_at(x_at, 64, False)[first : first + 16]), kind)
            y = _floats(w.shared.seen(matrix_at(w_at, n, False)), kind)
            with np.errstate(all="ignore"):
                sums[:] = x @ y.T + (sums if more else 0)

        work = Async("product", w.number, multiply)
        machine.start(work, w.products)
        w.open_products.append(work)

    def finish(w: Warp) -> None:
        for j, p in enumerate(put):
            p(w, np.ones(32, bool), w.sums[row[j], col[j]])
        w.sums = None

    scope.machine.finish_products = finish
    return run


def commit_products(ins: Instruction, scope: Scope) -> Run:
    def run(w: Warp, mask: np.ndarray) -> None:
        w.product_groups.append(w.open_products)
        w.open_products = []

    return run


def wait_products(ins: Instruction, scope: Scope) -> Run:
    """All but the last few groups of products have ended; registers have their sums when none is under way."""
    keep = int(str(ins.operands[0]))

    def run(w: Warp, mask: np.ndarray) -> None:
        due = w.product_groups[: len(w.product_groups) - keep]
        while any(not work.done for group in due for work in group):
            w.products.popleft().run()
        w.product_groups = w.product_groups[len(due) :]
        if not w.product_groups and not w.open_products and w.sums is not None:
            scope.machine.finish_products(w)

    return run


# --- tensor memory ----------------------------------------------------------------------------------------------------


def _group(ins: Instruction) -> int:
    return int(ins.op.split("cta_group::")[1][0])


def tcgen05_alloc(ins: Instruction, scope: Scope) -> Run:
    address = scope.address(str(ins.operands[0]))

    def run(w: Warp, mask: np.ndarray) -> None:
        if not mask.all():
            raise Violation("a part of a warp at tcgen05.alloc")
        cta, offset = scope.machine.shared_at(int(address(w)[0]))
        cta.shared.data[offset : offset + 4] = 0

    return run


def tcgen05_mma(ins: Instruction, scope: Scope) -> Run:
    """D (+)= A B^T, 128 rows a CTA; of a pair each CTA has its rows of A and half of the rows of B. See `idesc` below."""
    from .machine import Async

    to, read_x, read_w = scope.address(str(ins.operands[0])), scope.get(ins.operands[1], "u64"), scope.get(ins.operands[2], "u64")
    about, adds = scope.get(ins.operands[3], "u32"), scope.get(ins.operands[-1], "pred")
    ctas, machine = _group(ins), scope.machine

    def run(w: Warp, mask: np.ndarray) -> None:
        (lane,) = np.flatnonzero(mask)
        # Instruction descriptor: D fp32 at 4, A and B at 7 and 10 (0: fp16, 1: bf16), N / 8 at 17, M / 16 at 24.
        idesc = int(about(w)[lane])
        kind, n, m = {0: "f16", 1: "bf16"}[idesc >> 7 & 7], (idesc >> 17 & 63) * 8, (idesc >> 24 & 31) * 16
        if idesc >> 4 & 3 != 1 or idesc >> 10 & 7 != idesc >> 7 & 7 or m != 128 * ctas or w.rank % ctas:
            raise Violation(f"an instruction descriptor {idesc:#x} that is not understood, on CTA {w.rank}")
        column, more = int(to(w)[lane]), bool(adds(w)[lane])
        x_at, w_at = int(read_x(w)[lane]) & (2**64 - 1), int(read_w(w)[lane]) & (2**64 - 1)
        pair = machine.ctas[w.rank : w.rank + ctas]

        def multiply() -> None:
            y = np.concatenate([_floats(c.shared.seen(matrix_at(w_at, n // ctas, True)), kind) for c in pair])
            for c in pair:
                x = _floats(c.shared.seen(matrix_at(x_at, 128, True)), kind)
                sums = c.shared.tensor[:, column : column + n]
                with np.errstate(all="ignore"):
                    sums[:] = x @ y.T + (sums if more else 0)

        machine.start(Async("product", w.number, multiply), machine.ctas[w.rank].tensor_work)

    return run


def tcgen05_commit(ins: Instruction, scope: Scope) -> Run:
    """An arrival at a barrier, of each CTA in a mask, when the products before have ended."""
    from .machine import Async

    address = scope.address(str(ins.operands[0]))
    mask_of = scope.get(ins.operands[1], "u16") if len(ins.operands) > 1 else None
    machine = scope.machine

    def run(w: Warp, mask: np.ndarray) -> None:
        (lane,) = np.flatnonzero(mask)
        at = int(address(w)[lane])
        ranks = [r for r in range(machine.cluster) if int(mask_of(w)[lane]) >> r & 1] if mask_of else [at >> RANK]

        def arrive() -> None:
            for rank in ranks:
                machine.ctas[rank].shared.barrier(at & 0xFFFFFF).arrive()

        machine.start(Async("product", w.number, arrive), machine.ctas[w.rank].tensor_work)

    return run


def tcgen05_load(ins: Instruction, scope: Scope) -> Run:
    """32x32b: lane i of a warp takes columns of row 32 (number mod 4) + i.

    Compilers move what only renames registers in front of the wait, so the values are there at once; what is checked is
    that no arrival gives the memory back before it.
    """
    put, address = [scope.put(r) for r in ins.operands[0]], scope.address(str(ins.operands[1]))
    if ".32x32b." not in ins.op:
        raise NotImplementedError(ins.op)

    def run(w: Warp, mask: np.ndarray) -> None:
        if not mask.all():
            raise Violation("a part of a warp at tcgen05.ld")
        at = int(address(w)[0])
        first, column = at >> 16, at & 0xFFFF
        if first != 32 * (w.number % 4):
            raise Violation(f"warp {w.number} reads rows from {first} of tensor memory")
        for j, p in enumerate(put):
            p(w, mask, w.shared.tensor[first : first + 32, column + j])
        w.unread = True

    return run


def tcgen05_wait(ins: Instruction, scope: Scope) -> Run:
    def run(w: Warp, mask: np.ndarray) -> None:
        w.unread = False

    return run
