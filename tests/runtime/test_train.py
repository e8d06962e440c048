"""Training: gradients of micro-batches, schedules, decay, masters, falling loss, resuming bit for bit, signals."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from io import StringIO

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from typer.testing import CliRunner

from heddle.dsl.load import load, load_text, shipped_folder
from heddle.runtime.check import program_of
from heddle.runtime.cli import app
from heddle.runtime.compile import build, instantiate
from heddle.runtime.data import Batch, Corpus, Cursor, Packed, open_tokenizer
from heddle.runtime.errors import UserError
from heddle.runtime.train import TrainConfig, checkpoint, evaluate, train
from heddle.runtime.train.loop import _Run
from heddle.runtime.train.optimizer import Optimizer

SPEC = """
model tiny(vocab = 256, hidden = 32, heads = 2):
    tokens[batch, seq]: token
    embedding = embed(tokens, vocab -> hidden)
    x = embedding
    for layer in 1:
        norm1 = rms_norm(x)
        x = x + attention(norm1, heads)
        norm2 = rms_norm(x)
        x = x + mamba2(norm2, heads = 2, head_dim = 16, state = 8, groups = 1, chunk = 8)
        norm3 = rms_norm(x)
        x = x + mlp(norm3, 2 * hidden, bias = true)
    final = rms_norm(x)
    logits = linear(final, hidden -> vocab)
    return logits
