"""A step without numbers is the real step: every byte that is saved, sent and held, on every rank."""

from __future__ import annotations

from collections import Counter
from functools import cache

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import example, given, settings

from heddle.dsl.diagnostics import SpecError
from heddle.dsl.layout import layout_of
from heddle.dsl.load import load_text
from heddle.runtime.check import program_of
from heddle.runtime.compile import build
from heddle.runtime.distributed import over_of
from heddle.runtime.plan.hollow import Hollow, Unknown
from heddle.runtime.plan.plan import Steps
from heddle.runtime.plan.sizes import held
from heddle.runtime.plan.step import Feed, measure
from tests.runtime.plan.instrumented import artifact, ranks

FAMILIES = ("nemotron_h/tiny.spec", "nemotron_h/tiny_moe.spec", "llama/tiny.spec", "mistral/tiny.spec",
            "nemotron4/tiny.spec", "transformer_ls/tiny.spec", "transformer_ls/tiny_released.spec", "retro/tiny.spec")  # fmt: skip
KEPT = "parameters between microbatches"
TENSOR = ("vocab", "kv_heads", "ffn", "groups")


@cache
def built(family, layout):
    try:
        return artifact(family, layout)
    except SpecError:
        return None


@st.composite
def layouts(draw):
    mesh = draw(st.sampled_from([(1, 2), (2, 1), (2, 2), (1, 4), (1, 1)]))
    dims = draw(st.sets(st.sampled_from(TENSOR), min_size=2))
    rules = [f"    shard {d}? over tensor" for d in ("heads", *TENSOR) if d == "heads" or d in dims]
    if mesh[1] <= 2 and draw(st.booleans()):  # all tiny twins have two heads, not all have four
        rules.append("    shard seq? over tensor between blocks")
    rules.append("    shard batch? over data")
    stored = draw(st.sampled_from([None, None, "optimizer", "parameters", "parameters", KEPT]))
    if mesh[0] > 1 and stored:
        rules.append(f"    shard {stored.partition(' ')[0]} over data{' between microbatches' * (stored == KEPT)}")
    if draw(st.booleans()):
        rules.append(
            f"    recompute {draw(st.sampled_from(['attention?, long_short?', 'mlp?, gated_mlp?', 'blocks']))}"
        )
    return "\n".join([f"\nlayout drawn:\n    mesh data = {mesh[0]}, tensor = {mesh[1]}", *rules, ""])


def check(family, layout, precision, feed):
    made = built(family, layout)
    return made is not None and check_made(made, precision, feed)


def check_made(made, precision, feed):
    over = over_of(made, made.lowered.layout)
    step = measure(made, feed, precision, over)
    messages = Counter()
    for ledger in (step.micro, step.once):
        for m, n in ledger.messages.items():
            messages[m.phase, m.kind, m.axes, m.bytes] += n
    for saved, sent, parameters, state, gradients in ranks(made, feed, precision, over):
        assert messages == sent, (messages - sent, sent - messages)
        assert abs(step.saved_bytes - saved) <= 0.02 * saved, (step.saved_bytes, saved)
        assert sum(w.bytes for w in held(made.lowered, precision)) == parameters == step.parameter_bytes
        assert step.optimizer_bytes == state
        assert step.gradient_bytes == gradients
    return True


TP = """
layout drawn:
    mesh data = 2, tensor = 2
    shard vocab?, heads?, kv_heads?, ffn?, groups? over tensor
    shard seq? over tensor between blocks
    shard batch? over data
"""
PARTS = TP + "    shard parameters over data\n"


@settings(max_examples=34)
@given(
    st.sampled_from(FAMILIES), layouts(), st.sampled_from(["fp32", "bf16"]), st.booleans(), st.sampled_from([1, 2, 3])
)
@example("nemotron_h/tiny_moe.spec", TP, "bf16", True, 2)
@example("retro/tiny.spec", TP, "fp32", True, 1)
@example("transformer_ls/tiny.spec", TP, "bf16", False, 1)
@example("nemotron_h/tiny_moe.spec", PARTS, "bf16", True, 1)
@example("transformer_ls/tiny.spec", PARTS + "    recompute attention?, long_short?\n", "fp32", True, 1)
def test_a_plan_is_what_a_run_keeps_and_sends(family, layout, precision, documents, rows):
    check(family, layout, precision, Feed(rows, 32, 1, documents))


