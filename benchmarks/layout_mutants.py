"""Mistakes of sharded programs: how many change a number, how many of those the proof of layouts refuses.

Each mistake is made alone, in the program that the shard pass gives; simulated ranks run it against one device in fp64
(loss, every gradient, the norm), and `prove` says whether it would have compiled. Needs no GPU.
`--json FILE` also writes the numbers; `--every N` takes each N-th mistake.
"""

from __future__ import annotations

import argparse
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from heddle.lowering.placement.prove import prove
from tests.lowering.mutants import mutants
from tests.lowering.sharded import BASES, HARMLESS, Twin

COLUMNS = ("made", "harmful", "silent", "harmful, rejected", "harmless", "harmless, rejected")


def measure(base: Twin, every: int) -> tuple[dict[str, Counter[str]], dict[str, list[str]]]:
    """By kind of mistake how many there are of each sort; and by name those that are missed or change no number."""
    table: dict[str, Counter[str]] = {}
    names: dict[str, list[str]] = {"missed": [], "harmless, accepted": [], "harmless, rejected": []}
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
    total: dict[str, Counter[str]] = {}
    found: dict[str, Any] = {"every": given.every, "programs": {}}
    for base in BASES:
        table, names = measure(base, given.every)
        for kind, row in table.items():
            total.setdefault(kind, Counter()).update(row)
        found["programs"][str(base)] = {"made": sum(row["made"] for row in table.values()), **names}
        print(f"{base}: {found['programs'][str(base)]['made']}, missed {names['missed'] or 'none'}", flush=True)
    total["all"] = sum(total.values(), Counter())
    found["kinds"] = {kind: {c: row[c] for c in COLUMNS} for kind, row in total.items()}
    width = max(map(len, total))
    print(f"{'mistake':{width}}  " + "  ".join(COLUMNS))
    for kind, row in total.items():
        print(f"{kind:{width}}  " + "  ".join(f"{row[c]:{len(c)}}" for c in COLUMNS))
    if given.json is not None:
        given.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
