"""Reductions of dims that do not come back: sum, mean, max, count."""

from __future__ import annotations

from typing import Any

from ....dsl.diagnostics import fail
from ....dsl.program import TOKENS
from ...op import Monoid, Op, OpCall, Setting, Typing, shown


def _reduced(call: OpCall) -> tuple[Any, ...]:
    """The dims that go: those named, or all but those excepted."""
    x, over, rest = call.tensors["x"], call.settings["over"], call.settings["except"]
    for name, dims in (("over", over), ("except", rest)):
        absent = [d for d in dims or () if not any(d is e for e in x.dims)]
        if absent:
            raise fail(
                "dim-mismatch",
                f"`{call.op.name}` reduces `{absent[0].name}`, which its input does not have"
                if name == "over"
                else f"the input of `{call.op.name}` does not have `{absent[0].name}`",
                call.span_of(name),
                f"the input is {shown(x)}",
            )
    if over is not None and rest is not None:
        raise fail("wrong-arity", f"`{call.op.name}` takes `over` or `except`, not both", call.span_of("except"))
    return over if over is not None else tuple(d for d in x.dims if not any(d is e for e in rest or ()))


def _infer(call: OpCall) -> Typing:
    """The reduced dims go, wherever they stand. A mean over data that leaves nothing is a sum over places and their
    count: a loss."""
    call.op._check_kinds(call)
    x, over, where = call.tensors["x"], _reduced(call), call.tensors.get("where")
    slower = next((d for d in over if d.clock not in (None, TOKENS)), None)
    if slower is not None:
        raise fail(
            "not-built-yet",
            f"`{call.op.name}` along `{slower.name}` is not built yet",
            call.span_of("over"),
            "its rows come with groups of tokens",
        )
    if where is not None and [id(d) for d in where.dims] != [id(d) for d in x.dims]:
        raise fail(
            "dim-mismatch",
            f"`where` of `{call.op.name}` must say of each place of its input whether it counts",
            call.span_of("where"),
            f"this is {shown(where)}, the input {shown(x)}",
        )
    rest = tuple(d for d in x.dims if not any(d is e for e in over))
    is_loss = call.op.name == "mean" and not rest and any(d.size is None for d in over)
    return Typing(
        {"D": tuple(over)}, (x, where) if where is not None else (x,), (("loss" if is_loss else "real", rest),)
    )


def _reduction(name: str, meaning: str, state: tuple[str, ...], linear: bool, *kinds: str) -> Op:
    return Op(
        name=name,
        text="x[*, D+], where?[*, D+] -> y[*]" if linear else "x[*, D+] -> y[*]",
        meaning=meaning,
        settings=(
            Setting("over", "dims", None, "the dims that are reduced; all if not given"),
            Setting("except", "dims", None, "the dims that stay, in place of `over`"),
        ),
        infer_with=_infer,
        operand_kinds={"x": kinds, "where": ("mask",)},
        linear=(("x",),) if linear else (),
        coordinates=True,
        monoid=Monoid("D", state, peers="all", receiver_free=True),
        flops=lambda sizes, attrs: float(sizes["D"]),
        source="ours: what is not valid along a sequence does not count",
    )


OPS = (
    _reduction("sum", "the sum along dims", ("sum",), True, "real"),
    _reduction(
        "mean", "the mean along dims; of a mask, the share that is true", ("count", "sum"), True, "real", "mask"
    ),
    _reduction("max_over", "the largest along dims", ("max",), False, "real"),
    _reduction("count", "how many are true along dims", ("sum",), False, "mask"),
)
