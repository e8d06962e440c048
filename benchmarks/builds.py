"""Every kernel of every shipped model at its published size, built for each generation of GPU, without one; those of
products, too, that a lock may choose.

What each asks of the GPU is printed and, with `--json FILE`, written: registers, spills, shared memory, instructions of
tensor cores. Exit code 1 where one cannot be built or used. Run as
`python -m heddle.benchmarks.builds [SPEC[:MODEL]...]`; `--cache FOLDER` keeps what was built.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import traceback
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from heddle.dsl.load import load
from heddle.lowering.target import TARGETS
from heddle.runtime.ahead import Built
from heddle.runtime.check import check_file, proved
from heddle.runtime.compile import build, versions
from heddle.runtime.launched import built_for
from heddle.runtime.paths import split_entry
from heddle.runtime.plan.step import Feed
from heddle.runtime.tables import print_builds
from heddle.runtime.tune import choosing

SPECS = Path(__file__).resolve().parents[1] / "specs"
# Of the length that published models are trained with at least, where positions go so far.
SEQ = 4096


def published() -> list[str]:
    """FILE:MODEL of every shipped model whose sizes are known, but those that are small for tests."""
    files = (p for p in sorted(SPECS.glob("*/*.spec")) if p.parent.name != "std" and not p.stem.startswith("tiny"))
    return [f"{p}:{model}" for p in files for model in check_file(load(p)).programs]


def _model(spec: str, targets: Iterable[str], seq: int, cache: Path | None) -> dict[str, Any]:
    """Of one model: its builds, or what went wrong."""
    path, model = split_entry(spec)
    found: dict[str, Any] = {"model": model or path.stem, "builds": [], "error": None}
    try:
        program = proved(load(path), model)
        for target in targets:
            artifact = build(program, target)
            # Every product that a lock may choose is built as if it was, besides.
            offered = artifact.files.offered
            chosen = [build(program, target, lock=choosing(offered, target))] if offered else []
            for made in (artifact, *chosen):
                found["builds"] += built_for(made, TARGETS[target], Feed(seq=seq), cache=cache)
    except Exception:
        found["error"] = traceback.format_exc(limit=-3)
    return found


def summary(models: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Each kind of kernel on each target, by the most that one of its builds asks for; and the builds that cannot be
    used or spill, in full. A build that several models need is one."""
    builds = {one.key: one for model in models for one in model["builds"]}
    kinds: dict[tuple[str, str], list[Built]] = {}
    for one in builds.values():
        kinds.setdefault((one.kernel, one.target), []).append(one)
    rows = []
    for (kernel, target), found in sorted(kinds.items()):
        read = [one.resources for one in found if one.resources]
        cores = sorted({kind for r in read for kind, _ in r.tensor_cores})
        rows.append({
            "kernel": kernel, "target": target, "builds": len(found),
            "products": sorted({kind for one in found for kind, _ in one.products}),
            "registers": max((r.registers for r in read), default=None), "spills": max(map(_spills, found)),
            "shared": max(one.shared for one in found), "limit": found[0].limit, "tensor_cores": cores,
            "wide_loads": min((f"{r.wide_loads}/{r.loads}" for r in read if r.loads), key=_share, default=None),
            "seconds": round(sum(one.seconds for one in found), 1),
        })  # fmt: skip
    notable = [asdict(one) for one in builds.values() if one.problems or _spills(one)]
    notable.sort(key=lambda r: (not r["problems"], r["kernel"], r["target"], r["key"]))
    return rows, notable


def _spills(one: Built) -> int:
    read = one.resources
    return read.spill_loads + read.spill_stores if read else 0


def _share(written: str) -> float:
    part, whole = map(int, written.split("/"))
    return part / whole


def write(path: Path, models: list[dict[str, Any]], **how: Any) -> None:
    """What was built so far: a line for each row."""
    rows, notable = summary(models)
    told = {
        "torch": torch.__version__, **versions(), **how, "models": [m["model"] for m in models],
        "not_launched": [m["model"] for m in models if m["error"]],
    }  # fmt: skip
    head = json.dumps(told, indent=1)[:-2]
    lists = (f' "{name}": [\n  ' + ",\n  ".join(map(json.dumps, found)) + "\n ]" for name, found in
             (("kinds", rows), ("notable", notable)))  # fmt: skip
    path.write_text(",\n".join((head, *lists)) + "\n}\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("specs", nargs="*", metavar="SPEC[:MODEL]", help="these instead of all that are shipped")
    parser.add_argument("--target", action="append", choices=[n for n, t in TARGETS.items() if t.capability])
    parser.add_argument("--seq", type=int, default=SEQ)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--cache", type=Path, help="a folder where builds are kept")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    targets = args.target or [n for n, t in TARGETS.items() if t.capability]
    one = partial(_model, targets=targets, seq=args.seq, cache=args.cache)
    models = []
    with ProcessPoolExecutor(args.jobs, multiprocessing.get_context("spawn")) as pool:
        for model in pool.map(one, args.specs or published()):
            print(f"\n{model['model']}", flush=True)
            print_builds(model["builds"])
            if model["error"]:
                print(model["error"])
            models.append(model)
            if args.json:
                write(args.json, models, seq=args.seq, targets=targets)
    rows, notable = summary(models)
    wrong = sum(1 for r in notable if r["problems"])
    failed = [m["model"] for m in models if m["error"]]
    builds = sum(r["builds"] for r in rows)
    print(f"\n{len(models)} models, {builds} builds, {wrong} cannot be used, {len(notable) - wrong} others spill")
    if failed:
        print(f"not launched: {', '.join(failed)}")
    sys.exit(bool(wrong or failed))


if __name__ == "__main__":
    main()
