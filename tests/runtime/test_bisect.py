"""Two runs of one model: healthy ones differ by rounding, and a fault is named where it was planted."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from heddle.dsl.load import load_text
from heddle.runtime.bisect import watching
from heddle.runtime.bisect.command import feed_of
from heddle.runtime.bisect.finding import Comparison, Found, drawn, written
from heddle.runtime.bisect.sides import sides_of
from heddle.runtime.check import program_of
from heddle.runtime.compile import Artifact, build, module_class

HYBRID = """
use nemotron_h from "nemotron_h/nemotron_h.spec"

model small = nemotron_h(
    vocab = 32, hidden = 16, ffn = 24, heads = 4, kv_heads = 2, head_dim = 4, ssm_heads = 4, ssm_head_dim = 4, state = 4,
    groups = 2, chunk = 4, pattern = "M*-")
"""
DENSE = """
use llama from "llama/llama.spec"

model small = llama(vocab = 32, hidden = 16, ffn = 24, layers = 2, heads = 4, kv_heads = 2, head_dim = 4)
"""
LAYOUTS = """
layout grid:
    mesh data = 2, tensor = 2
    shard vocab, heads, kv_heads, ffn, groups? over tensor
    shard seq over tensor between blocks
    shard batch, parameters over data

layout long:
    mesh context = 2, tensor = 2
    shard heads, kv_heads, ffn over tensor
    shard seq over context
    recompute attend

layout stages:
    mesh pipe = 2, tensor = 2
    shard heads, kv_heads, ffn over tensor
    stages over pipe, schedule = zero_bubble, microbatches = 2
"""


class Pair:
    """A spec, two sides by their words, and what both read."""

    def __init__(self, text: str, a: str, b: str) -> None:
        file = load_text(text + LAYOUTS)
        self.program = program_of(file)
        self.sides = sides_of(a, b, file)
        self.made = tuple(written(self.program, side) for side in self.sides)
        one = build(self.program)
        kind = module_class(one.source, f"{one.name}/model.py")
        self.feed = feed_of(self.program, kind, one.lowered, 4, 8, seed=3)
        weights = drawn(self.program, 3)
        self.compared = Comparison(self.program, self.sides, self.made, self.feed, (weights, weights))

    def found(self, second: Artifact | None = None) -> Found:
        """What is found, with another module for the second side."""
        return self.compared.found(second)

    def planted(self, old: str, new: str, head: str = "", count: int | None = 1) -> Found:
        """The same with a fault: another text where the second side's module has this one, `count` times."""
        text = self.made[1].source
        assert text.count(old) == count or (count is None and old in text), f"`{old}` stands {text.count(old)} times"
        text = text.replace(old, new).replace("\nimport torch\n", f"\nimport torch\n{head}\n", 1)
        return self.found(replace(self.made[1], files=replace(self.made[1].files, model=text)))


@cache
def pair(text: str, a: str, b: str) -> Pair:
    return Pair(text, a, b)


# --- healthy pairs --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "a", "b", "values"),
    [
        (HYBRID, "fp32", "fp64", 25),
        (HYBRID, "bf16", "fp16", 25),
        (HYBRID, "fp64", "layout=grid", 24),
        (HYBRID, "layout=long,fp32", "layout=stages,bf16", 24),
    ],
)
def test_healthy_runs_differ_by_rounding(text: str, a: str, b: str, values: int) -> None:
    found = pair(text, a, b).found()
    assert found.equal and found.first is None
    assert len(found.values) >= values and len(found.gradients) > 2 * values
    assert sum(r.difference > 0 for r in found.gradients) > values  # they do differ


# --- planted faults -------------------------------------------------------------------------------------

WRONG = """
class Wrong(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return 1.001 * grad
"""
TEXTS = {
    # what is wrong -> (sides, old text, new text, where it is named, of which gradient)
    "eps": ("fp32", "self.final = lib.RmsNorm((16,), eps=1e-05)", "self.final = lib.RmsNorm((16,), eps=1e-03)", "final", None),
    "scale": ("fp32", "scale=0.5", "scale=0.25", "layer.1.attention.o", None),
    "mask": ("fp32", "(k, v, CAUSAL)", "(k, v, lib.Mask(None, behind=None, ahead=None))", "layer.1.attention.o", None),
    "no residual": ("bf16", "lambda: x + attention", "lambda: attention + 0 * x", "layer.1.x_2", None),
    "other gate": ("bf16", "lib.silu_mul(y, z)", "y * torch.sigmoid(z)", "layer.0.mamba2.mul", None),
    "backward only": ("fp32", "lambda: self.norm(mul)", "lambda: self.norm(Wrong.apply(mul))", "layer.0.mamba2.norm", "layer.0.mamba2.mul"),
    "no gradient": ("fp32", "lambda: lib.relu2(up)", "lambda: lib.relu2(up.detach())", "layer.2.mlp.relu2", "layer.2.mlp.up"),
    "half a gradient": ("fp32", "lib.ssd(uc, ", "lib.ssd(uc.detach(), ", "layer.0.mamba2.y", "layer.0.mamba2.silu(uc)"),
}  # fmt: skip


