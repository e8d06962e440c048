"""500 new random layouts and pipelines against one device, in fp64: every gradient, norm and weight to 1e-10.

Runs the drawn tests of tests/runtime with other random examples than the suite's, and writes how many were tried.
Run by `make soak-layouts`; `--json FILE` also writes the result.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import torch

from heddle.benchmarks.cpu import device

ROOT = Path(__file__).resolve().parents[1]
TESTS = (
    "tests/runtime/test_layouts.py::test_any_layout_equals_one_device",
    "tests/runtime/test_layouts.py::test_every_way_of_a_split_sequence_equals_one_device",
    "tests/runtime/test_stages.py::test_any_pipeline_equals_one_device",
)
TRIED = re.compile(r"(\d+) passing(?: examples)?, (\d+) failing(?: examples)?,? (?:and )?(\d+) invalid")


def tried(test: str, seed: int) -> dict[str, float]:
    """How many examples of a drawn test passed, failed, or were no layout; and how long it took."""
    begun = time.perf_counter()
    command = [sys.executable, "-m", "pytest", "--quiet", "-p", "no:cacheprovider", "--hypothesis-profile=soak"]
    command += [f"--hypothesis-seed={seed}", "--hypothesis-show-statistics", test]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    found = [list(map(int, m)) for m in TRIED.findall(ended.stdout)]
    if ended.returncode or not found:
        sys.exit(ended.stdout[-4000:] + ended.stderr[-2000:])
    passing, failing, invalid = (sum(column) for column in zip(*found, strict=True))
    return {"passing": passing, "failing": failing, "invalid": invalid, "seconds": round(time.perf_counter() - begun)}


def main() -> None:
    """Try and print."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--seed", type=int, default=time.time_ns() % 2**32, help="of the drawn examples")
    options.add_argument("--json", type=Path)
    given = options.parse_args()
    found = {}
    for test in TESTS:
        name = test.partition("::")[2]
        found[name] = tried(test, given.seed)
        print(f"{name:60} " + ", ".join(f"{n:g} {what}" for what, n in found[name].items()), flush=True)
    print(f"{sum(t['passing'] for t in found.values())} passed, seed {given.seed}")
    if given.json:
        about = {"device": device(), "date": time.strftime("%Y-%m-%d"), "torch": torch.__version__}
        given.json.write_text(json.dumps({**about, "seed": given.seed, "tests": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
