"""What kernels and models are to reach on a GPU, line by line: built, checked, timed against peers in turn.

On a GPU each line is measured with random data and inputs that no cache holds, medians of many. What there is of a line
is written behind it, so a run that is cut off goes on where it was; `--minutes` bounds one, and what it leaves out is
named. Without a GPU, or with `--estimate DEVICE`, nothing is timed: what each side does is counted, and a time is what
that takes at the rates of the device's data sheet, marked as an estimate.
Run by `make bench-gpu`; peers that are not installed are named: liger-kernel, fla-core, mamba-ssm, causal-conv1d.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path
from typing import Any

import torch
import triton

from heddle.benchmarks import gpu_models
from heddle.benchmarks.gpu_lines import LINES, Line, within
from heddle.benchmarks.gpu_table import written
from heddle.lowering.target import TARGETS
from heddle.runtime.kernel_bench import Case, cases, measured, rates
from heddle.runtime.kernel_estimate import done, estimated
from heddle.runtime.plan.devices import Device
from heddle.runtime.plan.devices import device as device_named
from heddle.runtime.timing import in_turn

RESULTS = Path(__file__).resolve().parent / "results"


def case_of(line: Line, target: str) -> Case:
    """The kernel that a line is about."""
    found = cases(line.program(), target, (1, line.tokens), torch.bfloat16, documents=line.documents)
    return next(case for case in found if tuple(n.op for n in case.alone.nodes) == line.ops)


def measure(line: Line, target: str, reached: tuple[float, float], compiled: bool) -> dict[str, Any]:
    """A line on this GPU."""
    if line.whole is not None:
        return gpu_models.MEASURES[line.whole](line, target, reached)
    return vars(measured(case_of(line, target), torch.device("cuda"), reached, in_turn, compiled))


def estimate(line: Line, device: Device) -> dict[str, Any]:
    """A line without one."""
    target = f"sm_{device.capability}"
    if line.whole is not None:
        return gpu_models.estimated(line, target, device)
    return estimated(done(case_of(line, target)), device).plain()


def judged(line: Line, row: dict[str, Any]) -> dict[str, Any]:
    """The row, with what is wanted of it, what was found, and whether that holds: None where it is not known."""
    found = [(w, w.found(row)) for w in line.wanted]
    wanted = [
        {"what": w.what, "least": w.least, "found": x, "holds": None if x is None else x >= w.least} for w, x in found
    ]
    return {**row, "tokens": line.tokens, "documents": line.documents, "wanted": wanted}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--estimate", metavar="DEVICE", default=None if torch.cuda.is_available() else "h100-80g")
    parser.add_argument("--minutes", type=float, help="as long as this may take; the most telling lines come first")
    parser.add_argument("--lines", nargs="+", metavar="PART", help="those whose names have one of these")
    parser.add_argument("--no-compile", action="store_true", help="without torch.compile, which takes most of the time")
    parser.add_argument("--again", action="store_true", help="also lines that are there from a run before")
    parser.add_argument("--out", type=Path, default=RESULTS)
    return parser.parse_args()


def main() -> None:
    """Run what is missing; write results and a table behind each line."""
    asked = _arguments()
    asked.out.mkdir(parents=True, exist_ok=True)
    name = asked.estimate or torch.cuda.get_device_name()
    when = "estimate" if asked.estimate else time.strftime("%Y-%m-%d")
    file = asked.out / f"{name.lower().replace(' ', '-')}-{when}.json"
    told: dict[str, Any] = {
        "estimated": asked.estimate is not None, "device": name, "torch": torch.__version__,
        "triton": triton.__version__, "python": platform.python_version(), "rates": None, "lines": {}, "left_out": [],
    }  # fmt: skip
    if file.is_file() and not asked.again:
        told["lines"] = json.loads(file.read_text())["lines"]
    lines = tuple(
        line for line in LINES
        if line.name not in told["lines"] and (not asked.lines or any(p in line.name for p in asked.lines))
    )  # fmt: skip
    if asked.estimate:
        device = device_named(asked.estimate)
    else:
        major, minor = torch.cuda.get_device_capability()
        target = f"sm_{major}{minor}" if f"sm_{major}{minor}" in TARGETS else "triton"
        told["rates"] = rates(torch.device("cuda"), torch.bfloat16, in_turn)

    def run(line: Line) -> None:
        print(f"{line.name} ...", flush=True)
        try:
            if asked.estimate:
                row = estimate(line, device)
            else:
                row = measure(line, target, told["rates"], not asked.no_compile)
        except torch.OutOfMemoryError as why:
            told["left_out"].append({"line": line.name, "why": f"out of memory: {why}"})
            return
        told["lines"][line.name] = judged(line, row)
        _write(file, told)

    late = within(lines, asked.minutes, run, time.monotonic)
    told["left_out"] += [{"line": line.name, "why": "no time was left"} for line in late]
    _write(file, told)
    print("\n" + written(told))
    for one in told["left_out"]:
        print(f"left out: {one['line']}: {one['why']}")


def _write(file: Path, told: dict[str, Any]) -> None:
    order = {line.name: i for i, line in enumerate(LINES)}
    told["lines"] = dict(sorted(told["lines"].items(), key=lambda item: order.get(item[0], len(order))))
    file.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    file.with_suffix(".md").write_text(written(told) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
