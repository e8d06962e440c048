"""Plans and searches as tables for people."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from ..tables import amount, size
from .search import Candidate

BYTES = (
    ("parameters", "weights"), ("gradients", "gradients"), ("optimizer", "optimizer state"), ("constants", "constants"),
    ("working", "micro-batches"), ("reserved", "driver and links"),
)  # fmt: skip

LEFT = ("phase", "axes", "why", "holds")
"""Columns of words."""


def print_plan(data: dict[str, Any]) -> None:
    """The tables of `heddle plan`."""
    console = Console(highlight=False)
    mesh = ", ".join(f"{a} = {n}" for a, n in data["mesh"].items())
    console.print(f"[bold]{data['model']}[/] under `{data['layout']}` ({mesh}): {data['parameters']:,} parameters")
    console.print(f"{data['ranks']:,} x {data['device']} in {data['precision']}")
    console.print(f"a step: {data['batch']:,} rows of {data['seq']:,} tokens, {data['microbatches']} micro-batches of "
                  f"{data['microbatch']} rows a rank")  # fmt: skip
    if data["pipeline"] is None:
        (group,) = data["groups"]
        console.print(f"\neach of {ranks_of(group)}: {group['parameters']:,} parameters")
    else:
        group = max(data["groups"], key=lambda g: g["bytes"]["total"])
        _print_pipeline(console, data)
        console.print(f"\nthe fullest, {ranks_of(group)}: {group['parameters']:,} parameters")
    _print_group(console, group)
    console.print(f"\n{data['seconds']:.4g} s a step, {amount(data['tokens_per_second'])} tokens a second, "
                  f"{amount(data['model_flops'])}FLOP of the model, MFU {data['mfu']:.1%}")  # fmt: skip
    if not data["fits"]:
        console.print(f"[bold]does not fit[/]: a rank needs {size(data['over_bytes'])} more than it has")
        for line in data["helps"]:
            console.print(f"  {line}")


def ranks_of(group: dict[str, Any]) -> str:
    """`ranks 0 .. 7, 16 .. 23, ..` of a group."""
    runs = group["ranks"]["runs"]
    named = [f"{first} .. {first + count - 1}" if count > 1 else str(first) for first, count in runs[:3]]
    return f"rank{'s' * (group['ranks']['count'] > 1)} {', '.join([*named, *['..'] * (len(runs) > 3)])}"


def _print_pipeline(console: Console, data: dict[str, Any]) -> None:
    """A line a stage, with what one micro-batch takes, and a line for the ranks at each place along the axis."""
    line, groups = data["pipeline"], data["groups"]
    chunks = f" in {line['chunks']} chunks" if line["chunks"] > 1 else ""
    console.print(f"\n{line['stages']} stages over `{line['axis']}`, {line['schedule']}{chunks}: "
                  f"{line['seconds']:.4g} s, in which ranks wait {line['bubble']:.1%} of what they work")  # fmt: skip
    table = _table("stage", "at", "holds", "parameters", "saved", "in flight", "forward", "backward",
                   *["of weights"] * any("W" in s["seconds"] for g in groups for s in g["stages"]), "sent")
    stages = ((stage, i) for i, group in enumerate(groups) for stage in group["stages"])
    for stage, place in sorted(stages, key=lambda pair: pair[0]["stage"]):
        table.add_row(
            str(stage["stage"]), str(place), ", ".join(stage["holds"]), amount(stage["parameters"]),
            size(stage["saved"]), str(stage["in_flight"]),
            *(f"{1000 * seconds:.4g} ms" for seconds in stage["seconds"].values()), size(sum(stage["sent"].values())),
        )  # fmt: skip
    console.print()
    console.print(table)
    shown = [(key, name) for key, name in BYTES if key in ("parameters", "gradients", "optimizer", "working")]
    table = _table("at", "ranks", *(name for _, name in shown), "in all", "share", "waits")
    for i, group in enumerate(groups):
        held = group["bytes"]
        table.add_row(
            str(i), ranks_of(group).partition(" ")[2], *(size(held[key]) for key, _ in shown), size(held["total"]),
            f"{held['total'] / held['capacity']:.1%}", f"{group['times']['waiting'] / line['seconds']:.1%}",
        )  # fmt: skip
    console.print()
    console.print(table)


def _print_group(console: Console, group: dict[str, Any]) -> None:
    held = group["bytes"]
    table = _table("", "bytes", "share")
    for key, name in BYTES:
        table.add_row(name, f"{held[key]:,}", f"{held[key] / held['capacity']:.1%}")
    table.add_row("[bold]in all[/]", f"{held['total']:,}", f"{held['total'] / held['capacity']:.1%}")
    console.print(table)
    console.print(f"saved for the backward pass: {held['saved']:,} bytes", end="")
    console.print("" if held["caches"] is None else f"; decoding keeps {held['caches']:,} a sequence")
    table = _table("block", "parameters", "saved bytes", "FLOP", "messages")
    for row in group["blocks"]:
        counts = f"{row['parameters']:,}", f"{row['saved']:,}", amount(row["flops"]), f"{row['messages']:,}"
        table.add_row(row["block"], *counts)
    console.print()
    console.print(table)
    table = _table("line of the spec", "saved bytes", "weight bytes")
    for row in group["lines"][:8]:
        table.add_row(row["line"] or "-", f"{row['saved']:,}", f"{row['parameters']:,}")
    console.print()
    console.print(table)
    table = _table("collective", "phase", "axes", "ranks", "count", "bytes", "on the wire")
    for row in _merged(group["collectives"]):
        axes = " x ".join(row["axes"]) + ("" if row["inside_node"] else " (between nodes)")
        table.add_row(row["kind"], row["phase"], axes, str(row["ranks"]), f"{row['count']:,}", f"{row['bytes']:,}",
                      size(row["wire_bytes"]))  # fmt: skip
    console.print()
    console.print(table)
    times = group["times"]
    parts = {"kernels": times["compute"], **{f"over {a}": t for a, t in times["collectives"].items()},
             **({"waiting": times["waiting"]} if times["waiting"] else {}), "gradient sums": times["sums"],
             "optimizer": times["optimizer"]}  # fmt: skip
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
        table.add_column(column, justify="right" if i and column not in LEFT else "left")
    return table


def candidates_json(found: list[Candidate]) -> list[dict[str, Any]]:
    """A search as plain data."""
    rows = []
    for c in found:
        row: dict[str, Any] = {"mesh": dict(c.mesh), "between_blocks": c.between, "why": c.why, "fits": False}
        if c.plan is not None:
            row |= {"fits": not c.plan.over, "over_bytes": c.plan.over, "seconds": c.plan.seconds, "mfu": c.plan.mfu,
                    "tokens": c.plan.tokens, "bytes": c.plan.fullest.memory.total}  # fmt: skip
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