"""
ARTIFACT = build(program_of(load_text(SPEC)))
TEXT = "the warp is held on the loom, and the weft is drawn through, over and under. " * 40
QUIET = Console(file=StringIO())


def tiny(seed=0, dtype=None):
    return instantiate(ARTIFACT, seed, dtype)


def rows(text=TEXT, seq=32, seed=0, kind=Packed):
    words = open_tokenizer("bytes")
    return kind(Corpus.of([words.encode(s) for s in text.split(". ") if s]), seq, seed)


def config(**changed):
    return TrainConfig(**{"steps": 10, "batch": 2, "seq": 32, "warmup": 2, "lr": 3e-3, **changed})


def losses(out):
    return [r["loss"] for r in map(json.loads, (out / "log.jsonl").read_text().splitlines()) if "loss" in r]


# --- gradients -----------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("accumulate", [2, 5])
def test_accumulating_equals_one_batch(tmp_path, packed, accumulate):
    """In fp64, to 1e-10, also where micro-batches have unlike numbers of scored tokens."""
    rows_each, seq = 2, 12
    source = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 256, (accumulate * rows_each, seq), generator=source)
    document = torch.zeros_like(tokens)
    if packed:
        starts = torch.rand(tokens.shape, generator=source) < torch.linspace(0, 0.8, len(tokens))[:, None]
        starts[:, 0] = False
        document = starts.cumsum(1)
    found = []
    for pieces in (1, accumulate):
        model = tiny(3)
        run = _Run(model, rows(), config(dtype="fp64"), tmp_path, None, QUIET)
        size = len(tokens) // pieces
        total = run._gradient([Batch(t, d) for t, d in zip(tokens.split(size), document.split(size), strict=True)])
        found.append((total, {n: p.grad for n, p in model.named_parameters()}))
    torch.testing.assert_close(found[1][0], found[0][0], rtol=0, atol=1e-10)
    assert all(g is not None and g.dtype == torch.float64 for g in found[0][1].values())
    for name, wanted in found[0][1].items():
        torch.testing.assert_close(found[1][1][name], wanted, rtol=0, atol=1e-10, msg=name)


def test_a_step_of_micro_batches_sees_the_rows_of_one_batch(tmp_path):
    states = []
    for batch, accumulate in ((4, 1), (1, 4), (2, 2)):
        model = tiny()
        out = tmp_path / f"{batch}"
        train(model, rows(), config(steps=3, batch=batch, accumulate=accumulate, dtype="fp64"), out, console=QUIET)
        states.append(model.state_dict())
    for other in states[1:]:
        for name, wanted in states[0].items():
            torch.testing.assert_close(other[name], wanted, rtol=0, atol=1e-9)


# --- schedules -----------------------------------------------------------------------------------

settings = st.fixed_dictionaries({
    "steps": st.integers(2, 200), "warmup": st.integers(0, 60), "decay": st.floats(0.05, 1.0),
    "lr": st.floats(1e-4, 1e-2), "min_lr": st.floats(0, 1e-4)})  # fmt: skip


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "constant"])
@given(given=settings)
def test_schedules(schedule, given):
    c = TrainConfig(schedule=schedule, **given)
    rates = [c.learning_rate(s) for s in range(1, c.steps + 1)]
    warm, rest = rates[: c.warmup], rates[c.warmup :]
    assert warm == pytest.approx([c.lr * s / c.warmup for s in range(1, len(warm) + 1)])
    assert all(c.min_lr - 1e-15 <= r <= c.lr + 1e-15 for r in rest)
    assert all(a >= b for a, b in itertools.pairwise(rest))
    if rest:
        assert rest[-1] == pytest.approx(c.lr if schedule == "constant" else c.min_lr, abs=1e-12)


def test_the_shapes_between_the_ends():
    cosine = TrainConfig(steps=110, warmup=10, lr=1.0, min_lr=0.0)
    assert cosine.learning_rate(10) == 1.0
    assert cosine.learning_rate(60) == pytest.approx(0.5)
    assert cosine.learning_rate(35) == pytest.approx(0.5 + 0.5 * 2**-0.5)
    wsd = TrainConfig(steps=110, warmup=10, lr=1.0, min_lr=0.0, schedule="wsd", decay=0.2)
    assert [wsd.learning_rate(s) for s in (10, 50, 90)] == pytest.approx([1.0] * 3)
    assert wsd.learning_rate(95) == pytest.approx(0.5)  # a quarter of the way down: 1 - sqrt(1/4)
    assert wsd.learning_rate(91) < 1.0


def test_the_log_has_the_rate_that_was_used(tmp_path):
    c = config(steps=4)
    train(tiny(), rows(), c, tmp_path, console=QUIET)
    records = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [r["lr"] for r in records] == [c.learning_rate(s) for s in (1, 2, 3, 4)]
    assert [r["tokens"] for r in records] == [64, 128, 192, 256]


# --- the optimizer -------------------------------------------------------------------------------


def test_decay_touches_matrices_only():
    """With no gradient a step is decay alone: matrices shrink by lr * decay, all else stays."""
    model = tiny()
    before = {n: v.detach().clone() for n, _, v in model.named_logical_parameters()}
    optimizer = Optimizer(model, config(weight_decay=0.5))
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step(0.1)
    shrunk = set()
    for name, _, now in model.named_logical_parameters():
        if not torch.equal(now, before[name]):
            torch.testing.assert_close(now, before[name] * 0.95)
            shrunk.add(name)
    matrices = {n for n, v in before.items() if v.dim() >= 2 and not n.endswith((".bias", "norm.weight"))}
    assert shrunk == matrices
    assert {n for n in before if n.endswith("A_log") or "norm" in n or n.endswith(".bias")} <= before.keys() - shrunk
    assert len(matrices) >= 10 and len(before) - len(matrices) >= 6


def test_bfloat16_keeps_masters(tmp_path):
    """A step too small for bf16 still counts, because the masters are fp32; the weights are the masters, rounded."""
    model = tiny()
    run = _Run(model, rows(), config(dtype="bf16", weight_decay=0.0), tmp_path, None, QUIET)
    name, weight = next((n, p) for n, p in model.named_parameters() if p.dtype == torch.bfloat16)
    master = run.optimizer.masters[name]
    assert master.dtype == torch.float32
    first, first_master = weight.detach().clone(), master.detach().clone()
    for _ in range(3):
        run._gradient([Batch(torch.zeros(1, 8, dtype=torch.int64) + 5, torch.zeros(1, 8, dtype=torch.int64))])
        run.optimizer.step(1e-7)
    assert not torch.equal(master, first_master)
    assert (weight == first).float().mean() > 0.9
    for n, p in model.named_parameters():
        assert torch.equal(p, run.optimizer.masters[n].to(p.dtype)), n
    kept = {n for n, p in model.named_parameters() if p.dtype == torch.float32}
    assert any("A_log" in n for n in kept)


def test_clipping(tmp_path):
    run = _Run(tiny(), rows(), config(), tmp_path, None, QUIET)
    batch, _ = run.data.batch(Cursor(), 2)
    run._gradient([batch])
    norm = run.optimizer.clip(1e-3)
    again = run.optimizer.clip(1e9)
    assert norm > 1e-2
    assert again == pytest.approx(1e-3, rel=1e-3)


# --- learning ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_loss_falls(tmp_path, dtype):
    report = train(tiny(), rows(), config(steps=40, dtype=dtype), tmp_path, held_out=rows(), console=QUIET)
    found = losses(tmp_path)
    assert found[0] == pytest.approx(np.log(256), abs=0.3)
    assert found[-1] < 0.6 * found[0]
    assert report.held_out == pytest.approx(found[-1], abs=0.5)


@pytest.mark.parametrize("family", ["llama", "mistral", "nemotron4", "nemotron_h"])
def test_each_family_learns(tmp_path, family):
    program = program_of(load(shipped_folder() / family / "tiny.spec"))
    train(instantiate(build(program)), rows(), config(steps=25, lr=5e-3, batch=4), tmp_path, console=QUIET)
    found = losses(tmp_path)
    assert found[-1] < 0.7 * found[0]


def test_evaluating_is_the_mean_over_scored_tokens():
    model, data = tiny(2), rows()
    everything = data.rows(list(range(data.num_rows)))
    with torch.no_grad():
        logits = model(everything.tokens, document=everything.document)[:, :-1]
        scored = everything.document[:, 1:] == everything.document[:, :-1]
        each = torch.nn.functional.cross_entropy(logits.transpose(1, 2), everything.tokens[:, 1:], reduction="none")
    for batch in (1, 3, 1000):
        assert evaluate(model, data, batch) == pytest.approx(float(each[scored].mean()), rel=1e-5)


# --- stopping and going on -----------------------------------------------------------------------


class Cut(Packed):
    """Data that send a signal, or break off, when a row is asked for."""

    at, number = 10, signal.SIGTERM

    def batch(self, cursor, rows):
        if cursor.row >= self.at:
            if self.number is None:
                raise ConnectionError("the power failed")
            self.at = 10**9
            os.kill(os.getpid(), self.number)
        return super().batch(cursor, rows)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, None], ids=["term", "int", "power"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_ten_steps_are_five_and_five(tmp_path, dtype, number):
    """Weights and log of a run that was stopped, or cut off behind its checkpoint, are those of one that was not."""
    c = config(dtype=dtype, save_every=4, eval_every=5, accumulate=2, batch=1)
    straight = tiny()
    train(straight, rows(), c, tmp_path / "a", held_out=rows(), console=QUIET)
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    data = rows(kind=Cut)
    data.number = number
    if number is None:
        with pytest.raises(ConnectionError):
            train(tiny(), data, c, tmp_path / "b", held_out=rows(), console=QUIET)
        assert len(losses(tmp_path / "b")) == 5
    else:
        report = train(tiny(), data, c, tmp_path / "b", held_out=rows(), console=QUIET)
        assert report.stopped
        assert report.step == 6
        assert report.held_out is None
    assert before == (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT))
    resumed = tiny(seed=77)  # what is resumed does not depend on how the model was filled
    report = train(resumed, rows(), c, tmp_path / "b", held_out=rows(), resume=True, console=QUIET)
    assert (report.step, report.stopped) == (10, False)
    wanted, found = straight.state_dict(), resumed.state_dict()
    assert wanted.keys() == found.keys()
    assert all(torch.equal(wanted[n], found[n]) for n in wanted)
    assert (tmp_path / "a/log.jsonl").read_bytes() == (tmp_path / "b/log.jsonl").read_bytes()
    a, b = (checkpoint.load(tmp_path / side / "checkpoints/step-00000010") for side in "ab")
    assert a[1].keys() == b[1].keys()
    assert all(torch.equal(a[1][n], b[1][n]) for n in a[1])
    assert a[2] == b[2]


CHANCE = SPEC.replace("mlp(norm3, 2 * hidden, bias = true)", "dropout(moe(norm3, sigmoid_router(4, 2), 8, 16), 0.2)")


def test_chance_and_buffers_go_on_bit_for_bit(tmp_path):
    """Dropout draws the same masks and routers have the same biases, whether a run was cut or not; others keep their
    chance."""
    artifact = build(program_of(load_text(CHANCE)))
    c = config(steps=6, save_every=2, accumulate=2, batch=1)
    straight, cut, resumed = (instantiate(artifact, seed) for seed in (0, 0, 5))
    torch.manual_seed(3)
    wanted = torch.rand(1)
    torch.manual_seed(3)
    train(straight, rows(), c, tmp_path / "a", console=QUIET)
    assert torch.equal(torch.rand(1), wanted)
    data = rows(kind=Cut)
    data.at, data.number = 7, None
    with pytest.raises(ConnectionError):
        train(cut, data, c, tmp_path / "b", console=QUIET)
    torch.rand(17)
    train(resumed, rows(), c, tmp_path / "b", resume=True, console=QUIET)
    ours, theirs = straight.state_dict(), resumed.state_dict()
    assert all(torch.equal(ours[n], theirs[n]) for n in ours)
    assert any(float(b.abs().max()) > 0 for n, b in straight.named_buffers() if n.endswith("bias"))
    first = [json.loads(line) for line in (tmp_path / "a/log.jsonl").read_text().splitlines()]
    assert all(r["violation"] >= 1 for r in first if "loss" in r)


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    """A run of four steps that means to go on to eight."""
    out = tmp_path_factory.mktemp("run")
    data = rows(kind=Cut)
    data.at = 6
    train(tiny(), data, config(steps=8), out, console=QUIET)
    return out


@pytest.mark.parametrize(
    ("changed", "named"),
    [({"batch": 3}, "batch"), ({"seq": 16}, "seq"), ({"seed": 1}, "seed"), ({"dtype": "bf16"}, "dtype"),
     ({"text": TEXT + "More. "}, "data")],
    ids=["batch", "seq", "seed", "dtype", "data"],
)  # fmt: skip
def test_another_run_is_not_resumed(started, changed, named):
    before = (started / "log.jsonl").read_bytes()
    data = rows(changed.pop("text", TEXT), changed.get("seq", 32), changed.get("seed", 0))
    with pytest.raises(UserError, match=named) as caught:
        train(tiny(), data, config(steps=8, **changed), started, resume=True, console=QUIET)
    assert caught.value.code == "other-run"
    assert (started / "log.jsonl").read_bytes() == before


def test_another_model_is_not_resumed(started):
    model = instantiate(build(program_of(load_text(SPEC), overrides={"hidden": 64})))
    with pytest.raises(UserError, match="model") as caught:
        train(model, rows(), config(steps=8), started, resume=True, console=QUIET)
    assert caught.value.code == "other-run"


def test_a_run_is_not_started_over_another(started):
    with pytest.raises(UserError) as caught:
        train(tiny(), rows(), config(steps=8), started, console=QUIET)
    assert caught.value.code == "already-there"
    assert checkpoint.latest(started / "checkpoints") is not None


def test_nothing_to_resume(tmp_path):
    with pytest.raises(UserError) as caught:
        train(tiny(), rows(), config(), tmp_path, resume=True, console=QUIET)
    assert caught.value.code == "nothing-to-resume"


def test_a_loss_that_is_no_number_ends_the_run_and_keeps_the_checkpoint(tmp_path):
    model = tiny()

    class Poison(Packed):
        def batch(self, cursor, rows):
            if cursor.row == 8:
                with torch.no_grad():
                    next(model.parameters()).fill_(float("nan"))
            return super().batch(cursor, rows)

    with pytest.raises(UserError, match="step 5") as caught:
        train(model, rows(kind=Poison), config(save_every=4), tmp_path, console=QUIET)
    assert caught.value.code == "not-finite"
    found = checkpoint.latest(tmp_path / "checkpoints")
    assert found.name == "step-00000004"
    assert all(v.isfinite().all() for v in checkpoint.load(found)[0].values())
    fresh = tiny()
    train(fresh, rows(), config(save_every=4), tmp_path, resume=True, console=QUIET)
    assert len(losses(tmp_path)) == 10


def test_a_finished_run_may_be_resumed(tmp_path):
    first, again = tiny(), tiny(4)
    train(first, rows(), config(steps=3), tmp_path, held_out=rows(), console=QUIET)
    log = (tmp_path / "log.jsonl").read_bytes()
    train(again, rows(), config(steps=3), tmp_path, held_out=rows(), resume=True, console=QUIET)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert (tmp_path / "log.jsonl").read_bytes() == log


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_process_that_is_stopped_saves_and_goes_on(tmp_path, number):
    (tmp_path / "a.txt").write_text(TEXT)
    (tmp_path / "m.spec").write_text(SPEC)
    out = tmp_path / "run"
    line = [sys.executable, "-m", "heddle.runtime.cli", "train", str(tmp_path / "m.spec"), "--data", str(tmp_path / "a.txt"),
            "-o", str(out), "--batch", "1", "--seq", "16", "--held-out", "0"]  # fmt: skip
    process = subprocess.Popen([*line, "--steps", "100000"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not ((out / "log.jsonl").is_file() and (out / "log.jsonl").read_text().count("\n") > 3):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(number)
    shown, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert "--resume" in shown
    assert "Traceback" not in shown + errors
    found = checkpoint.latest(out / "checkpoints")
    step = checkpoint.load(found)[2]["step"]
    assert len(losses(out)) == step
    assert not list((out / "checkpoints").glob(".*"))
    after = CliRunner().invoke(app, [*line[3:], "--steps", str(step + 2), "--resume"])
    assert after.exit_code == 0, after.output
    assert len(losses(out)) == step + 2
    assert losses(out)[-1] < 6
