"""Figures that papers print, from a spec: Narayanan et al. 2021 (sizes, operations, volumes, schedules) and Korthikanti
et al. 2022 (activation memory). Symbols are theirs: a heads, h hidden, l layers, s tokens, b rows, t tensor ranks, p
stages, m micro-batches, v chunks."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from heddle.dsl.layout import layout_of
from heddle.dsl.load import load_text
from heddle.lowering.cost import flops_per_token
from heddle.lowering.pipeline import lower
from heddle.runtime.check import program_of
from heddle.runtime.compile import build
from heddle.runtime.lib.pipeline import Pipe
from heddle.runtime.lib.schedules import order
from heddle.runtime.plan.data import to_json
from heddle.runtime.plan.devices import device
from heddle.runtime.plan.estimate import wire_bytes
from heddle.runtime.plan.hollow import Message
from heddle.runtime.plan.plan import plan
from heddle.runtime.plan.schedules import bubble, held, timeline, waited
from heddle.runtime.plan.step import Feed, measure

V, S = 51200, 2048
GPT = """
model gpt(vocab = 51200, context = 2048, hidden = 6144, heads = 64, layers = 48, rate = 0.1, mask = causal):
    tokens[batch, seq]: token
    embedding = embed(tokens, vocab -> hidden)
    place = embed(seq.position, context -> hidden)
    x = dropout(embedding + place, rate)
    for layer in layers:
        norm1 = layer_norm(x)
        attention = attention(norm1, heads, mask = mask, bias = true)
        x = x + dropout(attention, rate)
        norm2 = layer_norm(x)
        mlp = mlp(norm2, 4 * hidden, gelu, true)
        x = x + dropout(mlp, rate)
    final = layer_norm(x)
    logits = linear(final, hidden -> vocab, weight = embedding.weight)
    return logits

layout tp:
    mesh data = 1, tensor = 8
    shard vocab, heads, kv_heads?, ffn over tensor
    shard batch over data

layout tp_sp = tp with:
    shard seq over tensor between blocks
"""
# Table 1 of 2021: parameters (1e9), heads, hidden, layers, batch; and 96 B s l h^2 (1 + s/6h + V/16lh), in PFLOP.
TABLE = [
    (1.7, 24, 2304, 24, 512, 15.47), (3.6, 32, 3072, 30, 512, 32.66), (7.5, 32, 4096, 36, 512, 67.18),
    (18.4, 48, 6144, 40, 1024, 324.84), (39.1, 64, 8192, 48, 1536, 1021.23), (76.1, 80, 10240, 60, 1792, 2302.05),
    (145.6, 96, 12288, 80, 2304, 5641.68), (310.1, 128, 16384, 96, 2160, 11194.01),
    (529.6, 128, 20480, 105, 2520, 22215.94), (1008.0, 160, 25600, 128, 3072, 51390.51),
]  # fmt: skip


def gpt(layout=None, text=GPT, **settings):
    file = load_text(text)
    return program_of(file, "gpt", settings), layout_of(file, layout) if layout else None


@pytest.mark.parametrize(("billions", "a", "h", "layers", "batch", "peta"), TABLE)
def test_sizes_and_operations_of_table_1(billions, a, h, layers, batch, peta):
    program, _ = gpt(hidden=h, heads=a, layers=layers)
    count = program.num_parameters()
    assert count == 12 * layers * h * h + 13 * layers * h + (V + S) * h + 2 * h  # the paper leaves out the last norm
    assert abs(count / 1e9 - billions) <= 0.0501  # as printed
    # Each layer runs forward twice and backward once (twice the work); the head only forward once.
    full = GPT.replace("mask = causal", "mask = full")  # they count every score
    ours = flops_per_token(lower(gpt(text=full, hidden=h, heads=a, layers=layers)[0]), S)
    head = 2 * h * V
    points = ours - layers * (24 * h * h + 4 * S * h) - head  # norms, activations and sums, which they leave out
    assert 0 < points < 0.012 * ours
    assert (4 * (ours - points - head) + 3 * head) * batch * S / 1e15 == pytest.approx(peta, abs=0.0051)


def difference(layout, t, b, a=16, h=512, s=256):
    """(bytes that one more layer saves, those of them that lines with dropout save, messages of one more layer)."""
    steps = []
    for layers in (2, 3):
        program, made = gpt(layout, layers=layers, hidden=h, heads=a, context=s)
        made = replace(made, mesh=(("data", 1), ("tensor", t)))
        steps.append(measure(build(program, layout=made), Feed(b, s, 1, documents=False), "bf16"))
    one, two = steps
    masks = [sum(x.bytes for x in step.saved if x.line.endswith((":10", ":13"))) for step in steps]
    messages = Counter()
    for m, n in two.micro.messages.items():
        messages[m.phase, m.kind, m.bytes] += n
    for m, n in one.micro.messages.items():
        messages[m.phase, m.kind, m.bytes] -= n
    return two.saved_bytes - one.saved_bytes, masks[1] - masks[0], +messages


@pytest.mark.parametrize(("t", "b"), [(1, 1), (2, 3), (4, 2), (8, 1)])
def test_activation_memory_of_a_layer_under_tensor_parallelism(t, b):
    """sbh (10 + 24/t): the form without scores (their selective recomputation), which a fused attention keeps. Beside it
    are statistics that they do not count: a mean and a scale of each norm's rows, a sum of each head's rows, in fp32.
    They count 16 bits for norms' inputs; here norms keep them in 32."""
    a, h, s = 16, 512, 256
    saved, masks, messages = difference("tp", t, b)
    statistics = 2 * 2 * 4 * s * b + 4 * a * s * b // t
    wide = 2 * 2 * s * b * h  # of two norms' inputs two bytes more for each place
    assert masks == 2 * s * b * h
    assert saved - statistics - wide == s * b * h * (10 + 24 / t)
    if t > 1:
        # Two all-reduces of b s h forward and two backward, in 16 bits: 8 b s h (t - 1) / t elements on the wire.
        assert messages == {("forward", "all_reduce", 2 * b * s * h): 2, ("backward", "all_reduce", 2 * b * s * h): 2}
        wire = sum(n * wire_bytes(Message("", "", "", k, ("tensor",), size), t) for (_, k, size), n in messages.items())
        assert wire == pytest.approx(2 * 8 * b * s * h * (t - 1) / t)


