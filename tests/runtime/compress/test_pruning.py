"""Pruning: what is kept computes what it computed. For any model, since nothing in it knows a model.

Exactness. Cutting places that are zero changes nothing for a dim that only products and pointwise ops run over: a
feed-forward's width, attention heads, a latent, experts that are never chosen. It does change something for a dim that a
norm takes a statistic of (`hidden`; heads behind a grouped norm): the norm's count is of fewer places. There the laws are
that any permutation of places computes the same, and that models without such a norm lose zero places exactly.
"""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from heddle.runtime.compress import Plan, Scores, importance, prune
from heddle.runtime.compress.choosing import Choice
from heddle.runtime.compress.dims import Dims, without_numbers
from heddle.runtime.compress.pruning import subsequence
from tests.lowering.decoders import VOCAB, decoders, program

from .models import OTHERS, TINY, arguments, error_of, module, of_text, other, shipped, tokens


def same(a, b, within=1e-10):
    assert a.keys() == b.keys()
    return all(torch.equal(a[k], b[k]) if within == 0 else (a[k] - b[k]).abs().max() <= within for k in a)


# --- keeping everything ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TINY)
def test_keeping_everything_is_the_identity(name):
    made = module(shipped(name))
    weights = made.state_dict()
    assert same(prune(made.program, weights, shipped(name)), weights, 0)


@given(decoders())
@settings(max_examples=25)
def test_keeping_everything_of_any_decoder_is_the_identity(text):
    made = module(program(text))
    assert same(prune(made.program, made.state_dict(), program(text)), made.state_dict(), 0)


# --- any order of places -----------------------------------------------------------------------------


def permutations(dims, draw_permutation):
    """{dim: an order of its places} for each dim that has an order of its own: within each run where ops take runs."""
    keep = {}
    for key in sorted(dims.carried):
        size, ties = dims.sizes[key], dims.ties.get(key, ())
        if key in dims.rigid or any(t.by == key for ts in dims.ties.values() for t in ts):
            continue
        runs = max((t.count for t in ties), default=1)
        if any(runs % t.count for t in ties):
            continue
        width = size // runs
        keep[key] = [run * width + i for run in range(runs) for i in draw_permutation(width)]
    return keep


@given(decoders(), st.integers(0, 2**20))
@settings(max_examples=40)
def test_another_order_of_places_computes_the_same(text, seed):
    """If any weight that carries a dim did not follow, or a dim were cut alike where it is not one dim, this fails."""
    source = torch.Generator().manual_seed(seed)
    made = module(program(text), seed % 7)
    keep = permutations(Dims(made.program), lambda n: torch.randperm(n, generator=source).tolist())
    assert {"hidden"} < {without_numbers(k) for k in keep}
    mixed = prune(made.program, made.state_dict(), made.program, keep=keep)
    ids = tokens(VOCAB, seed=seed)
    with torch.no_grad():
        a, b = made(ids), module(made.program, weights=mixed)(ids)
    assert (a - b).abs().max() <= 1e-10 * a.abs().max()


@pytest.mark.parametrize("name", OTHERS)
def test_other_families_follow_their_dims(name):
    """A second input and an encoder in a decoder, summaries, a shared block: everything kept is the same bits, another
    order the same function, and a smaller model by importance runs."""
    made, source = module(other(name)), torch.Generator().manual_seed(0)
    weights, given = made.state_dict(), arguments(name)
    assert same(prune(made.program, weights, other(name)), weights, 0)
    keep = permutations(Dims(made.program), lambda n: torch.randperm(n, generator=source).tolist())
    mixed = prune(made.program, weights, made.program, keep=keep)
    assert keep and not same(mixed, weights)
    scores = importance(made, [given])
    student = other(name, **OTHERS[name])
    small = module(student, weights=prune(made.program, weights, student, by=scores))
    with torch.no_grad():
        a, b = made(**given), module(made.program, weights=mixed)(**given)
        assert (a - b).abs().max() <= 1e-10 * a.abs().max() and bool(small(**given).isfinite().all())


def test_what_lies_side_by_side_with_a_table_is_not_cut():
    """The widths of sinusoids are as many waves: fewer of them are other waves."""
    made, student = (shipped("transformer_ls/tiny_released", **o) for o in ({}, {"hidden": 12}))
    scores = Scores.of({k: torch.ones(n) for k, n in Dims(made).sizes.items()})
    found = error_of(lambda: Plan(made, student, scores))
    assert found.code == "cannot-cut" and "concat" in found.message and "hidden" in found.message


