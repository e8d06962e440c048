"""The table of `make bench-gpu` in Markdown."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def written(told: Mapping[str, Any]) -> str:
    """What was found, one line each, and notes on peers below."""
    kind = "estimates from what programs do and the data sheet, nothing was timed" if told["estimated"] else "measured"
    head = f"{told['device']}, bf16, forward and backward; {kind} (torch {told['torch']}, triton {told['triton']})"
    rates = told["rates"]
    if rates:
        head += f". Shares are of a copy at {rates[0] / 1e12:.2f} TB/s and a product at {rates[1] / 1e12:.0f} TFLOP/s"
    time = "us, an estimate" if told["estimated"] else "us"
    rows = [f"| line | {time} | of copying | of products | time of peers / ours | wanted |", "|---" * 6 + "|"]
    rows += [_row(name, row) for name, row in told["lines"].items()]
    notes = [f"- {name}, {peer}: {said}" for name, row in told["lines"].items() for peer, said in row["notes"].items()]
    left = [f"- {one['line']}: left out: {one['why']}" for one in told["left_out"]]
    return "\n".join([head + ".", "", *rows, "", *notes, *left]).rstrip()


def _row(name: str, row: Mapping[str, Any]) -> str:
    # What an op counts is an upper bound where a mask is of groups, so that a share may be of more than there is.
    shares = ["" if x is None or x > 1.1 else f"{x:.0%}" for x in (row["copy_share"], row["matmul_share"])]
    peers = ", ".join(f"{peer} {ratio:.2f}x" for peer, ratio in row["peers"].items())
    spread = "" if row["low"] is None else f" ({row['low'] * 1e6:.0f} - {row['high'] * 1e6:.0f})"
    wanted = "; ".join(_wanted(one, row["estimated"]) for one in row["wanted"])
    return f"| {name} | {row['seconds'] * 1e6:.0f}{spread} | {' | '.join(shares)} | {peers} | {wanted} |"


def _wanted(one: Mapping[str, Any], estimated: bool) -> str:
    is_share = one["what"].endswith("share")
    least, found = (
        "" if x is None else f"{x:.0%}" if is_share else f"{x:.2f}x" for x in (one["least"], one["found"])
    )
    if one["holds"] is None:
        return f"{one['what']} >= {least}: not known"
    verdicts = ("would hold", "would not") if estimated else ("holds", "does not hold")
    return f"{one['what']} >= {least}: {found} {verdicts[not one['holds']]}"
