"""The kernels of cross entropy, of logits that are given and of those that a linear map writes to a buffer."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from heddle.codegen.kernels import render
from heddle.lowering.ops.cross_entropy import reference
from heddle.lowering.ops.cross_entropy.triton import Facts
from heddle.runtime import lib
from heddle.runtime.lib import linear_loss

from . import harness

BLOCK = 16
GIVEN = tuple(Facts(v, block_v=BLOCK) for v in (1, 7, 16, 17, 37))
SHAPED = Facts(37, linear=True, scale=0.5, softcap=5.0, block_v=BLOCK)
LINEAR = (replace(GIVEN[4], linear=True), replace(GIVEN[1], linear=True), SHAPED, replace(SHAPED, softcap=None))
single = harness.roundoff(torch.float32)


def text(facts: Facts) -> str:
    return render("cross_entropy", {"name": "ce", **facts.rendered()})


def load(facts: Facts) -> ModuleType:
    return harness.load(text(facts))


class Case(NamedTuple):
    """logits [R, V], target [R], and the gradient of each row's loss [R]."""

    facts: Facts
    logits: Tensor
    target: Tensor
    dloss: Tensor


@st.composite
def cases(draw: st.DrawFn, of: tuple[Facts, ...]) -> Case:
    facts, rows, seed = draw(st.sampled_from(of)), draw(st.sampled_from((0, 1, 2, 3))), draw(harness.seeds())
    made = harness.values((rows, facts.vocab), draw(harness.dtypes()), seed, draw(harness.scales()))
    target = torch.tensor([draw(st.integers(-1, facts.vocab - 1)) for _ in range(rows)], dtype=torch.long)
    if rows and draw(st.booleans()):
        made[0, : facts.vocab - 1] = -torch.inf  # what a mask leaves out
        target[0] = draw(st.sampled_from((-1, facts.vocab - 1)))
    dloss = harness.values((rows,), torch.float32, seed + 1)
    return Case(facts, harness.laid(made, draw(harness.layouts())), target, dloss)


def shaped(facts: Facts, z: Tensor) -> Tensor:
    z = z if facts.scale is None else z * facts.scale
    return z if facts.softcap is None else facts.softcap * torch.tanh(z / facts.softcap)