@pytest.mark.parametrize("name", TINY)
def test_whole_groups_in_another_order_take_their_heads_along(name):
    made = module(shipped(name))
    dims = Dims(made.program)
    groups = {t.by: t.count for ties in dims.ties.values() for t in ties}
    mixed = prune(
        made.program, made.state_dict(), made.program, keep={k: list(range(n))[::-1] for k, n in groups.items()}
    )
    ids = tokens(256)
    with torch.no_grad():
        a, b = made(ids), module(made.program, weights=mixed)(ids)
    assert not same(mixed, made.state_dict())
    assert (a - b).abs().max() <= 1e-10 * a.abs().max()


# --- zero places -------------------------------------------------------------------------------------

EXACT = {"ffn", "latent", "attention.heads"}
"""Dims that no statistic runs over."""


def zeroed(made, cut):
    """The weights with zeros at every place that is cut."""
    weights = {k: v.clone() for k, v in made.state_dict().items()}
    for name, (_, dims) in Dims(made.program).tensors.items():
        for axis, key in enumerate(dims):
            gone = [i for i in range(weights[name].shape[axis]) if key in cut and i not in cut[key]]
            weights[name].index_fill_(axis, torch.tensor(gone, dtype=torch.int64), 0.0)
    return weights


WIDTHS = {
    "llama/tiny": {"ffn": 41, "heads": 2, "head_dim": 16},
    "mistral/tiny": {"ffn": 7, "heads": 2},
    "nemotron4/tiny": {"ffn": 95, "heads": 2},
    "nemotron_h/tiny": {"ffn": 13, "heads": 2},
    "nemotron_h/tiny_moe": {"expert_ffn": 5, "always_ffn": 33, "latent": 17, "heads": 2},
}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", WIDTHS)
def test_places_that_are_zero_may_go(name, seed):
    made, student = module(shipped(name), seed), shipped(name, **WIDTHS[name])
    source = torch.Generator().manual_seed(seed)
    scores = Scores.of({k: torch.rand(n, generator=source) for k, n in Dims(made.program).sizes.items()})
    choice = _choice(made.program, student, scores)
    cut = {k: choice.kept(k).tolist() for k in choice.matched if choice.is_cut(k)}
    assert cut and all(any(without_numbers(k).endswith(e) for e in EXACT) for k in cut)
    weights = zeroed(made, cut)
    ids = tokens(256, seed=seed)
    with torch.no_grad():
        a = module(made.program, weights=weights)(ids)
        b = module(student, weights=prune(made.program, weights, student, by=scores))(ids)
    assert (a - b).abs().max() <= 1e-10 * a.abs().max()


def _choice(teacher, student, scores):
    choice = Plan(teacher, student, scores).choice
    assert isinstance(choice, Choice)
    return choice


NORMLESS = """
model plain(vocab = 31, hidden = 12, ffn = 10, heads = 4, head_dim = 4, experts = 5):
    tokens[batch, seq]: token
    embedding = embed(tokens, vocab -> hidden)
    x = embedding
    for layer in 2:
        x = x + attention(x, heads, 2, head_dim, scale = 0.5)
        x = x + gated_mlp(x, ffn)
        x = x + moe(x, sigmoid_router(experts, 2), ffn)
    logits = linear(x, hidden -> vocab, weight = embedding.weight)
    return logits
"""


@pytest.mark.parametrize("sizes", [{"hidden": 7}, {"head_dim": 3}, {"heads": 2, "hidden": 11, "ffn": 3, "head_dim": 1}])
def test_every_dim_that_no_norm_runs_over_loses_zeros_exactly(sizes):
    """The residual stream of a model without norms, tied embedding included, and the channels of heads."""
    made, student = module(of_text(NORMLESS)), of_text(NORMLESS, **sizes)
    source = torch.Generator().manual_seed(1)
    scores = Scores.of({k: torch.rand(n, generator=source) for k, n in Dims(made.program).sizes.items()})
    choice = _choice(made.program, student, scores)
    weights = zeroed(made, {k: choice.kept(k).tolist() for k in choice.matched if choice.is_cut(k)})
    ids = tokens(31)
    with torch.no_grad():
        a = module(made.program, weights=weights)(ids)
        b = module(student, weights=prune(made.program, weights, student, by=scores))(ids)
    assert (a - b).abs().max() <= 1e-10 * a.abs().max()


