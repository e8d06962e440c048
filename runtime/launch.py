"""`heddle launch`: the torchrun command of a layout, started here or written into a script for Slurm."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

from ..dsl.layout import layout_of
from ..dsl.load import load
from .check import program_of
from .compile import build
from .distributed import check_stored
from .errors import UserError
from .paths import split_entry, write_text

FRESH = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"
"""Told to torchrun, so that ranks that are started again do not find what those before them left."""
GRACE_S = 180
"""How long before its time limit a job is told to save."""


def plan_launch(
    spec: str, layout: str, nnodes: int, restarts: int, endpoint: str, rest: list[str], slurm: bool = False
) -> list[str]:
    """The words of the torchrun command that trains a spec, with `rest` for `heddle train`, which resumes by itself.

    What is wrong with the spec or the layout is said before anything starts. Raises `SpecError`, UserError
    `mesh-does-not-fit`.
    """
    path, model = split_entry(spec)
    file = load(path)
    laid = layout_of(file, layout)
    check_stored(laid)
    if "--set" not in rest and "--objective" not in rest and not any(r.startswith("--set=") for r in rest):
        build(program_of(file, model), layout=laid)
    if laid.ranks % nnodes:
        fits = [n for n in range(1, laid.ranks + 1) if laid.ranks % n == 0]
        raise UserError(
            "mesh-does-not-fit",
            f"the {laid.ranks} ranks of `{laid.name}` cannot be shared by {nnodes} machines",
            help=f"--nnodes {' or '.join(map(str, fits))} can",
        )
    each = laid.ranks // nnodes
    words = [sys.executable, "-m", "torch.distributed.run", f"--nnodes={nnodes}", f"--nproc-per-node={each}"]
    words += [f"--max-restarts={restarts}"]
    if slurm:
        words += ["--rdzv-backend=c10d", "--rdzv-id=$SLURM_JOB_ID", "--rdzv-endpoint=$HEAD:29500"]
    elif nnodes == 1:
        words += ["--standalone"]
    else:
        if not endpoint:
            raise UserError("mesh-does-not-fit", f"{nnodes} machines have to meet somewhere",
                            help="--endpoint HOST:PORT, the same on all; or --slurm FILE")  # fmt: skip
        words += ["--rdzv-backend=c10d", "--rdzv-id=heddle", f"--rdzv-endpoint={endpoint}"]
    resume = [] if "--resume" in rest else ["--resume", "auto"]
    return [*words, "-m", "heddle.runtime.cli", "train", spec, "--layout", layout, *rest, *resume]


def run_command(words: list[str]) -> None:
    """Run torchrun to its end. Raises UserError `rank-failed` where ranks ended with an error, which they have said."""
    process = subprocess.Popen(words, env={**os.environ, FRESH: "1"})
    while True:
        try:
            code = process.wait()
            break
        except KeyboardInterrupt:  # torchrun has it as well, and tells the ranks, which save
            continue
    if code:
        raise UserError("rank-failed", "not all ranks came to their end", help="what they said stands above")


def write_script(path: Path, words: list[str], nnodes: int, time: str) -> Path:
    """Write a script for sbatch. Raises UserError `cannot-write`."""
    command = " ".join(w if w.startswith("--rdzv") else shlex.quote(w) for w in words)
    text = f"""#!/bin/bash
#SBATCH --nodes={nnodes}
#SBATCH --ntasks-per-node=1
#SBATCH --time={time}
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:TERM@{GRACE_S}
# Add what your cluster wants: --gpus-per-node, --partition, --account.

# The machines meet at the first of them.
export {FRESH}=1
export HEAD=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

# Ahead of the time limit the ranks finish their step and save; the job is queued again, and goes on from there.
stopping() {{
    kill -TERM "$ranks"
    wait "$ranks"
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
}}
trap stopping TERM

srun --kill-on-bad-exit=1 {command} &
ranks=$!
wait "$ranks"
"""
    write_text(path, text, mode=0o755)
    return path