def by_rows(case: Case, z: Tensor, loss: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    rows = [loss(shaped(case.facts, z[r : r + 1]), case.target[r : r + 1]) for r in range(len(z))]
    return torch.stack(rows) if rows else z.new_zeros(0)


def truth(case: Case) -> tuple[Tensor, Tensor]:
    """The loss of each row and d logits, fp64."""
    z = case.logits.double().detach().requires_grad_()
    loss = by_rows(case, z, reference.cross_entropy)
    grad = torch.autograd.grad(loss, z, case.dloss.double())[0] if len(z) else torch.zeros_like(z)
    return loss.detach(), torch.where((case.target < 0)[:, None], 0, grad).nan_to_num(0.0, 0.0, 0.0)


def plain(case: Case) -> tuple[Tensor, Tensor]:
    """The same by the library without a kernel, which is at least fp32 inside."""
    z = case.logits.detach().clone().requires_grad_()
    loss = by_rows(case, z, lib.cross_entropy)
    return loss.detach(), torch.autograd.grad(loss, z, case.dloss.to(loss.dtype))[0] if len(z) else torch.zeros_like(z)


def floors(case: Case, dz: Tensor) -> tuple[Tensor, Tensor]:
    """What roundings may cost: a logit loses `lost`, an exponential its exponent's error, a sum what it adds up."""
    facts, y = case.facts, shaped(case.facts, case.logits.double())
    finite = y.nan_to_num(0.0, 0.0, 0.0).abs()
    lost = single * (3 * finite + 6 * (facts.softcap or 0.0)) if facts.scale or facts.softcap else 0 * finite
    most = y.amax(1, keepdim=True).nan_to_num(0.0, 0.0, 0.0)
    steps = facts.vocab / BLOCK + math.log2(BLOCK) + 8
    log_p = (y - y.logsumexp(1, keepdim=True)).nan_to_num(0.0, 0.0, -1e30)
    # Exponents of what counts are not far from 0: p |log p| <= 1 / e a column.
    sizes = lost.amax(1, keepdim=True) + single * (steps + (y - most).abs().nan_to_num(0.0, 0.0, 0.0).clamp(max=100))
    loss = 2 * sizes.amax(1) + single * (most.abs()[:, 0] + finite.amax(1) + 2 * math.log(facts.vocab) + 2)
    p = log_p.exp()
    known = torch.zeros_like(p).scatter_(1, case.target.clamp(min=0)[:, None], 1.0)
    own = case.dloss.double().abs()[:, None] * (p * (2 * sizes + single * log_p.abs().clamp(max=100)) + single * (p + known) * 4)
    own = own * (facts.scale or 1.0)
    if facts.softcap:  # 1 - tanh^2 loses what tanh loses, twice
        own = own + case.dloss.double().abs()[:, None] * (p + known).clamp(max=1) * (2 * lost / facts.softcap + 4 * single)
    return loss, harness.floor(dz, case.logits.dtype, 0, own, each=True)


def check(module: ModuleType, case: Case) -> float:
    """The worst share of the error that is allowed. Raises AssertionError."""
    want, want_dz = truth(case)
    eager, eager_dz = plain(case)
    with harness.poisoned():
        if case.facts.linear:
            z = case.logits.clone(memory_format=torch.contiguous_format)
            got = module.ce(z, case.target, True)
            dz = z
            assert torch.equal(module.ce(case.logits.contiguous(), case.target, False), got)
            # the slope is that of the loss itself
            want_dz = torch.where(case.dloss[:, None] == 0, 0, want_dz / case.dloss.double()[:, None]).to(want_dz.dtype)
        else:
            z = case.logits.detach().requires_grad_()
            got = module.ce(z, case.target)
            (dz,) = torch.autograd.grad(got, z, case.dloss)
    floor, floor_dz = floors(case, want_dz)
    assert not dz[case.target < 0].any(), "a row that is not scored has a gradient"
    return max(harness.worst(got, want, eager, floor, "loss"), harness.worst(dz, want_dz, eager_dz, floor_dz, "dlogits", each=True))


def ones(case: Case) -> Case:
    return case._replace(dloss=torch.ones(len(case.target)))


@settings(max_examples=20)
@given(case=cases(GIVEN))
def test_given_logits_are_scored_as_the_reference_does(case: Case) -> None:
    check(load(case.facts), case)


@settings(max_examples=20)
@given(case=cases(LINEAR))
def test_a_buffer_is_scored_and_becomes_its_slope(case: Case) -> None:
    check(load(case.facts), ones(case))


# --- laws that need no reference --------------------------------------------------------------------------------------


def one(facts: Facts, seed: int = 1, rows: int = 3, scale: float = 3.0) -> Case:
    target = torch.tensor([facts.vocab - 1, -1, 2, 0, 5])[:rows]
    z = harness.values((rows, facts.vocab), torch.float32, seed, scale)
    return Case(facts, z, target, harness.values((rows,), torch.float32, seed + 1))


def run(facts: Facts, z: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    if facts.linear:
        z = z.clone()
        return load(facts).ce(z, target, True), z
    z = z.clone().requires_grad_()
    loss = load(facts).ce(z, target)
    return loss.detach(), torch.autograd.grad(loss.sum(), z)[0]


@pytest.mark.parametrize("facts", [GIVEN[4], SHAPED])
def test_rows_do_not_know_each_other_and_tiles_change_roundings_only(facts: Facts) -> None:
    case = one(facts)
    loss, dz = run(facts, case.logits, case.target)
    turned = run(facts, case.logits.flip(0), case.target.flip(0))
    assert torch.equal(turned[0].flip(0), loss) and torch.equal(turned[1].flip(0), dz)
    nan = case.logits.clone()
    nan[1] = torch.nan  # not scored: may hold anything
    again = run(facts, nan, case.target)
    assert torch.equal(again[0], loss) and torch.equal(again[1], dz) and loss[1] == 0 and not dz[1].any()
    check(load(replace(facts, block_v=64)), ones(case))
    other = run(replace(facts, stages=1), case.logits, case.target)
    assert torch.equal(other[0], loss) and torch.equal(other[1], dz)


def test_what_is_wrong_with_a_scored_row_is_seen() -> None:
    case = one(GIVEN[4])
    for z, target in ((case.logits.clone().fill_(torch.nan), 3), (case.logits, 37), (case.logits, 10**6)):
        assert run(GIVEN[4], z[:1], torch.tensor([target]))[0].isnan().all()


# --- faults, registration, text ---------------------------------------------------------------------------------------

WALK = {
    "the sum is not rescaled": harness.Fault("s * tl.exp(m - m_ref)", "s"),
    "the largest is stale": harness.Fault("        m = m_new\n", "        m = tl.maximum(m, -1.0)\n"),
    "the last column is left out": harness.Fault("(cols < 37) & is_scored", "(cols < 36) & is_scored"),
    "columns beyond the last count": harness.Fault("(cols < 37) & is_scored", "(cols < 48) & is_scored"),
    "rows that are not scored count": harness.Fault("tl.where(is_scored, log_s + (m - picked), 0.0)", "log_s + (m - picked)"),
    "the first target is none": harness.Fault("is_scored = target >= 0", "is_scored = target > 0"),
    "another row's target": harness.Fault("tl.load(target_ptr + row)", "tl.load(target_ptr + row * 0)"),
    "the target of a row of -1": harness.Fault("tl.where(is_scored, slope, 0.0)", "slope"),
    "the slope is no softmax": harness.Fault("tl.exp(y - m - log_s)", "tl.exp(y - m)"),
    "the target beside": harness.Fault("cols == target", "cols == target + 1"),
}
OF_GIVEN = {
    "every row weighs 1": harness.Fault("slope = dloss * (", "slope = ("),
    "the first row's gradient for all": harness.Fault("tl.load(dloss_ptr + row)", "tl.load(dloss_ptr)"),
    "a block of the gradient is skipped": harness.Fault("mask_v = cols < 37\n", "mask_v = (cols < 37) & (first != 16)\n"),
}
OF_SHAPED = {
    "the slope of the cap is left out": harness.Fault("(1.0 - (y / 5.0) * (y / 5.0))", "1.0"),
    "the slope of the scale is left out": harness.Fault("slope *= 0.5 * ", "slope *= "),
    "the scale is left out": harness.Fault("    z = 0.5 * z\n", "    z = z\n"),
    "near 0 another function": harness.Fault("t * (-1.0 / 3.0", "t * (2.0 / 3.0"),
    "the target's logit is not capped": harness.Fault("picked = shaped(tl.load(z_ptr + target", "picked = (tl.load(z_ptr + target"),
}  # fmt: skip


@pytest.mark.parametrize(("facts", "faults"), [(GIVEN[4], WALK | OF_GIVEN), (SHAPED, WALK | OF_SHAPED)])
def test_every_planted_fault_is_found(facts: Facts, faults: dict[str, harness.Fault]) -> None:
    def checks(module: ModuleType) -> None:
        for scale in (5.0, 0.4):
            case = one(facts, rows=4, scale=scale)
            check(module, ones(case) if facts.linear else case)

    made = faults
    if facts.linear:  # columns beyond the last are loaded as 0 there, and left out by a select
        made = {k: f for k, f in faults.items() if k != "columns beyond the last count"}
        made["columns beyond the last count"] = harness.Fault("tl.where(mask_v, shaped", "tl.where(cols < 48, shaped")
    assert harness.survivors(text(facts), made, checks) == []


def test_rows_are_numbered_in_64_bits() -> None:
    assert all("row = tl.program_id(0).to(tl.int64)" in text(facts) for facts in (GIVEN[0], SHAPED))


def test_their_ops_are_ops_of_torch() -> None:
    case = one(GIVEN[4])
    given, buffer = load(GIVEN[4]), load(SHAPED)
    z = case.logits.requires_grad_()
    torch.library.opcheck(given.ce_fwd, (z, case.target))
    torch.library.opcheck(buffer.ce_rows, (case.logits.detach().clone(), case.target, True))

    def loss(z: Tensor) -> Tensor:
        return lib.cross_entropy(z, case.target, kernel=given.ce)

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    assert torch.equal(torch.autograd.grad(compiled(z), z)[0], torch.autograd.grad(loss(z), z)[0])
    weight = harness.values((37, 4), torch.float32, 8).requires_grad_()
    x = harness.values((3, 4), torch.float32, 9).requires_grad_()

    def head(x: Tensor, weight: Tensor) -> Tensor:
        return lib.linear_cross_entropy(x, weight, case.target, scale=0.5, softcap=5.0, kernel=buffer.ce)

    compiled = torch.compile(head, backend="aot_eager", fullgraph=True)
    ours, theirs = (torch.autograd.grad(f(x, weight), (x, weight)) for f in (compiled, head))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs))