def test_experts_that_are_never_chosen_may_go():
    """Those that stay take their weights, their rows of the router and their bias along."""
    made, student = module(of_text(NORMLESS)), of_text(NORMLESS, experts=3)
    weights = {k: v.clone() for k, v in made.state_dict().items()}
    for i, (a, b) in enumerate([(0, 3), (1, 2)]):
        weights[f"layer.{i}.moe.routing.bias"][[a, b]] = -1e9
    scores = Scores.of({f"layer.{i}.moe.experts": weights[f"layer.{i}.moe.routing.bias"] for i in range(2)})
    cut = prune(made.program, weights, student, by=scores)
    assert torch.equal(cut["layer.0.moe.expert.0.up.weight"], weights["layer.0.moe.expert.1.up.weight"])
    assert torch.equal(cut["layer.1.moe.expert.1.out.weight"], weights["layer.1.moe.expert.3.out.weight"])
    ids = tokens(31)
    with torch.no_grad():
        a, b = module(made.program, weights=weights)(ids), module(student, weights=cut)(ids)
    assert (a - b).abs().max() <= 1e-10 * a.abs().max()


# --- layers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "out"), [("llama/tiny", ("attention", "gated_mlp")), ("nemotron4/tiny", ("attention", "mlp"))]
)
def test_layers_that_change_nothing_may_go(name, out):
    made, student = module(shipped(name)), shipped(name, layers=2)
    weights = {k: v.clone() for k, v in made.state_dict().items()}
    for block in out:
        weights[f"layer.1.{block}.out.weight"].zero_()
    cut = prune(made.program, weights, student, keep={"layer": [0, 2]})
    ids = tokens(256)
    with torch.no_grad():
        assert torch.equal(module(made.program, weights=weights)(ids), module(student, weights=cut)(ids))


def test_the_best_layers_of_each_kind_stay_in_order():
    """Facts of the pattern search: M=[.9, .1, .5], *=[.2, .7], -=[.3, .8, .6] of M-*M-M*-; two M, one *, two -."""
    teacher, student = shipped("nemotron_h/tiny", pattern="M-*M-M*-"), shipped("nemotron_h/tiny", pattern="M-M*-")
    weights = {p.name: torch.full(p.shape, float(p.path[1])) for p in teacher.tensors() if p.path[0] == "layer"}
    weights |= {p.name: torch.zeros(p.shape) for p in teacher.tensors() if p.path[0] != "layer"}
    scores = Scores.of({}, {"layer": [0.9, 0.3, 0.2, 0.1, 0.8, 0.5, 0.7, 0.6]})
    cut = prune(teacher, weights, student, by=scores)
    assert [int(cut[f"layer.{i}.rms_norm.weight"][0]) for i in range(5)] == [0, 4, 5, 6, 7]


@given(st.text("M*-", min_size=1, max_size=7), st.integers(0, 2**20))
def test_layers_that_stay_are_the_best_that_stand_in_the_order_of_the_student(pattern, seed):
    """Against every choice of layers; of equal sums the earlier."""
    source = torch.Generator().manual_seed(seed)
    scores = torch.randint(0, 4, (len(pattern),), generator=source).tolist()
    count = int(torch.randint(1, len(pattern) + 1, (1,), generator=source))
    wanted = "".join(pattern[i] for i in sorted(torch.randperm(len(pattern), generator=source)[:count].tolist()))
    every = [c for c in combinations(range(len(pattern)), count) if "".join(pattern[i] for i in c) == wanted]
    best = max(every, key=lambda c: (sum(scores[i] for i in c), [-i for i in c]))
    assert subsequence(pattern, wanted, scores) == list(best)
    assert subsequence(pattern, wanted + pattern, scores) is None


def test_layers_are_not_put_into_another_order():
    """The best of each kind would be `*` of the end and `M` of the beginning, the other way round."""
    teacher, student = shipped("nemotron_h/tiny", pattern="M*-M*"), shipped("nemotron_h/tiny", pattern="*M")
    weights = {p.name: torch.zeros(p.shape) for p in teacher.tensors()}
    scores = Scores.of({}, {"layer": [0.9, 0.1, 0.5, 0.1, 0.9]})
    assert Plan(teacher, student, scores).sources["layer.0.rms_norm.weight"] == "layer.1.rms_norm.weight"
    prune(teacher, weights, student)  # there is one way only
    turned = shipped("nemotron_h/tiny", pattern="-**")
    assert error_of(lambda: prune(teacher, weights, turned, by=scores)).code == "not-a-part"
    assert error_of(lambda: prune(teacher, weights, shipped("nemotron_h/tiny", pattern="M*"))).code == "no-scores"


