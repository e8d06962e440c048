"""The depthwise convolution against its sum, tap by tap."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from heddle.runtime import lib
from heddle.runtime.lib import conv

from .tiny import convolve, pieces


@pytest.fixture(autouse=True)
def _default_block(monkeypatch):
    monkeypatch.setattr(conv, "BLOCK", conv.BLOCK)


law = settings(deadline=None, max_examples=25)


def make(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).requires_grad_()


@law
@given(
    st.data(), st.integers(1, 2), st.integers(1, 9), st.integers(1, 5), st.booleans(), st.sampled_from([None, "silu"])
)
def test_conv_is_its_sum_and_so_are_gradients(data, batch, seq, taps, has_bias, act):
    conv.BLOCK = 3 * data.draw(st.integers(1, 10))  # channels times rows of a block
    x, weight, bias = make(batch, seq, 3), make(3, taps, seed=1), make(3, seed=2) if has_bias else None
    packed = data.draw(st.booleans())
    document = torch.zeros(batch, seq)
    if packed:
        document = torch.tensor([[data.draw(st.integers(0, 2)) == 0 for _ in range(seq)] for _ in range(batch)]).cumsum(
            1
        )
    y = lib.causal_conv(x, weight, bias, lib.At((batch, seq), document=document if packed else None), act=act)
    expected = torch.stack(
        [torch.cat([convolve(x[i, s:e], weight, bias) for s, e in pieces(d.tolist())]) for i, d in enumerate(document)]
    )
    if act:
        expected = expected * expected.sigmoid()
    assert (y - expected).abs().max() < 1e-10
    wrt = [x, weight] + ([bias] if has_bias else [])
    up = torch.randn_like(y)
    for a, b in zip(torch.autograd.grad(y, wrt, up), torch.autograd.grad(expected, wrt, up), strict=True):
        assert (a - b).abs().max() < 1e-10


@law
@given(st.integers(1, 7), st.integers(1, 4))
def test_another_document_changes_no_bit(cut, taps):
    document = (torch.arange(8) >= cut).long()[None]
    results = []
    for seed in (1, 2):
        x = make(1, 8, 3, seed=seed).detach()
        x[:, cut:] = make(1, 8, 3, seed=9).detach()[:, cut:]
        x.requires_grad_()
        weight, bias = make(3, taps, seed=5), make(3, seed=6)
        y = lib.causal_conv(x, weight, bias, lib.At((1, 8), document=document), act="silu")[:, cut:]
        results.append(
            [y, *(g[:, cut:] if g.dim() == 3 else g for g in torch.autograd.grad(y.sum(), [x, weight, bias]))]
        )
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_padding_may_be_nan():
    x, weight, bias = make(1, 6, 2).detach(), make(2, 3, seed=1), make(2, seed=2)
    valid = torch.tensor([[True] * 4 + [False] * 2])
    x[:, 4:] = float("nan")
    x.requires_grad_()
    y = lib.causal_conv(x, weight, bias, lib.At((1, 6), valid=valid))[:, :4]
    assert (y[0] - convolve(x[0, :4], weight, bias)).abs().max() < 1e-10
    assert all(bool(g.isfinite().all()) for g in torch.autograd.grad(y.sum(), [x, weight, bias]))


def test_modules_hold_channels_as_the_spec_says():
    at = lib.At((2, 5))
    alone = lib.Conv((2, 3), 4).double()
    lib.initialise(alone, {"weight": ("normal", 1), "bias": ("normal", 1)})
    x = make(2, 5, 2, 3)
    y = alone(x, at, act="silu")
    weight, bias = alone.state_dict().values()
    assert [path for path, _, _ in lib.named_logical_parameters(alone)] == ["weight", "bias"]
    assert weight.shape == (2, 3, 4)
    assert bias.shape == (2, 3)
    flat = lib.causal_conv(x.flatten(2), weight.flatten(0, 1), bias.flatten(), at, act="silu")
    assert torch.equal(y.flatten(2), flat)

    both = lib.ParallelConv({"a": (2, 3), "b": (4,)}, 4).double()
    table = {f"{name}.{kind}": ("normal", 1) for name in "ab" for kind in ("weight", "bias")}
    lib.initialise(both, table)
    state = both.state_dict()
    assert {k: tuple(v.shape) for k, v in state.items()} == {
        "a.weight": (2, 3, 4),
        "a.bias": (2, 3),
        "b.weight": (4, 4),
        "b.bias": (4,),
    }
    x = make(2, 5, 10)
    a, b = both(x, at)
    assert a.shape == (2, 5, 2, 3)
    single = lib.causal_conv(x[..., 6:], state["b.weight"], state["b.bias"], at)
    assert (b - single).abs().max() < 1e-14


def test_other_activations_are_refused():
    with pytest.raises(ValueError, match="found 'gelu'"):
        lib.causal_conv(make(1, 2, 3), make(3, 2), None, lib.At((1, 2)), act="gelu")
