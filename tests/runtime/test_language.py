"""What the language means, seen from the models that it makes: rules, coordinates, sharing, experts, buffers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from heddle.dsl.diagnostics import SpecError
from heddle.dsl.load import load_text, shipped_folder
from heddle.dsl.program import Program
from heddle.runtime import lib
from heddle.runtime.check import program_of, proved
from heddle.runtime.compile import build, instantiate

VOCAB = 61
BASE = f"""
model base(vocab = {VOCAB}, hidden = 24, heads = 4, layers = 3):
    tokens[batch, seq]: token
    embedding = embed(tokens, vocab -> hidden)
    x = embedding
    for layer in layers:
        x = x + attention(rms_norm(x), heads, rotary = rope())
        norm = rms_norm(x)
        x = x + mlp(norm, 2 * hidden)
    final = rms_norm(x)
    logits = linear(final, hidden -> vocab)
    init linear, embed: normal(0.2)
    return logits
"""


def program(text: str, model: str | None = None, **settings: object) -> Program:
    return program_of(load_text(text, folder=shipped_folder()), model, settings)


def module(text: str, model: str | None = None, seed: int = 1, **settings: object):
    return instantiate(build(program(text, model, **settings)), seed=seed).cast(torch.float64).eval()


def tokens(seed: int = 0, batch: int = 2, seq: int = 23) -> torch.Tensor:
    return torch.randint(0, VOCAB, (batch, seq), generator=torch.Generator().manual_seed(seed))


def test_a_document_longer_than_its_positions_are_known_is_refused():
    text = BASE.replace("    x = embedding\n", "    x = embedding + embed(seq.position, 16 -> hidden)\n")
    model = module(text)
    assert model.longest == 16 and module(BASE).longest is None
    ids = tokens(seq=24)
    with pytest.raises(ValueError, match="24 tokens, positions are known up to 16"):
        model(ids)
    document = (torch.arange(24) >= 12).long().expand(2, -1)
    assert model(ids, document).shape[1] == 24
    stream = model.stream(2, 64)
    model.prefill(ids[:, :16], stream)
    with pytest.raises(ValueError, match="17 tokens"):
        model.prefill(ids[:, 16:17], stream)
    start = torch.zeros(2, 1, dtype=torch.bool)
    start[:, 0] = True
    model.prefill(ids[:, 16:17], stream, start=start)  # a new document has room again
    ragged = model.stream(2, 64)
    model.prefill(ids[:, :16], ragged, count=torch.tensor([16, 3]))
    with pytest.raises(ValueError, match="17 tokens"):
        model.prefill(ids[:, 16:17], ragged)
    assert ragged.ticks().tolist() == [16, 3]


def refused(text: str, model: str | None = None) -> list[str]:
    """The codes of what is wrong with a text."""
    with pytest.raises(SpecError) as caught:
        program(text, model)
    return [d.code for d in caught.value.diagnostics]


def streams_like_it_runs(model, pieces: tuple[int, ...] = (5, 1, 7)) -> None:
    """Prefill in pieces, then token by token, gives what a full run gives."""
    ids = tokens(3)
    stream = model.stream(len(ids), ids.shape[1])
    parts, at = [], 0
    for size in (*pieces, *[1] * (ids.shape[1] - sum(pieces))):
        parts.append(model.prefill(ids[:, at : at + size], stream))
        at += size
    with torch.no_grad():
        assert float((torch.cat(parts, 1) - model(ids)).abs().max()) < 1e-10


# --- rules of `with:` ----------------------------------------------------------------------------

WRAPPINGS = {
    "lora": "attention.q, attention.v: lora(it, rank = 2)",
    "adapter": "attention, mlp: adapter(it, width = 5)",
    "linears": "linear in layer: lora(it, rank = 3)",
    "some": "mlp in layer[first(1), last(1)]: adapter(it, width = 5)",
}


@pytest.mark.parametrize("name", WRAPPINGS)
def test_adapters_start_as_what_they_wrap(name):
    """They begin at zero, and what they wrap keeps its path: with the base's weights the logits are the base's."""
    plain = module(BASE)
    tuned = module(f"{BASE}\nmodel tuned = base with:\n    {WRAPPINGS[name]}\n", "tuned", seed=7)
    theirs = plain.state_dict()
    own = tuned.state_dict()
    assert set(theirs) < set(own) and not any("it" in key.split(".") for key in own)
    tuned.load_state_dict({**own, **theirs})
    assert torch.allclose(tuned(tokens()), plain(tokens()), rtol=0, atol=1e-12)
    streams_like_it_runs(tuned)


def test_rules_pick_iterations():
    text = f"{BASE}\nmodel tuned = base with:\n    mlp in layer[first(1), last(1)]: adapter(it, width = 5)\n"
    names = {p.name for p in program(text, "tuned", layers=5).parameters()}
    adapted = {n.split(".")[1] for n in names if n.endswith("mlp.adapter.down.weight")}
    assert adapted == {"0", "4"}


def test_equal_iterations_stay_one_graph():
    text = f"{BASE}\nmodel tuned = base with:\n    attention.q in layer[0 .. 60 step 20]: lora(it, rank = 2)\n"
    few, many = (len(program(text, "tuned", layers=n).bodies) for n in (61, 120))
    assert few == many < 12


def test_an_argument_is_changed_through_it():
    """`it(mask = ...)` is what was there with another argument."""
    text = f"{BASE}\nmodel near = base with:\n    attention: it(mask = window(3))\n"
    direct = BASE.replace("rotary = rope()", "rotary = rope(), mask = window(3)")
    assert torch.equal(module(text, "near")(tokens()), module(direct)(tokens()))


def test_what_does_not_use_it_takes_its_place():
    text = f"{BASE}\nmodel other = base with:\n    relu2: silu\n"
    direct = BASE.replace("2 * hidden)", "2 * hidden, silu)")
    assert torch.equal(module(text, "other")(tokens()), module(direct)(tokens()))


def test_later_rules_win_and_sheets_nest():
    text = (
        f"{BASE}\nmodel one = base with:\n    linear in attention: lora(it, rank = 2)\n    attention.q: it\n"
        "model two = one with:\n    attention: adapter(it, width = 4)\n"
    )
    names = {p.name for p in program(text, "two").parameters()}
    layer = {n.removeprefix("layer.0.attention.") for n in names if n.startswith("layer.0.attention.")}
    assert {"q.weight", "k.weight", "k.lora.a.weight", "adapter.down.weight"} <= layer
    assert "q.lora.a.weight" not in layer


def test_what_a_rule_makes_is_not_selected_by_its_sheet():
    """`linear: lora(it)` does not wrap the linears of lora, for ever."""
    text = f"{BASE}\nmodel tuned = base with:\n    linear: lora(it, rank = 2)\n"
    assert not any(n.count("lora") > 1 for n in (p.name for p in program(text, "tuned").parameters()))


def test_rules_that_do_nothing_are_errors():
    assert refused(f"{BASE}\nmodel t = base with:\n    layer.q: lora(it, rank = 2)\n", "t") == ["selects-nothing"]
    assert refused(BASE.replace("linear, embed", "layer.q")) == ["selects-nothing"]
    program(f"{BASE}\nmodel t = base with:\n    layer.q?: lora(it, rank = 2)\n    moe.up: lora(it, rank = 2)\n", "t")


def test_init_picks_iterations():
    text = BASE.replace("    return logits", "    init mlp.up in layer[1]: constant(3.5)\n    return logits")
    starts = {p.name: p.init.values for p in program(text).parameters() if p.name.endswith("mlp.up.weight")}
    assert starts == {f"layer.{i}.mlp.up.weight": (3.5,) if i == 1 else (0.2,) for i in range(3)}


# --- coordinates ---------------------------------------------------------------------------------


def with_mask(mask: str, before: str = "") -> str:
    return BASE.replace("    x = embedding\n", f"    x = embedding\n{before}").replace(
        "rotary = rope()", f"mask = {mask}"
    )


@settings(max_examples=25)
@given(piece=st.integers(1, 9), shift=st.integers(0, 4), seed=st.integers(0, 99))
def test_a_computed_coordinate_is_its_formula(piece, shift, seed):
    """`key.piece < query.piece` is the comparison of what defines `piece`; it streams; the future changes nothing."""
    named = with_mask(
        "(key.piece < query.piece or key.piece == query.piece) and causal",
        f"    seq.piece = (seq.position + {shift}) // {piece}\n",
    )
    spelled = with_mask(f"(key.position + {shift}) // {piece} <= (query.position + {shift}) // {piece} and causal")
    one, two = module(named, seed=seed), module(spelled, seed=seed)
    assert torch.equal(one(tokens(seed)), two(tokens(seed)))
    streams_like_it_runs(one)
    ids = tokens(seed)
    changed = ids.clone()
    changed[:, 11:] = (changed[:, 11:] + 1) % VOCAB
    assert torch.equal(one(ids)[:, :11], one(changed)[:, :11])


def test_pieces_bound_what_is_kept():
    """Attention within pieces of 4 needs 3 rows back: the hull sees through the floor division."""
    from heddle.lowering.pipeline import lower

    text = with_mask("key.piece == query.piece and causal", "    seq.piece = seq.position // 4\n")
    states = [s for group in lower(program(text)).states.values() for s in group]
    assert {s.keep for s in states} == {3}
    streams_like_it_runs(module(text))


def test_coordinates_are_values_too():
    text = BASE.replace(
        "    x = embedding\n",
        "    seq.half = seq.position // 2\n    place = embed(seq.half, 50 -> hidden)\n    x = embedding + place\n",
    )
    model = module(text)
    assert model.state_dict()["place.weight"].shape == (50, 24)
    streams_like_it_runs(model)


def test_a_coordinate_is_seen_by_what_is_called_and_no_further():
    inner = (
        "block inner(heads):\n    x[seq, hidden]\n    seq.piece = seq.position // 2\n"
        "    return attention(x, heads, mask = near)\n"
    )
    near = "block near(): return causal and key.piece == query.piece\n"
    fine = near + inner + BASE.replace("attention(rms_norm(x), heads, rotary = rope())", "inner(rms_norm(x), heads)")
    streams_like_it_runs(module(fine))
    outside = fine.replace("x = x + mlp(", "x = x + attention(norm, heads, mask = near) + mlp(")
    assert "no-such-member" in refused(outside)


@pytest.mark.parametrize(
    ("line", "code"),
    [("seq.piece = hidden / 7", "not-exact"), ("seq.position = seq.position // 2", "bound-twice"),
     ("seq.piece = seq.position // 0", "divide-by-zero"), ("hidden.piece = seq.position", "no-sequence"),
     ("seq.piece = seq.position / 2", "wrong-type"), ("seq.piece = seq.position < 2", "wrong-type")],
)  # fmt: skip
def test_bad_coordinates(line, code):
    text = (
        with_mask("key.piece == query.piece", f"    {line}\n")
        if "piece" in line
        else with_mask("causal", f"    {line}\n")
    )
    assert refused(text)[0] == code


# --- sharing -------------------------------------------------------------------------------------


def test_a_shared_block_has_one_set_of_weights_and_a_state_for_each_call():
    """Universal transformer: one layer, used in a loop and outside; its calls are unrolled to see the same numbers."""
    shared = f"""