def test_layers_by_hand_must_be_of_the_right_kind():
    teacher, student = shipped("nemotron_h/tiny"), shipped("nemotron_h/tiny", pattern="M-*")
    weights = {p.name: torch.zeros(p.shape) for p in teacher.tensors()}
    prune(teacher, weights, student, keep={"layer": [2, 4, 3]})
    assert error_of(lambda: prune(teacher, weights, student, keep={"layer": [0, 2, 3]})).code == "not-a-part"


# --- groups ------------------------------------------------------------------------------------------


def kept_of(teacher, student, scores, key, ranked=False, keep=None):
    return Plan(teacher, student, Scores.of(scores), keep, ranked).choice.kept(key).tolist()


def test_heads_stay_within_their_group():
    """Facts 1.2: a global choice of four would be 0, 2, 3, 5."""
    made, student = (shipped("llama/tiny", layers=1, heads=h, head_dim=16) for h in (8, 4))
    key, scores = "layer.0.attention.heads", [0.9, 0.1, 0.5, 0.6, 0.2, 0.8, 0.3, 0.4]
    assert kept_of(made, student, {key: scores}, key) == [0, 3, 5, 7]
    assert kept_of(made, student, {key: scores}, key, ranked=True) == [0, 3, 5, 7]
    assert kept_of(made, student, {key: [1.0] * 8}, key) == [0, 1, 4, 5]  # of equal scores the earlier


def test_key_heads_go_with_their_queries():
    made = shipped("llama/tiny", layers=1, heads=8, kv_heads=4, head_dim=16)
    student = shipped("llama/tiny", layers=1, heads=4, kv_heads=2, head_dim=16)
    key, scores = "layer.0.attention.heads", [1.0, 2.0, 0.0, 0.1, 0.0, 5.0, 2.0, 2.0]
    assert kept_of(made, student, {key: scores}, "layer.0.attention.kv_heads") == [2, 3]
    assert kept_of(made, student, {key: scores}, key) == [4, 5, 6, 7]


def test_state_space_heads_and_channels():
    """Facts 2.1: channels once for all heads, heads by the channels that stay, the same number in each group."""
    teacher, student = (
        shipped("nemotron_h/tiny", pattern="M", ssm_heads=h, ssm_head_dim=p) for h, p in ((6, 4), (4, 2))
    )
    rows = [[4, 1, 0, 2], [1, 1, 0, 0], [3, 0, 1, 1], [0, 6, 0, 1], [2, 2, 0, 0], [1, 0, 3, 0]]
    from heddle.runtime.compress import Plan, Site

    key, channels = "layer.0.mamba2.heads", "layer.0.mamba2.head_dim"
    scores = Scores((Site("u", (key, channels), torch.tensor(rows, dtype=torch.float64)),))
    expected = torch.tensor([5.5678, 6.4807, 3.1623, 2.4495], dtype=torch.float64)
    assert torch.allclose(scores[channels], expected, atol=1e-4)
    choice = Plan(teacher, student, scores).choice
    assert choice.kept(channels).tolist() == [0, 1]
    expected = torch.tensor([4.1231, 1.4142, 3.0, 6.0, 2.8284, 1.0], dtype=torch.float64)
    assert torch.allclose(choice.score(key), expected, atol=1e-4)
    assert choice.kept(key).tolist() == [0, 2, 3, 4]
    weights = {p.name: torch.arange(p.count, dtype=torch.float64).view(p.shape) for p in teacher.tensors()}
    cut = prune(teacher, weights, student, by=scores)
    u = weights["layer.0.mamba2.u.weight"].flatten(0, 1)
    assert torch.equal(cut["layer.0.mamba2.u.weight"].flatten(0, 1), u[[0, 1, 8, 9, 12, 13, 16, 17]])
    for part in ("b.weight", "c.weight", "bc.bias", "cc.weight"):
        assert torch.equal(cut[f"layer.0.mamba2.{part}"], weights[f"layer.0.mamba2.{part}"])
    for part in ("y.A_log", "y.D", "y.dt_bias", "dt.weight"):
        assert torch.equal(cut[f"layer.0.mamba2.{part}"], weights[f"layer.0.mamba2.{part}"][[0, 2, 3, 4]])


