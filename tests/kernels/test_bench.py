"""`heddle bench --target` and `make bench-gpu` without a GPU: whom is timed, in what order, and what estimates count."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from heddle.benchmarks import gpu_models
from heddle.benchmarks.gpu import judged
from heddle.benchmarks.gpu_lines import EIGHT, LINES, Line, Wanted, within
from heddle.benchmarks.gpu_table import written
from heddle.dsl.load import load_text
from heddle.lowering.target import TARGETS
from heddle.runtime import peers
from heddle.runtime.check import program_of
from heddle.runtime.compile import build, instantiate
from heddle.runtime.counted import Counted, Watched, count
from heddle.runtime.kernel_bench import Case, Measured, cases, measured, work
from heddle.runtime.kernel_estimate import Counts, Done, estimated, launch_seconds
from heddle.runtime.peers.seam import NotServed, Peer, calling, computing
from heddle.runtime.plan.devices import DEVICES, device
from heddle.runtime.plan.hollow import Ledger
from heddle.runtime.timing import WARM, in_turn, rotated

SPEC = """
use transformer_ls from "transformer_ls/transformer_ls.spec"

model made(vocab = 37, hidden = 64, heads = 2):
    tokens[batch, seq]: token
    x = embed(tokens, vocab -> hidden)
    norm = rms_norm(x)
    x = x + attention(norm, heads, 1, 32, mask = window(5))
    final = rms_norm(x)
    one, two = linear(final, hidden -> vocab), linear(x, hidden -> vocab)
    return one + two

