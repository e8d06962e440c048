"""`heddle launch`: the command that is started, the script that is queued, and what is said before anything starts."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import settings
from typer.testing import CliRunner

from heddle.runtime.cli import app
from tests.runtime.train.gang import write_project

SPEC = """use llama from "llama/llama.spec"

model tiny = llama(vocab = 256, hidden = 24, ffn = 48, layers = 2, heads = 4, kv_heads = 2)

layout grid:
    mesh data = 2, tensor = 2
    shard vocab, heads, kv_heads, ffn over tensor
    shard batch over data

layout odd = grid with:
    mesh data = 1, tensor = 3

layout two = grid with:
    mesh data = 1, tensor = 2
"""
LONG = not settings.default.derandomize


def launch(*words: str):
    return CliRunner().invoke(app, ["launch", *words])


@pytest.fixture
def spec(tmp_path):
    write_project(tmp_path, SPEC)
    return str(tmp_path / "m.spec")


def test_the_command_has_a_process_a_rank_and_resumes(spec):
    words = shlex.split(launch(spec, "--layout", "grid", "--show", "--data", "texts", "-o", "run").stdout)
    assert words[:5] == [sys.executable, "-m", "torch.distributed.run", "--nnodes=1", "--nproc-per-node=4"]
    assert {"--standalone", "--max-restarts=3"} <= set(words)
    train = words[words.index("heddle.runtime.cli") :]
    assert train == [
        "heddle.runtime.cli",
        "train",
        spec,
        "--layout",
        "grid",
        "--data",
        "texts",
        "-o",
        "run",
        "--resume",
        "auto",
    ]


def test_machines_share_the_ranks(spec):
    given = (spec, "--layout", "grid", "--nnodes", "2", "--show", "--data", "texts", "-o", "run")
    assert "error[mesh-does-not-fit]: 2 machines have to meet somewhere" in launch(*given).stderr
    words = shlex.split(launch(*given, "--endpoint", "first:29500").stdout)
    assert {"--nnodes=2", "--nproc-per-node=2", "--rdzv-backend=c10d", "--rdzv-endpoint=first:29500"} <= set(words)
    wrong = launch(spec, "--layout", "grid", "--nnodes", "3", "--show")
    assert wrong.exit_code == 2
    assert (
        "the 4 ranks of `grid` cannot be shared by 3 machines" in wrong.stderr
        and "--nnodes 1 or 2 or 4" in wrong.stderr
    )


@pytest.mark.parametrize("layout", ["odd", "none"])
def test_a_layout_that_cannot_be_is_said_before_anything_starts(spec, layout):
    said = launch(spec, "--layout", layout, "--data", "texts", "-o", "run")
    assert said.exit_code == 2
    assert said.stderr.startswith("error[")
    assert not Path("run").exists()


def test_the_script_saves_ahead_of_its_limit_and_is_queued_again(spec, tmp_path):
    """Run by bash, with stand-ins for what a cluster has."""
    script = tmp_path / "job.sh"
    said = launch(
        spec,
        "--layout",
        "grid",
        "--nnodes",
        "2",
        "--slurm",
        str(script),
        "--time",
        "01:00:00",
        "--data",
        "a b",
        "-o",
        "run",
    )
    assert said.exit_code == 0, said.stderr
    text = script.read_text()
    for line in ("--nodes=2", "--ntasks-per-node=1", "--time=01:00:00", "--requeue", "--signal=B:TERM@180"):
        assert f"#SBATCH {line}\n" in text
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "scontrol").write_text(
        f'#!/bin/bash\necho "$@" >> {tmp_path}/scontrol.log\n[ "$1" = show ] && echo "node7"; true\n'
    )
    (tools / "srun").write_text(
        f'#!/bin/bash\nprintf "%s\\n" "$@" > {tmp_path}/srun.log\ntrap "echo saved >> {tmp_path}/srun.log; exit 0" TERM\n'
        f"[ -e {tmp_path}/short ] && exit 5\nwhile true; do sleep 0.05; done\n"
    )
    for tool in tools.iterdir():
        tool.chmod(0o755)
    env = {
        **os.environ,
        "PATH": f"{tools}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "42",
        "SLURM_JOB_NODELIST": "node[7-8]",
    }
    process = subprocess.Popen(["bash", str(script)], env=env)
    end = time.monotonic() + 30
    while not (tmp_path / "srun.log").is_file() or not (tmp_path / "srun.log").read_text():
        assert time.monotonic() < end
        time.sleep(0.02)
    time.sleep(0.2)
    process.terminate()
    assert process.wait(30) == 0
    words = (tmp_path / "srun.log").read_text().splitlines()
    assert words[-1] == "saved"
    assert "--rdzv-endpoint=node7:29500" in words and "--rdzv-id=42" in words and "--nproc-per-node=2" in words
    assert "a b" in words  # a word stays a word
    assert (tmp_path / "scontrol.log").read_text().splitlines()[-1] == "requeue 42"
    (tmp_path / "short").touch()
    assert subprocess.run(["bash", str(script)], env=env, timeout=30).returncode == 5  # what failed has failed


@pytest.mark.skipif(not LONG, reason="starts torchrun with two ranks, twice: make soak")
def test_torchrun_starts_ranks_again_from_the_last_checkpoint(tmp_path):
    """A rank is killed in a run that torchrun watches; the log is that of a run that nothing disturbed."""
    words = [*write_project(tmp_path, SPEC)[1:], "--layout", "two", "--steps", "40", "--save-every", "4"]
    calm, hurt = tmp_path / "calm", tmp_path / "hurt"
    base = [sys.executable, "-m", "heddle.runtime.cli", "launch"]
    assert subprocess.run([*base, *words, "-o", str(calm)], timeout=300).returncode == 0
    process = subprocess.Popen([*base, *words, "-o", str(hurt), "--restarts", "2"])
    end = time.monotonic() + 120
    while not list((hurt / "checkpoints").glob("step-*")):
        assert time.monotonic() < end
        time.sleep(0.02)
    (rank,) = [int(p.name) for p in Path("/proc").iterdir() if p.name.isdigit() and _is_rank(p, hurt, "1")]
    os.kill(rank, 9)
    assert process.wait(300) == 0
    assert (hurt / "log.jsonl").read_bytes() == (calm / "log.jsonl").read_bytes()


def _is_rank(process: Path, out: Path, rank: str) -> bool:
    try:
        return str(out) in (process / "cmdline").read_text() and f"\0RANK={rank}\0" in (process / "environ").read_text()
    except OSError:
        return False
