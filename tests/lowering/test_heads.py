"""Heads that a loss makes by itself: which are found, and that a model trains as it does with all of its logits."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from heddle.codegen.emit import emit, emit_block
from heddle.dsl.load import load_text, shipped_folder
from heddle.lowering.alone import kernels
from heddle.lowering.graph import GraphProgram
from heddle.lowering.pipeline import lower
from heddle.lowering.target import TARGETS
from heddle.runtime.check import program_of
from heddle.runtime.compile import build, instantiate

PLAIN = "logits = linear(x, hidden -> vocab)"
OBJECTIVE = """
block scored(net):
    tokens[batch, seq]: token
    {0}
"""


def program(logits: str = PLAIN, objective: str = ""):
    text = "model made(vocab = 11, hidden = 8):\n    tokens[batch, seq]: token\n"
    text += f"    embedding = embed(tokens, vocab -> hidden)\n    x = embedding * 0.5\n    {logits}\n    return logits\n"
    if objective:
        text += OBJECTIVE.format("\n    ".join(objective.split("\n")))
    return program_of(load_text(text, folder=shipped_folder()), "made", **({"objective": "scored"} if objective else {}))


def lowered(*given: str, target: str = "triton") -> GraphProgram:
    return lower(program(*given), target=TARGETS[target])


HEADS = {
    "its own": (PLAIN, "self.logits.weight, next_,"),
    "with a bias": ("logits = linear(x, hidden -> vocab, bias = true)", "self.logits.weight, next_, self.logits.bias,"),
    "tied": ("logits = linear(x, hidden -> vocab, weight = embedding.weight)", "self.embedding.weight, next_,"),
}


@pytest.mark.parametrize("name", HEADS)
def test_a_model_trains_as_it_does_with_all_of_its_logits(name: str) -> None:
    logits, given = HEADS[name]
    text = emit(lowered(logits), "test").model
    assert "if head else x" in text and f", {given} kernel=kernels.cross_entropy)" in text
    models = [instantiate(build(program(logits), target), 3) for target in ("cpu", "triton")]
    tokens = torch.randint(0, 11, (2, 5), generator=torch.Generator().manual_seed(1))
    found = []
    for model in models:
        loss = model.losses(tokens)["lm"]
        found.append([loss, model(tokens), *torch.autograd.grad(loss, list(model.parameters()))])
    for a, b in zip(*found, strict=True):
        assert (a - b).abs().max() <= 1e-5 * a.abs().max()


@pytest.mark.parametrize(
    ("logits", "why"),
    [
        ("logits = 2.0 * linear(x, hidden -> vocab)", "the map's result is not what is scored"),
        ("logits = softmax(linear(x, hidden -> vocab), over = vocab)", "nor here"),
    ],
)
def test_a_model_that_goes_on_behind_its_last_map_keeps_its_logits(logits: str, why: str) -> None:
    made = lowered(logits)
    assert not made.heads, why
    text = emit(made, "test").model
    assert "head" not in text and "lib.cross_entropy(" in text


TWICE = """out = net(tokens)
loss lm = cross_entropy(out.logits, next(tokens))
loss flat = cross_entropy(0.5 * out.logits, next(tokens))"""
ONCE = "loss flat = cross_entropy(net(tokens).logits, next(tokens))"


def test_logits_that_two_read_are_made_once() -> None:
    assert lowered(PLAIN, ONCE).heads and not lowered(PLAIN, TWICE).heads
    assert emit(lowered(PLAIN, TWICE), "test").model.count("lib.cross_entropy(") == 2


def test_a_target_without_kernels_and_who_looks_on_see_all_logits() -> None:
    assert not lowered(target="cpu").heads
    assert "head" not in emit(lowered(), "test", named=True).model


@pytest.mark.parametrize("name", HEADS)
def test_by_itself_the_loss_stands_beside_its_map(name: str) -> None:
    """What `heddle verify` and `tune` run is the kernel that the model runs."""
    made = lowered(HEADS[name][0])
    (found,) = (a for a in kernels(made) if a.nodes[-1].op == "cross_entropy")
    assert [n.op for n in found.nodes] == ["linear", "cross_entropy"]
    files = emit_block(found.name, found.program, "test")
    assert files.kernels == {"cross_entropy": emit(made, "test").kernels["cross_entropy"]}
    assert "lib.linear_cross_entropy(" in files.model and "lib.linear(" not in files.model
    plain = replace(found.program, target=TARGETS["cpu"], heads={})
    text = emit_block(found.name, plain, "test").model
    assert "lib.cross_entropy(logits, " in text and ("self.logits(" in text or "lib.linear(" in text)