model tied(vocab = {VOCAB}, hidden = 24, heads = 4):
    tokens[batch, seq]: token
    embedding = embed(tokens, vocab -> hidden)
    shared mix = attention(heads, rotary = rope(), mask = window(6))
    shared scan = mamba2(heads, 8, 8, 2)
    x = embedding + mix(embedding)
    for layer in 3:
        x = x + mix(rms_norm(x))
        x = x + scan(x)
        for again in 2:
            x = x + scan(x)
    logits = linear(x + mix(x), hidden -> vocab)
    init linear, embed: normal(0.2)
    return logits
"""
    model = module(shared)
    names = [n for n in model.state_dict() if ".q.weight" in n or "A_log" in n]
    assert sorted(names) == ["mix.q.weight", "scan.y.A_log"]
    streams_like_it_runs(model)
    model(tokens()).sum().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())


# --- experts, buffers, losses of blocks ----------------------------------------------------------

MOE = f"""
model sparse(vocab = {VOCAB}, hidden = 16, experts = 5, active = 2, latent = none, always = none):
    tokens[batch, seq]: token
    embedding = embed(tokens, vocab -> hidden)
    x = embedding + attention(embedding, heads = 4)
    for layer in 2:
        x = x + moe(rms_norm(x), sigmoid_router(experts, active, scale = 1.5), 12, always, latent)
    logits = linear(x, hidden -> vocab)
    init linear, embed: normal(0.3)
    return logits
