"""The kernel of attention whose keys are told from rank to rank: parts of the keys, brought together."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from heddle.codegen.kernels import render
from heddle.lowering.ops.attend.triton import Attend, Source
from heddle.runtime import lib
from heddle.runtime.lib.simulated import simulate
from tests.runtime.lib.test_ring import CAUSAL, FULL, window

from . import harness
from .attention import SMALL

HEADS, GROUP, WIDTH = 4, 2, 4


@cache
def text() -> str:
    facts = Attend(GROUP, WIDTH, WIDTH, (Source("a mask"),), None, SMALL, is_part=True)
    return render("attend", {"name": "attend_ring", **facts.rendered()})


@cache
def kernel(made: str) -> Callable[..., Any]:
    return harness.load(made).attend_ring


def tensors(seq: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """q, k, v, the gradient from behind, and keys and values that all ranks have."""
    source = torch.Generator().manual_seed(seq)
    shapes = [(2, n, h, WIDTH) for n, h in ((seq, HEADS), (seq, 2), (seq, 2), (seq, HEADS), (5, 2), (5, 2))]
    return tuple(torch.randn(s, generator=source, dtype=torch.float64).to(dtype) for s in shapes)


Case = tuple[lib.Mask, int, str | None, Tensor | None, Tensor | None, bool]


def ranks(count: int, case: Case, dtype: torch.dtype, made: Callable[..., Any] | None) -> list[Tensor]:
    """The result, and the gradients of q, k and v, of ranks that share a sequence."""
    mask, seq, order, document, valid, two = case

    def rank(mesh: Any) -> tuple[Tensor, ...]:
        group = mesh["context"]
        q, k, v, up, *all_have = tensors(seq, dtype)
        q, k, v = (group.parts(x, 1)[group.rank].clone().requires_grad_() for x in (q, k, v))
        at = lib.At((2, seq), document=document, valid=valid)
        more = [(*all_have, FULL, None)] if two else []
        o = lib.attend_ring(q, (k, v, mask), *more, at=at, group=group, scale=0.5, order=order, kernel=made)
        return o.detach(), *torch.autograd.grad(o, [q, k, v], group.parts(up, 1)[group.rank])

    found = simulate({"context": count}, rank)
    return [torch.cat(parts, 1) for parts in zip(*found, strict=True)]


def whole(case: Case, dtype: torch.dtype) -> list[Tensor]:
    mask, seq, _, document, valid, two = case
    q, k, v, up, *all_have = tensors(seq, dtype)
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    more = [(*all_have, FULL, None)] if two else []
    o = lib.attend(q, (k, v, mask), *more, at=lib.At((2, seq), document=document, valid=valid), scale=0.5)
    return [o.detach(), *torch.autograd.grad(o, [q, k, v], up)]


def check(count: int, case: Case, dtype: torch.dtype, made: Callable[..., Any]) -> None:
    exact, eager = whole(tuple(case), torch.float64), whole(case, dtype)
    calls = []

    def counted(*args: Any, **more: Any) -> Any:
        calls.append(args)
        return made(*args, **more)

    found = ranks(count, case, dtype, counted)
    assert calls
    for name, got, want, plain in zip(("o", "d_q", "d_k", "d_v"), found, exact, eager, strict=True):
        # Each part is rounded to the dtype before parts are added.
        own = harness.roundoff(dtype) * count * float(want.abs().max())
        harness.worst(got, want, plain, harness.floor(want, dtype, case[1] + 5, own), name)


@st.composite
def cases(draw: st.DrawFn) -> tuple[int, Case]:
    count = draw(st.integers(1, 3))
    seq = count * draw(st.sampled_from([2, 4, 10]))
    source = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    document = (torch.rand(2, seq, generator=source) < 0.2).cumsum(1) if draw(st.booleans()) else None
    valid = torch.arange(seq) < torch.randint(1, seq + 1, (2, 1), generator=source) if draw(st.booleans()) else None
    mask = draw(st.one_of(st.sampled_from([CAUSAL, FULL]), st.builds(window, st.integers(0, 20), st.integers(0, 9))))
    return count, (mask, seq, draw(st.sampled_from([None, "zigzag"])), document, valid, draw(st.booleans()))


@settings(max_examples=max(3, settings.default.max_examples // 33), deadline=None)
@given(cases(), harness.dtypes())
def test_parts_together_are_attention(drawn: tuple[int, Case], dtype: torch.dtype) -> None:
    check(*drawn, dtype, kernel(text()))


FAULTS = {
    "a gradient that forgets the sums of other parts": (
        "return attend_backward(*above, q,", "return attend_backward(*above[:2], attend_forward(q, *source[:7], scale)[1], q,",
    ),
    "sums that forget the largest score": ("m + tl.log2(total))  #", "tl.log2(total))  #"),
    "an empty row that weighs something": ('mass == 0.0, float("inf")', "mass == 0.0, 0.0"),
    "a gradient of one part's result": (
        "return attend_backward(*above, q,", "return attend_backward(above[0], attend_forward(q, *source[:7], scale)[0], above[2], q,",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_faults_are_found(name: str) -> None:
    old, new = FAULTS[name]
    assert old in text()
    # Of documents that end at a rank's end, a rank's rows see nothing of the one before.
    document = torch.arange(12).div(4, rounding_mode="floor").expand(2, -1)
    case = (CAUSAL, 12, None, document if "empty" in name else None, None, False)
    check(3, case, torch.float32, kernel(text()))
    with pytest.raises(AssertionError):
        check(3, case, torch.float32, kernel(text().replace(old, new)))


def test_what_a_kernel_does_not_take_goes_through_torch() -> None:
    def never(*args: Any, **more: Any) -> Any:
        raise AssertionError("fp64 in a kernel")

    case: Case = (CAUSAL, 8, None, None, None, False)
    for a, b in zip(ranks(2, case, torch.float64, never), whole(case, torch.float64), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