def test_same_facts_same_bytes(golden: Callable[[str, str], None]) -> None:
    for facts in (Facts(131072), Facts(131072, linear=True, softcap=30.0)):
        assert text(facts) == text(replace(facts))
        harness.stable(text(facts))
    golden("cross_entropy", text(Facts(131072)))
    golden("linear_cross_entropy", text(Facts(131072, linear=True, softcap=30.0)))


# --- a linear map and its loss, without logits ----------------------------------------------------------------------


def head_of(case: Case, x: Tensor, weight: Tensor, bias: Tensor | None, plain: bool, **more: Any) -> Tensor:
    facts = case.facts
    if plain:
        y = torch.nn.functional.linear(x, weight, bias)
        loss = reference.cross_entropy if x.dtype == torch.float64 else lib.cross_entropy
        return loss(shaped(facts, y), case.target)
    return lib.linear_cross_entropy(x, weight, case.target, bias, facts.scale, facts.softcap, **more)


@settings(max_examples=12)
@given(data=st.data(), rows=st.sampled_from((0, 1, 5, 6)), dtype=harness.dtypes(), biased=st.booleans())
def test_a_head_with_its_loss_is_both_one_after_the_other(data: Any, rows: int, dtype: torch.dtype, biased: bool) -> None:
    facts, seed = data.draw(st.sampled_from(LINEAR)), data.draw(harness.seeds())
    target = torch.tensor([data.draw(st.integers(-1, facts.vocab - 1)) for _ in range(rows)], dtype=torch.long)
    case = Case(facts, torch.empty(0), target, torch.empty(0))
    leaves = [harness.values(s, dtype, seed + i) for i, s in enumerate(((rows, 4), (facts.vocab, 4), (facts.vocab,)))]
    leaves = leaves if biased else leaves[:2]
    kernel = data.draw(st.sampled_from((None, load(facts).ce)))

    def both(kind: torch.dtype, plain: bool, **more: Any) -> list[Tensor]:
        given = [t.to(kind).requires_grad_() for t in leaves]
        loss = head_of(case, given[0], given[1], given[2] if biased else None, plain, **more)
        grads = torch.autograd.grad(0.375 * loss, given, allow_unused=True, materialize_grads=True)
        return [loss, *grads]

    before = linear_loss.BUFFER, linear_loss.LEAST_ROWS
    linear_loss.BUFFER, linear_loss.LEAST_ROWS = 1, data.draw(st.sampled_from((2, 128)))
    try:
        got = both(dtype, False, kernel=kernel)
    finally:
        linear_loss.BUFFER, linear_loss.LEAST_ROWS = before
    want, eager = both(torch.float64, True), both(dtype, True)
    x, weight = leaves[0].double(), leaves[1].double()
    size = x.abs() @ weight.abs().T + (leaves[2].double().abs() if biased else 0)
    u = harness.roundoff(dtype)
    # A logit loses its rounding, which moves the loss by as much, and a slope by its share; then a slope is rounded.
    lost = (facts.scale or 1.0) * (u * size + 8 * single * size) + single * (40 + 6 * (facts.softcap or 0))
    slope = 2 * lost.amax(1, keepdim=True) if rows else lost
    slope = (slope + u).expand(rows, facts.vocab) * 0.375 * (facts.scale or 1.0) * (target >= 0)[:, None]
    own = [2 * lost.amax(1).sum() if rows else torch.tensor(0.0), slope @ weight.abs(), slope.T @ x.abs(), slope.sum(0)]
    for name, a, b, e, o in zip(("loss", "dx", "dweight", "dbias"), got, want, eager, own):
        kind = torch.float32 if name == "loss" else dtype
        harness.worst(a, b, e, harness.floor(b, kind, rows + 4, o), name)
        if name == "dx":
            assert not a[target < 0].any()