"""


def dense(model, x, prefix: str, active: int):
    """The layer as the papers write it: scores, the best `active` of score + bias, their mean of experts. fp64."""
    w = {k.removeprefix(prefix): v for k, v in model.state_dict().items() if k.startswith(prefix)}
    s = torch.sigmoid(x @ w["routing.gate.weight"].T)
    chosen = (s + w["routing.bias"]).topk(active, -1).indices
    g = torch.zeros_like(s).scatter(-1, chosen, s.gather(-1, chosen))
    g = 1.5 * g / (g.sum(-1, keepdim=True) + 1e-20)
    number = len({k.split(".")[1] for k in w if k.startswith("expert.")})
    experts = [(x @ w[f"expert.{e}.up.weight"].T).relu() ** 2 @ w[f"expert.{e}.out.weight"].T for e in range(number)]
    return sum(g[..., e, None] * y for e, y in enumerate(experts))


@settings(max_examples=10)
@given(experts=st.integers(1, 6), data=st.data())
def test_a_layer_of_experts_is_the_weighted_sum_of_them(experts, data):
    """DeepSeek-V3 eq. 12-16 (sigmoid scores, biased choice, unbiased weights), scaled as Nemotron 3 does."""
    active = data.draw(st.integers(1, experts))
    model = module(MOE, experts=experts, active=active)
    layer = next(m for name, m in model.named_modules() if name == "layer.0.moe")
    with torch.no_grad():
        layer.routing.bias.copy_(torch.randn(experts, dtype=torch.float64))
        x = torch.randn(2, 7, 16, dtype=torch.float64)
        y = layer(x, lib.At((2, 7)), lib.STATELESS)
        assert torch.allclose(y, dense(model, x, "layer.0.moe.", active), rtol=1e-10, atol=1e-12)
    streams_like_it_runs(model)


def test_gradients_of_experts_are_those_of_the_sum():
    model = module(MOE)
    layer = next(m for name, m in model.named_modules() if name == "layer.0.moe")
    x = torch.randn(1, 3, 16, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v: layer(v, lib.At((1, 3)), lib.STATELESS), (x,), eps=1e-7, atol=1e-5)


@settings(max_examples=8)
@given(cut=st.integers(1, 3), seed=st.integers(0, 50))
def test_losses_and_buffers_do_not_see_micro_batches(cut, seed):
    """Sums add up: the balance loss, the counts and the new biases are those of one batch."""
    ids = tokens(seed, batch=4, seq=9)
    whole, parts = module(MOE), module(MOE)
    one, two = lib.Gathered(), lib.Gathered()
    sums = whole.losses(ids, gathered=one)
    counts = whole.counts(ids)
    pieces = [parts.losses(p, gathered=two) for p in ids.split([cut, 4 - cut])]
    assert set(sums) == set(counts) == {"lm", "balance"}
    assert int(counts["balance"]) == sum(int(parts.counts(p)["balance"]) for p in ids.split([cut, 4 - cut]))
    for name in sums:
        assert torch.allclose(sums[name], sum(p[name] for p in pieces), rtol=1e-12)
    assert one.settle().keys() == {"violation"}
    two.settle()
    biases = [b for name, b in whole.named_buffers() if name.endswith("bias")]
    assert len(biases) == 2 and all(float(b.abs().max()) == pytest.approx(1e-3) for b in biases)
    assert all(
        torch.equal(a, b)
        for a, b in zip(biases, (b for n, b in parts.named_buffers() if n.endswith("bias")), strict=True)
    )


def test_the_bias_moves_towards_balance():
    """`update bias = bias + rate * sign(mean(load) - load)`: the busiest expert's falls, an idle one's rises."""
    model = module(MOE)
    gathered = lib.Gathered()
    model.losses(tokens(), gathered=gathered)
    loads = [s["load"] for s in gathered.sums.values()]
    gathered.settle()
    for load, bias in zip(loads, (b for n, b in model.named_buffers() if n.endswith("bias")), strict=True):
        assert torch.equal(torch.sign(bias), torch.sign(load.mean() - load).double())


def test_buffers_are_saved_but_are_no_parameters():
    made = program(MOE)
    buffers = [p.name for p in made.tensors() if not p.weight.trained]
    assert buffers == ["layer.0.moe.routing.bias", "layer.1.moe.routing.bias"]
    model = instantiate(build(made), seed=0)
    assert set(buffers) <= set(model.state_dict()) and not set(buffers) & {n for n, _ in model.named_parameters()}
    assert sum(p.numel() for p in model.parameters()) == made.num_parameters()


def test_nobody_asked_nothing_computed():
    """Without `gathered` no block states anything, in training mode too."""
    model = module(MOE).train()
    assert set(model.losses(tokens())) == {"lm"}


def test_what_an_update_cannot_wait_for():
    text = MOE.replace(
        "model sparse",
        """block greedy(experts):
    x[seq, hidden]
    buffer top[experts] = 0
    score = sigmoid(linear(x, hidden -> experts))
    update top = max_over(score, except = experts)
    return linear(score, experts -> hidden)

