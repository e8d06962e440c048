"""The harness of kernels' tests: each of its checks finds what it is for, and passes what is right."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from heddle.runtime.lib import kernels

from . import harness
from .harness import Fault
from .scale import SCALE


def poisoned_scale(module: ModuleType) -> None:
    """`scale` of two rows of 15 columns, which a block of 16 does not end with."""
    x = harness.laid(harness.values((2, 15), torch.float32, 0), "offset")
    with harness.poisoned():
        y = module.scale(x, 3.0)
    harness.worst(y, x.double() * 3.0, x * 3.0, harness.floor(x.double() * 3.0, x.dtype, 1))


@given(rows=harness.sizes(4), cols=st.integers(0, 16), how=harness.layouts(), dtype=harness.dtypes(), seed=harness.seeds())
def test_a_right_kernel_passes(rows: int, cols: int, how: str, dtype: torch.dtype, seed: int) -> None:
    x = harness.laid(harness.values((rows, cols), dtype, seed), how)
    if x.numel() and x.stride(1) != 1:  # this small kernel holds rows of neighbours only
        x = harness.laid(x, "sliced")
    with harness.poisoned():
        y = harness.load(SCALE).scale(x, -2.5)
    want = x.double() * -2.5
    assert harness.worst(y, want, x * -2.5, harness.floor(want, dtype, 1)) <= 1


FAULTS = {
    "the last column is not written": Fault("x * a, mask=cols < C", "x * a, mask=cols < C - 1"),
    "a store behind the row": Fault("x * a, mask=cols < C", "x * a, mask=cols < C + 1"),
    "a store before the tensor": Fault("y_ptr + row * C + cols", "y_ptr + row * C + cols - 1"),
    "a load behind the tensor": Fault("mask=cols < C, other=0.0).to(tl.float32)", "mask=cols >= 0, other=0.0).to(tl.float32)"),
    "a row too few": Fault("(rows,)", "(rows - 1,)"),
    "a wrong factor": Fault("x * a", "x * a * 1.00001"),
}


def test_faults_of_each_kind_are_found() -> None:
    # a load behind a row is another row's value and multiplied with nothing: the one fault that changes no result
    found = harness.survivors(SCALE, FAULTS, poisoned_scale)
    assert found == ["a load behind the tensor"], found


def test_a_fault_that_is_badly_planted_is_no_fault_found() -> None:
    with pytest.raises(ValueError, match="there is no `z`"):
        harness.plant("x = y", "z", "w")
    with pytest.raises(ValueError, match="no fault"):
        harness.plant("x = y", "x", "x")
    with pytest.raises(NameError):
        harness.survivors(SCALE, {"a typing mistake": Fault("return y", "return yy")}, poisoned_scale)
    with pytest.raises(AssertionError):
        harness.survivors(harness.plant(SCALE, "x * a", "x + a"), {}, poisoned_scale)


@given(rows=st.integers(0, 3), cols=st.integers(1, 5), dtype=st.sampled_from((*harness.DTYPES, torch.int32, torch.int64, torch.uint8)))
def test_memory_is_as_it_was_asked_for(rows: int, cols: int, dtype: torch.dtype) -> None:
    like = torch.zeros(1)
    with harness.poisoned():
        made = kernels.empty((rows, cols), like, dtype)
        assert made.shape == (rows, cols) and made.dtype == dtype and made.is_contiguous() and not made.storage_offset()
        assert made.data_ptr() % 16 == 0 or not rows
        if dtype.is_floating_point:
            assert made.isnan().all()
        made.zero_()
    if rows:
        with pytest.raises(AssertionError, match=r"not written at \(0, 0\)"), harness.poisoned():
            kernels.empty((rows, cols), like, dtype)


def test_memory_of_shapes_only_is_not_looked_at() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with harness.poisoned():
        assert kernels.empty((2, 3), torch.empty(1, device="meta")).is_meta
        with FakeTensorMode():
            kernels.empty((2, 3), torch.empty(1))
    assert kernels.empty.__module__ == kernels.__name__


def test_what_fails_inside_is_not_hidden_by_what_was_not_written() -> None:
    def fails() -> None:
        with harness.poisoned():
            kernels.empty((2,), torch.zeros(1))
            raise KeyError

    with pytest.raises(KeyError):
        fails()
    assert kernels.empty.__module__ == kernels.__name__


# --- the rule of error --------------------------------------------------------------------------------------------------


@given(seed=harness.seeds(), over=st.sampled_from((0.5, 0.99, 1.01, 3.0)), each=st.booleans())
def test_the_limit_is_twice_eager_and_the_floor(seed: int, over: float, each: bool) -> None:
    want = harness.values((3, 4), torch.float64, seed)
    lost = harness.values((3, 4), torch.float64, seed + 1).abs() + 0.1
    limit = 2 * (lost if each else lost.max()) + 0.25
    got = want.clone()
    got[1, 2] += over * (limit[1, 2] if each else limit)
    if over > 1:
        with pytest.raises(AssertionError, match=r"at \(1, 2\)"):
            harness.worst(got, want, want + lost, 0.25, each=each)
    else:
        assert harness.worst(got, want, want + lost, 0.25, each=each) == pytest.approx(over)


def test_an_eager_result_that_is_not_finite_excuses_nothing() -> None:
    want, got = torch.zeros(3, dtype=torch.float64), torch.tensor([0.0, 0.5, 0.0])
    for bad in (math.nan, math.inf):
        with pytest.raises(AssertionError):
            harness.worst(got, want, torch.tensor([9.0, bad, 9.0]), 0.1)
    with pytest.raises(AssertionError):
        harness.worst(got, want, None, 0.1)
    assert harness.worst(got, want, torch.tensor([9.0, 9.0, 9.0]), 0.1) < 1


@pytest.mark.parametrize("got", [math.nan, math.inf, -math.inf, 1.0])
@pytest.mark.parametrize("want", [math.nan, math.inf, -math.inf, 1.0])
def test_nan_and_infinity_have_to_be_those_of_the_reference(got: float, want: float) -> None:
    wanted = torch.tensor([1.0, want], dtype=torch.float64)
    if got == want or (math.isnan(got) and math.isnan(want)):
        assert harness.worst(torch.tensor([1.0, got]), wanted, wanted, 0.0) == 0
    else:
        with pytest.raises(AssertionError, match=r"at \(1,\)"):
            harness.worst(torch.tensor([1.0, got]), wanted, wanted, 9.0)


def test_shapes_are_compared_and_nothing_is_equal_to_nothing() -> None:
    with pytest.raises(AssertionError, match="shape"):
        harness.worst(torch.zeros(1, 2), torch.zeros(2).double(), None, 1.0)
    assert harness.worst(torch.zeros(0, 2), torch.zeros(0, 2).double(), torch.zeros(0, 2), 1.0) == 0


@given(seed=harness.seeds(), dtype=harness.dtypes(), scale=harness.scales(), each=st.booleans())
def test_the_floor_holds_one_rounding_and_not_three(seed: int, dtype: torch.dtype, scale: float, each: bool) -> None:
    want = harness.values((40,), torch.float64, seed, scale)
    assert harness.worst(want.to(dtype), want, None, harness.floor(want, dtype, 0, each=each)) <= 1
    wrong = want + 3 * harness.roundoff(dtype) * (want.abs().max() + torch.finfo(dtype).smallest_normal)
    with pytest.raises(AssertionError):
        harness.worst(wrong, want, None, harness.floor(want, dtype, 0, each=each))


# --- what is drawn ------------------------------------------------------------------------------------------------------


@given(shape=st.lists(st.integers(0, 4), max_size=3), how=harness.layouts(),
       dtype=st.sampled_from((*harness.DTYPES, torch.int32, torch.bool)), seed=harness.seeds())  # fmt: skip
def test_a_tensor_lies_elsewhere_with_the_same_values(shape: list[int], how: str, dtype: torch.dtype, seed: int) -> None:
    tensor = harness.values(shape, torch.float32, seed, 30.0).to(dtype)
    found = harness.laid(tensor, how)
    assert torch.equal(found, tensor) and found.dtype == dtype
    if tensor.numel() > 1 and tensor.ndim > 1 and min(shape) > 1:
        assert found.is_contiguous() == (how in ("contiguous", "offset"))
    if tensor.numel() and tensor.ndim and dtype.is_floating_point:
        whole = torch.as_strided(found, (found.untyped_storage().nbytes() // dtype.itemsize,), (1,), 0)
        assert int(whole.isnan().sum()) == len(whole) - tensor.numel()


@given(length=st.integers(0, 40), data=st.data())
def test_documents_fill_the_rows(length: int, data: st.DataObject) -> None:
    found = data.draw(harness.documents(length))
    assert sum(found) == length and all(n > 0 for n in found)


def test_sizes_are_about_a_block() -> None:
    drawn: set[int] = set()

    @given(size=harness.sizes(16))
    def collect(size: int) -> None:
        drawn.add(size)

    collect()
    assert {0, 1, 15, 16, 17, 32, 33} <= drawn


def test_values_have_zeros_and_do_not_change() -> None:
    once, again = (harness.values((4000,), torch.float32, 7) for _ in range(2))
    assert torch.equal(once, again) and (once == 0).any() and once.abs().max() > 8
    assert not torch.equal(once, harness.values((4000,), torch.float32, 8))


# --- golden files -------------------------------------------------------------------------------------------------------


def test_a_golden_file_is_compared_and_written_on_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "GOLDEN", tmp_path / "golden")
    with pytest.raises(AssertionError, match="--update-golden writes it"):
        harness.agrees_with_golden("scale", SCALE, update=False)
    harness.agrees_with_golden("scale", SCALE, update=True)
    harness.agrees_with_golden("scale", SCALE, update=False)
    with pytest.raises(AssertionError, match="not what is generated"):
        harness.agrees_with_golden("scale", SCALE + "\n", update=False)


def test_every_golden_file_belongs_to_a_test(golden: Callable[[str, str], None]) -> None:
    tests = "".join(p.read_text(encoding="utf-8") for p in Path(__file__).parent.glob("test_*.py"))
    for path in harness.GOLDEN.glob("*.py"):
        assert f'golden("{path.stem}"' in tests, f"no test compares {path.name}"


def test_a_generated_file_names_no_place_or_day() -> None:
    harness.stable(SCALE)
    for wrong in ("at 0x7fddb1dd5f80", "of 2024-11-28", "/home/me/x.spec"):
        with pytest.raises(AssertionError):
            harness.stable(f"{SCALE}# {wrong}\n")


def test_one_text_is_one_module() -> None:
    assert harness.load(SCALE) is harness.load(SCALE)
    assert harness.load(SCALE) is not harness.load(SCALE + "\n")
