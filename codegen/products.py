"""The file of a matrix product that ends with more than its sums: the CuTe DSL's text of that, and of its slope."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..lowering.chains.derive import derive
from ..lowering.chains.expr import Expr, load, ordered
from ..lowering.chains.fragments import FRAGMENTS, for_fragments
from ..lowering.chains.plan import calls, plain
from ..lowering.chains.table import CALL
from .expressions import Printer, literal, meaning
from .kernels import render
from .tiles import NAME, key_of

Z = load("z", "rc")
"""The sums of a product, which its step is an expression of."""
_D_Y = load("d_y", "rc", grad=False)
_LONG = 64  # characters of a value, beyond which it gets a name


def source(op: str, facts: Any, name: str) -> str:
    """The text of a file with one public function `name(x, w[, bias][, residual])`; `facts` are a room's of `op`."""
    values = replace(facts, name=name).rendered()
    return render(op, {**values, **_step(facts.step, facts.keeps)}, facts.template)


def key(op: str, facts: Any) -> str:
    """What a lock knows the kernel by."""
    return key_of(source(op, facts, NAME))


def _step(step: Expr | None, keeps: str | None) -> dict[str, Any]:
    """What templates print of a step: its math, its lines from `z` to `a`, and its slope with the lines before it."""
    if step is None:
        return {"step_math": None, "step_lines": (), "slope": None, "slope_lines": (), "helpers": ()}
    value = plain([step])[step]
    slope = derive({step: _D_Y}, 1)[Z]
    slope = plain([slope])[slope]
    lines, result = _triton(slope, {_D_Y: "d_y", **({value: "y"} if keeps == "y" else {Z: "z"})})
    return {
        "step_math": f"a(z) = {meaning(value, {}, 1)[0]}",
        "step_lines": fragments(value),
        "slope": result,
        "slope_lines": lines,
        "helpers": calls([slope]),
    }


def _triton(value: Expr, scope: dict[Expr, str]) -> tuple[list[str], str]:
    """Lines of Triton, and the expression behind them, of what has names."""
    printer = Printer({}, ("y", "z", "d_y", "d_z", "offs", "mask", "size", "tl"), 1)
    printer.begin([value], masked=False)
    printer.count([value], scope)
    result = printer.text(value, scope)[0]
    return printer.lines, result


def fragments(value: Expr) -> list[str]:
    """Lines of the CuTe DSL from `z`, a fragment in fp32, to `a`: what is used twice, or is long, is a statement."""
    value = for_fragments(value)
    uses: dict[Expr, int] = {}
    for e in ordered([value]):
        for i, x in enumerate(e.args):
            uses[x] = uses.get(x, 0) + FRAGMENTS[e.op].text.count(f"{{{i}}}")
    names = {Z: "z"}
    lines: list[str] = []
    for e in ordered([value]):
        text = _fragment(e, names)[0]
        if e.args and e is not value and (uses[e] > 1 or len(text) > _LONG):
            names[e] = f"t{len(lines) + 1}"
            lines.append(f"{names[e]} = {text}")
    return [*lines, f"a = {_fragment(value, names)[0]}"]


def _fragment(e: Expr, names: dict[Expr, str]) -> tuple[str, int]:
    """The value as text, and how tightly that binds."""
    if e in names:
        return names[e], CALL
    if e.op == "number":
        return literal(e.value, 1, whole=False)
    form = FRAGMENTS[e.op]
    args = []
    for x, need in zip(e.args, form.needs, strict=True):
        text, binds = _fragment(x, names)
        args.append(f"({text})" if binds < need else text)
    return form.text.format(*args), form.binds