def test_merged_heads_take_what_the_others_differ_by():
    """Facts 1.4: heads 1 .. 6 by importance, four stay: 1, 2, 3 + (3 - 6), 4 + (4 - 5)."""
    made, student = (shipped("llama/tiny", layers=1, heads=h, kv_heads=1, head_dim=16) for h in (6, 4))
    weights = {p.name: torch.zeros(p.shape, dtype=torch.float64) for p in made.tensors()}
    heads = torch.arange(1.0, 7.0, dtype=torch.float64)
    weights["layer.0.attention.q.weight"] += heads[:, None, None]
    weights["layer.0.attention.out.weight"] += heads[None, :, None]
    scores = Scores.of({"layer.0.attention.heads": [6.0, 5.0, 4.0, 3.0, 2.0, 1.0]})
    cut = prune(made, weights, student, by=scores, merge_heads=True)
    assert cut["layer.0.attention.q.weight"][:, 0, 0].tolist() == [1, 2, 0, 3]
    assert cut["layer.0.attention.out.weight"][0, :, 0].tolist() == [1, 2, 0, 3]
    few = shipped("llama/tiny", layers=1, heads=2, kv_heads=1, head_dim=16)
    assert error_of(lambda: prune(made, weights, few, by=scores, merge_heads=True)).code == "cannot-cut"


def test_merging_leaves_state_space_heads_alone():
    teacher, student = shipped("nemotron_h/tiny"), shipped("nemotron_h/tiny", ssm_heads=4)
    weights = module(teacher).state_dict()
    scores = Scores.of({k: torch.arange(n, 0, -1) for k, n in Dims(teacher).sizes.items()})
    assert same(*(prune(teacher, weights, student, by=scores, merge_heads=m) for m in (False, True)), 0)


# --- what cannot be done -----------------------------------------------------------------------------


def refusal(name, over, more=None, **said):
    teacher, student = shipped(name, **(more or {})), shipped(name, **over)
    weights = {p.name: torch.zeros(p.shape) for p in teacher.tensors()}
    scores = Scores.of({k: torch.ones(n) for k, n in Dims(teacher).sizes.items()})
    return error_of(lambda: prune(teacher, weights, student, **({"by": scores} | said)))


def test_more_than_there_is():
    found = refusal("llama/tiny", {"hidden": 128, "head_dim": 16})
    assert found.code == "not-a-part" and "128" in found.message and "64" in found.message
    assert refusal("llama/tiny", {"layers": 4}).code == "not-a-part"
    assert refusal("nemotron_h/tiny", {"pattern": "M-M*-*"}).code == "not-a-part"
    assert refusal("nemotron_h/tiny_moe", {"experts": 8}).code == "not-a-part"


def test_a_dim_whose_channels_are_coupled():
    found = refusal("llama/tiny", {"head_dim": 8, "hidden": 32})
    assert found.code == "cannot-cut" and "rotate" in found.message
    found = refusal("llama/tiny", {"vocab": 200})
    assert found.code == "cannot-cut" and "embed" in found.message
    assert refusal("nemotron_h/tiny", {"taps": 3}).code == "cannot-cut"


def test_heads_that_do_not_divide():
    assert refusal("nemotron_h/tiny", {"groups": 1, "ssm_heads": 6}).code == "cannot-cut"  # six of four in a group
    same_number = {"keep": {"attention.heads": [0, 1]}}
    assert refusal("llama/tiny", {"heads": 2, "head_dim": 16}, **same_number).code == "cannot-cut"
    prune_alike = {"keep": {"attention.heads": [1, 2]}}
    teacher, student = shipped("llama/tiny"), shipped("llama/tiny", heads=2, head_dim=16)
    prune(teacher, {p.name: torch.zeros(p.shape) for p in teacher.tensors()}, student, **prune_alike)


def test_nothing_says_what_to_keep():
    assert refusal("llama/tiny", {"ffn": 40}, by=None).code == "no-scores"
    assert refusal("llama/tiny", {"layers": 2}).code == "no-scores"
    assert refusal("nemotron_h/tiny", {"state": 8}, by=Scores.of({})).code == "no-scores"


def test_lists_that_do_not_fit():
    for places in ([0, 1, 2], [0, 0], [0, 3], [-1, 0]):
        assert refusal("llama/tiny", {"layers": 2}, keep={"layer": places}).code == "out-of-range"
    assert refusal("llama/tiny", {"ffn": 40}, keep={"fnn": range(40)}).code == "unknown-dim"


def test_other_families():
    llama, mistral = shipped("llama/tiny"), shipped("mistral/tiny")
    found = error_of(lambda: prune(llama, {}, mistral))
    assert found.code == "not-a-part" and found.secondary


def test_weights_that_the_teacher_lacks():
    assert refusal("llama/tiny", {"bias": True}).code == "not-a-part"
