"""A plan of a pipeline is the real step of each of its ranks: bytes held and saved, messages, and the schedule's time."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from dataclasses import replace
from functools import cache
from itertools import combinations

import hypothesis.strategies as st
import networkx as nx
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings

from heddle.dsl.diagnostics import InternalError, SpecError
from heddle.dsl.layout import layout_of
from heddle.dsl.load import load_text
from heddle.runtime.check import program_of
from heddle.runtime.compile import build
from heddle.runtime.distributed import axes_of, over_of
from heddle.runtime.lib import At, Gathered
from heddle.runtime.lib.laid import global_counts
from heddle.runtime.lib.pipeline import Pipe, keep_stages, pipelined
from heddle.runtime.lib.schedules import Action, order
from heddle.runtime.plan import staged
from heddle.runtime.plan.alike import alike
from heddle.runtime.plan.around import Around
from heddle.runtime.plan.devices import device
from heddle.runtime.plan.hollow import Hollow
from heddle.runtime.plan.plan import plan
from heddle.runtime.plan.schedules import timeline, waited
from heddle.runtime.plan.sizes import Ranks, block_of
from heddle.runtime.plan.staged import measure_ranks, scheduled
from heddle.runtime.plan.step import Feed, inputs, opened
from tests.runtime.plan.instrumented import artifact, piped_ranks

DEEP = {
    "llama": """
use llama from "llama/llama.spec"
model deep = llama(vocab = 64, hidden = 16, ffn = 24, layers = 8, heads = 4, kv_heads = 2)
""",
    "hybrid": """
use nemotron_h from "nemotron_h/nemotron_h.spec"
model deep = nemotron_h(
    vocab = 64, hidden = 16, heads = 4, kv_heads = 2, head_dim = 8, ffn = 24, ssm_heads = 4, ssm_head_dim = 4, state = 8,
    groups = 2, chunk = 8, experts = 4, active = 2, expert_ffn = 8, always_ffn = 16, scale = 2.5, pattern = "M-*EM-M*E-")
""",
}
# name: layers
LAYERS = {"llama": 8, "hybrid": 10, "nemotron_h/tiny.spec": 5, "nemotron_h/tiny_moe.spec": 5, "nemotron4/tiny.spec": 2,
          "transformer_ls/tiny.spec": 2, "transformer_ls/tiny_released.spec": 2, "retro/tiny.spec": 3}  # fmt: skip


@cache
def built(family, layout):
    try:
        if family not in DEEP:
            return artifact(family, layout)
        file = load_text(DEEP[family] + layout)
        return build(program_of(file, "deep"), layout=layout_of(file))
    except SpecError:
        return None


def text_of(pipe, stages, data=1, tensor=1, more=""):
    return f"""
