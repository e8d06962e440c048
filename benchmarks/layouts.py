"""How long `heddle plan` and `heddle certify` take, and how much memory, for a hybrid of 56 B parameters on 3,072
ranks, also in four stages.

Each round is a process of its own, as a user starts it: its wall time, its processor time and its peak memory. The best
round counts, for others use this machine, too. Run as `python -m heddle.benchmarks.layouts`; `--json FILE` writes it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from itertools import product
from pathlib import Path
from typing import Any

import torch

from heddle.benchmarks.cpu import device

SPEC = """
use nemotron_h_56b from "nemotron_h/nemotron_h_56b.spec"

layout big:
    mesh data = 384, tensor = 8
    shard vocab, heads, kv_heads, ffn, groups over tensor
    shard seq over tensor between blocks
    shard batch, optimizer over data

layout piped = big with:
    mesh pipe = 4, data = 96, tensor = 8
    stages over pipe, microbatches = 16
"""
LIMITS = {"seconds": 5.0, "bytes": 2 * 2**30, "certify seconds": 10.0}
HOW = {"plan": ("--format", "json"), "certify": ("--json",)}
"""How a command is asked for data."""


def once(command: str, layout: str, seq: int) -> dict[str, Any]:
    """One process that plans or certifies: seconds, processor seconds, peak bytes, and what it says."""
    with tempfile.TemporaryDirectory() as folder:
        spec = Path(folder) / "big.spec"
        spec.write_text(SPEC, encoding="utf-8")
        words = [sys.executable, "-m", "heddle.runtime.cli", command, f"{spec}:nemotron_h_56b", "--layout", layout]
        words += ["--seq", str(seq), *HOW[command]]
        begun = time.perf_counter()
        with subprocess.Popen(words, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            told = process.stdout.read()
            _, status, used = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        seconds = time.perf_counter() - begun
    if process.returncode:
        raise RuntimeError(f"{command} ends with {process.returncode}")
    peak = used.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {"seconds": seconds, "cpu_seconds": used.ru_utime + used.ru_stime, "bytes": peak, "said": json.loads(told)}


def several(rounds: int, command: str, layout: str, seq: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """What rounds took, the best of them first, and what was said."""
    all_rounds = [once(command, layout, seq) for _ in range(rounds)]
    best = min(all_rounds, key=lambda r: r["seconds"])
    row = {
        "seconds": best["seconds"], "all_seconds": [r["seconds"] for r in all_rounds],
        "cpu_seconds": min(r["cpu_seconds"] for r in all_rounds), "bytes": max(r["bytes"] for r in all_rounds),
    }  # fmt: skip
    return row, best["said"]


def spent(row: dict[str, Any]) -> str:
    """Seconds, processor seconds and memory, in columns."""
    return f"{row['seconds']:>8.2f} s{row['cpu_seconds']:>9.2f} s{row['bytes'] / 2**20:>9.0f} MiB"


def main() -> None:
    """Measure and print."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--seq", type=int, nargs="*", default=[4096, 8192])
    options.add_argument("--layouts", nargs="*", default=["big", "piped"])
    options.add_argument("--json", type=Path)
    given = options.parse_args()
    found = {}
    print(f"{'layout':>6}{'seq':>6}{'seconds':>10}{'processor':>11}{'peak memory':>13}   a rank holds, fits, MFU")
    for seq, layout in product(given.seq, given.layouts):
        row, plan = several(given.rounds, "plan", layout, seq)
        row |= {
            "ranks": plan["ranks"], "parameters": plan["parameters"], "fits": plan["fits"], "mfu": plan["mfu"],
            "rank_bytes": max(group["bytes"]["total"] for group in plan["groups"]),
        }  # fmt: skip
        found[f"{seq} {layout}"] = row
        told = f"{row['rank_bytes'] / 1e9:.1f} GB, {'yes' if row['fits'] else 'no'}, {row['mfu']:.1%}"
        print(f"{layout:>6}{seq:>6}{spent(row)}   {told}", flush=True)
    print("\ncertify")
    certified = {}
    for layout in given.layouts:
        row, card = several(given.rounds, "certify", layout, 16)
        certified[layout] = {**row, "holds": card["holds"], "spmd_types": card["opinion"]["accepted"]}
        told = f"holds: {card['holds']}, spmd_types: {card['opinion']['accepted']}"
        print(f"{layout:>6}{16:>6}{spent(row)}   {told}", flush=True)
    print(f"wanted: plans in less than {LIMITS['seconds']:g} s and {LIMITS['bytes'] / 2**30:g} GiB, certificates in "
          f"less than {LIMITS['certify seconds']:g} s; load of this machine: {os.getloadavg()[0]:.1f}")  # fmt: skip
    if given.json:
        about = {"device": device(), "date": time.strftime("%Y-%m-%d"), "torch": torch.__version__}
        about |= {"load": os.getloadavg()[0], "limits": LIMITS}
        given.json.write_text(json.dumps({**about, "plans": found, "certificates": certified}, indent=1) + "\n")


if __name__ == "__main__":
    main()
