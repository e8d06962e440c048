"""Kernels of shipped models at their published sizes, one by one: on this GPU against PyTorch, or as an estimate.

On a GPU each is timed in turn with PyTorch as it stands and compiled by `torch.compile`, forward and backward in bf16,
with what it moves and computes as shares of a measured copy and product. Without one (or with `--estimate DEVICE`)
nothing is timed: a figure is what the work takes at the rates of the device's data sheet, whatever the kernel.
Run as `python -m heddle.benchmarks.kernels`; `--json FILE` writes it.
"""

from __future__ import annotations

import argparse
import json
import platform
from pathlib import Path
from typing import Any

import torch
import triton

from heddle.dsl.load import load, shipped_folder
from heddle.runtime.check import program_of
from heddle.runtime.kernel_bench import bench_spec
from heddle.runtime.tables import print_measured

MODELS = ("nemotron_h/nemotron_h_8b", "llama/llama31_8b", "transformer_ls/enwik8_base", "retro/retro_small")
SHAPE = (1, 8192)


def main() -> None:
    """Print a table a model; write all as JSON where it is asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--estimate", metavar="DEVICE", default=None if torch.cuda.is_available() else "h100-80g")
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    name = asked.estimate or torch.cuda.get_device_name()
    results: dict[str, Any] = {
        "estimated": asked.estimate is not None, "device": name, "torch": torch.__version__,
        "triton": triton.__version__, "python": platform.python_version(), "rows": SHAPE[0], "tokens": SHAPE[1],
        "models": {},
    }  # fmt: skip
    for model in asked.models:
        program = program_of(load(shipped_folder() / f"{model}.spec"))
        rows = bench_spec(program, "triton", SHAPE, asked.estimate)
        print(f"\n{model}, [{SHAPE[0]}, {SHAPE[1]}] tokens, bf16, on {name}")
        print_measured(rows)
        results["models"][model] = [vars(row) for row in rows]
    if asked.json:
        asked.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
