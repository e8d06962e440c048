"""Plans and searches as tables for people."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from ..tables import amount, size
from .search import Candidate

BYTES = (
    ("parameters", "weights"), ("gradients", "gradients"), ("optimizer", "optimizer state"), ("constants", "constants"),
    ("working", "a micro-batch at most"), ("reserved", "driver and links"),
)  # fmt: skip


def print_plan(data: dict[str, Any]) -> None:
    """The tables of `heddle plan`."""
    console = Console(highlight=False)
    mesh = ", ".join(f"{a} = {n}" for a, n in data["mesh"].items())
    console.print(f"[bold]{data['model']}[/] under `{data['layout']}` ({mesh}): {data['parameters']:,} parameters")
    console.print(f"{data['ranks']:,} x {data['device']} in {data['precision']}")
    console.print(f"a step: {data['batch']:,} rows of {data['seq']:,} tokens, {data['microbatches']} micro-batches of "
                  f"{data['microbatch']} rows a rank")  # fmt: skip
    for stage in data["stages"]:
        _print_stage(console, stage)
    console.print(f"\n{data['seconds']:.4g} s a step, {amount(data['tokens_per_second'])} tokens a second, "
                  f"{amount(data['model_flops'])}FLOP of the model, MFU {data['mfu']:.1%}")  # fmt: skip
    if not data["fits"]:
        console.print(f"[bold]does not fit[/]: a rank needs {size(data['over_bytes'])} more than it has")
        for line in data["helps"]:
            console.print(f"  {line}")


def _print_stage(console: Console, stage: dict[str, Any]) -> None:
    first, count = stage["ranks"]["first"], stage["ranks"]["count"]
    held = stage["bytes"]
    console.print(f"\neach of ranks {first} .. {first + count - 1}: {stage['parameters']:,} parameters")
    table = _table("", "bytes", "share")
    for key, name in BYTES:
        table.add_row(name, f"{held[key]:,}", f"{held[key] / held['capacity']:.1%}")
    table.add_row("[bold]in all[/]", f"{held['total']:,}", f"{held['total'] / held['capacity']:.1%}")
    console.print(table)
    console.print(f"saved for the backward pass: {held['saved']:,} bytes", end="")
    console.print("" if held["caches"] is None else f"; decoding keeps {held['caches']:,} a sequence")
    table = _table("block", "parameters", "saved bytes", "FLOP", "messages")
    for row in stage["blocks"]:
        counts = f"{row['parameters']:,}", f"{row['saved']:,}", amount(row["flops"]), f"{row['messages']:,}"
        table.add_row(row["block"], *counts)
    console.print()
    console.print(table)
    table = _table("line of the spec", "saved bytes", "weight bytes")
    for row in stage["lines"][:8]:
        table.add_row(row["line"] or "-", f"{row['saved']:,}", f"{row['parameters']:,}")
    console.print()
    console.print(table)
    table = _table("collective", "phase", "axes", "ranks", "count", "bytes", "on the wire")
    for row in _merged(stage["collectives"]):
        axes = " x ".join(row["axes"]) + ("" if row["inside_node"] else " (between nodes)")
        table.add_row(row["kind"], row["phase"], axes, str(row["ranks"]), f"{row['count']:,}", f"{row['bytes']:,}",
                      size(row["wire_bytes"]))  # fmt: skip
    console.print()
    console.print(table)
    times = stage["times"]
    parts = {"kernels": times["compute"], **{f"over {a}": t for a, t in times["collectives"].items()},
             "gradient sums": times["sums"], "optimizer": times["optimizer"]}  # fmt: skip
    console.print("time: " + ", ".join(f"{name} {t:.4g} s" for name, t in parts.items()))


def _merged(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Collectives of all lines together."""
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in rows:
        key = (row["phase"], row["kind"], tuple(row["axes"]))
        if key not in found:
            found[key] = dict(row)
            continue
        for what in ("count", "bytes", "wire_bytes"):
            found[key][what] += row[what]
    return list(found.values())


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False)
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i and column not in ("phase", "axes", "why") else "left")
    return table


def candidates_json(found: list[Candidate]) -> list[dict[str, Any]]:
    """A search as plain data."""
    rows = []
    for c in found:
        row: dict[str, Any] = {"mesh": dict(c.mesh), "between_blocks": c.between, "why": c.why, "fits": False}
        if c.plan is not None:
            row |= {"fits": not c.plan.over, "over_bytes": c.plan.over, "seconds": c.plan.seconds, "mfu": c.plan.mfu,
                    "tokens": c.plan.tokens, "bytes": max(s.memory.total for s in c.plan.stages)}  # fmt: skip
        rows.append(row)
    return rows


def print_candidates(rows: list[dict[str, Any]]) -> None:
    """The table of `heddle plan --search`."""
    table = _table("mesh", "between", "bytes a rank", "s a step", "MFU", "why")
    for row in rows:
        mesh = ", ".join(f"{a} = {n}" for a, n in row["mesh"].items())
        known = ("", "", "")
        if "bytes" in row:
            known = f"{row['bytes']:,}", f"{row['seconds']:.4g}", f"{row['mfu']:.1%}"
        table.add_row(mesh, "yes" if row["between_blocks"] else "no", *known, row["why"])
    Console(highlight=False).print(table)
