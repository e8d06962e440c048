"""The repaired interpreter: casts are those of torch, products are of what is stored, bf16 is not computed with."""

from __future__ import annotations

import struct
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from triton.runtime.errors import InterpreterError

from heddle.lowering.target import TARGETS
from heddle.runtime.ahead import build
from heddle.runtime.lib import kernels

from . import harness
from .product import PRODUCT

CASTS = '''"""y = x in the type of y. n elements; one program owns all."""

import triton
import triton.language as tl


@triton.jit
def cast_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs, mask=offs < n, other=0.0)
    tl.store(y_ptr + offs, x.to(y_ptr.dtype.element_ty), mask=offs < n)


@triton.jit
def store_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.store(y_ptr + offs, tl.load(x_ptr + offs, mask=offs < n, other=0.0), mask=offs < n)


@triton.jit
def whole_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs, mask=offs < n, other=0.0).to(tl.int32)
    tl.store(y_ptr + offs, x.to(y_ptr.dtype.element_ty), mask=offs < n)


@triton.jit
def dot_kernel(a_ptr, b_ptr, y_ptr, N: tl.constexpr):
    rows, cols = tl.arange(0, N)[:, None], tl.arange(0, N)[None, :]
    a = tl.load(a_ptr + rows * N + cols)
    b = tl.load(b_ptr + rows * N + cols)
    tl.store(y_ptr + rows * N + cols, tl.dot(a, tl.trans(b)))
'''
LOW = (torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2)
BLOCK = 64


def bits(value: int) -> float:
    """The fp32 number of these bits."""
    return struct.unpack("<f", struct.pack("<I", value))[0]


@st.composite
def singles(draw: st.DrawFn) -> float:
    """Any fp32 number: of drawn bits, half way between two bf16 numbers, or one at which types differ."""
    how = draw(st.sampled_from(("bits", "tie", "special", "small")))
    if how == "tie":
        upper = draw(st.integers(0, 0xFFFF))
        return bits(upper << 16 | 0x8000 | draw(st.sampled_from((0, 1))))
    if how == "special":
        # the largest of each type and what rounds up beyond it, its smallest normals and subnormals
        edges = [torch.finfo(d) for d in (torch.float32, *LOW)]
        near = [v * f for e in edges for v in (e.max, e.tiny, e.tiny * e.eps) for f in (1.0, 0.5, 0.75, 1.03125, 1.0625)]
        return draw(st.sampled_from([0.0, -0.0, float("inf"), float("-inf"), float("nan"), *near, *(-v for v in near)]))
    if how == "small":
        return draw(st.integers(-600, 600)) / 16.0
    return bits(draw(st.integers(0, 2**32 - 1)))


def run(name: str, x: Tensor, to: torch.dtype) -> Tensor:
    y = torch.zeros(x.shape, dtype=to)
    getattr(harness.load(CASTS), name)[(1,)](x, y, x.numel(), BLOCK=BLOCK)
    return y


def same(got: Tensor, want: Tensor) -> None:
    """Equal bits, with one NaN for all."""
    got, want = got.float(), want.float()
    both = (got.view(torch.int32) == want.view(torch.int32)) | (got.isnan() & want.isnan())
    assert both.all(), (got[~both], want[~both])


@pytest.mark.parametrize("kernel", ["cast_kernel", "store_kernel"])
@given(values=st.lists(singles(), min_size=1, max_size=BLOCK), low=st.sampled_from(LOW))
def test_a_cast_from_fp32_is_that_of_torch(kernel: str, values: list[float], low: torch.dtype) -> None:
    x = torch.tensor(values, dtype=torch.float32)
    same(run(kernel, x, low), x.to(low))


@given(codes=st.lists(st.integers(0, 2**16 - 1), min_size=1, max_size=BLOCK), low=st.sampled_from(LOW),
       to=st.sampled_from((torch.float32, torch.bfloat16, torch.float16)))  # fmt: skip
def test_a_cast_of_every_low_number_is_that_of_torch(codes: list[int], low: torch.dtype, to: torch.dtype) -> None:
    whole = torch.tensor(codes, dtype=torch.int32).to(torch.uint16 if low.itemsize == 2 else torch.uint8)
    x = whole.view(low)
    same(run("cast_kernel", x, to), x.to(to))


@given(values=st.lists(st.integers(-1000, 1000), min_size=1, max_size=BLOCK), low=st.sampled_from((torch.bfloat16, torch.float16)))
def test_whole_numbers_are_cast_by_their_value(values: list[int], low: torch.dtype) -> None:
    x = torch.tensor(values, dtype=torch.float32)
    same(run("whole_kernel", x, low), x.int().to(low))
    same(run("whole_kernel", x.to(low), torch.float32), x.to(low).int().float())


@settings(max_examples=20)
@given(seed=harness.seeds(), dtype=st.sampled_from((torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn)))
def test_a_dot_multiplies_what_is_stored_and_sums_in_fp32(seed: int, dtype: torch.dtype) -> None:
    a, b = (harness.values((16, 16), torch.float32, seed + i).to(dtype) for i in range(2))
    y = torch.zeros(16, 16)
    harness.load(CASTS).dot_kernel[(1,)](a, b, y, N=16)
    want = a.double() @ b.double().T
    # the products of two low numbers are exact in fp32, the sum of 16 of them rounds at most 16 times
    size = a.double().abs() @ b.double().abs().T
    assert ((y.double() - want).abs() <= 17 * 2**-24 * size).all()


