"""What each instruction does to the lanes of a warp. One that is not here is an error when a kernel is compiled."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from . import moves, tensor
from .memory import ALL, whole
from .text import Instruction

if TYPE_CHECKING:
    from .machine import Machine, Warp

Run = Callable[["Warp", np.ndarray], Any]
_KINDS = {"u": np.uint64, "s": np.int64, "b": np.uint64}


class Scope:
    """Reads and writes operands of one kernel; values are int64 or float32 by type."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine

    def get(self, word: Any, kind: str) -> Callable[[Warp], np.ndarray]:
        """A reader of an operand as `kind`: pred, s32, b64, f32, bf16, .."""
        read = self._bits(word)
        if kind == "pred":
            return lambda w: read(w).astype(bool)
        if kind == "f32":
            return lambda w: read(w).astype(np.uint32).view(np.float32)
        if kind == "bf16":
            return lambda w: (read(w).astype(np.uint32) << 16).view(np.float32)
        if kind == "f16":
            return lambda w: read(w).astype(np.uint16).view(np.float16).astype(np.float32)
        if kind == "f32x2":
            return lambda w: read(w).astype(np.uint64).view(np.float32).reshape(-1, 2)
        plain = np.dtype(f"{'i' if kind[0] == 's' else 'u'}{int(kind[1:]) // 8}")
        unsigned = np.dtype(f"u{plain.itemsize}")
        return lambda w: read(w).astype(unsigned).view(plain).astype(np.int64)

    def _bits(self, word: Any) -> Callable[[Warp], np.ndarray]:
        machine = self.machine
        if re.fullmatch(r"-?\d+|0x[0-9a-fA-F]+", word):
            value = np.full(32, int(word, 0) & (2**64 - 1), np.uint64)
            return lambda w: value
        if re.fullmatch(r"0f[0-9A-F]{8}", word):
            single = np.full(32, int(word[2:], 16), np.uint64)
            return lambda w: single
        if word.startswith("%") and (word.split(".")[0].rstrip("0123456789") in ("%tid", "%ctaid", "%nctaid") or word in ("%cluster_ctarank", "%laneid")):
            return lambda w: machine.special(w, word)
        if word in machine.program.widths or word.rstrip("0123456789") in machine.program.widths:
            return lambda w: machine.read(w, word)
        return lambda w: np.full(32, machine.symbol(w, word), np.uint64)

    def put(self, word: str) -> Callable[[Warp, np.ndarray, Any], None]:
        """A writer of a register: whole numbers are cut to its width, fp32 gives its bits."""
        if word == "_":
            return lambda w, mask, value: None
        machine = self.machine

        def write(w: Warp, mask: np.ndarray, value: Any) -> None:
            register = machine.read(w, word)
            value = np.asarray(value)
            if value.dtype == np.float32 and value.ndim == 2:
                value = np.ascontiguousarray(value).view(np.uint64)[:, 0]
            elif value.dtype == np.float32:
                value = value.view(np.uint32) if value.ndim else np.float32(value).view(np.uint32)
            if mask is ALL:
                register[:] = value.astype(register.dtype)
            else:
                np.copyto(register, value.astype(register.dtype), where=mask, casting="unsafe")

        return write

    def address(self, word: str) -> Callable[[Warp], np.ndarray]:
        base, _, offset = word.strip("[]").replace(" ", "").partition("+")
        read, more = self._bits(base), int(offset or 0)
        return lambda w: read(w).astype(np.int64) + more


def compiled(ins: Instruction, machine: Machine) -> Run:
    """An instruction as a function of a warp and its active lanes: a label's place to go on at, None, or BLOCK."""
    scope = Scope(machine)
    words = ins.words
    for length in range(min(5, len(words)), 0, -1):
        make = _TABLE.get(".".join(words[:length]))
        if make is not None:
            return make(ins, scope)
    raise NotImplementedError(f"`{ins.op}` is not interpreted: {ins.line}")


def _kind(ins: Instruction) -> str:
    return ins.words[-1]


# What may stand between the name of an operation and its types: of what rounds as numpy does, or keeps the low bits.
_PLAIN = {"rn", "ftz", "approx", "full", "lo", "wide", "hi", "bf16", "f16", "f32"}