@pytest.mark.parametrize("what", TEXTS)
def test_a_fault_in_a_module_is_named(what: str) -> None:
    dtype, old, new, where, of = TEXTS[what]
    found = pair(HYBRID, "fp64", dtype).planted(old, new, WRONG)
    first = found.first
    assert first is not None and not found.equal
    assert (str(first.key), None if first.of is None else str(first.of)) == (where, of)
    assert first.errors[1] > 100 * first.errors[0] and first.spec.count(".spec:") == 1
    forward = [r for r in found.values if r.share > 1]
    assert forward == ([] if of else [first])  # it is not carried on


def test_a_gradient_that_ranks_do_not_sum_is_named_backward() -> None:
    """I -> R is nothing in the forward pass, and a sum in the backward pass."""
    made = pair(DENSE, "fp64", "layout=long")
    convert = re.search(r"spmd\.convert\((\w+), [^\n]*src=I, dst=R\)", made.made[1].source)
    assert convert is not None
    found = made.planted(convert[0], convert[1], count=None)
    assert all(r.share <= 1 for r in found.values)
    assert found.first is not None and found.first.of is not None


def test_a_sum_over_ranks_that_is_not_made_is_named_where_it_is_read() -> None:
    made = pair(DENSE, "fp64", "layout=long")
    call = re.search(r"spmd\.all_reduce\((\w+), [^\n]*src=P, dst=[IR]\)", made.made[1].source)
    assert call is not None
    found = made.planted(call[0], call[1], count=None)
    assert found.first is not None and found.first.of is None and found.first.op == "add", found.first


# --- any use ------------------------------------------------------------------------------------------------


class _Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, there: float, back: float) -> torch.Tensor:
        ctx.back = back
        return x * there

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return grad * ctx.back, None, None


@settings(max_examples=8)
@given(st.data(), st.booleans())
def test_any_use_that_is_wrong_is_named(data: st.DataObject, forward: bool) -> None:
    """One use of one side gives 1 % more, or hands on 1 % more of a gradient: exactly that is named."""
    made = pair(HYBRID, "fp32", "fp64")
    lowered = made.made[1].lowered
    uses = sorted({(r.key, made_by(lowered, r.key)) for r in made_rows(made, forward)})
    key, (graph, node) = data.draw(st.sampled_from(uses))
    plain = watching._use

    def use(g: str, n: str, run: Any, operands: Any) -> Any:
        watch = watching._here.watch
        if watch is None or watch.program is not lowered or (g, n) != (graph, node) or watch._blocks[-1][0] != key.path:
            return plain(g, n, run, operands)
        there, back = (1.01, 1.0) if forward else (1.0, 1.01)

        def wrong() -> Any:
            got = run()
            many = isinstance(got, tuple)
            scaled = tuple(_Scaled.apply(x, there, back) for x in (got if many else (got,)))
            return scaled if many else scaled[0]

        return plain(g, n, wrong, operands)

    watching._use = use
    try:
        found = made.found(made.made[1])
    finally:
        watching._use = plain
    first = found.first
    assert first is not None and made_by(lowered, first.key) == (graph, node) and first.key.path == key.path
    assert (first.of is None) == forward


def made_by(lowered: Any, key: watching.Key) -> tuple[str, str]:
    """The graph and node that a value of a run is made by."""
    for name in [key.root] if key.root else blocks_at(lowered, key.path):
        for node in lowered.graphs[name].nodes:
            if any(watching.called(node, r.name) == key.value for r in node.results):
                return name, node.name
    raise AssertionError(key)


def blocks_at(lowered: Any, path: str) -> tuple[str, ...]:
    """The graphs of the block at a path."""
    here, loop = lowered.model, None
    for segment in path.split("."):
        loop = loop if segment.isdigit() else here.instance(segment)
        names = (
            loop.bodies
            if loop.schedule is None
            else (loop.bodies[loop.schedule[int(segment)]],)
            if segment.isdigit()
            else ()
        )
        here = lowered.graphs[names[0]] if names else here
    return names


@cache
def made_rows(made: Pair, forward: bool) -> tuple[Any, ...]:
    found = made.found()
    rows = found.values if forward else found.gradients
    return tuple(r for r in rows if r.size > 0)