ARITHMETIC = '''"""y = one expression of x and x, in the type that is stored. n elements; one program owns all."""

import triton
import triton.language as tl


@triton.jit
def wrong_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs, mask=offs < n, other=0.0)
    tl.store(y_ptr + offs, EXPRESSION, mask=offs < n)
'''
EXPRESSIONS = (
    "x + x", "x - x", "x * x", "x + 1.0", "2.0 * x", "-x", "x * 3", "tl.abs(x)", "tl.exp(x)", "tl.exp2(x)",
    "tl.log(x)", "tl.log2(x)", "tl.sqrt(x)", "tl.rsqrt(x)", "tl.sin(x)", "tl.cos(x)", "tl.erf(x)", "tl.floor(x)",
    "tl.ceil(x)", "tl.fma(x, x, x)", "tl.where(x > x, 1.0, 0.0)", "tl.where(x == x, 1.0, 0.0)",
    "tl.where(x != x, 1.0, 0.0)", "tl.where(x <= x, 1.0, 0.0)", "tl.sum(x, 0)", "tl.sigmoid(x)", "tl.sort(x)",
)  # fmt: skip
# These Triton casts to fp32 by itself, on hardware too.
ALLOWED = {
    "x / 3.0": lambda x: (x / 3.0), "tl.maximum(x, 1.75)": lambda x: x.clamp(min=1.75), "tl.max(x, 0)": lambda x: x.max(),
    "tl.minimum(x, 1.75)": lambda x: x.clamp(max=1.75), "tl.min(x, 0)": lambda x: x.min(),
    "tl.cumsum(x, 0)": lambda x: x.cumsum(0), "tl.clamp(x, 1.0, 2.0)": lambda x: x.clamp(1.0, 2.0),
    "tl.where(x > 0.0, 1.0, 0.0)": lambda x: (x > 0).float(),
    "tl.where(offs > 1, x, 1.0)": lambda x: torch.cat([torch.ones(2), x[2:]]), "x": lambda x: x,
}  # fmt: skip


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_arithmetic_in_bf16_is_an_error_and_in_fp32_is_none(expression: str) -> None:
    wrong = harness.load(harness.plant(ARITHMETIC, "EXPRESSION", expression)).wrong_kernel
    x = torch.tensor([0.5, 1.5, 2.5, 3.0], dtype=torch.bfloat16)
    with pytest.raises(InterpreterError, match="fp32"):
        wrong[(1,)](x, torch.zeros(4), 4, BLOCK=4)
    right = harness.load(
        harness.plant(ARITHMETIC, "EXPRESSION", expression).replace("other=0.0)\n", "other=0.0).to(tl.float32)\n")
    )
    found: Any = torch.full((4,), float("nan"))
    right.wrong_kernel[(1,)](x, found, 4, BLOCK=4)
    assert found.isfinite().all()


@pytest.mark.parametrize("expression", ALLOWED)
def test_what_triton_casts_or_only_moves_is_right(expression: str) -> None:
    kernel = harness.load(harness.plant(ARITHMETIC, "EXPRESSION", expression)).wrong_kernel
    x, y = torch.tensor([0.5, 1.5, -2.5, 3.140625]), torch.full((4,), float("nan"))
    kernel[(1,)](x.bfloat16(), y, 4, BLOCK=4)
    want = ALLOWED[expression](x)
    # a division in fp32, or in bf16: the interpreter follows Triton's semantics of the version at hand
    near = 2.0**-8 if "/" in expression else 0.0
    assert torch.allclose(y, want.expand(4), rtol=near, atol=0.0)


def test_what_ran_here_can_still_be_built() -> None:
    """Functions of Triton's own, as `tl.sum`, are patched while a kernel runs, and must not stay so."""
    module = harness.load(PRODUCT)
    module.product(torch.ones(2, 16), torch.ones(2, 16))
    with kernels.launches() as told:
        module.product(*(torch.empty(64, 64, device="meta", dtype=torch.bfloat16) for _ in range(2)))
    assert [built.problems for built in build(told, TARGETS["sm_90"])] == [(), ()]


LOOP = '''"""y = exp(y + 1000). One program walks along n of them."""

import triton
import triton.language as tl


@triton.jit
def loop_kernel(y_ptr, n):
    first = tl.program_id(0) * n
    for i in tl.range(first, tl.minimum(first + n, n + n), num_stages=2):
        tl.store(y_ptr + i, tl.exp(tl.load(y_ptr + i) + 1000.0))
'''


@pytest.mark.filterwarnings("error")
def test_a_loop_has_bounds_that_are_computed_and_infinity_is_a_value() -> None:
    y = torch.zeros(6)
    harness.load(LOOP).loop_kernel[(2,)](y, 3)
    assert y.isinf().all()