CHANCE = """
model small(vocab = 32, hidden = 16, layers = 3):
    tokens[batch, seq]: token
    x = embed(tokens, vocab -> hidden)
    for layer in layers:
        norm1 = layer_norm(x)
        x = x + attention(norm1, heads = 4, kv_heads = 2, mask = {mask}, drop = 0.1)
        norm2 = layer_norm(x)
        x = x + dropout(mlp(norm2, 2 * hidden, gelu), 0.1)
    final = layer_norm(x)
    logits = linear(final, hidden -> vocab)
    return logits
"""


@pytest.mark.parametrize(("mask", "precision"), [("causal", "bf16"), ("window(3)", "fp32")])
@pytest.mark.parametrize("again", ["", "    recompute attend\n", "    recompute layer_norm, attention\n"])
def test_a_plan_of_attention_with_dropout_is_what_a_run_keeps_and_sends(mask, precision, again):
    for layout in (TP, CONTEXT.format(2, 2, "attend: ring"), CONTEXT.format(2, 1, "attend: exchange(heads)")):
        file = load_text(CHANCE.replace("{mask}", mask) + layout + again)
        assert check_made(build(program_of(file), layout=layout_of(file)), precision, Feed(2, 32, 1, True))


CONTEXT = """
layout drawn:
    mesh context = {}, tensor = {}
    shard vocab?, heads?, kv_heads?, ffn?, groups? over tensor
    shard seq over context
    {}
"""


@pytest.mark.parametrize(
    ("family", "mesh", "way"),
    [
        ("llama/tiny.spec", (4, 1), "attend: ring(order = zigzag)"),
        ("mistral/tiny.spec", (4, 1), "attend: ring"),  # a window: neighbours only
        ("llama/tiny.spec", (2, 2), "attend: ring"),
        ("transformer_ls/tiny.spec", (2, 1), "attend: ring"),
        ("nemotron_h/tiny.spec", (2, 1), "attend: exchange(heads)\n    mamba2: exchange(heads, groups)"),
        ("llama/tiny.spec", (4, 1), "attend: all_gather"),
    ],
)
def test_a_plan_of_a_split_sequence_is_what_a_run_keeps_and_sends(family, mesh, way):
    assert check(family, CONTEXT.format(*mesh, way), "fp32", Feed(1, 64, 1, True))


def test_a_search_takes_no_step_of_other_parts_of_a_sequence():
    """Meshes whose modules read alike, but whose ranks have other parts of each row."""
    steps = Steps()
    feed, texts = Feed(1, 64), [CONTEXT.format(n, 1, "attend: ring") for n in (2, 4)]
    two, four = (steps.of(built("llama/tiny.spec", text), feed, "fp32", ()) for text in texts)
    assert two.saved_bytes > four.saved_bytes


def test_most_layouts_are_checked():
    """Refused ones would leave the law empty."""
    assert all(built(f, TP) is not None for f in FAMILIES)


def test_repeated_layers_cost_what_they_cost_alone():
    """Four layers of a kind are one that is run and three that are counted: the same as a run of all."""
    text = TP.replace("data = 2, tensor = 2", "data = 1, tensor = 2")
    assert check("llama/tiny.spec", text, "fp32", Feed(2, 16, 1, True))
    made = built("llama/tiny.spec", text)
    step = measure(made, Feed(2, 16))
    layers = Counter(s.block.split(".")[1] for s in step.saved if s.block.startswith("layer."))
    assert len(layers) > 1 and len(set(layers.values())) <= 2  # the first also keeps what all share
    assert all(s.line for s in step.saved if s.block.startswith("layer."))