@pytest.mark.parametrize(("t", "b"), [(2, 3), (4, 2), (8, 1)])
def test_activation_memory_of_a_layer_with_sequence_parallelism(t, b):
    """sbh 34/t, and of the inputs of both products the other ranks' parts: they gather these again in the backward
    pass, we keep what was gathered: 4 sbh (1 - 1/t) more."""
    a, h, s = 16, 512, 256
    saved, masks, messages = difference("tp_sp", t, b)
    statistics = 2 * 2 * 4 * s * b // t + 4 * a * s * b // t
    wide = 2 * 2 * s * b * h // t
    assert masks == 2 * s * b * h // t
    assert saved - statistics - wide == s * b * h * 34 / t + 4 * s * b * h * (1 - 1 / t)
    part, whole = 2 * b * s * h // t, 2 * b * s * h
    assert messages == {
        ("forward", "all_gather", part): 2, ("forward", "reduce_scatter", whole): 2,
        ("backward", "all_gather", part): 2, ("backward", "reduce_scatter", whole): 2,
    }  # fmt: skip


# With dropout of the weights of attention, as they have it: these are kept.
DROPPED = (
    GPT.replace("mask = mask, bias = true)", "mask = mask, bias = true, drop = rate)")
    + """
layout selective = tp with:
    recompute attend

layout selective_sp = tp_sp with:
    recompute attend

layout every = tp with:
    recompute blocks

layout every_sp = tp_sp with:
    recompute blocks
"""
)
# Bytes of a layer, by s b h (2022, table 2, equations 1, 2 and 4, and sections 4.1, 5): x = 5 a s / h.
PUBLISHED = {
    "tp": lambda t, x: 10 + (24 + x) / t,
    "tp_sp": lambda t, x: (34 + x) / t,
    "selective": lambda t, x: 10 + 24 / t,
    "selective_sp": lambda t, x: 34 / t,
    "every": lambda t, x: 2,
    "every_sp": lambda t, x: 2 / t,
}


