"""Tables for people."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table


def amount(number: float) -> str:
    """`8.1 B`, `17.3 M`, `960`."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.2f} {unit}"
    return f"{number:.0f}"


def print_summary(data: dict[str, Any]) -> None:
    """The table of `heddle show`."""
    console = Console(highlight=False)
    active = data["active_parameters"]
    routed = f", {active:,} for a token" if active < data["parameters"] else ""
    console.print(f"[bold]{data['model']}[/] ({data['family']}): {data['parameters']:,} parameters{routed}")
    table = Table(box=None, pad_edge=False)
    table.add_column("block")
    for title in ("copies", "parameters", "share"):
        table.add_column(title, justify="right")
    for row in data["blocks"]:
        share = row["parameters"] / max(1, data["parameters"])
        table.add_row(row["path"], str(row["copies"]), f"{row['parameters']:,}", f"{share:.1%}")
    console.print(table)
    console.print(f"{amount(data['flops_per_token'])}FLOP a token, forward, at {data['length']} tokens")
    if data["state_bytes"] is None:
        console.print("cannot be sampled from token by token: it reads ahead")
    else:
        console.print(f"{amount(data['state_bytes'])}B of state a sequence of {data['length']} tokens, rows in bf16")
    if "weights" in data:
        for weight in data["weights"]:
            dims = ", ".join(f"{d['name']} = {d['size']}" for d in weight["dims"])
            console.print(f"  {weight['path']}  \\[{dims}]  {weight['init']}")