layout drawn:
    mesh data = {data}, pipe = {pipe}, tensor = {tensor}
    shard vocab?, heads?, kv_heads?, ffn?, groups? over tensor
    shard batch? over data
    stages over pipe, {stages}
{more}"""


@st.composite
def cases(draw):
    """A family, a layout of it and what it is fed."""
    family = draw(st.sampled_from(sorted(LAYERS)))
    pipe = draw(st.sampled_from([p for p in (2, 4, 3) if p <= LAYERS[family]]))
    chunks = draw(st.sampled_from([c for c in (1, 2) if pipe * c <= LAYERS[family]]))
    batches = pipe * draw(st.integers(1, 2)) + (0 if chunks > 1 else draw(st.integers(0, 2)))
    data, tensor = draw(st.sampled_from([(1, 1), (2, 1), (1, 2)]))
    rules = [
        "    shard seq? over tensor between blocks\n" * draw(st.booleans()),
        draw(st.sampled_from(["", "    shard optimizer over data\n", "    shard parameters over data\n"])),
        draw(st.sampled_from(["", "", "    recompute blocks\n", "    recompute mlp?, gated_mlp?\n"])),
    ]
    how = draw(st.sampled_from([f"schedule = interleaved(chunks = {chunks}), " if chunks > 1 else "",
                                f"schedule = zero_bubble(chunks = {chunks}), "]))  # fmt: skip
    layout = text_of(pipe, f"{how}microbatches = {batches}", data, tensor, "".join(rules))
    feed = Feed(draw(st.integers(1, 2)), 32, 1, draw(st.booleans()))
    return family, layout, draw(st.sampled_from(["fp32", "bf16"])), feed


def steps_of(made, feed, precision, over=()):
    pipe = made.lowered.laid.pipe
    found = measure_ranks(made, feed, precision, over)
    orders = [order(r, pipe.size, pipe.microbatches, pipe.chunks, pipe.parts) for r in range(pipe.size)]
    return [scheduled(p, actions) for p, actions in zip(found, orders)]


def check(family, layout, precision, feed):
    made = built(family, layout)
    if made is None:
        return False
    over, pipe, axes = over_of(made, made.lowered.layout), made.lowered.laid.pipe, axes_of(made)
    plans = steps_of(made, feed, precision, over)
    place = {rank: p for p in range(pipe.size) for rank in Ranks.along(axes, pipe.axis, p).all()}
    for rank, (saved, sent, parameters, state, gradients) in enumerate(piped_ranks(made, feed, precision, over)):
        step = plans[place[rank]]
        messages = Counter()
        for ledger, times in ((step.micro, pipe.microbatches), (step.once, 1)):
            for m, n in ledger.messages.items():
                messages[m.phase, m.kind, m.axes, m.bytes] += n * times
        assert messages == sent, (rank, messages - sent, sent - messages)
        assert abs(step.saved_bytes - saved) <= 0.02 * saved, (rank, step.saved_bytes, saved)
        assert parameters == step.parameter_bytes
        assert step.optimizer_bytes == state
        assert step.gradient_bytes == gradients
    return True


TWO, FOUR = text_of(2, "microbatches = 4", 2, 1), text_of(4, "schedule = interleaved(chunks = 2), microbatches = 8")


@settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck))
@given(cases())
@example(("llama", FOUR, "bf16", Feed(1, 32, 1, True)))
@example(("hybrid", text_of(4, "microbatches = 6"), "fp32", Feed(1, 32, 1, True)))
@example(("transformer_ls/tiny_released.spec", TWO, "bf16", Feed(2, 32, 1, False)))
@example(("llama", text_of(4, "schedule = zero_bubble, microbatches = 6"), "bf16", Feed(1, 32, 1, True)))
@example(("hybrid", text_of(2, "schedule = zero_bubble(chunks = 2), microbatches = 4"), "fp32", Feed(1, 32, 1, True)))
@example(("retro/tiny.spec", TWO, "fp32", Feed(1, 32, 1, True)))
@example(("nemotron_h/tiny_moe.spec", text_of(2, "microbatches = 2", 1, 2), "bf16", Feed(1, 32, 1, True)))
def test_a_plan_is_what_each_rank_of_a_pipeline_keeps_and_sends(case):
    check(*case)


def test_most_pipelines_are_checked():
    """Refused ones would leave the law empty."""
    assert all(built(family, TWO) is not None for family in LAYERS)


@pytest.mark.parametrize(("layout", "place"), [(FOUR, 0), (FOUR, 3), (text_of(4, "microbatches = 6"), 1)])
def test_the_most_that_is_there_at_once_is_that_of_the_whole_step(layout, place):
    """Actions one by one and the order, against all micro-batches through the pipeline."""
    made, feed = built("hybrid", layout), Feed(1, 32)
    step = steps_of(made, feed, "bf16")[place]
    with opened(made, "bf16") as (model, blocks):
        mode, settled = blocks.mode, set()

        def settle(weight):
            if id(weight) not in settled:
                settled.add(id(weight))
                mode.settle(weight.grad)

        weights = list(model.parameters())  # held here, or what is made later would be where they were
        for weight in weights:
            weight.register_post_accumulate_grad_hook(settle)
        model.mesh.stand(model.pipe.axis, place)
        keep_stages(model)
        tokens, document, given = inputs(model, made.lowered, feed)
        counts = global_counts(model, model.counts(tokens, document, **given))
        base = mode.peak = mode.live

        def at_of(_):
            at = model._rows(tokens, None, document, None)
            at.gathered = Gathered()
            return at

        with blocks.keeping():
            pipelined(model, [(tokens, *given.values())] * model.pipe.microbatches, counts, at_of)
        peak = mode.peak - base
    assert step.saved_bytes < peak
    # What it keeps of sums is one number a loss, and what is added to a gradient goes at once.
    assert step.working_bytes == pytest.approx(peak, rel=0.002)


def test_every_weight_is_on_the_ranks_of_its_stages():
    """A tied table twice, all else once; its gradient is summed over the stages once a step."""
    text = text_of(2, "microbatches = 2")
    made = built("transformer_ls/tiny_released.spec", text)
    p = plan(made.program, made.lowered.layout, device("h100-80g"), "fp32", Feed(1, 32))
    paths = Counter(w.path for g in p.groups for w in g.weights)
    assert {path for path, n in paths.items() if n > 1} == {"embedding.weight"}
    assert set(paths) == {w.name for w in made.program.parameters()}
    for g in p.groups:
        assert g.memory.parameters == g.step.parameter_bytes
        (table,) = (w for w in g.weights if w.path == "embedding.weight")
        sums = [n for m, n in g.step.once.messages.items() if m.axes == ("pipe",) and m.bytes == table.bytes]
        assert sums == [1]
        assert g.memory.constants < table.bytes  # what it is like is known, and takes no room


def test_a_plan_has_as_many_micro_batches_as_the_layout():
    made = built("llama", text_of(2, "microbatches = 6"))
    layout = made.lowered.layout
    p = plan(made.program, layout, device("h100-80g"), "fp32", Feed(1, 32))
    assert p.feed.microbatches == 6 and p.tokens == 6 * 32
    assert all(len(row) == 2 * 6 for row in p.pipeline.rows)
    for g, row in zip(p.groups, p.pipeline.rows, strict=True):
        assert g.times.working + g.times.waiting == pytest.approx(p.pipeline.seconds)
        assert g.times.waiting == pytest.approx(waited(row, p.pipeline.seconds))


@pytest.mark.parametrize(("family", "more", "equal"), [
    ("llama", "microbatches = 4", {(1, 2)}), ("hybrid", "microbatches = 4", set()),
    ("llama", "microbatches = 4, layers = [1, 2, 3, 2]", set()), ("llama", "microbatches = 4, layers = [1, 2, 2, 3]", {(1, 2)}),
    ("llama", "microbatches = 4, schedule = interleaved(chunks = 2)", {(1, 2)}),
])  # fmt: skip
def test_ranks_that_are_alike_are_run_once(family, more, equal, monkeypatch):
    """And what the others would have done is the same, but for the numbers of layers."""
    made = built(family, text_of(4, more))
    pipe = made.lowered.laid.pipe
    keys = [alike(made.lowered, Pipe("pipe", 4, pipe.chunks, 4, ()), place) for place in range(4)]
    same = {(a, b) for a, b in combinations(range(4), 2) if keys[a] is not None and keys[a] == keys[b]}
    assert same == equal
    once = measure_ranks(made, Feed(1, 32), "bf16")
    monkeypatch.setattr(staged, "alike", lambda *_: None)
    for short, long in zip(once, measure_ranks(made, Feed(1, 32), "bf16"), strict=True):
        assert unnumbered(short) == unnumbered(long)


def unnumbered(piped):
    """What a rank does, with layers by their kinds."""

    def counted(ledger):
        work, messages = Counter(), Counter()
        for w, n in ledger.work.items():
            work[w._replace(block=block_of(w.block))] += n
        for m, n in ledger.messages.items():
            messages[m._replace(block=block_of(m.block))] += n
        return work, messages

    parts = [
        (stage.number, kind, counted(part.ledger), part.rise, part.kept,
         Counter((block_of(s.block), s.line, s.bytes) for s in part.saved))
        for stage in piped.stages for kind, part in stage.parts.items()
    ]  # fmt: skip
    rest = replace(piped, stages=(), counts=None, once=None)
    return parts, counted(piped.counts), counted(piped.once), rest


@given(p=st.integers(2, 6), more=st.integers(0, 6), data=st.data())
def test_gradients_of_weights_fill_what_others_wait(p, more, data):
    """ZB-H1 (Qi et al. 2023, table 1): ranks of equal stages wait (p - 1)(F + B - W), where W is no longer than F and B;
    one forward, one backward waits (p - 1)(F + B + W)."""
    w = data.draw(st.integers(1, 9))
    f, b = (data.draw(st.integers(w, 12)) for _ in range(2))
    m, seconds = p + more, {"F": f, "B": b, "W": w}
    pipe = Pipe("pipe", p, 1, m, ((),) * p, parts=2)
    rows = timeline(pipe, [pipe.order(r, m) for r in range(p)], lambda kind, _: seconds[kind], lambda *_: 0.0)
    end = max(row[-1].end for row in rows)
    assert all(waited(row, end) == (p - 1) * (f + b - w) for row in rows)


@pytest.mark.parametrize("family", ["llama", "hybrid"])
def test_the_same_plan_each_time(family):
    made = built(family, FOUR)
    assert steps_of(made, Feed(1, 32), "bf16") == steps_of(made, Feed(1, 32), "bf16")


def test_coordinates_of_another_stage_know_whole_numbers_and_nothing_else():
    with Hollow() as mode:
        around, first = Around(mode), At((2, 8))
        rows = first.memo["rows"] = torch.arange(8)
        first.memo["part"] = other = At((2, 4))
        other.tokens = first  # as those of a slower clock refer to their tokens
        plain = around.described(first)
        first.memo["mask"] = torch.zeros(8, 8)
        other.memo["mask"] = (torch.zeros(4, 4), 1)
        again = around.again(first)
        assert again.memo["rows"] is rows and set(again.memo) == {"rows", "part"}
        assert again.memo["part"].tokens is again and not again.memo["part"].memo
        assert around.described(again) == plain != around.described(first)
        assert around.described(around.again(again)) == plain
        again.memo["mask"] = torch.zeros(8, 8)
        assert around.described(again) != around.described(first)  # which has another in its part
        again.memo["part"].memo["mask"] = (torch.zeros(4, 4), 1)
        assert around.described(again) == around.described(first)
        assert len(around.hollow(again)) == 2 and set(around.hollow(again)) == set(around.hollow(first))


# --- when ----------------------------------------------------------------------------------------


@given(
    st.integers(2, 4), st.integers(1, 2), st.integers(1, 3), st.lists(st.integers(1, 9), min_size=16, max_size=16),
    st.lists(st.integers(0, 12), min_size=16, max_size=16),
)  # fmt: skip
def test_a_timeline_is_the_longest_way_through_what_waits_for_what(ranks, chunks, rounds, spent, sent):
    """Actions and messages as nodes of a graph: an action behind the last of its rank and the message that it reads, a
    message behind its action and the last message between the two ranks."""
    pipe = Pipe("pipe", ranks, chunks, ranks * rounds, ())
    orders = [order(r, ranks, ranks * rounds, chunks) for r in range(ranks)]
    last = ranks * chunks - 1

    def seconds(kind, stage):
        return spent[2 * stage + (kind == "B")]

    def sending(kind, stage):
        return 0 if stage == (last if kind == "F" else 0) else sent[2 * stage + (kind == "B")]

    graph, ways = nx.DiGraph(), {}
    for rank, actions in enumerate(orders):
        before = None
        for action in actions:
            stage, step = rank + action.chunk * ranks, 1 if action.kind == "F" else -1
            node, letter = ("at", action.kind, action.batch, stage), ("way", action.kind, action.batch, stage)
            graph.add_edge(letter, ("end",), weight=0)
            graph.add_edge(node, letter, weight=seconds(action.kind, stage) + sending(action.kind, stage))
            if before is not None:
                graph.add_edge(before[0], node, weight=before[1])
            before = node, seconds(action.kind, stage)
            if 0 <= stage - step <= last:
                graph.add_edge(("way", action.kind, action.batch, stage - step), node, weight=0)
            if 0 <= stage + step <= last:
                way = rank, (stage + step) % ranks
                if way in ways:
                    graph.add_edge(ways[way], letter, weight=sending(action.kind, stage))
                ways[way] = letter
    starts = dict.fromkeys(graph, 0)
    for node in nx.topological_sort(graph):
        for behind, edge in graph[node].items():
            starts[behind] = max(starts[behind], starts[node] + edge["weight"])
    rows = timeline(pipe, orders, seconds, sending)
    for row in rows:
        for box in row:
            assert box.start == starts["at", box.action.kind, box.action.batch, box.stage]
            assert box.end - box.start == seconds(box.action.kind, box.stage)


def test_a_schedule_that_stands_still_is_no_timeline():
    orders = [(Action("F", 0), Action("B", 0)), (Action("B", 0), Action("F", 0))]
    orders[0], orders[1] = orders[1], orders[0]
    with pytest.raises(InternalError, match="stands still"):
        timeline(Pipe("pipe", 2, 1, 1, ()), orders, lambda *_: 1.0, lambda *_: 0.0)


# --- what PyTorch loads --------------------------------------------------------------------------

PLAIN = """
import sys, torch
from heddle.runtime.plan.uncompiled import uncompiled
wrapped = torch.optim.Optimizer.add_param_group.__wrapped__
with uncompiled():
    weight = torch.nn.Parameter(torch.ones(2))
    weight.grad = torch.ones(2)
    torch.optim.AdamW([weight]).step()
    assert hasattr(wrapped, "__dynamo_disable")
assert not any(name.startswith("torch._dynamo") for name in sys.modules)
assert not hasattr(wrapped, "__dynamo_disable")
with uncompiled():
    assert torch._dynamo.config.verbose is False  # asked for more: it is loaded
assert torch._dynamo.__file__ and wrapped is torch.optim.Optimizer.add_param_group.__wrapped__
"""


def test_a_plan_does_not_load_the_compiler():
    subprocess.run([sys.executable, "-c", PLAIN], check=True, timeout=120)
