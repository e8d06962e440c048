"""The interpreter of PTX: what it refuses, and tables of the ISA against other ways to say them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from .ptx import LATE, Deadlock, Machine, TensorMap, Violation, parse
from .ptx.instructions import _rounded
from .ptx.memory import BASE, Barrier, Shared, matrix_at, swizzled

HEAD = """
.visible .entry kernel(
	.param .align 64 .b8 kernel_param_0[128],
	.param .align 64 .b8 kernel_param_1[128],
	.param .u32 kernel_param_2
)
.reqntid 64, 1, 1
{
	.reg .pred 	%p<9>;
	.reg .b32 	%r<9>;
	.reg .b64 	%rd<9>;
	mov.b32 	%r1, __dynamic_shmem__0;
	mov.u32 	%r2, %tid.x;
	mov.b64 	%rd1, kernel_param_0;
	mov.b64 	%rd2, kernel_param_1;
"""


def run(body: str, seed: int = 0, cluster: int = 1) -> np.ndarray:
    """A kernel of two warps that moves an 8 x 16 box of parameter 0 to parameter 1."""
    data = np.arange(8 * 16, dtype=np.uint16).reshape(8, 16)
    to = np.full_like(data, 9999)
    Machine(parse(HEAD + body + "\tret;\n}\n"), {0: TensorMap(data, (8, 16), 32), 1: TensorMap(to, (8, 16), 32), 2: 5}, cluster, cluster, seed).run()
    return to


INIT = """
	setp.ne.b32 %p1, %r2, 0;
	@%p1 bra NOT_FIRST;
	mov.b32 %r3, 1;
	mbarrier.init.shared.b64 [%r1], %r3;
	mbarrier.arrive.expect_tx.shared.b64 %rd3, [%r1], 256;
	cp.async.bulk.tensor.2d.shared::cta.global.tile.mbarrier::complete_tx::bytes [%r1+1024], [%rd1, {0, 0}], [%r1];
NOT_FIRST:
	bar.sync 0;
"""
WAIT = """
	{ .reg .pred P1;
	AGAIN: mbarrier.try_wait.parity.shared.b64 P1, [%r1], 0;
	@P1 bra DONE;
	bra AGAIN;
	DONE: }
"""
STORE = """
	@%p1 bra END;
	cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%rd2, {0, 0}], [%r1+1024];
	cp.async.bulk.commit_group;
	cp.async.bulk.wait_group.read 0;
