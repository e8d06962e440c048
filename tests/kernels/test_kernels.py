"""What generated kernels stand on: ops whose fake form is themselves, launches that are told, memory by shapes only."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from heddle.runtime.lib import kernels

from . import harness
from .scale import SCALE


def module() -> ModuleType:
    return harness.load(SCALE)


@given(rows=st.integers(0, 4), cols=st.integers(0, 9), dtype=harness.dtypes())
def test_the_fake_form_has_the_real_shapes(rows: int, cols: int, dtype: torch.dtype) -> None:
    x = harness.values((rows, cols), dtype, 0)
    real = module().scale(x, 2.0)
    with FakeTensorMode() as mode:
        fake = module().scale(mode.from_tensor(x), 2.0)
    assert (fake.shape, fake.dtype, fake.stride()) == (real.shape, real.dtype, real.stride())


@pytest.mark.parametrize("dtype", harness.DTYPES)
def test_an_op_passes_the_checks_of_torch_poisoned_or_not(dtype: torch.dtype) -> None:
    x = harness.laid(harness.values((3, 5), dtype, 1), "sliced").requires_grad_()
    torch.library.opcheck(module().scale_fwd, (x, 2.0))
    with harness.poisoned():
        torch.library.opcheck(module().scale_fwd, (x, 2.0))


def test_a_compiled_graph_holds_the_op_whole() -> None:
    x = harness.values((3, 5), torch.float32, 1).requires_grad_()
    compiled = torch.compile(module().scale, backend="aot_eager", fullgraph=True)
    (mine,) = torch.autograd.grad(compiled(x, 2.0).square().sum(), x)
    assert torch.equal(mine, torch.autograd.grad(module().scale(x, 2.0).square().sum(), x)[0])
    assert torch.equal(mine, 8.0 * x)


def test_launches_are_told_with_shapes_only_and_nothing_runs() -> None:
    x = torch.empty(6, 5, device="meta", dtype=torch.bfloat16)[::2]
    with kernels.launches() as told:
        y = module().scale(x, 2.0)
    (launch,) = told
    assert y.is_meta and y.shape == (3, 5)
    assert launch.kernel is module().scale_kernel and launch.grid == (3,) and launch.how == {"BLOCK": 16}
    assert launch.args[0] is x and launch.args[1] == 10 and launch.args[3:] == (5, 2.0)
    assert isinstance(launch.args[2], Tensor) and launch.args[2].dtype == torch.bfloat16


def test_launches_of_a_step_are_told_in_order_and_backward_is_one() -> None:
    x = torch.ones(2, 3, requires_grad=True)
    with kernels.launches() as outer:
        y = module().scale(x, 2.0)
        with kernels.launches() as inner:
            y.sum().backward()
        module().scale(x, 2.0)
    assert (len(outer), len(inner)) == (2, 1) and torch.equal(inner[0].args[0], torch.ones(2, 3))
    module().scale(x, 2.0)
    assert len(outer) == 2


def test_no_program_runs_where_there_are_none() -> None:
    with kernels.launches() as told:
        assert module().scale(torch.ones(0, 3), 2.0).shape == (0, 3)
    assert told[0].grid == (0,)


def test_an_op_may_write_to_what_it_says() -> None:
    text = harness.plant(SCALE, "@kernels.op(__name__)\ndef scale_bwd", '@kernels.op(__name__, mutates=("d_y",))\ndef scale_bwd')
    text = harness.plant(text, "    return scale_fwd(d_y.contiguous(), a)", "    return scale_fwd(d_y.add_(1.0), a)")
    x = torch.ones(2, 3)
    torch.library.opcheck(harness.load(text).scale_bwd, (x, 2.0), test_utils=("test_schema",))
    wrong = harness.plant(text, ', mutates=("d_y",)', "")
    with pytest.raises(Exception, match="mutate"):
        torch.library.opcheck(harness.load(wrong).scale_bwd, (x, 2.0), test_utils=("test_schema",))
