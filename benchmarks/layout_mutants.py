"""Mistakes of sharded programs: how many change a number, how many of those the proof of layouts refuses.

Each mistake is made alone, in the program that the shard pass gives; simulated ranks run it against one device in fp64
(loss, every gradient, the norm), and `prove` says whether it would have compiled. Beside it is what the checker of
spmd_types says, which sees the forward pass alone: `refused` by a type, or the module `fails` as it runs on shapes that
do not fit. Needs no GPU.
`--json FILE` also writes the numbers; `--every N` takes each N-th mistake.
"""

from __future__ import annotations

import argparse
import json
import math
import warnings
from collections import Counter
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from heddle.lowering.placement.prove import prove
from tests.lowering.mutants import mutants
from tests.lowering.sharded import BASES, HARMLESS, Twin

COLUMNS = ("made", "harmful", "silent", "harmful, rejected", "harmless", "harmless, rejected")
THEIRS = ("harmful, refused", "harmful, fails", "silent, refused", "harmless, refused", "harmless, fails")
FORWARD = (
    "drop", "double", "move", "insert", "src type", "dst type", "other dim", "other factor", "part of the factors",
)  # fmt: skip
"""What is done to a conversion of values; all other mistakes are in what a step owes."""


def measure(base: Twin, every: int) -> tuple[dict[str, Counter[str]], dict[str, list[str]]]:
    """By kind of mistake how many there are of each sort; and by name those that are missed or change no number."""
    table: dict[str, Counter[str]] = {}
    names: dict[str, list[str]] = {"missed": [], "harmless, accepted": [], "harmless, rejected": []}
    names["of values, harmful, accepted by spmd_types"] = []
    for i, mutant in enumerate(mutants(base.sharded)):
        if i % every:
            continue
        far, is_rejected = base.far(mutant), bool(prove(mutant.program))
        row = table.setdefault(mutant.kind, Counter())
        is_harmful = far > HARMLESS
        row["made"] += 1
        row["harmful"] += is_harmful
        row["silent"] += is_harmful and math.isfinite(far)
        row["harmful, rejected"] += is_harmful and is_rejected
        row["harmless"] += not is_harmful
        row["harmless, rejected"] += not is_harmful and is_rejected
        said = "accepted" if mutant.norm is not None else base.said(mutant)
        if said == "accepted" and is_harmful and mutant.kind in FORWARD:
            names["of values, harmful, accepted by spmd_types"].append(str(mutant))
        if said != "accepted":
            row[f"harmful, {said}"] += is_harmful
            row[f"silent, {said}"] += is_harmful and math.isfinite(far)
            row[f"harmless, {said}"] += not is_harmful
        if is_harmful and not is_rejected:
            names["missed"].append(str(mutant))
        if not is_harmful:
            names["harmless, rejected" if is_rejected else "harmless, accepted"].append(str(mutant))
    return table, names


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--every", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", ".*deprecated", FutureWarning)  # of torch 2.13, about what spmd_types calls
    total: dict[str, Counter[str]] = {}
    found: dict[str, Any] = {"every": given.every, "spmd_types": metadata.version("spmd_types"), "programs": {}}
    for base in BASES:
        table, names = measure(base, given.every)
        for kind, row in table.items():
            total.setdefault(kind, Counter()).update(row)
        found["programs"][str(base)] = {"made": sum(row["made"] for row in table.values()), **names}
        print(f"{base}: {found['programs'][str(base)]['made']}, missed {names['missed'] or 'none'}", flush=True)
    of_values = sum((row for kind, row in total.items() if kind in FORWARD), Counter())
    total |= {"of values": of_values, "all": sum(total.values(), Counter())}
    found["kinds"] = {kind: {c: row[c] for c in (*COLUMNS, *THEIRS)} for kind, row in total.items()}
    width = max(map(len, total))
    for title, columns in (("the proof", COLUMNS), ("spmd_types", ("harmful", "silent", *THEIRS))):
        print(f"\n{title:{width}}  " + "  ".join(columns))
        for kind, row in total.items():
            print(f"{kind:{width}}  " + "  ".join(f"{row[c]:{len(c)}}" for c in columns))
    if given.json is not None:
        given.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