END:
"""


@pytest.mark.parametrize("seed", range(len(LATE)))
def test_a_box_is_copied_and_only_after_it_came(seed: int) -> None:
    assert (run(INIT + WAIT + STORE, seed) == np.arange(128).reshape(8, 16)).all()


def test_a_wait_that_is_missing_is_seen() -> None:
    assert (run(INIT + STORE) != np.arange(128).reshape(8, 16)).any()


@pytest.mark.parametrize(("what", "said"), [(INIT.replace("256", "257") + WAIT, "mbarrier.try_wait"), ("\tbar.sync 0, 96;\n", "bar.sync")])
def test_what_never_goes_on_is_a_deadlock(what: str, said: str) -> None:
    with pytest.raises(Deadlock, match=said):
        run(what)


@pytest.mark.parametrize(
    ("what", "said"),
    [
        (INIT + WAIT + "\tst.shared.b32 [%r1+1024], %r2;\n\tbar.sync 0;\n" + STORE, "no fence.proxy.async"),
        (WAIT, "no barrier was made"),
        (INIT.replace("[%r1+1024]", "[%r1+1040]"), "not aligned"),
        ("\tsetp.lt.u32 %p1, %r2, 3;\n\t@%p1 bra L;\n\tbar.sync 0;\nL:\n", "29 lanes"),
        (INIT.replace("NOT_FIRST:", "\tmbarrier.arrive.shared.b64 %rd3, [%r1], 1;\nNOT_FIRST:"), "arrivals"),
    ],
)  # fmt: skip
def test_what_is_not_defined_is_refused(what: str, said: str) -> None:
    with pytest.raises(Violation, match=said):
        run(what)


def test_an_instruction_that_is_not_known_is_refused() -> None:
    for line in ("vote.sync.any.pred %p1, %p2, -1", "mul24.lo.s32 %r3, %r2, %r2", "add.sat.s32 %r3, %r2, %r2"):
        with pytest.raises(NotImplementedError, match=line.split()[0]):
            run(f"\t{line};\n")


@given(st.floats(width=32, allow_nan=True, allow_infinity=True))
def test_rounding_is_that_of_torch(x: float) -> None:
    for kind, dtype in (("bf16", torch.bfloat16), ("f16", torch.float16)):
        with np.errstate(over="ignore"):
            mine = _rounded(np.full(1, x, np.float32), kind).astype(np.uint16).view(np.int16)
        found, want = torch.from_numpy(mine).view(dtype), torch.tensor([x], dtype=torch.float32).to(dtype)
        assert torch.equal(found.isnan(), want.isnan()) and torch.equal(found.nan_to_num(0.0, 1.0, 2.0), want.nan_to_num(0.0, 1.0, 2.0))


@given(
    p=st.integers(0, 2**32 - 1), q=st.integers(0, 2**32 - 1),
    op=st.sampled_from(("add.s32", "sub.s32", "mul.lo.s32", "mul.hi.u32", "mul.hi.s32", "div.s32", "rem.s32", "min.s32", "shr.s32", "shr.u32", "shl.b32", "and.b32")),
)  # fmt: skip
def test_whole_numbers_are_those_of_python(p: int, q: int, op: str) -> None:
    """A kernel stores the result in shared memory, where it is read."""
    name, signed = op.split(".")[0], op.endswith("s32")
    q = q % 32 if name in ("shr", "shl") else q
    x, y = (v - 2**32 if signed and v >= 2**31 else v for v in (p, q))
    y = y if y or name not in ("div", "rem") else 1
    towards_zero = int(abs(x) // max(abs(y), 1)) * (1 if (x < 0) == (y < 0) else -1)
    want = {"add": x + y, "sub": x - y, "mul": x * y >> (32 if ".hi" in op else 0), "div": towards_zero,
            "rem": x - towards_zero * y, "min": min(x, y), "shr": x >> (y & 31), "shl": x << (y & 31), "and": x & y}[name]  # fmt: skip
    body = f"\tmov.b32 %r4, {x};\n\tmov.b32 %r5, {y};\n\t{op} %r6, %r4, %r5;\n\tst.shared.b32 [%r1], %r6;\n"
    machine = Machine(parse(HEAD + body + "\tret;\n}\n"), {}, 1, 1, 0)
    machine.run()
    assert machine.ctas[0].shared.data.view(np.uint32)[BASE // 4] == want % 2**32


@pytest.mark.parametrize("span", [32, 64, 128])
@pytest.mark.parametrize("blackwell", [False, True])
def test_tma_writes_what_a_descriptor_reads(span: int, blackwell: bool) -> None:
    """Two tables of the ISA that have to agree: the swizzle of copies, and that of operands."""
    cols = span // 2
    data = np.random.default_rng(span).integers(0, 2**16, (20, cols), np.uint16)
    shared = Shared()
    TensorMap(data, (24, cols), span).load(shared, BASE, 0, 0)
    kind = ({128: 2, 64: 4, 32: 6}[span] << 61 | 1 << 46) if blackwell else {128: 1, 64: 2, 32: 3}[span] << 62
    for k in range(0, cols, 16):
        descriptor = kind | (8 * span // 16) << 32 | (BASE + 2 * k) >> 4
        found = shared.seen(matrix_at(descriptor, 24, blackwell))
        assert (found[:20] == data[:, k : k + 16]).all() and (found[20:] == 0).all()
    at = np.arange(0, 4096, 16)
    assert (np.sort(swizzled(at, span)) == at).all() and (swizzled(swizzled(at, span), span) == at).all()


def test_a_barrier_turns_when_arrivals_and_bytes_are_there() -> None:
    barrier = Barrier(2, 2)
    barrier.arrive()
    barrier.expect(8)
    barrier.arrive()
    assert barrier.phase == 0
    barrier.complete(8)
    assert barrier.phase == 1 and barrier.pending == 2