model sparse""",
    ).replace("x = embedding +", "x = embedding + greedy(embedding, experts) +")
    with pytest.raises(SpecError) as caught:
        build(program(text))
    assert [d.code for d in caught.value.diagnostics] == ["not-built-yet"]


def test_dropout_only_while_training():
    text = BASE.replace("rms_norm(x))", "rms_norm(x))").replace(
        "x = x + mlp(norm, 2 * hidden)", "x = x + dropout(mlp(norm, 2 * hidden), 0.5)"
    )
    model = module(text)
    assert torch.equal(model(tokens()), module(BASE)(tokens()))
    model.train()
    torch.manual_seed(0)
    first = model(tokens())
    assert not torch.equal(first, model(tokens()))
    assert refused(text.replace("0.5", "1.5")) == ["out-of-range"]


def test_weights_of_attention_are_dropped_only_while_training():
    text = BASE.replace("rotary = rope())", "rotary = rope(), drop = 0.5)")
    assert text != BASE
    model, plain = module(text), module(BASE)
    assert torch.equal(model(tokens()), plain(tokens()))
    made = [m.generate(tokens()[:, :3], 4) for m in (model, plain)]
    assert torch.equal(*made)
    model.train()
    torch.manual_seed(0)
    first = model(tokens())
    assert not torch.equal(first, model(tokens()))
    for wrong in ("1", "-0.5"):
        assert refused(text.replace("0.5", wrong)) == ["out-of-range"]


# --- variables of a run --------------------------------------------------------------------------


def test_a_run_can_be_asked_for_any_of_its_variables():
    """`f(x).up` is what `up` was, in the run that made `f(x)`; equal blocks stay one body; loops give theirs, too."""
    text = f"""