@pytest.mark.parametrize(
    ("layout", "t", "b"),
    [("tp", 1, 1), ("tp", 4, 2), ("tp_sp", 2, 3), ("selective", 1, 2), ("selective", 2, 1), ("selective_sp", 4, 2),
     ("every", 2, 1), ("every_sp", 4, 2)],
)  # fmt: skip
def test_activation_memory_of_a_layer_whose_attention_keeps_its_scores(layout, t, b):
    """sbh (34 + 5as/h) on one rank, and its forms: 2 as^2 b of the softmax, as^2 b of what is kept, 2 as^2 b of what
    is left of it. Beyond it are what the forms above have beyond theirs: norms' inputs in 32 bits, a mean and a scale
    of their rows in fp32, and with split sequences the parts of other ranks of two products' inputs. A layer that is
    made again keeps its input alone."""
    a, h, s = 16, 512, 256
    sbh, saved = s * b * h, []
    for layers in (2, 3):
        program, made = gpt(layout, DROPPED, layers=layers, hidden=h, heads=a, context=s)
        made = replace(made, mesh=(("data", 1), ("tensor", t)))
        found = plan(program, made, device("a100-80g"), "bf16", Feed(b, s, 1, documents=False))
        saved.append(found.groups[0].memory.saved)
    parts = t if layout.endswith("_sp") else 1
    norms = 2 * 2 * sbh // parts + 2 * 2 * 4 * s * b // parts
    gathered = 4 * sbh * (1 - 1 / parts)
    beyond = 0 if layout.startswith("every") else norms + gathered
    assert saved[1] - saved[0] - beyond == sbh * PUBLISHED[layout](t, 5 * a * s / h)


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("layout", ["tp", "tp_sp"])
def test_no_message_beside_the_published_ones(layout, layers):
    """Of a whole step, data 2 x tensor 2. A layer has two pairs of messages (Shoeybi et al. 2019, figure 3; with split
    sequences Korthikanti et al. 2022, figure 5), the embedding half a pair and so has the head, the cross entropy a
    largest and two sums of a number a row. Gradients of the same axes are one message (the paper's data-parallel
    all-reduce); beside it are numbers for the count of tokens, the loss, and the norm: its squares by what splits them."""
    b, s, h = 3, 64, 32
    program, made = gpt(layout, layers=layers, hidden=h, heads=4, vocab=64, context=s)
    made = replace(made, mesh=(("data", 2), ("tensor", 2)))
    step = measure(build(program, layout=made), Feed(b, s, 1, documents=False), "fp32")
    messages = Counter()
    for m, n in step.micro.messages.items():
        messages[m.phase, m.kind, m.axes, m.bytes] += n
    row, whole, n = 4 * b * s, 4 * b * s * h, 2 * layers + 1
    wanted = {("forward", "all_reduce", ("tensor",), row): 3}
    if layout == "tp":
        wanted |= {(phase, "all_reduce", ("tensor",), whole): n for phase in ("forward", "backward")}
    else:
        wanted |= {(phase, kind, ("tensor",), size): n for phase in ("forward", "backward")
                   for kind, size in (("all_gather", whole // 2), ("reduce_scatter", whole))}  # fmt: skip
    assert messages == wanted
    once = Counter()
    for m, k in step.once.messages.items():
        assert m.kind == "all_reduce"
        once[m.axes, "a number" if m.bytes == 8 else "gradients"] += k
    sums = {"tp": [("data",)], "tp_sp": [("data",), ("data", "tensor")]}[layout]
    assert once == {(("data",), "a number"): 2, (("tensor",), "a number"): 1} | {(axes, "gradients"): 1 for axes in sums}


def test_gradients_of_data_ranks_are_summed_once_by_a_ring():
    """A gradient's bytes, times 2 (d - 1) / d on the wire."""
    program, layout = gpt("tp", layers=2, hidden=64, heads=4, vocab=64, context=32)
    for d in (2, 4, 8):
        made = replace(layout, mesh=(("data", d), ("tensor", 1)))
        p = plan(program, made, device("a100-80g"), "fp32", Feed(1, 32))
        sums = {m: n for m, n in p.groups[0].step.once.messages.items() if m.bytes > 8}
        assert sum(m.bytes * n for m, n in sums.items()) == 4 * program.num_parameters()
        wire = sum(wire_bytes(m, d) * n for m, n in sums.items())
        assert wire == pytest.approx(2 * (d - 1) / d * 4 * program.num_parameters())


# --- schedules -----------------------------------------------------------------------------------


def text(actions, chunks=False):
    return " ".join(f"{x.kind}{x.batch}" + (f".{x.chunk}" if chunks else "") for x in actions)


def test_orders_of_one_forward_one_backward():
    wanted = ["F0 F1 F2 F3 B0 F4 B1 F5 B2 B3 B4 B5", "F0 F1 F2 B0 F3 B1 F4 B2 F5 B3 B4 B5",
              "F0 F1 B0 F2 B1 F3 B2 F4 B3 F5 B4 B5", "F0 B0 F1 B1 F2 B2 F3 B3 F4 B4 F5 B5"]  # fmt: skip
    assert [text(order(r, 4, 6)) for r in range(4)] == wanted
    assert [held(order(r, 4, 6)) for r in range(4)] == [4, 3, 2, 1]


INTERLEAVED = {
    (2, 4): """F0.0 F1.0 F0.1 F1.1 F2.0 B0.1 F3.0 B1.1 F2.1 B0.0 F3.1 B1.0 B2.1 B3.1 B2.0 B3.0
F0.0 F1.0 F0.1 B0.1 F1.1 B1.1 F2.0 B0.0 F3.0 B1.0 F2.1 B2.1 F3.1 B3.1 B2.0 B3.0""",
    (
        4,
        8,
    ): """F0.0 F1.0 F2.0 F3.0 F0.1 F1.1 F2.1 F3.1 F4.0 F5.0 F6.0 B0.1 F7.0 B1.1 F4.1 B2.1 F5.1 B3.1 F6.1 B0.0 F7.1 B1.0 B2.0 B3.0 B4.1 B5.1 B6.1 B7.1 B4.0 B5.0 B6.0 B7.0
F0.0 F1.0 F2.0 F3.0 F0.1 F1.1 F2.1 F3.1 F4.0 B0.1 F5.0 B1.1 F6.0 B2.1 F7.0 B3.1 F4.1 B0.0 F5.1 B1.0 F6.1 B2.0 F7.1 B3.0 B4.1 B5.1 B6.1 B7.1 B4.0 B5.0 B6.0 B7.0
F0.0 F1.0 F2.0 F3.0 F0.1 F1.1 F2.1 B0.1 F3.1 B1.1 F4.0 B2.1 F5.0 B3.1 F6.0 B0.0 F7.0 B1.0 F4.1 B2.0 F5.1 B3.0 F6.1 B4.1 F7.1 B5.1 B6.1 B7.1 B4.0 B5.0 B6.0 B7.0
F0.0 F1.0 F2.0 F3.0 F0.1 B0.1 F1.1 B1.1 F2.1 B2.1 F3.1 B3.1 F4.0 B0.0 F5.0 B1.0 F6.0 B2.0 F7.0 B3.0 F4.1 B4.1 F5.1 B5.1 F6.1 B6.1 F7.1 B7.1 B4.0 B5.0 B6.0 B7.0""",
}


@pytest.mark.parametrize(("p", "m"), list(INTERLEAVED))
def test_interleaved_order_of_each_rank(p, m):
    assert [text(order(r, p, m, 2), True) for r in range(p)] == INTERLEAVED[p, m].split("\n")


def test_chunks_that_wait_under_interleaving():
    for p, v, m in ((4, 2, 8), (8, 4, 32)):
        assert [held(order(r, p, m, v)) for r in range(p)] == [(v - 1) * p + 2 * (p - 1 - r) + 1 for r in range(p)]


def finish(orders, pieces, p):
    """When all ranks are done: a forward takes 1, a backward 2; each waits for what it reads."""
    done, free, at = {}, [0.0] * p, [0] * p
    while any(at[r] < len(orders[r]) for r in range(p)):
        moved = False
        for r in range(p):
            while at[r] < len(orders[r]):
                kind, m, c = orders[r][at[r]]
                piece = c * p + r
                needs = [("F", m, piece - 1)] if kind == "F" and piece else []
                if kind == "B":
                    needs = [("F", m, piece), *([("B", m, piece + 1)] if piece + 1 < pieces else [])]
                if any(n not in done for n in needs):
                    break
                start = max([free[r], *(done[n] for n in needs)])
                free[r] = done[kind, m, piece] = start + (1 if kind == "F" else 2)
                at[r] += 1
                moved = True
        assert moved, "no rank can go on"
    return max(free)


@pytest.mark.parametrize(("p", "v", "m", "share"), [(4, 2, 8, 0.1875), (4, 2, 16, 0.09375), (8, 4, 32, 0.0546875)])
def test_bubbles_are_what_ranks_wait(p, v, m, share):
    assert bubble(p, m, v) == share
    assert finish([order(r, p, m, v) for r in range(p)], p * v, p) == pytest.approx(3 * m * v * (1 + share))
    assert finish([order(r, p, m) for r in range(p)], p, p) == pytest.approx(3 * m * (1 + bubble(p, m)))
    for chunks in (1, v):
        orders = [order(r, p, m, chunks) for r in range(p)]
        rows = timeline(Pipe("pipe", p, chunks, m, ()), orders, lambda kind, _: 1 + (kind == "B"), lambda *_: 0.0)
        end = max(row[-1].end for row in rows)
        assert end == finish(orders, p * chunks, p)
        assert all(waited(row, end) / (end - waited(row, end)) == bubble(p, m, chunks) for row in rows)


# --- pipelines -----------------------------------------------------------------------------------

PIPES = (
    GPT
    + """
layout pipes:
    mesh data = 1, pipe = 2, tensor = 1
    shard vocab, heads, kv_heads?, ffn over tensor
    shard batch over data
    stages over pipe, microbatches = 16

layout chunks = pipes with:
    stages over pipe, schedule = interleaved(chunks = 2), microbatches = 16

layout pipes_sp = pipes with:
    shard seq over tensor between blocks
"""
)


def piped(layout, p, t, b, layers, h=512, a=16, s=256):
    program, made = gpt(layout, PIPES, layers=layers, hidden=h, heads=a, context=s)
    made = replace(made, mesh=(("data", 1), ("pipe", p), ("tensor", t)))
    return plan(program, made, device("a100-80g"), "bf16", Feed(b, s, 1, documents=False))


@pytest.mark.parametrize(("layout", "v"), [("pipes", 1), ("chunks", 2)])
@pytest.mark.parametrize(("p", "t", "b"), [(2, 1, 1), (4, 2, 3)])
def test_activation_memory_of_the_first_stage(layout, v, p, t, b):
    """What the layers of rank 0 keep: sbh l (10 + 24/t), whatever p is (2022, equation 5), for p of the l/p layers of its
    stage are in flight; interleaved (1 + (p - 1)/(p v)) times as much. Of each layer as above."""
    a, h, s = 16, 512, 256
    layer = s * b * h * (10 + 24 / t) + 2 * 2 * 4 * s * b + 4 * a * s * b // t + 2 * 2 * s * b * h
    few, many = (piped(layout, p, t, b, layers) for layers in (8, 16))
    more = many.groups[0].memory.saved - few.groups[0].memory.saved
    assert more == (16 - 8) * (1 + (p - 1) / (p * v) * (v > 1)) * layer
    if v == 1:  # of at most p - r micro-batches (2021, section 2.2)
        assert [[stage.in_flight for stage in g.step.stages] for g in many.groups] == [[p - r] for r in range(p)]
    if v == 2:  # chunks in flight of rank r, all of a size but the last, which has the head
        first = many.groups[0]
        each = first.step.stages[1].parts["F"].saved_bytes
        assert round(first.memory.saved / each) == (v - 1) * p + 2 * (p - 1) + 1


@pytest.mark.parametrize(("layout", "v"), [("pipes", 1), ("chunks", 2), ("pipes_sp", 1)])
@pytest.mark.parametrize(("p", "t", "b"), [(2, 2, 1), (4, 1, 3)])
def test_volumes_between_stages(layout, v, p, t, b):
    """bsh each way between neighbours for each micro-batch, in 16 bits, v times that interleaved (2021, section 2.2);
    where the sequence is split a rank sends its part."""
    m, one = 16, 2 * b * 256 * 512 // (t if layout == "pipes_sp" else 1)
    for r, group in enumerate(piped(layout, p, t, b, 8).groups):
        sent = Counter()
        for message, n in group.step.micro.messages.items():
            if message.kind == "send":
                assert message.bytes == one and message.axes[0] == "pipe"
                sent[message.phase] += n
        forward, backward = v - (r == p - 1), v - (r == 0)
        assert sent == +Counter({"forward": forward, "backward": backward})
    found = to_json(piped(layout, p, t, b, 8))["groups"][0]["collectives"]
    (row,) = (row for row in found if row["kind"] == "send" and row["phase"] == "forward")
    assert (row["axes"], row["count"], row["bytes"]) == (["pipe"], m * v, m * v * one)


def test_bubble_of_a_plan_with_alike_stages_and_fast_links():
    """What ranks wait of what they work is (p - 1)/(v m), as far as stages take equally long: all do here but the first
    and the last."""
    fast = replace(device("a100-80g"), inside=1e30, between=1e30, latency_s=0.0)
    for layout, p, v in (("pipes", 2, 1), ("pipes", 4, 1), ("chunks", 4, 2)):
        program, made = gpt(layout, PIPES, layers=32, hidden=512, heads=16, context=256, vocab=16)
        made = replace(made, mesh=(("data", 1), ("pipe", p), ("tensor", 1)))
        found = plan(program, made, fast, "bf16", Feed(1, 256, 1, documents=False)).pipeline
        work = [sum(box.end - box.start for box in row) for row in found.rows]
        assert max(work) < 1.15 * min(work)
        ideal = max(work) * (1 + bubble(p, 16, v))
        assert bubble(p, 16, v) * min(work) < found.seconds - min(work) and found.seconds < 1.01 * ideal
