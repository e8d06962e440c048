"""Layers: what a model does without one is what a model that lacks it does."""

from __future__ import annotations

import math

import pytest
import torch

from heddle.runtime.compress import layer_importance, prune, without_layers, without_window
from heddle.runtime.compress.layers import METRICS, distance, influence
from heddle.runtime.errors import UserError

from .models import error_of, module, shipped, tokens


def fp64(*rows):
    return torch.tensor(rows, dtype=torch.float64)


def test_block_influence_of_known_states():
    """Facts 1.3."""
    assert influence([fp64([1, 0], [3, 4]), fp64([1, 1], [4, 3])]) == pytest.approx([0.16645], abs=1e-5)
    states = [fp64(s) for s in ([1, 0], [0.8, 0.6], [0.6, 0.8], [0, 1], [-0.6, 0.8])]
    assert influence(states) == pytest.approx([0.2, 0.04, 0.2, 0.2])
    assert influence(states, 2) == pytest.approx([0.4, 0.4, 0.72])


def test_distances_of_known_states():
    """Facts 2.3 for squares; 1.6 for the divergence."""
    full = fp64([1, 2, 2]).expand(3, 3)
    assert distance("mse", full, fp64([1, 2, 1], [0, 2, 1], [1, 1, 0])).tolist() == pytest.approx([1 / 3, 2 / 3, 5 / 3])
    assert float(distance("kl", fp64([2, 1, 0]), fp64([1, 1, 1]))) == pytest.approx(0.266217, abs=1e-6)


def student_without(made, gone, count):
    """A model that never had these layers."""
    student = shipped("llama/tiny", layers=count - len(gone))
    keep = [i for i in range(count) if i not in gone]
    return module(student, weights=prune(made.program, made.state_dict(), student, keep={"layer": keep}))


@pytest.mark.parametrize("span", [1, 2])
def test_scores_are_those_of_models_without_the_layers(span):
    made, ids = module(shipped("llama/tiny", layers=4)), tokens(256, 3, 9)
    with torch.no_grad():
        full = made(ids).flatten(0, 1)
        for metric in ("kl", "mse", "perplexity"):
            got = layer_importance(made, [ids[:1], ids[1:]], metric, span)["layer"]
            for i in range(4 - span + 1):
                other = student_without(made, set(range(i, i + span)), 4)
                if metric == "perplexity":
                    logits, targets = other(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
                    expected = math.exp(float(torch.nn.functional.cross_entropy(logits, targets)))
                else:
                    expected = float(distance(metric, full, other(ids).flatten(0, 1)).mean())
                assert float(got[i]) == pytest.approx(expected, rel=1e-9)


def test_final_states_are_those_that_the_head_reads():
    made, ids = module(shipped("llama/tiny", layers=2)), tokens(256)
    seen = []
    made.final.register_forward_hook(lambda m, args, out: seen.append(out))
    with torch.no_grad():
        made(ids)
    other = student_without(made, {1}, 2)
    other.final.register_forward_hook(lambda m, args, out: seen.append(out))
    with torch.no_grad():
        other(ids)
    expected = float((seen[0] - seen[1]).square().mean())
    assert float(layer_importance(made, [ids], "hidden_mse")["layer"][1]) == pytest.approx(expected, rel=1e-9)


def test_influence_is_of_what_goes_in_and_comes_out():
    made, ids = module(shipped("nemotron_h/tiny")), tokens(256)
    states = []
    for layer in made.layer:
        layer.register_forward_pre_hook(lambda m, args: states.append(args[0]))
    with torch.no_grad():
        made(ids)
    expected = torch.tensor(influence([s.flatten(0, 1) for s in states]), dtype=torch.float64)
    assert torch.allclose(layer_importance(made, [ids])["layer"][:-1], expected, rtol=1e-9)


def test_padding_does_not_count():
    made, ids = module(shipped("nemotron_h/tiny")), tokens(256, 2, 9)
    valid = torch.tensor([[True] * 6 + [False] * 3] * 2)
    for metric in METRICS:
        a = layer_importance(made, [{"tokens": ids, "valid": valid}], metric)["layer"]
        b = layer_importance(made, [ids[:, :6]], metric)["layer"]
        assert torch.allclose(a, b, rtol=1e-9), metric


def idle(gone):
    """A model of six layers of which some change nothing."""
    made = module(shipped("llama/tiny", layers=6))
    with torch.no_grad():
        for i in gone:
            made.layer[i].attention.out.weight.zero_()
            made.layer[i].gated_mlp.out.weight.zero_()
    return made


@pytest.mark.parametrize("metric", METRICS)
def test_layers_that_change_nothing_go_first(metric):
    made, ids = idle({1, 2, 4}), [tokens(256)]
    assert without_layers(made, ids, 3, metric if metric != "perplexity" else "kl") == [0, 3, 5]
    if metric not in ("perplexity",):  # a layer of random weights may well be in the way of a perplexity
        assert without_window(made, ids, 2, metric) == [0, 3, 4, 5]
        score = layer_importance(made, ids, metric)["layer"]
        assert all(abs(float(score[i])) < 1e-12 for i in (1, 2, 4))
        assert all(float(score[i]) > 1e-6 for i in (0, 3, 5))


def test_protected_layers_stay():
    assert without_layers(idle({1, 2, 4}), [tokens(256)], 2, "mse", protect=[1, 2]) != [0, 3, 4, 5]
    assert {1, 2} <= set(without_layers(idle({1, 2, 4}), [tokens(256)], 3, "mse", protect=[1, 2]))


def test_each_removal_is_scored_anew():
    """By hand: drop the least important, make the model without it, and so on."""
    made, ids = module(shipped("llama/tiny", layers=5), 4), tokens(256, 2, 9)
    with torch.no_grad():
        full, kept = made(ids), list(range(5))
        for _ in range(3):
            damage = []
            for i in kept:
                other = student_without(made, set(range(5)) - (set(kept) - {i}), 5)
                now = student_without(made, set(range(5)) - set(kept), 5)(ids) if len(kept) < 5 else full
                damage.append(float((other(ids) - now).square().mean()))
            kept.remove(kept[damage.index(min(damage))])
    assert without_layers(made, [ids], 3, "mse") == kept


def test_what_cannot_be_asked():
    made, ids = module(shipped("llama/tiny")), [tokens(256)]
    for call in (lambda: layer_importance(made, ids, "size"), lambda: layer_importance(made, ids, span=4),
                 lambda: without_layers(made, ids, 3)):  # fmt: skip
        with pytest.raises(UserError) as caught:
            call()
        assert caught.value.code == "unknown-setting"
    assert error_of(lambda: layer_importance(made, ids, loop="tier")).code == "unknown-name"
