"""Importance: the aggregations of the paper, and each site against a computation by hand of what the spec says."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from heddle.runtime.compress import Scores, Site, importance
from heddle.runtime.compress.dims import Dims, without_numbers
from heddle.runtime.compress.scores import HOW, Running
from heddle.runtime.compress.sites import sites
from heddle.runtime.errors import UserError
from tests.lowering.decoders import VOCAB, decoders, program

from .models import TINY, error_of, module, of_text, shipped, tokens

A = torch.tensor([[[1, -2, 0], [3, 0, 1], [-1, 2, 2]], [[0, 4, -3], [2, -2, 0], [1, 0, 3]]], dtype=torch.float64)
TABLE = {
    ("mean", "mean"): [1.3333, 1.6667, 1.5], ("mean", "l2"): [2.7763, 3.6503, 3.2394],
    ("mean", "var"): [1.6667, 4.4444, 3.3333], ("l2", "mean"): [1.9437, 2.4037, 2.2361],
    ("l2", "l2"): [4.0, 5.2915, 4.7958], ("l2", "var"): [2.7487, 6.7696, 6.0369],
    ("var", "mean"): [0.1111, 0.1111, 0.25], ("var", "l2"): [0.2919, 0.6754, 1.0066],
    ("var", "var"): [1.0, 3.1605, 7.1111],
}  # fmt: skip
"""Facts 1.1: (batch, seq), computed there by hand."""


def aggregated(x, batch, seq, pieces=1, counts=None):
    running = Running(batch, seq)
    for i in range(0, len(x), pieces):
        running.add(x[i : i + pieces], None if counts is None else counts[i : i + pieces])
    return running.finish()


@pytest.mark.parametrize("how", TABLE)
def test_the_nine_aggregations(how):
    found = aggregated(A, *how)
    assert (found - torch.tensor(TABLE[how], dtype=torch.float64)).abs().max() < 1e-4
    if how == ("l2", "mean"):
        assert found.argsort(descending=True).tolist() == [1, 2, 0]


@given(st.integers(1, 5), st.integers(1, 4), st.sampled_from(HOW), st.sampled_from(HOW), st.integers(0, 99))
def test_pieces_and_padding_do_not_matter(rows, piece, batch, seq, seed):
    source = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 4, 3, generator=source, dtype=torch.float64)
    whole = aggregated(x, batch, seq, rows)
    assert (aggregated(x, batch, seq, piece) - whole).abs().max() < 1e-12
    padded = torch.cat([x, torch.full((rows, 2, 3), 7.0, dtype=torch.float64)], 1)
    counts = torch.tensor([[True] * 4 + [False] * 2]).expand(rows, -1)
    assert (aggregated(padded, batch, seq, piece, counts) - whole).abs().max() < 1e-12


def test_unknown_aggregations_are_refused():
    with pytest.raises(UserError) as caught:
        importance(module(shipped("llama/tiny")), [tokens(256)], batch="max")
    assert caught.value.code == "unknown-setting"
    with pytest.raises(UserError) as caught:
        importance(module(shipped("llama/tiny")), [])
    assert caught.value.code == "no-data"


def default(x):
    """x [batch, seq, *dims]: mean over places, then L2 over samples."""
    return x.abs().mean(1).square().sum(0).sqrt()


def test_sites_of_a_decoder_are_what_the_paper_says():
    """Gated feed-forward, grouped attention and norms, recomputed from the weights; one layer, so nothing is fed on."""
    made = module(shipped("llama/tiny", layers=1))
    w, ids = made.state_dict(), tokens(256, 3, 10)
    got = importance(made, [ids[:2], ids[2:]])
    norm = torch.nn.functional.rms_norm
    x = w["embedding.weight"][ids]
    n1 = norm(x, (64,), w["layer.0.norm1.weight"], 1e-5)
    o = made.layer[0].attention  # what goes into `out` is seen by a hook of the test's own
    seen = []
    handle = o.out.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    with torch.no_grad():
        made(ids)
    handle.remove()
    x = x + torch.einsum("bshd,ohd->bso", seen[0], w["layer.0.attention.out.weight"])
    n2 = norm(x, (64,), w["layer.0.norm2.weight"], 1e-5)
    gate, up = (n2 @ w[f"layer.0.gated_mlp.{part}.weight"].T for part in ("gate", "up"))
    inner = torch.nn.functional.silu(gate) * up
    x = x + inner @ w["layer.0.gated_mlp.out.weight"].T
    final = norm(x, (64,), w["final.weight"], 1e-5)
    assert torch.allclose(got["hidden"], default(n1) + default(n2) + default(final), rtol=1e-10)
    assert torch.allclose(got["layer.0.gated_mlp.ffn"], default(inner), rtol=1e-10)
    assert torch.allclose(got["layer.0.attention.heads"], default(seen[0]).norm(dim=1), rtol=1e-10)


def test_state_space_heads_are_scored_by_their_input():
    """By the part of the input projection that the scan reads, not by what the output projection reads."""
    made = module(shipped("nemotron_h/tiny", pattern="M"))
    w, ids = made.state_dict(), tokens(256, 3, 10)
    x = torch.nn.functional.rms_norm(w["embedding.weight"][ids], (64,), w["layer.0.rms_norm.weight"], 1e-5)

    def part(name):
        return default(torch.einsum("bsk,hpk->bshp", x, w[f"layer.0.mamba2.{name}.weight"]))

    key, channels = "layer.0.mamba2.heads", "layer.0.mamba2.head_dim"
    got = importance(made, [ids])
    assert torch.allclose(got[key], part("u").norm(dim=1), rtol=1e-10)
    assert torch.allclose(got[channels], part("u").norm(dim=0), rtol=1e-10)
    gated = importance(made, [ids], at={"mamba2": "z"})
    assert torch.allclose(gated[key], part("z").norm(dim=1), rtol=1e-10)
    seen = []
    made.layer[0].mamba2.out.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    out = importance(made, [ids], at={"mamba2": "norm"})
    assert torch.allclose(out[key], default(seen[-1]).norm(dim=1), rtol=1e-10)


def test_a_variable_may_be_asked_for():
    made, ids = module(shipped("nemotron4/tiny", layers=1)), tokens(256)
    seen = []
    made.layer[0].mlp.up.register_forward_hook(lambda m, args, out: seen.append(out))
    got = importance(made, [ids], at={"mlp": "up"})  # before the activation, as the paper prints it
    assert torch.allclose(got["layer.0.mlp.ffn"], default(seen[-1]), rtol=1e-10)
    assert error_of(lambda: importance(made, [ids], at={"mlq": "up"})).code == "unknown-name"
    assert error_of(lambda: importance(made, [ids], at={"mlp": "upp"})).code == "unknown-name"


def test_experts_are_scored_by_what_they_add():
    made, ids = module(shipped("nemotron_h/tiny_moe", pattern="E")), tokens(256, 2, 9)
    block = made.layer[0].moe
    seen, rows = {}, []
    block.routing.register_forward_hook(lambda m, args, out: seen.update(weights=out.flatten(0, 1)))
    block.down.register_forward_hook(lambda m, args, out: rows.append(out.flatten(0, 1)))
    got = importance(made, [ids])
    weights, x = seen["weights"], rows[-1]
    hits = weights != 0
    for e, expert in enumerate(block.expert):
        inner = torch.relu(x @ expert.up.weight.T).square()
        y = (inner @ expert.out.weight.T) * weights[:, e, None]
        assert torch.allclose(got["layer.0.moe.experts"][e], y.norm(dim=1).sum() / 18, rtol=1e-10)
        samples = [inner[b * 9 : b * 9 + 9][hits[b * 9 : b * 9 + 9, e]] for b in range(2)]
        expected = torch.stack([s.abs().mean(0) for s in samples if len(s)]).square().sum(0).sqrt()
        assert torch.allclose(got[f"layer.0.moe.expert.{e}.ffn"], expected, rtol=1e-10)
    assert torch.allclose(got["layer.0.moe.latent"], _latent(block, x, weights), rtol=1e-10)


def _latent(block, x, weights):
    """Scored where the experts read it, and where what they gave is led back."""
    some = torch.zeros_like(x)
    for e, expert in enumerate(block.expert):
        some += weights[:, e, None] * (torch.relu(x @ expert.up.weight.T).square() @ expert.out.weight.T)
    return default(x.view(2, 9, -1)) + default(some.view(2, 9, -1))


@given(decoders(), st.integers(0, 99))
@settings(max_examples=25)
def test_any_decoder_is_scored_whole_and_left_alone(text, seed):
    """Every dim that a weight contracts has finite scores; hooks are gone; micro-batches do not matter."""
    made, ids = module(program(text)), tokens(VOCAB, 4, 7, seed)
    before = made(ids)
    got = importance(made, [ids])
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in made.modules())
    assert torch.equal(made(ids), before)
    pieces = importance(made, [ids[:1], ids[1:]])
    never = {d for d in got.dims if d not in pieces}
    assert all("expert" in d for d in never)
    for key in pieces.dims:
        assert bool(torch.isfinite(got[key]).all())
        assert torch.allclose(got[key], pieces[key], rtol=1e-9, atol=1e-12)
    plain = {without_numbers(k) for k in got.dims}
    assert "hidden" in plain
    contracted = {d for w in sites(Dims(made.program)) for d in w.dims}
    assert contracted >= set(got.dims) - set(Dims(made.program).sizes) and contracted


@pytest.mark.parametrize("name", TINY)
def test_padding_does_not_count(name):
    """Rows with padding at their end score as without it: nothing looks ahead."""
    made, ids = module(shipped(name)), tokens(256, 2, 9)
    valid = torch.tensor([[True] * 6 + [False] * 3] * 2)
    a = importance(made, [{"tokens": ids, "valid": valid}])
    b = importance(made, [ids[:, :6]])
    for key in b.dims:
        assert torch.allclose(a[key], b[key], rtol=1e-9), key


def test_a_file_of_scores_comes_back(tmp_path):
    made = module(shipped("nemotron_h/tiny"))
    scores = importance(made, [tokens(256)]).with_layers({"layer": torch.arange(5.0, dtype=torch.float64)})
    again = Scores.load(scores.save(tmp_path / "a" / "scores.safetensors"))
    assert again.dims == scores.dims and again.about == scores.about
    assert all(torch.equal(scores[k], again[k]) for k in scores.dims)
    assert torch.equal(again.layers["layer"], scores.layers["layer"])
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["scores.safetensors"]
    (tmp_path / "broken").write_bytes(b"not a file of scores")
    for path, code in ((tmp_path / "broken", "damaged-weights"), (tmp_path / "absent", "no-such-file")):
        with pytest.raises(UserError) as caught:
            Scores.load(path)
        assert caught.value.code == code


def test_a_tied_head_is_scored_where_its_norm_gives():
    made, ids = module(shipped("llama/tiny", layers=1, tied=True)), tokens(256)
    seen = []
    made.final.register_forward_hook(lambda m, args, out: seen.append(out))
    site = next(s for s in importance(made, [ids]).sites if s.name == "final")
    assert isinstance(site, Site) and torch.allclose(site.values, default(seen[-1]), rtol=1e-10)


def test_what_only_training_changes_is_passed_through():
    """A head that reads a dropped residual stream: what the last layer gives is scored."""
    made, ids = module(shipped("transformer_ls/tiny_released")), tokens(256)
    seen = []
    made.layer[-1].register_forward_hook(lambda m, args, out: seen.append(out))
    site = next(s for s in importance(made, [ids]).sites if "." not in s.name)
    assert site.dims == ("hidden",) and torch.allclose(site.values, default(seen[-1]), rtol=1e-10)


def test_a_shared_block_is_scored_over_all_its_uses():
    text = """
model twice(vocab = 31, hidden = 8, ffn = 6):
    tokens[batch, seq]: token
    embedding = embed(tokens, vocab -> hidden)
    shared tail = mlp(ffn)
    x = embedding + tail(embedding)
    x = x + tail(x)
    logits = linear(x, hidden -> vocab)
    return logits
"""
    made, ids = module(of_text(text)), tokens(31, 2, 5)
    seen = []
    made.tail.out.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    got = importance(made, [ids])
    assert torch.allclose(got["tail.ffn"], default(torch.cat(seen[-2:])), rtol=1e-10)
