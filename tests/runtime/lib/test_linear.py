"""Fused linear maps are the separate ones: forward, training, initial values and saved weights."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from heddle.runtime import lib
from heddle.runtime.lib import product

law = settings(deadline=None, max_examples=25)
dims = st.lists(st.integers(1, 3), min_size=1, max_size=2).map(tuple)


class Separate(nn.Module):
    def __init__(self, parts, ins):
        super().__init__()
        for name, (outs, bias) in parts.items():
            self.add_module(name, lib.Linear(ins, outs, bias))


class Together(lib.Model):
    def __init__(self, parts, ins, give=None):
        super().__init__()
        self.all = lib.Parallel(parts, ins, give)


def pair(parts, ins, seed=0):
    one, many = Together(parts, ins).double(), Separate(parts, ins).double()
    table = {path: ("normal", 1.0) for path, _, _ in lib.named_logical_parameters(many)}
    assert [path for path, _, _ in one.named_logical_parameters()] == list(table)
    lib.initialise(many, table, seed)
    one.initialise(seed, table)
    return one, many


@law
@given(st.dictionaries(st.sampled_from("abc"), st.tuples(dims, st.booleans()), min_size=1), dims, st.integers(0, 9))
def test_fused_is_separate(parts, ins, seed):
    """Same initial values, outputs, three steps of AdamW, and saved weights under the same names."""
    one, many = pair(parts, ins, seed)
    x = torch.randn(2, 3, *ins, dtype=torch.float64)
    optimisers = [torch.optim.AdamW(m.parameters(), lr=0.1, weight_decay=0.1) for m in (one, many)]
    for _ in range(3):
        fused = dict(zip(parts, one.all(x), strict=True))
        separate = {name: getattr(many, name)(x) for name in parts}
        for name, (outs, _) in parts.items():
            assert fused[name].shape == (2, 3, *outs)
            assert (fused[name] - separate[name]).abs().max() < 1e-10
        for y, optimiser in zip((fused, separate), optimisers, strict=True):
            optimiser.zero_grad()
            sum(v.pow(2).sum() for v in y.values()).backward()
            optimiser.step()
    a, b = one.state_dict(), many.state_dict()
    assert set(a) == set(b)
    for name in a:
        assert a[name].shape == b[name].shape
        assert (a[name] - b[name]).abs().max() < 1e-10
    with torch.no_grad():
        for parameter in one.parameters():
            parameter.fill_(float("nan"))
    one.load_state_dict(b)
    many.load_state_dict(one.state_dict())
    assert all(
        torch.equal(x, y) for x, y in zip(one.state_dict().values(), [b[n] for n in one.state_dict()], strict=True)
    )


def test_logical_views_share_memory():
    one, _ = pair({"q": ((2, 3), True), "k": ((3,), False)}, (4,))
    views = {path: (holder, view) for path, holder, view in one.named_logical_parameters()}
    holder, view = views["k.weight"]
    view.fill_(7)
    assert holder is one.all.weight
    assert torch.equal(one.all.weight[6:], torch.full((3, 4), 7.0, dtype=torch.float64))
    assert "all.weight" not in one.state_dict()


def test_groups_stay_flat_side_by_side():
    parts = {"z": ((2, 2), False), "u": ((2, 2), False), "b": ((3,), False), "dt": ((2,), False)}
    one, many = pair(parts, (5,))
    flat = Together(parts, (5,), (("z",), ("u", "b"), ("dt",))).double()
    flat.load_state_dict(one.state_dict())
    x = torch.randn(2, 3, 5, dtype=torch.float64)
    z, u_b, dt = flat.all(x)
    assert z.shape == (2, 3, 2, 2)
    assert dt.shape == (2, 3, 2)
    assert u_b.stride(-1) == 1
    assert torch.allclose(u_b, torch.cat([many.u(x).flatten(2), many.b(x)], -1), atol=1e-12)
    with pytest.raises(ValueError, match="does not list the parts"):
        lib.Parallel(parts, (5,), (("u", "z"), ("b", "dt")))


def test_loading_names_what_is_wrong():
    one, _ = pair({"q": ((2,), False), "k": ((2,), False)}, (3,))
    good = one.state_dict()
    with pytest.raises(RuntimeError, match=r"Missing key.*k\.weight"):
        one.load_state_dict({"q.weight": good["q.weight"]})
    with pytest.raises(RuntimeError, match=r"Unexpected key.*v\.weight"):
        one.load_state_dict(good | {"v.weight": good["q.weight"]})
    with pytest.raises(RuntimeError, match=r"q\.weight has shape \[3, 2\], expected \[2, 3\]"):
        one.load_state_dict(good | {"q.weight": good["q.weight"].T})
    wrapped = nn.Sequential(one)
    wrapped.load_state_dict({f"0.{name}": x + 1 for name, x in good.items()})
    assert torch.equal(one.state_dict()["q.weight"], wrapped.state_dict()["0.q.weight"])


@pytest.mark.parametrize("tiles", [False, True])
@pytest.mark.parametrize("rows", [1, 7])
def test_low_precision_products_are_no_worse_than_plain_torch(monkeypatch, tiles, rows):
    """Whichever kernel serves bf16, in any blocks: value and gradients against the same bf16 numbers in fp64."""
    monkeypatch.setattr(product, "_has_tiles", lambda: tiles)
    monkeypatch.setattr(product, "LEAST_ROWS", 2)
    monkeypatch.setattr(product, "BLOCK_ROWS", 3)
    parts = {"a": ((4, 2), True), "b": ((5,), False)}
    make = torch.Generator().manual_seed(rows)
    low = Together(parts, (6,)).initialise(1, {f"{n}.weight": ("normal", 1) for n in "ab"} | {"a.bias": ("normal", 1)})
    low.cast(torch.bfloat16)
    x = torch.randn(rows, 6, generator=make).bfloat16()
    weight, bias = low.all.weight.detach(), torch.cat([low.all.bias.detach(), torch.zeros(5).bfloat16()])
    up = torch.randn(rows, 13, generator=make).bfloat16()

    def results(kind):
        a, w, b = (t.to(kind).requires_grad_() for t in (x, weight, bias))
        y = torch.nn.functional.linear(a, w, b)
        return [y, *torch.autograd.grad(y, [a, w], up.to(kind))]

    own = x.clone().requires_grad_()
    pieces = low.all(own)
    y = torch.cat([piece.flatten(1) for piece in pieces], 1)
    ours = [y, *torch.autograd.grad(y, [own, low.all.weight], up)]
    for got, plain, truth in zip(ours, results(torch.bfloat16), results(torch.float64), strict=True):
        assert got.dtype == torch.bfloat16
        floor = 2**-9 * truth.norm()
        assert (got.double() - truth).norm() <= 2 * (plain.double() - truth).norm() + floor
    with torch.inference_mode():
        again = torch.cat([piece.flatten(1) for piece in low.all(x)], 1)
    assert torch.equal(again, y)


def test_parts_that_no_one_uses_get_no_gradient():
    one, many = pair({"a": ((2,), False), "b": ((3,), True)}, (4,))
    x = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    got = torch.autograd.grad(one.all(x)[1].pow(2).sum(), [x, *one.parameters()])
    wanted = torch.autograd.grad(many.b(x).pow(2).sum(), [x, *many.b.parameters()])
    assert torch.allclose(got[0], wanted[0], atol=1e-12)
    assert torch.allclose(got[1][2:], wanted[1], atol=1e-12)
    assert not bool(got[1][:2].any())
    assert torch.allclose(got[2], wanted[2], atol=1e-12)


def test_a_fresh_module_is_seen_to_be_fresh():
    assert bool(lib.Linear((2,), (3,))(torch.ones(1, 2)).isnan().all())


def test_embedding_has_compound_dims():
    embed = lib.Embed(5, (2, 3))
    lib.initialise(embed, {"weight": ("normal", 1)})
    tokens = torch.tensor([[1, 4]])
    assert torch.equal(embed(tokens), embed.weight[tokens])
