"""The chunked scan against the recurrence, one step at a time."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from heddle.runtime import lib

from .tiny import pieces, scan

law = settings(deadline=None, max_examples=25)


def inputs(seed, batch, seq, groups, per_group, width, state, dtype=torch.float64):
    make = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=make, dtype=torch.float64).to(dtype)

    heads = groups * per_group
    named = {
        "u": normal(batch, seq, heads, width),
        "dt": normal(batch, seq, heads),
        "b": normal(batch, seq, groups, state),
        "c": normal(batch, seq, groups, state),
        "A_log": normal(heads),
        "D": normal(heads),
        "dt_bias": normal(heads),
    }
    return {name: x.requires_grad_() for name, x in named.items()}


def documents(draw, batch, seq):
    return torch.tensor([[draw(st.integers(0, 3)) == 0 for _ in range(seq)] for _ in range(batch)]).cumsum(1)


def reference(named, document):
    rows = []
    per_head = [named[name] for name in ("A_log", "D", "dt_bias")]
    for i, row in enumerate(document.tolist()):
        parts = [scan(*(named[n][i, s:e] for n in ("u", "dt", "b", "c")), *per_head) for s, e in pieces(row)]
        rows.append(torch.cat(parts))
    return torch.stack(rows)


def grads(y, named, seed=7):
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.autograd.grad((y.double() * weight).sum(), list(named.values()))


def close(a, b):
    return all((x - y).abs().max() < 1e-10 * (1 + y.abs().max()) for x, y in zip(a, b, strict=True))


@law
@given(st.data(), st.integers(1, 2), st.integers(1, 11), st.integers(1, 3), st.integers(1, 2), st.integers(1, 12))
def test_chunks_are_the_recurrence_and_so_are_gradients(data, batch, seq, groups, per_group, chunk):
    named = inputs(seq, batch, seq, groups, per_group, 3, 2)
    document = documents(data.draw, batch, seq)
    at = lib.At((batch, seq), None, document=document)
    y = lib.ssd(**named, at=at, chunk=chunk)
    expected = reference(named, document)
    assert close([y], [expected])
    assert close(grads(y, named), grads(expected, named))


@law
@given(st.integers(1, 13), st.integers(1, 14))
def test_one_document_needs_no_coordinates(seq, chunk):
    named = inputs(seq, 2, seq, 2, 2, 2, 3)
    y = lib.ssd(**named, at=lib.At((2, seq)), chunk=chunk)
    expected = reference(named, torch.zeros(2, seq))
    assert close([y], [expected])
    assert close(grads(y, named), grads(expected, named))


@law
@given(st.data(), st.integers(2, 12), st.integers(1, 13))
def test_another_document_changes_no_bit(data, seq, chunk):
    """Outputs and gradients of a document are the same bits whatever its neighbours hold."""
    cut = data.draw(st.integers(1, seq - 1))
    first = data.draw(st.booleans())
    mine = slice(0, cut) if first else slice(cut, seq)
    document = (torch.arange(seq) >= cut).long()[None]
    at = lib.At((1, seq), None, document=document)
    mixed = []
    for seed in (1, 2):
        named = {name: x.detach().clone() for name, x in inputs(0, 1, seq, 2, 2, 3, 4).items()}
        other = inputs(seed, 1, seq, 2, 2, 3, 4)
        for name in ("u", "dt", "b", "c"):
            keep = named[name][:, mine].clone()
            named[name] = 3 * other[name].detach()
            named[name][:, mine] = keep
        named = {name: x.requires_grad_() for name, x in named.items()}
        y = lib.ssd(**named, at=at, chunk=chunk)[:, mine]
        mixed.append([y, *(g[:, mine] if g.dim() > 1 else g for g in grads(y, named))])
    assert all(torch.equal(a, b) for a, b in zip(*mixed, strict=True))


@pytest.mark.parametrize("chunk", [2, 4, 16])
def test_padding_is_the_identity_even_if_it_is_nan(chunk):
    named = inputs(3, 1, 7, 1, 2, 2, 3)
    poisoned = {n: x.detach().clone() for n, x in named.items()}
    valid = torch.tensor([[True] * 4 + [False] * 2 + [True]])
    for name in ("u", "dt", "b", "c"):
        poisoned[name][:, 4:6] = float("nan")
    poisoned = {n: x.requires_grad_() for n, x in poisoned.items()}
    y = lib.ssd(**poisoned, at=lib.At((1, 7), valid=valid), chunk=chunk)[valid][None]
    kept = {n: x[:, valid[0]] if x.dim() > 1 else x for n, x in named.items()}
    expected = reference(kept, torch.zeros(1, 5))
    assert close([y], [expected])
    got, wanted = grads(y, poisoned), grads(expected, named)
    assert close(got, wanted)


def test_backward_is_the_derivative():
    named = inputs(1, 1, 5, 2, 1, 2, 2)
    at = lib.At((1, 5), None, document=torch.tensor([[0, 0, 1, 1, 1]]))
    assert torch.autograd.gradcheck(lambda *x: lib.ssd(*x, at=at, chunk=2), tuple(named.values()))


@pytest.mark.parametrize("scale", [1e-3, 30.0, 300.0])
def test_strong_and_weak_decay_stay_finite_and_exact(scale):
    """exp(ca_i - ca_j) is never a quotient of two exponentials, which would overflow."""
    named = inputs(2, 1, 40, 1, 2, 2, 3)
    named["A_log"] = torch.full((2,), scale).log().double().requires_grad_()
    y = lib.ssd(**named, at=lib.At((1, 40)), chunk=16)
    expected = reference(named, torch.zeros(1, 40))
    assert close([y], [expected])
    assert close(grads(y, named), grads(expected, named))


def test_low_precision_is_no_worse_than_plain_torch():
    """bf16 inputs, fp32 inside: at most twice the error of the recurrence run on the same rounded inputs in bf16."""
    exact = inputs(4, 2, 64, 2, 2, 8, 8)
    low = {n: x.detach().bfloat16().requires_grad_() for n, x in exact.items()}
    rounded = {n: x.detach().double().requires_grad_() for n, x in low.items()}
    truth = reference(rounded, torch.zeros(2, 64))
    plain = reference(low, torch.zeros(2, 64))
    ours = lib.ssd(**low, at=lib.At((2, 64)), chunk=16)
    assert ours.dtype == torch.bfloat16

    def error(y):
        return (y.double() - truth).norm()

    assert error(ours) <= 2 * error(plain)
    wanted = grads(truth, rounded)
    for got, naive, exact_grad in zip(grads(ours, low), grads(plain, low), wanted, strict=True):
        # Both round the result once: half a unit in the last place of bf16 is a floor that no kernel can beat.
        floor = 2**-8 * exact_grad.norm()
        assert (got.double() - exact_grad).norm() <= 2 * (naive.double() - exact_grad).norm() + floor


def test_heads_that_no_group_serves_are_refused():
    named = inputs(0, 1, 2, 2, 2, 2, 2)
    with pytest.raises(ValueError, match="4 heads are not a multiple of 3 groups"):
        lib.ssd(**named | {"b": torch.zeros(1, 2, 3, 2), "c": torch.zeros(1, 2, 3, 2)}, at=lib.At((1, 2)))