block half(ffn):
    x[hidden]
    up = linear(x, hidden -> ffn)
    act = silu(up)
    return linear(act, ffn -> hidden)

model asked(vocab = {VOCAB}, hidden = 8):
    tokens[batch, seq]: token
    embedding = embed(tokens, vocab -> hidden)
    one = half(embedding, 12)
    two = half(one, 12)
    x = two + one
    for layer in 2:
        y = half(x, 12)
        act[wide] = y.act
        x = x + y + linear(act, wide -> hidden)
    up[wide] = two.up
    deep = linear(up, wide -> vocab)
    logits = linear(x, hidden -> vocab) + deep
    return logits
"""
    made = program(text)
    assert sum(b.block == "half" for b in made.bodies.values()) == 1
    model = module(text)
    streams_like_it_runs(model)
    with torch.no_grad():
        two = model.two.up(model.one(model.embedding(tokens()), lib.At((2, 23)), lib.STATELESS)[0])
        full = model(tokens())
        model.deep.weight.zero_()
        assert not torch.equal(model(tokens()), full) and two.shape[-1] == 12
    assert "no-such-member" in refused(text.replace("two.up", "two.upp"))


def test_objectives_may_ask_for_what_the_model_does_not_return():
    text = (
        BASE
        + """
block both(net):
    tokens[batch, seq]: token
    out = net(tokens)
    loss lm = cross_entropy(out.logits, next(tokens))
    loss small = 0.1 * mean(out.final ^ 2)
