"""A variant of a decoder written in a spec alone, and what elaboration promises to those who write one."""

from __future__ import annotations

import re
from io import StringIO

import pytest
import torch
from rich.console import Console

from heddle.dsl.diagnostics import SpecError
from heddle.dsl.load import load, load_text, shipped_folder
from heddle.runtime.check import program_of
from heddle.runtime.compile import build, instantiate
from heddle.runtime.data import Corpus, Packed, open_tokenizer
from heddle.runtime.train import TrainConfig, train

# Attention and feed-forward side by side behind one norm, as in GPT-J and PaLM.
PARALLEL = """
block side_by_side(heads, ffn):
    x[hidden]
    norm = rms_norm(x)
    return x + attention(norm, heads, rotary = rope()) + gated_mlp(norm, ffn)

model parallel(vocab = 256, hidden = 32, heads = 4, layers = 2, ffn = 64):
    tokens[batch, seq]: token
    embedding = embed(tokens, vocab -> hidden)
    x = embedding
    for layer in layers:
        x = side_by_side(x, heads, ffn)
    final = rms_norm(x)
    logits = linear(final, hidden -> vocab, weight = embedding.weight)
    return logits
"""


def program(text, **overrides):
    return program_of(load_text(text), None, overrides)


def body(lines, head="model m(vocab = 16, hidden = 8)"):
    """A model whose layers are these lines; they rebind x."""
    inner = "".join(f"    {line}\n" for line in lines.strip("\n").split("\n"))
    return (
        f"{head}:\n    tokens[batch, seq]: token\n    embedding = embed(tokens, vocab -> hidden)\n    x = embedding\n"
        f"{inner}    logits = linear(x, hidden -> vocab)\n    return logits\n"
    )


def names(p):
    return [q.name for q in p.parameters()]


def refused(code, text, **overrides):
    with pytest.raises(SpecError) as caught:
        program(text, **overrides)
    found = next((d for d in caught.value.diagnostics if d.code == code), None)
    assert found is not None, str(caught.value)
    return str(found.to_json())


# --- the variant ---------------------------------------------------------------------------------


def test_a_parallel_decoder_trains_and_generates(tmp_path):
    model = instantiate(build(program(PARALLEL)))
    words = open_tokenizer("bytes")
    data = Packed(Corpus.of([words.encode("over and under, over and under. " * 30)]), 32)
    config = TrainConfig(steps=30, batch=4, seq=32, lr=1e-2, warmup=2)
    report = train(model, data, config, tmp_path, held_out=data, console=Console(file=StringIO()))
    losses = [float(n) for n in re.findall(r'"loss": ([\d.]+)', (tmp_path / "log.jsonl").read_text())]
    assert losses[0] > 5
    assert losses[-1] < 1.5
    assert report.held_out < 1.5
    prompt = torch.from_numpy(words.encode("over and under, over"))[None].long()
    made = model.eval().generate(prompt, 6)
    assert words.decode(made[0].tolist()).startswith("over and under, over ")
    assert words.decode(made[0, 20:].tolist()) in "over and under, over and under. " * 2 + " under"
    with torch.no_grad():
        full = model(made)
        stream = model.stream(1, 26)
        steps = torch.cat([model.decode(made[:, i : i + 1], stream) for i in range(26)], 1)
    torch.testing.assert_close(steps, full, rtol=0, atol=1e-4)


def test_the_parallel_block_has_one_norm():
    found = names(program(PARALLEL))
    assert [n for n in found if "norm" in n and n.startswith("layer.1")] == ["layer.1.side_by_side.norm.weight"]
    assert "logits.weight" not in found


def test_the_parallel_block_is_the_formula():
    """x + attention(n) + gated_mlp(n): taking the attention's output away leaves x + gated_mlp(n)."""
    model = instantiate(build(program(PARALLEL, layers=1)), dtype=torch.float64)
    views = {n: v for n, _, v in model.named_logical_parameters()}
    with torch.no_grad():
        for name, v in views.items():
            if name.endswith("out.weight"):
                v.zero_()
        tokens = torch.arange(9)[None]
        e = views["embedding.weight"]
        h = e[tokens]
        final = h / (h.square().mean(-1, keepdim=True) + 1e-5).sqrt() * views["final.weight"]
        torch.testing.assert_close(model(tokens), final @ e.T, rtol=0, atol=1e-3)


# --- dims ----------------------------------------------------------------------------------------