def _binary(do: Callable[..., Any]) -> Callable[[Instruction, Scope], Run]:
    def make(ins: Instruction, scope: Scope) -> Run:
        kind = _kind(ins)
        if not set(ins.words[1:-1]) <= _PLAIN:
            raise NotImplementedError(f"`{ins.op}` is not interpreted: {ins.line}")
        kinds = [kind] * (len(ins.operands) - 1)
        if ".f32.bf16" in ins.op or ".f32.f16" in ins.op:  # the first is narrow, the sum is not
            kinds = [kind, "f32"]
        read, write = [scope.get(o, k) for o, k in zip(ins.operands[1:], kinds, strict=True)], scope.put(str(ins.operands[0]))

        def run(w: Warp, mask: np.ndarray) -> None:
            with np.errstate(all="ignore"):
                write(w, mask, do(*[r(w) for r in read]))

        return run

    return make


def _high(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """The upper half of a product of 32-bit numbers; those without a sign may have a product beyond int64."""
    if (p < 0).any() or (q < 0).any():
        return (p * q) >> 32
    return (p.astype(np.uint64) * q.astype(np.uint64)) >> np.uint64(32)


def _divide(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    if p.dtype == np.float32:
        return p / q
    return (np.sign(p) * np.sign(q) * (np.abs(p) // np.maximum(np.abs(q), 1))).astype(np.int64)


def _remainder(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    return p - _divide(p, q) * q


def _shift(ins: Instruction, scope: Scope) -> Run:
    kind = _kind(ins)
    read, by, write = scope.get(ins.operands[1], kind), scope.get(ins.operands[2], "u32"), scope.put(str(ins.operands[0]))
    left, bits = ins.op.startswith("shl"), int(kind[1:])

    def run(w: Warp, mask: np.ndarray) -> None:
        value, n = read(w), np.minimum(by(w), bits - (kind[0] == "s"))
        if bits == 64:
            plain = value if kind[0] == "s" else value.view(np.uint64)
            write(w, mask, (plain << n.astype(plain.dtype)) if left else (plain >> n.astype(plain.dtype)))
        else:
            write(w, mask, value << n if left else value >> n)

    return run


_COMPARE = {"eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
            "equ": lambda p, q: ~(p < q) & ~(p > q), "neu": lambda p, q: ~(p == q), "ltu": lambda p, q: ~(p >= q),
            "leu": lambda p, q: ~(p > q), "gtu": lambda p, q: ~(p <= q), "geu": lambda p, q: ~(p < q)}  # fmt: skip


def _setp(ins: Instruction, scope: Scope) -> Run:
    do, kind = _COMPARE[ins.words[1]], _kind(ins)
    p, q, write = scope.get(ins.operands[1], kind), scope.get(ins.operands[2], kind), scope.put(str(ins.operands[0]))
    return lambda w, mask: write(w, mask, do(p(w), q(w)))


def _selp(ins: Instruction, scope: Scope) -> Run:
    kind = _kind(ins)
    p, q, c = scope.get(ins.operands[1], kind), scope.get(ins.operands[2], kind), scope.get(ins.operands[3], "pred")
    write = scope.put(str(ins.operands[0]))
    return lambda w, mask: write(w, mask, np.where(c(w), p(w), q(w)))


def _mov(ins: Instruction, scope: Scope) -> Run:
    """Also several registers to one and back."""
    to, of, kind = ins.operands[0], ins.operands[1], _kind(ins)
    if isinstance(of, tuple):
        part = int(kind[1:]) // len(of)
        read, write = [scope.get(o, f"u{part}") for o in of], scope.put(str(to))

        def pack(w: Warp, mask: np.ndarray) -> None:
            write(w, mask, sum((r(w).astype(np.uint64) << np.uint64(i * part) for i, r in enumerate(read)), np.uint64(0)))

        return pack
    if isinstance(to, tuple):
        part = int(kind[1:]) // len(to)
        one, each = scope.get(of, kind), [scope.put(t) for t in to]

        def unpack(w: Warp, mask: np.ndarray) -> None:
            bits = one(w).view(np.uint64)
            for i, put in enumerate(each):
                put(w, mask, (bits >> np.uint64(i * part)) & np.uint64((1 << part) - 1))

        return unpack
    read_one, write = scope.get(of, kind), scope.put(to)
    return lambda w, mask: write(w, mask, read_one(w))


def _rounded(value: np.ndarray, kind: str) -> np.ndarray:
    """Bits of fp32 values in a narrow type, to nearest, ties to even."""
    if kind == "f16":
        return value.astype(np.float16).view(np.uint16).astype(np.int64)
    bits = value.view(np.uint32).astype(np.int64)
    near = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(value), 0x7FFF, near)


def _cvt(ins: Instruction, scope: Scope) -> Run:
    words = [x for x in ins.words[1:] if x not in ("rn", "rni", "rzi", "satfinite", "ftz")]
    to, of = words
    write = scope.put(str(ins.operands[0]))
    if to in ("bf16x2", "f16x2"):
        high, low = scope.get(ins.operands[1], "f32"), scope.get(ins.operands[2], "f32")
        return lambda w, mask: write(w, mask, _rounded(high(w), to[:-2]) << 16 | _rounded(low(w), to[:-2]))
    read = scope.get(ins.operands[1], of)
    if to in ("bf16", "f16"):
        return lambda w, mask: write(w, mask, _rounded(read(w), to))
    return lambda w, mask: write(w, mask, read(w))


def _bra(ins: Instruction, scope: Scope) -> Run:
    target = scope.machine.program.labels[str(ins.operands[0])]
    return lambda w, mask: target


def _ret(ins: Instruction, scope: Scope) -> Run:
    def run(w: Warp, mask: np.ndarray) -> None:
        w.alive = w.alive & ~mask

    return run


def _nothing(ins: Instruction, scope: Scope) -> Run:
    return lambda w, mask: None


def _shfl(ins: Instruction, scope: Scope) -> Run:
    read, lane, write = scope.get(ins.operands[1], "b32"), scope.get(ins.operands[2], "u32"), scope.put(str(ins.operands[0]))

    def run(w: Warp, mask: np.ndarray) -> None:
        whole(mask, ins)
        write(w, mask, read(w)[lane(w)])

    return run


def _elect(ins: Instruction, scope: Scope) -> Run:
    leader, chosen = scope.put(str(ins.operands[0])), scope.put(str(ins.operands[1]))

    def run(w: Warp, mask: np.ndarray) -> None:
        whole(mask, ins)
        leader(w, mask, np.zeros(32, np.int64))
        chosen(w, mask, np.arange(32) == 0)

    return run


def _arith(name: str) -> Callable[..., Any]:
    return {"add": lambda p, q: p + q, "sub": lambda p, q: p - q, "mul": lambda p, q: p * q,
            "fma": lambda p, q, r: (p.astype(np.float64) * q + r).astype(np.float32),
            "mad": lambda p, q, r: p * q + r, "min": np.minimum, "max": np.fmax, "neg": lambda p: -p, "abs": np.abs,
            "and": lambda p, q: p & q, "or": lambda p, q: p | q, "xor": lambda p, q: p ^ q, "not": lambda p: ~p,
            "div": _divide, "rem": _remainder, "ex2": np.exp2, "rcp": lambda p: np.float32(1) / p}[name]  # fmt: skip


_TABLE: dict[str, Callable[[Instruction, Scope], Run]] = {
    **{n: _binary(_arith(n)) for n in ("add", "sub", "mul", "fma", "mad", "min", "max", "neg", "abs", "and", "or", "xor", "not",
                                       "div", "rem", "ex2", "rcp")},
    "mul.hi": _binary(_high), "shl": _shift, "shr": _shift, "setp": _setp, "selp": _selp, "mov": _mov, "cvt": _cvt, "bra": _bra, "ret": _ret,
    "cvta": _mov, "shfl.sync.idx": _shfl, "elect.sync": _elect, "ld": moves.load, "st.shared": moves.store,
    "ldmatrix": moves.matrices, "stmatrix": moves.matrices, "fence": moves.fence, "prefetch": _nothing, "setmaxnreg": _nothing,
    "bar.warp.sync": _nothing, "mbarrier.init": moves.barrier_init, "mbarrier.arrive": moves.arrive, "mbarrier.try_wait": moves.try_wait,
    "bar.sync": moves.bar_sync, "barrier.cluster": moves.cluster_barrier, "mapa": moves.mapa,
    "cp.async.bulk.tensor": tensor.copy, "cp.async.bulk.commit_group": tensor.commit_stores,
    "cp.async.bulk.wait_group": tensor.wait_stores, "wgmma.mma_async": tensor.wgmma, "wgmma.fence": _nothing,
    "wgmma.commit_group": tensor.commit_products, "wgmma.wait_group": tensor.wait_products,
    "tcgen05.mma": tensor.tcgen05_mma, "tcgen05.commit": tensor.tcgen05_commit, "tcgen05.ld": tensor.tcgen05_load,
    "tcgen05.wait::ld": tensor.tcgen05_wait, "tcgen05.alloc": tensor.tcgen05_alloc, "tcgen05.dealloc": _nothing,
    "tcgen05.relinquish_alloc_permit": _nothing,
}  # fmt: skip
