"""Norms, activations and rotations against their formulas, values and gradients."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from heddle.runtime import lib

from .tiny import angles, rms, rotated

law = settings(deadline=None, max_examples=25)


def make(*shape, seed=0, scale=1.0):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (scale * x).requires_grad_()


def same(y, expected, wrt):
    assert y.shape == expected.shape
    assert (y - expected).abs().max() < 1e-10
    up = torch.randn_like(y)
    for a, b in zip(torch.autograd.grad(y, wrt, up), torch.autograd.grad(expected, wrt, up), strict=True):
        assert (a - b).abs().max() < 1e-10 * (1 + b.abs().max())


@law
@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 4), st.sampled_from([1e-3, 1.0, 1e3]))
def test_rms_norm(rows, groups, width, scale):
    x, weight = make(rows, 2, groups, width, scale=scale), make(groups, width, seed=1)
    for count in {1, groups}:
        same(lib.rms_norm(x, weight, 1e-5, count), rms(x, weight, count, 2), [x, weight])
    flat = make(rows, 5)
    same(lib.rms_norm(flat, None, 1e-5), rms(flat, torch.ones(5)), [flat])
    x, weight = make(rows, width), make(width, seed=1)
    same(lib.rms_norm(x, weight, 1e-5), rms(x, weight), [x, weight])


@law
@given(st.integers(1, 3), st.integers(1, 3), st.integers(2, 4), st.booleans(), st.booleans())
def test_layer_norm(rows, outer, width, zero_centred, has_bias):
    x, weight = make(rows, outer, width), make(outer, width, seed=1)
    bias = make(outer, width, seed=2) if has_bias else None
    mean, var = x.mean((-2, -1), keepdim=True), x.var((-2, -1), keepdim=True, unbiased=False)
    expected = (x - mean) / (var + 1e-5).sqrt() * (weight + zero_centred)
    expected = expected if bias is None else expected + bias
    wrt = [x, weight] + ([bias] if has_bias else [])
    same(lib.layer_norm(x, weight, bias, 1e-5, zero_centred), expected, wrt)


@law
@given(st.integers(1, 3), st.integers(1, 5), st.integers(0, 2))
def test_rotate(heads, pairs, rest):
    x, speed = make(1, 6, heads, 2 * pairs + rest), torch.rand(pairs, dtype=torch.float64)
    cos, sin = angles(torch.arange(6)[None], speed)
    same(lib.rotate(x, cos, sin), rotated(x[0], speed)[None], [x])


def test_rotation_needs_dims_and_keeps_its_dtype():
    cos, sin = angles(torch.tensor([[3]]), torch.tensor([1.0]))
    with pytest.raises(ValueError, match="1 pairs need 2 dims, found 1"):
        lib.rotate(torch.ones(1, 1, 1, 1), cos, sin)
    x = torch.randn(1, 1, 2, 4).bfloat16()
    assert lib.rotate(x, cos, sin).dtype == torch.bfloat16


@law
@given(st.integers(1, 7))
def test_activations(n):
    x, z = make(n, 3), make(n, 3, seed=1)
    same(lib.relu2(x), x.clamp_min(0) ** 2, [x])
    same(lib.silu_mul(x, z), x * z * z.sigmoid(), [x, z])


def test_gradients_are_derivatives():
    x, w, z = make(2, 3, 4), make(3, 4, seed=1), make(2, 3, 4, seed=2)
    cos, sin = angles(torch.arange(2)[None], torch.ones(1).double())
    check = torch.autograd.gradcheck
    assert check(lambda x, w: lib.rms_norm(x, w, 1e-5, 3), (x, w))
    assert check(lib.relu2, (x,))
    assert check(lib.silu_mul, (x, z))
    assert check(lib.rotate, (x[None, :, :, :], cos.requires_grad_(), sin.requires_grad_()))


@pytest.mark.parametrize("name", ["rms_norm", "layer_norm", "relu2", "silu_mul"])
def test_low_precision_is_no_worse_than_plain_torch(name):
    x, z, w = make(64, 32).detach().bfloat16(), make(64, 32, seed=1).detach().bfloat16(), torch.ones(32)
    b = torch.zeros(32)
    pairs = {
        "rms_norm": (lambda: lib.rms_norm(x, w, 1e-5), lambda t: F.rms_norm(t(x), (32,), t(w), 1e-5)),
        "layer_norm": (lambda: lib.layer_norm(x, w, b, 1e-5), lambda t: F.layer_norm(t(x), (32,), t(w), t(b), 1e-5)),
        "relu2": (lambda: lib.relu2(x), lambda t: F.relu(t(x)).square()),
        "silu_mul": (lambda: lib.silu_mul(x, z), lambda t: t(x) * F.silu(t(z))),
    }
    ours, plain = pairs[name]
    truth = plain(torch.Tensor.double)
    assert ours().dtype == torch.bfloat16
    assert (ours().double() - truth).norm() <= 2 * (plain(torch.Tensor.bfloat16).double() - truth).norm()