def test_a_graph_that_is_kept_has_the_same_gradient_again() -> None:
    x, weight = (harness.values(s, torch.float32, 1).requires_grad_() for s in ((5, 4), (7, 4)))
    loss = lib.linear_cross_entropy(x, weight, torch.tensor([0, 1, -1, 6, 2])) / 3
    first = torch.autograd.grad(loss, (x, weight), retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, torch.autograd.grad(loss, (x, weight))))


def test_no_more_rows_than_the_buffer_holds_have_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_loss, "BUFFER", 4 * 37 * 130)
    steps = linear_loss._steps(300, 37, 4)
    assert [s.start for s in steps] == [0, 100, 200] and steps[-1].stop == 300
    assert linear_loss._steps(0, 37, 4) == []
    seen: list[int] = []

    def kernel(y: Tensor, target: Tensor, slope: bool) -> Tensor:
        seen.append(y.data_ptr())
        return torch.zeros(len(target))

    x, weight = (harness.values(s, torch.float32, 1).requires_grad_() for s in ((300, 2), (37, 2)))
    with torch.no_grad():
        lib.linear_cross_entropy(x, weight, torch.full((300,), -1), kernel=kernel)
    assert len(seen) == 3 and len(set(seen)) == 1, "one buffer for all"


def test_gradients_that_wait_are_those_of_both_one_after_the_other() -> None:
    from heddle.runtime.lib.later import Later, later

    x, weight = (harness.values(s, torch.float32, 1).requires_grad_() for s in ((5, 4), (7, 4)))
    target = torch.tensor([0, 1, -1, 6, 2])
    now = torch.autograd.grad(lib.linear_cross_entropy(x, weight, target), (x, weight))
    store = Later()
    with later(store):
        lib.linear_cross_entropy(x, weight, target).backward()
    assert weight.grad is None
    store.run()
    assert torch.allclose(x.grad, now[0], atol=1e-6) and torch.allclose(weight.grad, now[1], atol=1e-6)