@pytest.mark.parametrize("family", ["nemotron_h/tiny.spec", "nemotron_h/tiny_moe.spec"])
def test_the_same_plan_each_time(family):
    made = built(family, TP)
    one, two = (measure(made, Feed(1, 32), "bf16") for _ in range(2))
    assert (one.saved, one.micro, one.once, one.working_bytes) == (two.saved, two.micro, two.once, two.working_bytes)


def test_working_memory_holds_what_is_saved_and_grows_with_the_rows():
    made = built("nemotron_h/tiny.spec", TP)
    small, large = (measure(made, Feed(rows, 32)) for rows in (1, 2))
    assert small.saved_bytes < small.working_bytes < large.working_bytes
    assert large.saved_bytes < large.working_bytes


# --- tensors without numbers ---------------------------------------------------------------------


def test_whole_numbers_are_computed_and_others_are_not():
    with Hollow(share=0.25) as mode:
        rows = torch.arange(8)
        assert int((rows * 2).sum()) == 56
        x = torch.randn(4, 8)
        assert mode.live == 4 * 8 * 4
        assert (x @ x.T).shape == (4, 4)
        assert x.flatten().untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
        assert len((x[0] > 0).nonzero()) == 2
        with pytest.raises(Unknown):
            float(x.sum())
        with pytest.raises(Unknown):
            int(x.argmax())
        some = torch.zeros(4, dtype=torch.int64)
        some.copy_(x[:, 0])  # numbers are lost
        with pytest.raises(Unknown):
            int(some[0])
    del x, some
    assert mode.live >= 0


def test_memory_is_counted_while_it_is_there_and_never_touched():
    import resource

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with Hollow() as mode:
        x = torch.empty(1 << 20, 1 << 16)  # 256 GiB
        assert mode.live == x.numel() * 4
        y = x + 1
        assert mode.peak == 2 * x.numel() * 4
        del x, y
        assert mode.live == 0
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 18  # kB


def test_nothing_is_touched_in_inference_mode_either():
    """There, ops that are made of others come whole, and may say of themselves that they give a view."""
    import resource

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with Hollow() as mode, torch.inference_mode():
        x = torch.empty(1 << 14, 1 << 15)  # 2 GiB
        y = x.to(torch.bfloat16)
        assert y.dtype == torch.bfloat16 and mode.live == x.numel() * 6
        assert y.flatten().untyped_storage().data_ptr() == y.untyped_storage().data_ptr()
        assert x.to(torch.float32) is x and int(torch.arange(8).to(torch.int32).sum()) == 28
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 18  # kB


@torch.library.custom_op("heddle_tests::step", mutates_args=("state",))
def step(x: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
    state.add_(x.sum())
    return x + 1


@step.register_fake
def _(x: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


def test_what_is_written_to_is_not_what_is_given():
    """As a kernel that replaces a state and gives rows."""
    with Hollow() as mode:
        x, state = torch.empty(4, 8), torch.empty(3)
        before = mode.live
        for _ in range(2):
            y = step(x, state)
            assert y.shape == x.shape and y.data_ptr() != x.data_ptr() and mode.live == before + y.numel() * 4
        assert state.add_(1) is state


def test_shapes_that_do_not_fit_are_errors_in_place_too():
    with Hollow():
        x, y = torch.empty(4, 8), torch.empty(4, 7)
        for wrong in (lambda: x + y, lambda: x.add_(y), lambda: x.copy_(y), lambda: torch.add(x, y, out=x)):
            with pytest.raises(RuntimeError):
                wrong()
        assert x.add_(x[:1]) is x


def test_products_are_counted_forward_and_backward():
    with Hollow() as mode:
        w = torch.nn.Parameter(torch.empty(32, 16))
        (torch.empty(8, 16) @ w.T).sum().backward()
    assert sum(work.flops * n for work, n in mode.ledger.work.items()) == 2 * 2 * 8 * 16 * 32
