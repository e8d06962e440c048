"""What `heddle bisect` prints."""

from __future__ import annotations

from typing import Any


def print_found(found: dict[str, Any]) -> None:
    """The first difference, and the largest ones before it."""
    rows, *_, seq = found["tokens"]
    print(f"{found['model']}: A = {found['a']}, B = {found['b']}; {rows} rows of {seq} tokens")
    print(f"compared: {found['values']} values, {found['gradients']} gradients of what uses of ops are given")
    if found["left_out"]:
        count, one = len(found["left_out"]), found["left_out"][0]
        print(f"not compared: {count} values that a run never has by themselves, as `{one}`")
    weights, first = found["weights"], found["first"]
    if weights["count"]:
        print(f"weights differ: {weights['count']}, the first is `{weights['first']}`, by {weights['difference']:.1e}")
    if first is None:
        print("no op differs by more than rounding explains" if not weights["count"] else "no op adds to that")
    else:
        _print_first(first)
    if found["before"]:
        print("explained by rounding, largest share of what it allows first:" if first is None
              else "before it, explained by rounding, largest share of what it allows first:")  # fmt: skip
        print(f"  {'A - B':>9}  {'allowed':>9}  {'share':>6}  value")
        for row in found["before"]:
            share = row["difference"] / row["allowed"]
            print(f"  {row['difference']:9.1e}  {row['allowed']:9.1e}  {share:6.0%}  {_what(row)}")


def _print_first(row: dict[str, Any]) -> None:
    print(f"first difference: {_what(row)}")
    print(f"  {row['spec']}")
    why = f"of numbers up to {row['size']:.1e}; rounding explains {row['allowed']:.1e}"
    print(f"  A - B     {_number(row['difference'])}, {why}")
    for side in ("a", "b"):
        print(f"  {side.upper()} - fp64  {_number(row[f'{side}_error'])}, given the same")
    if row["carried"] is not None:
        print(f"  A - B     {row['carried']:9.1e} where each goes on with its own numbers")


def _what(row: dict[str, Any]) -> str:
    value = f"`{row['value']}` ({row['op']})"
    return value if row["gradient_of"] is None else f"the gradient of `{row['gradient_of']}` by {value}"


def _number(x: float | None) -> str:
    return "no number" if x is None else f"{x:9.1e}"
