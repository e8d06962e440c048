"""`heddle plan`: from what a user types to a plan."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from ...dsl.diagnostics import listed
from ...dsl.layout import layout_of
from ...dsl.load import load
from ..check import program_of
from ..compile import DTYPES
from ..errors import UserError
from ..paths import split_entry, write_text
from .data import to_json
from .devices import device as find_device
from .helping import helps
from .page import page
from .plan import Steps, plan
from .search import search, shared
from .show import candidates_json
from .step import Feed

PRECISIONS = ("fp32", "bf16")
assert set(PRECISIONS) <= set(DTYPES)


def plan_spec(
    spec: str, settings: dict[str, Any], layout: str | None, device: str, precision: str, feed: Feed,
    batch: int | None = None, ranks: int | None = None, html: Path | None = None,
) -> dict[str, Any]:  # fmt: skip
    """A plan as plain data, or with `ranks` the candidates of a search. `settings` are parameters of the model, and
    `L.mesh.A` sizes of axes of the layout. `html` is written last, whole or not at all.

    Raises UserError: unknown-device, unknown-setting, bad-override, uneven-batch, no-layout-fits, cannot-write;
    `SpecError` what reading the spec and laying it out raise.
    """
    machine = find_device(device)
    if precision not in PRECISIONS:
        raise UserError(
            "unknown-setting", f"no precision is named `{precision}`", help=f"there are {listed(PRECISIONS)}"
        )
    path, name = split_entry(spec)
    file = load(path)
    sizes, overrides = _split(settings)
    chosen = layout_of(file, layout)
    for other in (n for n in sizes if n != chosen.name):
        layout_of(file, other, sizes[other])  # says what is wrong with it
        raise UserError("bad-override", f"`--set {other}.mesh` is of another layout than `{chosen.name}`")
    chosen = layout_of(file, chosen.name, sizes.get(chosen.name))
    program = program_of(file, name, overrides)
    if not program.objectives:
        raise UserError(
            "no-objective", f"`{program.name}` has no `tokens` and `logits`, so next tokens cannot train it"
        )
    if ranks is not None:
        found = search(program, chosen, ranks, machine, precision, feed, batch)
        about = {"model": program.name, "layout": chosen.name, "device": machine.name, "ranks": ranks}
        return {**about, "candidates": candidates_json(found)}
    steps = Steps()
    made = plan(program, chosen, machine, precision, feed, steps)
    if batch is not None:
        made = plan(program, chosen, machine, precision, shared(feed, batch, made.rows, chosen), steps)
    if made.over:
        made = replace(made, helps=helps(made, steps))
    data = to_json(made)
    if html is not None:
        write_text(html, page(data))
    return data


def _split(settings: dict[str, Any]) -> tuple[dict[str, dict[str, int]], dict[str, Any]]:
    """Sizes of axes by layout, and parameters of the model. Raises UserError `bad-override`."""
    sizes: dict[str, dict[str, int]] = {}
    rest = {}
    for name, value in settings.items():
        parts = name.split(".")
        if len(parts) == 1:
            rest[name] = value
            continue
        if len(parts) != 3 or parts[1] != "mesh" or not isinstance(value, int):
            raise UserError("bad-override", f"`--set {name}={value}` is neither a parameter nor the size of an axis",
                            help="for example --set big.mesh.tensor=4")  # fmt: skip
        sizes.setdefault(parts[0], {})[parts[2]] = value
    return sizes, rest