def test_dims_unify_by_position():
    """A block's `width` is what it is called with, at each call anew."""
    text = "block half(out):\n    x[width]\n    return linear(x, width -> out)\n\n" + body(
        "a = half(x, 4)\nx = half(a, hidden)"
    )
    shapes = {q.name: tuple(q.shape) for q in program(text).parameters()}
    assert [s for n, s in shapes.items() if n.startswith(("a.", "a"))] == [(4, 8)]
    assert (8, 4) in shapes.values()


def test_a_dim_mismatch_shows_both_sides():
    shown = refused("dim-mismatch", body("y = linear(x, hidden -> 3)\nx = x + y"))
    assert "8" in shown
    assert "3" in shown


def test_heads_that_do_not_divide_show_both_numbers():
    assert "8 / 3" in refused("not-exact", body("x = attention(x, 3)"))
    shown = refused("indivisible-heads", body("x = attention(x, 4, 3)"))
    assert "4" in shown
    assert "3" in shown


def test_a_size_that_does_not_divide_shows_both_numbers():
    shown = refused("not-exact", body("x = mlp(x, hidden / heads)", "model m(vocab = 16, hidden = 8, heads = 3)"))
    assert "8" in shown
    assert "3" in shown


def test_kv_heads_are_heads_unless_said():
    def shapes(call):
        return {q.path[-2]: tuple(q.shape) for q in program(body(call)).parameters() if q.path[-2] in "qkv"}

    def total(shape):
        return torch.Size(shape).numel()

    shared, given, fewer = (
        shapes("x = attention(x, 4)"),
        shapes("x = attention(x, 4, 4)"),
        shapes("x = attention(x, 4, 2)"),
    )
    assert shared == given
    assert total(shared["k"]) == total(shared["q"]) == 2 * total(fewer["k"]) == 2 * total(fewer["v"])


# --- sharing -------------------------------------------------------------------------------------


def test_tied_weights_are_one_tensor():
    p = program(PARALLEL)
    model = instantiate(build(p))
    assert sum(v.numel() for v in model.state_dict().values()) == p.num_parameters()
    untied = program(PARALLEL.replace(", weight = embedding.weight", ""))
    assert untied.num_parameters() - p.num_parameters() == 256 * 32
    with torch.no_grad():
        tokens = torch.arange(4)[None]
        before = model(tokens)
        model.load_state_dict({n: v * (2 if n == "embedding.weight" else 1) for n, v in model.state_dict().items()})
    assert not torch.equal(model(tokens), before)


def test_layers_of_a_loop_have_their_own_weights():
    found = names(program(PARALLEL, layers=3))
    assert len({n for n in found if n.endswith("attention.q.weight")}) == 3


def test_bodies_of_a_loop_are_distinct_for_each_kind_only():
    from heddle.lowering.pipeline import lower

    spec = load(shipped_folder() / "nemotron_h/tiny.spec")
    few, many = (program_of(spec, None, {"pattern": p}) for p in ("M*-", "M*-" * 7))
    assert len(names(many)) > 5 * len(names(few))
    assert len(lower(few).graphs) == len(lower(many).graphs)
    assert len(build(many).source.splitlines()) < 1.3 * len(build(few).source.splitlines())


def test_shared_layers_own_one_set_of_weights():
    own = body("first = mlp(x, 8)\nsecond = mlp(first, 8)\nx = x + second")
    assert len([n for n in names(program(own)) if n.startswith(("first", "second"))]) == 4
    p = program(body("shared one = mlp(8)\nfirst = one(x)\nx = x + one(first)"))
    assert len([n for n in names(p) if "one" in n or "mlp" in n]) == 2, names(p)
    model = instantiate(build(p))
    sum(model.losses(torch.arange(8)[None]).values()).backward()
    assert all(q.grad is not None for q in model.parameters())


def test_two_calls_that_own_weights_under_one_name():
    shown = refused("same-name-twice", body("x = x + mlp(x, 8)\nx = x + mlp(x, 8)"))
    assert "mlp" in shown
    program(body("first = mlp(x, 8)\nsecond = mlp(first, 8)\nx = x + second"))


# --- patterns ------------------------------------------------------------------------------------


def test_pipeline_marks_of_megatron_patterns_are_accepted():
    spec = load(shipped_folder() / "nemotron_h/tiny.spec")
    plain, marked = (program_of(spec, None, {"pattern": p}) for p in ("M-M*-", "M-|M*|-"))
    assert names(plain) == names(marked)
    assert build(plain).source.replace("M-M*-", "") == build(marked).source.replace("M-|M*|-", "")


def test_a_kind_that_a_pattern_does_not_have_is_named():
    spec = load(shipped_folder() / "nemotron_h/tiny.spec")
    with pytest.raises(SpecError, match="unknown-symbol"):
        program_of(spec, None, {"pattern": "M-X"})
