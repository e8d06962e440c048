"""Fused linear maps are the separate ones: forward, training, initial values and saved weights."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from heddle.runtime import lib

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


def test_a_fresh_module_is_seen_to_be_fresh():
    assert bool(lib.Linear((2,), (3,))(torch.ones(1, 2)).isnan().all())


def test_embedding_has_compound_dims():
    embed = lib.Embed(5, (2, 3))
    lib.initialise(embed, {"weight": ("normal", 1)})
    tokens = torch.tensor([[1, 4]])
    assert torch.equal(embed(tokens), embed.weight[tokens])
