"""Runs of several ranks are the run of one process: losses, norms, weights, moments, whatever the layout, also where a
run is stopped, killed at any moment, and goes on in another layout."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from heddle.runtime.cli import app
from heddle.runtime.folder import load as load_folder
from heddle.runtime.train import checkpoint
from tests.runtime.train.gang import MOMENTS, Gang, write_project

LAYOUTS = """
layout tp:
    mesh data = 2, tensor = 2
    shard vocab?, heads?, kv_heads?, ffn?, groups? over tensor
    shard seq over tensor between blocks
    shard batch, optimizer over data

layout wide = tp with:
    mesh data = 1, tensor = 4

layout rows = tp with:
    mesh data = 4, tensor = 1

layout narrow = tp with:
    mesh data = 1, tensor = 2

layout both = tp with:
    mesh data = 2, tensor = 1

layout stored = rows with:
    shard parameters over data

layout pipe:
    mesh pipe = 2, tensor = 2
    shard vocab?, heads?, kv_heads?, ffn?, groups? over tensor
    stages over pipe, microbatches = 2

layout eight:
    mesh pipe = 2, data = 2, tensor = 2
    shard vocab?, heads?, kv_heads?, ffn?, groups? over tensor
    shard seq over tensor between blocks
    shard batch, optimizer over data
    stages over pipe, microbatches = 2

layout around:
    mesh context = 4
    shard seq over context
    attend: ring(order = zigzag)

layout couple:
    mesh context = 2
    shard seq over context
    attend: ring

layout folded:
    mesh context = 6
    shard seq over context
    attend: ring(order = zigzag)

layout swapped:
    mesh context = 2, tensor = 2
    shard vocab?, heads?, kv_heads?, ffn?, groups? over tensor
    shard seq over context
    attend?: exchange(heads)

layout chunks = pipe with:
    stages over pipe, schedule = zero_bubble(chunks = 2), microbatches = 2

layout deep:
    mesh pipe = 4
    stages over pipe, schedule = zero_bubble, microbatches = 4

layout halves:
    mesh pipe = 2
    stages over pipe, schedule = zero_bubble, microbatches = 2

layout plain:
    mesh data = 4
    shard batch over data
"""
LLAMA = (
    """use llama from "llama/llama.spec"

model tiny = llama(vocab = 256, hidden = 24, ffn = 48, layers = 2, heads = 4, kv_heads = 2)
"""
    + LAYOUTS
)
EXPERTS = (
    """use nemotron_h from "nemotron_h/nemotron_h.spec"

model tiny = nemotron_h(
    vocab = 256, hidden = 24, heads = 4, kv_heads = 2, head_dim = 8, ssm_heads = 4, ssm_head_dim = 8, state = 8,
    groups = 2, chunk = 8, experts = 4, active = 2, expert_ffn = 8, always_ffn = 16, latent = 16, scale = 2.5,
    pattern = "MEM*E")
"""
    + LAYOUTS
)
CHANCE = (
    """
model tiny(vocab = 256, hidden = 24, heads = 4):
    tokens[batch, seq]: token
    embedding = embed(tokens, vocab -> hidden)
    x = embedding
    for layer in 2:
        norm1 = rms_norm(x)
        x = x + dropout(attention(norm1, heads, kv_heads = 2, drop = 0.3), 0.1)
        norm2 = rms_norm(x)
        x = x + dropout(gated_mlp(norm2, 2 * hidden), 0.2)
    final = rms_norm(x)
    logits = linear(final, hidden -> vocab)
    return logits
"""
    + LAYOUTS
)
RUNS = {
    "llama": (LLAMA, ("tp", "wide", "around", "swapped")),
    "experts": (EXPERTS, ("tp", "stored", "chunks", "deep")),
    "chance": (CHANCE, ("tp", "pipe")),
}
BATCHES = {"deep": ["--batch", "2", "--accumulate", "4"]}
"""Other micro-batches of the same step."""
LONG = not settings.default.derandomize
"""`make soak`: all moments, and the real torchrun."""


def alone(words: list[str]) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        os.environ.pop(name, None)
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output


def log(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def steps(run: Path) -> list[dict[str, float]]:
    return [r for r in log(run) if "loss" in r]


def is_same(run: Path, other: Path, atol: float = 1e-10) -> None:
    """Losses, norms, metrics, held-out losses; weights, buffers and moments."""
    for ours, theirs in zip(steps(run), steps(other), strict=True):
        assert ours.keys() == theirs.keys()
        for key in ours:
            assert ours[key] == pytest.approx(theirs[key], rel=0, abs=atol), (run, key, ours["step"])
    ends = [[r["held_out"] for r in log(x) if "held_out" in r][-1] for x in (run, other)]
    assert ends[0] == pytest.approx(ends[1], rel=0, abs=atol)
    a, b = (checkpoint.load(checkpoint.latest(x / "checkpoints")) for x in (run, other))
    for ours, theirs in zip(a[:2], b[:2], strict=True):
        assert ours.keys() == theirs.keys()
        for name, tensor in ours.items():
            torch.testing.assert_close(tensor, theirs[name], rtol=0, atol=atol, msg=f"{run.name}: {name}")
    assert a[2]["step"] == b[2]["step"] and a[2]["row"] == b[2]["row"] and a[2]["run"] == b[2]["run"]


def run_four(folder):
    """What four ranks did: each layout from the start, and one layout's checkpoint taken up by the others."""
    runs = {}
    jobs = []
    for name, (spec, layouts) in RUNS.items():
        words = [*write_project(folder / name, spec), "--accumulate", "2", "--save-every", "1", "--eval-every", "2"]
        for layout in layouts:
            jobs.append([*words, "--steps", "3", "--layout", layout, "-o", str(folder / name / layout),
                         *BATCHES.get(layout, [])])  # fmt: skip
        runs[name] = words
    words = runs["llama"]
    first = folder / "llama" / "first"
    jobs.append([*words, "--steps", "2", "--layout", "tp", "-o", str(first)])
    for layout in ("stored", "wide", "pipe"):
        out = folder / "llama" / f"to-{layout}"
        jobs += [["copy", str(first), str(out)]]
        jobs += [[*words, "--steps", "4", "--layout", layout, "-o", str(out), "--resume"]]
    ended = Gang(jobs, 4).start().wait(300)
    for rank, each in enumerate(ended):
        for words_, e in zip(jobs, each):
            assert e.code == 0, (rank, words_[-4:], e.said)
    return folder, runs, ended