"""
    )
    made = program_of(load_text(text, folder=shipped_folder()), "base", {}, "both")
    model = instantiate(build(made), seed=1).cast(torch.float64)
    sums, counts = model.losses(tokens()), model.counts(tokens())
    kept = {}
    model.final.register_forward_hook(lambda module, args, out: kept.setdefault("final", out))
    logits = model(tokens())
    assert logits.shape == (2, 23, VOCAB) and model.generate(tokens()[:, :4], 3).shape == (2, 7)
    assert torch.allclose(sums["small"] / counts["small"], 0.1 * (kept["final"] ** 2).mean())


def test_compiling_proves_the_maps_of_the_family():
    """Two weights under one name are found before a checkpoint is ever written; a changed model has left the family."""
    text = BASE.replace("model base", "model mapped") + (
        '\ncheckpoint huggingface "Mapped" for mapped:\n    vocab = config.vocab_size\n'
        '    embedding = "same"; logits = "same"\n'
        "\nmodel apart = mapped with:\n    logits: lora(it, rank = 2)\n"
    )
    file = load_text(text, folder=shipped_folder())
    with pytest.raises(SpecError) as caught:
        proved(file, "mapped")
    assert [d.code for d in caught.value.diagnostics] == ["map-collision"]
    assert proved(file, "apart").is_changed
    assert proved(load_text(text.replace('logits = "same"', 'logits = "other"'), folder=shipped_folder()), "mapped")


def test_sources_of_attention_stream_each_with_its_own_memory():
    """One softmax over a near window and a far one that skips; a shared op keeps rows for each of its uses."""
    text = f"""
block two(heads, head_dim):
    x[seq, hidden]
    q = linear(x, hidden -> [heads, head_dim])
    k = linear(x, hidden -> [heads, head_dim])
    v = linear(x, hidden -> [heads, head_dim])
    near = query.position - key.position < 3 and causal
    far = key.position // 2 * 2 == key.position and key.position <= query.position - 3
    shared mixed = causal_conv(taps = 3)
    o = attend(q, (k, v, near), (mixed(k), mixed(v), far))
    return linear(o, [heads, head_dim] -> hidden)

model sourced(vocab = {VOCAB}, hidden = 16):
    tokens[batch, seq]: token
    embedding = embed(tokens, vocab -> hidden)
    x = embedding + two(embedding, 2, 8)
    logits = linear(x, hidden -> vocab)
    init linear, embed: normal(0.4)
    return logits
"""
    streams_like_it_runs(module(text))
