"""A model as the compiler writes one: whole documents, losses, generation, initial values, precision."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from heddle.runtime import lib

from .tiny import VOCAB, Tiny, pieces, reference

law = settings(deadline=None, max_examples=25)
MODEL = Tiny().double().initialise(2)


def tokens_of(batch, seq, seed=0):
    return torch.randint(0, VOCAB, (batch, seq), generator=torch.Generator().manual_seed(seed))


def documents_of(data, batch, seq):
    return torch.tensor([[data.draw(st.integers(0, 3)) == 0 for _ in range(seq)] for _ in range(batch)]).cumsum(1)


@law
@given(st.data(), st.integers(1, 2), st.integers(1, 11))
def test_packed_documents_are_each_their_own(data, batch, seq):
    tokens, document = tokens_of(batch, seq, seq), documents_of(data, batch, seq)
    weights = {name: x.clone().requires_grad_() for name, x in MODEL.state_dict().items()}
    MODEL.zero_grad()
    loss = MODEL.losses(tokens, document)["next"]
    logits = MODEL(tokens, document=document)
    expected, count = torch.zeros((), dtype=torch.float64), 0
    for i, row in enumerate(document.tolist()):
        for s, e in pieces(row):
            wanted = reference(weights, tokens[i, s:e])
            assert (logits[i, s:e] - wanted).abs().max() < 1e-10
            log_p = wanted.log_softmax(-1)
            expected = expected - sum(log_p[t, tokens[i, s + t + 1]] for t in range(e - s - 1))
            count += e - s - 1
    assert abs(loss - expected) < 1e-10 * (1 + count)
    assert MODEL.counts(tokens, document)["next"] == count
    if not count:
        return
    loss.backward()
    expected.backward()
    # A step against the gradient, to see the gradients of fused weights under their own names.
    moved = copy.deepcopy(MODEL)
    with torch.no_grad():
        for parameter, source in zip(moved.parameters(), MODEL.parameters(), strict=True):
            parameter.sub_(source.grad)
    for path, after in moved.state_dict().items():
        wanted = weights[path].grad
        got = weights[path].detach() - after
        if wanted is None:
            assert not bool(got.any()), path
        else:
            assert (got - wanted).abs().max() < 1e-9 * (1 + wanted.abs().max()), path


@law
@given(st.integers(1, 3), st.integers(1, 6), st.integers(0, 6), st.integers(0, 9))
def test_greedy_generation_is_the_argmax_of_the_whole(batch, seq, new, seed):
    prompt = tokens_of(batch, seq, seed)
    out = MODEL.generate(prompt, new)
    assert torch.equal(out[:, :seq], prompt)
    whole = MODEL(out)
    assert torch.equal(whole[:, seq - 1 : -1].argmax(-1), out[:, seq:]) or not new


def test_long_prompts_are_fed_in_pieces(monkeypatch):
    prompt = tokens_of(2, 9)
    once = MODEL.generate(prompt, 4)
    monkeypatch.setattr(f"{lib.Model.__module__}.PREFILL_ROWS", 2)
    assert torch.equal(MODEL.generate(prompt, 4), once)


def test_sampling_follows_the_probabilities_it_keeps():
    prompt = tokens_of(1, 4).expand(400, 4)
    p = (MODEL(prompt[:1])[0, -1] / 0.8).softmax(-1)
    order = p.argsort(descending=True)
    for kept, settings_of in (
        (order, {}),
        (order[:3], {"top_k": 3}),
        (order[: int((p[order].cumsum(0) < 0.7).sum()) + 1], {"top_p": 0.7}),
    ):
        drawn = MODEL.generate(prompt, 1, temperature=0.8, seed=4, **settings_of)[:, -1]
        share = torch.zeros_like(p)
        share[kept] = p[kept] / p[kept].sum()
        assert set(drawn.tolist()) <= set(kept.tolist())
        # 400 draws: five standard deviations of each count.
        count = torch.bincount(drawn, minlength=VOCAB)
        assert bool(((count - 400 * share).abs() <= 5 * (400 * share * (1 - share)).sqrt() + 1).all())


def test_a_seed_repeats_and_the_callback_sees_and_stops():
    prompt = tokens_of(2, 3)
    first = MODEL.generate(prompt, 6, temperature=1.0, seed=1)
    assert torch.equal(first, MODEL.generate(prompt, 6, temperature=1.0, seed=1))
    assert not torch.equal(first, MODEL.generate(prompt, 6, temperature=1.0, seed=2))
    seen = []

    def stop_at_three(new):
        seen.append(new)
        return len(seen) == 3

    out = MODEL.generate(prompt, 6, temperature=1.0, seed=1, on_token=stop_at_three)
    assert torch.equal(out, first[:, :6])
    assert torch.equal(torch.stack(seen, 1), out[:, 3:])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": -0.1}, "temperature is -0.1, must be at least 0"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"top_p": 0.0}, "top_p is 0.0, must be above 0 and at most 1"),
        ({"top_p": 1.1}, "top_p is 1.1"),
        ({"top_k": 0}, "top_k is 0, must be at least 1"),
        ({"max_new_tokens": -1}, "max_new_tokens is -1"),
        ({"tokens": torch.zeros(1, 0, dtype=torch.long)}, r"the prompt \[1, 0\] is empty"),
        ({"tokens": torch.tensor([[3, VOCAB]])}, f"token {VOCAB} is outside the vocabulary of {VOCAB}"),
        ({"tokens": torch.tensor([[-1, 3]])}, "token -1 is outside"),
        ({"tokens": torch.tensor([1, 2])}, r"must be int64\[batch, seq\]"),
    ],
)
def test_misuse_is_a_clear_error(change, message):
    with pytest.raises(ValueError, match=message):
        MODEL.generate(**{"tokens": tokens_of(1, 3), "max_new_tokens": 2} | change)


def test_prefix_law():
    """What comes later changes nothing before."""
    tokens = tokens_of(1, 12)
    whole = MODEL(tokens)
    for t in range(1, 12):
        assert (MODEL(tokens[:, :t]) - whole[:, :t]).abs().max() < 1e-10


def test_padding_changes_nothing():
    tokens = tokens_of(2, 8)
    valid = torch.arange(8) < torch.tensor([[8], [5]])
    logits = MODEL(tokens, valid=valid)
    assert (logits[1, :5] - MODEL(tokens[1:, :5])[0]).abs().max() < 1e-10
    assert MODEL.counts(tokens, valid=valid)["next"] == 7 + 4
    parts = MODEL.losses(tokens[:1])["next"] + MODEL.losses(tokens[1:, :5])["next"]
    assert abs(MODEL.losses(tokens, valid=valid)["next"] - parts) < 1e-10


def test_micro_batches_add_up():
    tokens, document = tokens_of(4, 7), (torch.arange(7) >= torch.tensor([[1], [3], [5], [2]])).long()
    whole = MODEL.losses(tokens, document)["next"]
    halves = [MODEL.losses(tokens[i : i + 2], document[i : i + 2])["next"] for i in (0, 2)]
    assert abs(whole - sum(halves)) < 1e-10


def test_cast_keeps_what_must_stay_fp32_and_agrees():
    model = Tiny().initialise(2).cast(torch.bfloat16)
    kinds = {path: view.dtype for path, _, view in model.named_logical_parameters()}
    for path, kind in kinds.items():
        name = path.rpartition(".")[2]
        wide = name in ("A_log", "D", "dt_bias") or path.endswith("norm.weight")
        assert kind == (torch.float32 if wide else torch.bfloat16), path
    tokens = tokens_of(2, 9)
    logits = model(tokens)
    assert logits.dtype == torch.bfloat16
    rounded = Tiny().double()
    rounded.load_state_dict(model.state_dict())
    assert (logits.double() - rounded(tokens)).norm() < 0.05 * logits.double().norm()
    stream = model.stream(2, 9)
    decoded = torch.cat([model.decode(t, stream) for t in tokens.split(1, 1)], 1)
    assert (decoded.double() - rounded(tokens)).norm() < 0.05 * logits.double().norm()
    assert {b.rows["state"].dtype for b in stream.buffers if "state" in b.rows} == {torch.float32}
    losses = model.losses(tokens)["next"]
    losses.backward()
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters())


def test_autocast_is_no_worse_than_plain_torch_under_it():
    """Custom functions are unknown to autocast; value and gradients still err at most twice as much as torch's own."""
    model = Tiny(("mamba", "mlp", "mamba")).initialise(2)
    tokens = tokens_of(1, 12)
    target = tokens[0, 1:]

    def plain(weights):
        log_p = reference(weights, tokens[0], model.kinds)[:-1].log_softmax(-1)
        return -log_p[torch.arange(len(target)), target].sum()

    def run(dtype, low):
        weights = {path: x.detach().clone().to(dtype).requires_grad_() for path, x in model.state_dict().items()}
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=low):
            loss = plain(weights)
        return torch.cat([g.flatten().double() for g in torch.autograd.grad(loss, list(weights.values()))])

    truth, rounded = run(torch.float64, False), run(torch.float32, True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model.losses(tokens)["next"]
    loss.backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in model.parameters())
    before = {path: x.clone() for path, x in model.state_dict().items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.sub_(parameter.grad)
    ours = torch.cat([(before[path] - x).flatten().double() for path, x in model.state_dict().items()])
    assert (ours - truth).norm() <= 2 * (rounded - truth).norm()


def test_a_model_whose_logits_wait_cannot_be_decoded():
    model = Tiny().initialise(2)
    model.late = "`logits` come 3 tokens late"
    with pytest.raises(ValueError, match="Tiny cannot be decoded: `logits` come 3 tokens late"):
        model.generate(tokens_of(1, 3), 2)


def test_cast_refuses_to_split_a_parameter():
    model = Tiny().initialise(0)
    model.keep_fp32 = ("layer.1.mixer.q.weight",)
    with pytest.raises(ValueError, match="keep_fp32 names only some of them"):
        model.cast(torch.bfloat16)


def test_initial_values_depend_on_seed_and_path_alone():
    """Not on the order of the table, nor on dtype; and their laws hold."""
    a, b = Tiny().initialise(1), Tiny()
    b.initialise(1, dict(reversed(b.INIT.items())))
    c = Tiny().double().initialise(1)
    for (path, x), y, z in zip(a.state_dict().items(), b.state_dict().values(), c.state_dict().values(), strict=True):
        assert torch.equal(x, y), path
        assert torch.equal(x.double(), z), path
    assert not torch.equal(a.head.weight, Tiny().initialise(2).head.weight)
    with pytest.raises(ValueError, match=r"no entry for \['head.weight'\], no parameter for \['tail.weight'\]"):
        a.initialise(0, {"tail.weight" if k == "head.weight" else k: v for k, v in a.INIT.items()})


@pytest.mark.parametrize(
    ("rule", "low", "high", "mean"),
    [
        (("zeros",), 0, 0, 0),
        (("ones",), 1, 1, 1),
        (("constant", 2.5), 2.5, 2.5, 2.5),
        (("uniform", -1, 3), -1, 3, 1),
        (("uniform_fan", 0.5), -0.5, 0.5, 0),
        (("log_uniform", 1, 16), 0, math.log(16), (16 * math.log(16) - 15) / 15),
        (("normal", 0.1), -1, 1, 0),
    ],
)
def test_initial_laws(rule, low, high, mean):
    weights = lib.Weights(x=(100, 100))
    lib.initialise(weights, {"x": rule}, 3)
    x = weights.x.detach()
    assert low <= x.min() <= x.max() <= high
    # 10^4 draws: five standard errors of the mean.
    assert abs(x.mean() - mean) <= 5 * x.std() / 100 + 1e-6
    if rule[0] == "normal":
        assert abs(x.std() - 0.1) < 0.005


def test_initial_dt_bias_is_the_inverse_softplus():
    weights = lib.Weights(x=(10000,))
    lib.initialise(weights, {"x": ("softplus_inverse_log_uniform", 0.001, 0.1, 0.002)}, 3)
    dt = torch.nn.functional.softplus(weights.x.detach().double())
    assert 0.002 * (1 - 1e-5) <= dt.min() <= dt.max() <= 0.1
    inside = dt[dt > 0.0021].log()
    assert abs(inside.mean() - (math.log(0.0021) + math.log(0.1)) / 2) < 0.05
    with pytest.raises(ValueError, match="no initial value 'gamma' of 1 numbers"):
        lib.initialise(weights, {"x": ("gamma", 1)})


def test_a_tied_weight_is_drawn_once():
    model = Tiny()
    model.head.weight = model.embedding.weight
    model.INIT = {path: rule for path, rule in model.INIT.items() if path != "head.weight"}
    model.initialise(2)
    assert torch.equal(model.head.weight, Tiny().initialise(2).embedding.weight)