def check_each_is_one_process(folder, runs):
    """fp64, three steps of two micro-batches: losses, norms, metrics, buffers, every weight and moment to 1e-10."""
    for family, (_, layouts) in RUNS.items():
        alone([*runs[family], "--steps", "3", "-o", str(folder / family / "one")])
        for layout in layouts:
            is_same(folder / family / layout, folder / family / "one")


def check_any_layout_goes_on(folder, runs):
    """Data 2 x tensor 2, optimizer divided; then data 4, tensor 4, the same again, and one process."""
    one, first = folder / "llama" / "long", folder / "llama" / "first"
    alone([*runs["llama"], "--steps", "4", "-o", str(one)])
    mine = folder / "llama" / "to-one"
    shutil.copytree(first, mine)
    alone([*runs["llama"], "--steps", "4", "-o", str(mine), "--resume"])
    for out in ("stored", "wide", "pipe", "one"):
        is_same(folder / "llama" / f"to-{out}", one)


def check_only_the_first_rank_speaks(ended):
    assert "step 1/3" in ended[0][0].said
    assert all(not e.said for each in ended[1:] for e in each)


def check_it_is_a_model_folder(folder, tmp_path):
    """`generate` and `export` read it; the export is what one process exports, to rounding."""
    one, many = folder / "llama" / "one", folder / "llama" / "tp"
    ours, theirs = load_folder(many).state_dict(), load_folder(one).state_dict()
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=1e-10)
    from safetensors.torch import load_file

    for name, run in (("one", one), ("many", many)):
        alone(["export", str(run), "-o", str(tmp_path / name)])
    a, b = (load_file(tmp_path / n / "model.safetensors") for n in ("one", "many"))
    assert a.keys() == b.keys()
    assert all(torch.allclose(a[n], b[n], rtol=0, atol=1e-10) for n in a)
    assert (tmp_path / "one" / "config.json").read_bytes() == (tmp_path / "many" / "config.json").read_bytes()


def test_four_ranks_are_one_process(tmp_path):
    """One test, so that the ranks start once."""
    folder, runs, ended = run_four(tmp_path / "four")
    check_each_is_one_process(folder, runs)
    check_any_layout_goes_on(folder, runs)
    check_only_the_first_rank_speaks(ended)
    check_it_is_a_model_folder(folder, tmp_path)


@pytest.mark.skipif(not LONG, reason="eight processes: make soak")
@pytest.mark.parametrize("spec", [LLAMA, EXPERTS, CHANCE], ids=["llama", "experts", "chance"])
def test_eight_ranks_are_one_process(tmp_path, spec):
    words = [*write_project(tmp_path, spec), "--accumulate", "2", "--steps", "3"]
    ended = Gang([[*words, "--layout", "eight", "-o", str(tmp_path / "eight")]], 8).start().wait(300)
    assert [each[0].code for each in ended] == [0] * 8, ended
    alone([*words, "-o", str(tmp_path / "one")])
    is_same(tmp_path / "eight", tmp_path / "one")


def test_two_ranks_in_a_pipeline_are_one_process(tmp_path):
    words = [*write_project(tmp_path, CHANCE), "--accumulate", "2", "--steps", "3"]
    ended = Gang([[*words, "--layout", "halves", "-o", str(tmp_path / "halves")]], 2).start().wait()
    assert [each[0].code for each in ended] == [0, 0], ended
    alone([*words, "-o", str(tmp_path / "one")])
    is_same(tmp_path / "halves", tmp_path / "one")