model summaries = transformer_ls(vocab = 37, hidden = 16, ffn = 16, layers = 1, heads = 2, span = 9)
"""
ADDED, CPU, H100 = ("add", "rms_norm"), torch.device("cpu"), device("h100-80g")


def case(*ops: str, model: str = "made", dtype: torch.dtype = torch.float32, **more) -> Case:
    found = cases(program_of(load_text(SPEC), model), "triton", (1, 40), dtype, **more)
    return next(c for c in found if tuple(n.op for n in c.alone.nodes)[-len(ops) :] == ops)


def turns(runs):
    """Seconds that say which call it was, and what each call gives."""
    for run in runs:
        run()
    return [[1.0 + i, 3.0 + i, 2.0 + i] for i in range(len(runs))]


# --- clocks -----------------------------------------------------------------------------------------------------------


def test_sides_are_timed_in_turn_and_another_begins_each_round():
    called, ticks = [], itertools.count()

    def clock(run):
        run()
        return float(next(ticks))

    runs = [lambda i=i: called.append(i) for i in range(3)]
    found = in_turn(runs, rounds=6, clock=clock)
    rounds = list(itertools.batched(called, 3)) if hasattr(itertools, "batched") else list(zip(*[iter(called)] * 3))
    assert len(rounds) == WARM + 6 and all(sorted(one) == [0, 1, 2] for one in rounds)
    assert {one[0] for one in rounds} == {0, 1, 2}
    assert [len(times) for times in found] == [6, 6, 6]
    counted = sorted(itertools.chain(*found))
    assert counted == [float(t) for t in range(3 * WARM, 3 * (WARM + 6))]  # warm ones do not


@pytest.mark.parametrize(("size", "cache", "copies"), [(10, 0, 1), (10, 50, 8), (30, 50, 4), (100, 50, 1), (99, 50, 2)])
def test_inputs_change_so_that_no_cache_holds_them(size, cache, copies):
    made = itertools.count()

    def make():
        number = next(made)
        return lambda: number

    run = rotated(make, size, cache)
    assert [run() for _ in range(2 * copies)] == [*range(copies)] * 2


# --- peers ------------------------------------------------------------------------------------------------------------


def peer(name, forward, package=None):
    def make(alone, plain):
        return computing(plain(), alone, lambda block, given, at: forward(alone, block, given))

    return Peer(name, package, (ADDED,), make)


def added(alone, block, given, eps=1e-6):
    x, y = given.values()
    (weight,) = block.parameters()
    h = x + y
    norm = h * torch.rsqrt((h.float() ** 2).mean(-1, keepdim=True) + eps).to(h.dtype) * weight
    return dict(zip(alone.graph.results, (h, norm), strict=True))


def test_peers_are_compared_before_they_are_timed(monkeypatch):
    def wrong(alone, block, given):
        found = added(alone, block, given)
        last = alone.graph.results[-1]
        return found | {last: found[last] * 1.01}

    def refuses(alone, block, given):
        raise NotServed("it is too wide")

    there = (peer("right", added), peer("wrong", wrong), peer("broken", lambda *given: 1 / 0),
             peer("refuses", refuses), peer("absent", added, "no-such-package-of-kernels"))  # fmt: skip
    monkeypatch.setattr(peers, "PEERS", there)
    row = measured(case(*ADDED), CPU, (1e9, 1e12), turns, compiled=False)
    assert set(row.peers) == {"right", "eager"}
    assert row.seconds == 2.0 and row.peers == {"right": 1.5, "eager": 2.0}
    assert row.errors["ours"] <= 1 and row.errors["right"] < 16 < row.errors["wrong"]
    assert row.notes["wrong"].startswith("wrong: ") and row.notes["broken"].startswith("fails: ZeroDivisionError")
    assert row.notes["refuses"] == "it is too wide"
    assert row.notes["absent"] == "no-such-package-of-kernels is not installed"
    assert row.copy_share == row.bytes / 2.0 / 1e9 and row.matmul_share == row.flops / 2.0 / 1e12


@pytest.mark.parametrize(("model", "documents"), [("made", None), ("made", (11, 1, 28)), ("summaries", (11, 1, 20, 8))])
def test_attention_of_torch_sees_what_ours_sees(model, documents):
    one = case("attend", model=model, documents=documents)
    kinds = {offer.name: offer.kind for offer in one.offers()}
    draw = one.draw(CPU)
    with torch.no_grad():
        want = draw.ready(one.plain("other"), torch.float64).forward()[0]
        for name in ("flex", "sdpa"):
            ready = draw.ready(kinds[name], torch.float32)
            for x in ready.inputs:
                x.requires_grad_(False)  # FlexAttention has no backward pass on a CPU
            found = ready.forward()[0]
            torch.testing.assert_close(found.double(), want, atol=1e-4, rtol=1e-4, msg=name)


def test_a_class_calls_what_it_is_given_and_others_still_the_library():
    one = case("attend")
    kind = calling(one.plain(), attend=lambda q, *rest, **more: q + 1)
    draw = one.draw(CPU)
    ready = draw.ready(kind, torch.float32)
    assert torch.equal(ready.forward()[0], ready.inputs[0] + 1)
    assert not torch.equal(draw.ready(one.plain(), torch.float32).forward()[0], ready.inputs[0] + 1)


# --- what programs do -------------------------------------------------------------------------------------------------


def test_a_norm_moves_its_rows_once_and_no_more():
    """Both passes of x, y -> h = x + y, norm: what comes in and goes out is counted, each tensor once a pass."""
    one = case(*ADDED)
    done = work(one, one.kind)
    rows, weight = 40 * 64 * 4, 64 * 4
    # Forward reads two and writes two; backward reads h and two slopes and writes the one gradient that both have. The
    # weight is read twice, and its gradient written.
    assert done.necessary == 8 * rows + 3 * weight
    counts = [count(form) for (form,) in done.launches]
    moved = sum(c.moved for c in counts)
    assert done.necessary <= moved + weight < 1.1 * done.necessary  # beside it: statistics, and sums of programs
    assert counts[0].requested >= counts[0].moved and not any(c.flops for c in counts)


def test_products_of_tiles_that_a_mask_leaves_are_counted():
    one = case("attend", dtype=torch.bfloat16)
    alike = replace(one, shape=(1, 512))
    (forward, *_), half = work(alike, one.kind).launches, work(replace(one, shape=(1, 256)), one.kind).launches[0]
    whole = 2 * 2 * 32 * 2 * 512**2  # two products of width 32, two heads
    assert 0 < count(forward[0]).flops < 0.6 * whole  # a window of 5 rows of tiles
    assert count(forward[0]).flops == pytest.approx(2 * count(half[0]).flops, rel=0.2)


def test_some_programs_stand_for_all(monkeypatch):
    one = case("attend", dtype=torch.bfloat16)
    (form,) = work(replace(one, shape=(1, 600)), one.kind).launches[0]
    some = count(form)
    monkeypatch.setattr("heddle.runtime.counted.SOME", 10**9)
    monkeypatch.setattr("heddle.runtime.counted.PROGRAMS", 10**9)
    every = count(form)
    assert every.programs == some.programs > 8
    assert some.flops == pytest.approx(every.flops, rel=0.1)
    assert some.requested == pytest.approx(every.requested, rel=0.1)


def test_memory_that_is_asked_for_is_no_work():
    with Watched(1.0) as mode, mode.section("", "") as section:
        x = torch.empty(1000)
        torch.empty_like(x) + x
    assert sum(w.bytes * n for w, n in section.ledger.work.items()) == 3 * 4000


def test_an_estimate_takes_the_better_form_and_the_slower_of_bytes_and_products():
    memory = H100.memory_rate * H100.reached[1]
    bytes_bound, products_bound = Counted("a", 1, 9e9, memory * 1e-3, 1e9), Counted("b", 1, 1.0, 1.0, 1e12)
    assert launch_seconds(bytes_bound, H100) == pytest.approx(1e-3)
    assert launch_seconds(products_bound, H100) == pytest.approx(1e12 / (0.4 * 989.5e12))
    assert launch_seconds(Counted("c", 1, 1.0, 1.0, 0.0), H100) == H100.launch_s
    row = Measured("k", ("op",), int(memory * 1e-3), 0, 0.0, 1, 0.0)
    theirs = [[bytes_bound], [products_bound, bytes_bound]]
    sides = {"ours": Counts([[bytes_bound]], Ledger()), "peer": Counts(theirs, Ledger())}
    found = estimated(Done(row, sides), H100).row
    assert found.copy_share == pytest.approx(1.0, rel=1e-6) and found.peers == {"peer": pytest.approx(2.0)}


# --- lines ------------------------------------------------------------------------------------------------------------


def test_every_device_has_a_target_to_be_estimated_for():
    assert {f"sm_{d.capability}" for d in DEVICES.values()} <= set(TARGETS)


def test_every_line_has_its_kernel():
    eight = {tuple(n.op for n in c.alone.nodes) for c in cases(LINES[0].program(), "sm_90", (1, 8), torch.bfloat16)}
    assert {line.ops for line in LINES if line.model == EIGHT and line.ops} <= eight
    for name in ("windowed", "summaries"):
        (line,) = (line for line in LINES if line.model == name)
        found = cases(line.program(), "sm_90", (1, 8), torch.bfloat16)
        assert line.ops in {tuple(n.op for n in c.alone.nodes) for c in found}
    (train,) = (line for line in LINES if line.whole == "train")
    assert 0.95e9 < train.program().num_parameters() < 1.15e9
    assert all(sum(line.documents) == line.tokens for line in LINES if line.documents)


def test_minutes_bound_a_run_and_what_is_left_out_is_named():
    now, ran = [0.0], []

    def run(line):
        ran.append(line.name)
        now[0] += 60 * line.minutes

    lines = tuple(Line(name, "", (), minutes=m) for name, m in (("a", 2), ("b", 5), ("c", 1)))
    assert [line.name for line in within(lines, 4, run, lambda: now[0])] == ["b"] and ran == ["a", "c"]
    ran.clear()
    assert not within(lines, None, run, lambda: now[0]) and ran == ["a", "b", "c"]


def test_a_table_says_what_holds_and_what_is_not_known():
    row = vars(Measured("k", ("op",), 100, 100, 1e9, 1, 2e-6, copy_share=0.93, peers={"flex": 1.1}, estimated=True))
    row["memory"] = {"ours": 100, "liger": 250}
    what = {"copy share": 0.9, "ratio to flex": 1.2, "ratio to liger": 1.0, "memory ratio to liger": 2.0,
            "memory ratio to flex": 1.0, "matmul share": 0.5}  # fmt: skip
    wanted = tuple(Wanted(name, least) for name, least in what.items())
    made = judged(Line("line", "", wanted, ("op",)), row)
    assert [one["holds"] for one in made["wanted"]] == [True, False, None, True, None, None]
    told = {"estimated": True, "device": "D", "torch": "1", "triton": "2", "rates": None, "lines": {"line": made},
            "left_out": [{"line": "other", "why": "no time was left"}]}  # fmt: skip
    text = written(told)
    assert "estimates" in text and "- other: left out: no time was left" in text
    assert "| line | 2 | 93% |  | flex 1.10x | copy share >= 90%: 93% would hold; ratio to flex >= 1.20x: 1.10x would not;" in text
    assert "ratio to liger >= 1.00x: not known" in text


def test_transformers_has_the_same_model():
    line = Line("tiny", "nemotron_h/tiny", (), whole="train", tokens=32)
    ours = instantiate(build(line.program())).eval()
    theirs = gpu_models.same_of_transformers(ours, line).eval()
    tokens = torch.randint(0, 256, (2, 32), generator=torch.Generator().manual_seed(0)) % ours.vocab
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens), theirs(tokens).logits, atol=2e-4, rtol=2e-4)


def test_what_many_programs_read_is_moved_once():
    """A weight that each program reads is asked for by all of them, and moved as often as it is there."""
    one = replace(case(*ADDED), shape=(1, 4096))
    ((form,), *_) = work(one, one.kind).launches
    found = count(form)
    rows, statistics, weight = 4 * 4096 * 64 * 4, 4096 * 4, 64 * 4
    assert found.moved == rows + statistics + weight
    assert found.requested > found.moved + 20 * weight