# --- what goes wrong -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A run of two ranks that nothing disturbs: six steps, each saved."""
    folder = tmp_path_factory.mktemp("two")
    plain = write_project(folder, LLAMA)
    words = [*plain, "--layout", "narrow", "--save-every", "1", "--timeout", "20"]
    ring = [*plain, "--layout", "couple", "--steps", "2", "-o", str(folder / "ring")]
    ended = Gang([[*words, "--steps", "6", "-o", str(folder / "straight")], ring], 2).start().wait()
    assert [[e.code for e in each] for each in ended] == [[0, 0], [0, 0]], ended
    alone([*plain, "--steps", "2", "-o", str(folder / "one")])
    return folder, words


def test_two_ranks_that_share_a_sequence_are_one_process(straight):
    is_same(straight[0] / "ring", straight[0] / "one")


@pytest.mark.parametrize(
    ("layout", "batch", "said", "help"),
    [
        ("tp", "4", "error[mesh-does-not-fit]: `tp` has 4 ranks (data 2 x tensor 2), and there are 2 processes",
         "`mesh data = 1, tensor = 2` has 2"),
        ("both", "3", "error[uneven-batch]: a micro-batch of 3 rows does not divide over 2 ranks", "--batch 2 or 4"),
        ("folded", "4", "error[uneven-batch]: rows of 16 tokens do not divide into the 12 parts that the layout cuts",
         "--seq 12 or 24"),
    ],
    ids=["mesh", "batch", "rows"],
)  # fmt: skip
def test_what_does_not_fit_is_said_on_every_rank(tmp_path, layout, batch, said, help):
    words = write_project(tmp_path, LLAMA)
    words[words.index("--batch") + 1] = batch
    ended = Gang([[*words, "--layout", layout, "--steps", "2", "-o", str(tmp_path / "run")]], 2).start().wait()
    for rank, (e,) in enumerate(ended):
        assert e.code == 2
        assert said in e.said and help in e.said
        assert ("rank 1: " in e.said) == (rank == 1)
    assert not (tmp_path / "run").exists()


moments = st.sampled_from([(m, rank) for m, ranks in MOMENTS.items() for rank in ranks])


@given(drawn=moments, count=st.integers(1, 4))
@settings(max_examples=40 if LONG else 4)
def test_a_rank_that_is_killed_loses_nothing_that_was_saved(straight, tmp_path_factory, drawn, count):
    """SIGKILL at any moment, while saving too: the others say so and end, what is there is whole, and the run that
    goes on has the log of one that was not disturbed, bit for bit."""
    folder, words = straight
    moment, rank = drawn
    out = tmp_path_factory.mktemp("killed") / "run"
    job = [*words, "--steps", "6", "-o", str(out), "--resume", "auto"]
    ended = Gang([job], 2, {rank: (moment, count)}).start().wait()
    assert ended[rank][0].code == -signal.SIGKILL, ended
    other = ended[1 - rank][0]
    assert other.code == 2, other
    assert "error[rank-failed]: rank" in other.said
    assert "Traceback" not in other.said
    for left in checkpoint.whole(out / "checkpoints"):
        checkpoint.verify(left)
    again = Gang([job], 2).start().wait()
    assert [each[0].code for each in again] == [0, 0], again
    assert (out / "log.jsonl").read_bytes() == (folder / "straight" / "log.jsonl").read_bytes()
    a, b = (checkpoint.load(checkpoint.latest(x / "checkpoints")) for x in (out, folder / "straight"))
    assert all(torch.equal(a[i][n], b[i][n]) for i in (0, 1) for n in b[i])
    assert not list((out / "checkpoints").glob(".*"))


def test_a_rank_that_hangs_is_named(straight, tmp_path):
    """Stopped, not dead: no connection breaks, and the other gives up after its time, with the line of the spec."""
    _, words = straight
    words = list(words)
    words[words.index("--timeout") + 1] = "2"
    gang = Gang([[*words, "--steps", "100000", "-o", str(tmp_path / "run")]], 2).start()
    try:
        wait_for(tmp_path / "run", 2)
        os.kill(gang.processes[1].pid, signal.SIGSTOP)
        begun = time.monotonic()
        result = gang.results[0].get(timeout=60)
        assert time.monotonic() - begun < 40
        assert result[0] == 2
        assert "error[rank-failed]: rank 0" in result[1]
    finally:
        gang.stop()


def test_a_signal_to_one_rank_stops_all_and_they_go_on(straight, tmp_path):
    folder, words = straight
    out = tmp_path / "run"
    gang = Gang([[*words, "--steps", "100000", "-o", str(out)]], 2).start()
    wait_for(out, 2)
    os.kill(gang.processes[1].pid, signal.SIGTERM)
    ended = gang.wait()
    assert [each[0].code for each in ended] == [0, 0], ended
    step = len(steps(out))
    assert checkpoint.state_of(checkpoint.latest(out / "checkpoints"))["step"] == step
    mine, theirs = steps(out), steps(folder / "straight")
    assert mine[: len(theirs)] == theirs[:step]


def wait_for(run: Path, count: int) -> None:
    end = time.monotonic() + 60
    while not (run / "log.jsonl").is_file() or (run / "log.jsonl").read_text().count("\n") < count:
        assert time.monotonic() < end
        time.sleep(0.02)
