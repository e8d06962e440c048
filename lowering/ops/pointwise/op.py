"""Everything that is computed place by place: arithmetic and activations, one table.

Operands align by name of dim: one operand must have all dims of the others, and the result has its dims.
`outer` says that none has, and gives the dims of both.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ....dsl.diagnostics import Label, fail
from ...op import Op, OpCall, Setting, Typing, shown, tensors_of

UNARY = {
    "neg": "-x",
    "exp": "e to the x",
    "log": "natural logarithm",
    "sqrt": "square root",
    "abs": "absolute value",
    "sign": "-1, 0 or 1",
    "sigmoid": "1 / (1 + exp(-x))",
    "silu": "x * sigmoid(x)",
    "relu": "max(x, 0)",
    "relu2": "max(x, 0)^2 (So et al. 2021, Primer)",
    "gelu": "x times the normal distribution function of x (Hendrycks and Gimpel 2016)",
    "gelu_tanh": "gelu in its tanh approximation",
    "tanh": "hyperbolic tangent",
    "softplus": "log(1 + exp(x))",
    "log_sigmoid": "log(sigmoid(x))",
    "sin": "sine",
    "cos": "cosine",
    "constant": "x, through which no gradient flows",
}
BINARY = {
    "add": "x + y",
    "sub": "x - y",
    "mul": "x * y",
    "div": "x / y",
    "floordiv": "the largest whole number that is at most x / y",
    "pow": "x to the y",
    "max": "the larger",
    "min": "the smaller",
}
COMPARE = {
    "lt": "true where x < y",
    "le": "true where x <= y",
    "gt": "true where x > y",
    "ge": "true where x >= y",
    "eq": "true where x == y",
    "ne": "true where x != y",
}
LOGIC = {
    "logical_not": "true where the mask is not",
    "logical_and": "true where both masks are",
    "logical_or": "true where one of two masks is",
}
LINEAR = {
    "neg": (("x",),),
    "constant": (("x",),),
    "add": (("x", "y"),),
    "sub": (("x", "y"),),
    "mul": (("x",), ("y",)),
    "div": (("x",),),
}
SIGNS = {"neg": "-", "add": "+", "sub": "-", "mul": "*", "div": "/", "floordiv": "//", "pow": "^",
         "lt": "<", "le": "<=", "gt": ">", "ge": ">=", "eq": "==", "ne": "!=",
         "logical_not": "not", "logical_and": "and", "logical_or": "or"}  # fmt: skip
_KINDS = ("real", "coordinate", "index")
_SCALES = ("neg", "mul", "div")
_WHOLE = ("add", "sub", "mul", "floordiv", "max", "min", "neg", "abs")


def _infer(call: OpCall) -> Typing:
    tensors = [t for name in call.tensors for t in tensors_of(call.tensors[name])]
    scaled = [name for name, t in call.tensors.items() if t is not None and t.kind == "loss"]
    if scaled and len(tensors) == 1 and call.op.name in _SCALES and not (call.op.name == "div" and scaled == ["y"]):
        return Typing({"D": ()}, tuple(call.tensors.values()), (("loss", ()),))
    for t in tensors:
        if t.kind not in _KINDS:
            raise fail(
                "wrong-kind",
                f"`{SIGNS.get(call.op.name, call.op.name)}` needs numbers",
                call.span,
                f"this is {shown(t)}",
            )
    numbers = [n for n in (call.settings.get(name) for name in ("x", "y")) if n is not None]
    whole = call.op.name in _WHOLE and all(float(n).is_integer() for n in numbers)
    kind = "coordinate" if whole and all(t.kind != "real" for t in tensors) else "real"
    return _aligned(call, tensors, kind)


def _aligned(call: OpCall, tensors: list[Any], kind: str) -> Typing:
    """The result has the dims of the operand that has all."""
    widest = max(tensors, key=lambda t: len(t.dims))
    for t in tensors:
        if not all(any(d is e for e in widest.dims) for d in t.dims):
            raise fail(
                "dim-mismatch",
                f"the operands of `{SIGNS.get(call.op.name, call.op.name)}` have different dims, and neither has all "
                "dims of the other",
                call.span,
                f"{shown(widest)} and {shown(t)}",
                labels := _namesakes(widest, t),
                help=None if labels else "`outer(a, b)` gives the dims of both",
            )
    return Typing({"D": tuple(widest.dims)}, tuple(call.tensors.values()), ((kind, tuple(widest.dims)),))


def _namesakes(a: Any, b: Any) -> list[Label]:
    """Where dims come from that two operands have by one name, though they are two."""
    pairs = [(d, e) for d in a.dims for e in b.dims if d is not e and d.name == e.name]
    labels = [Label(d.span, f"`{d.name}` = {d.size}") for pair in pairs for d in pair if getattr(d, "span", None)]
    return labels if len({label.span for label in labels}) > 1 else []


def _compare(call: OpCall) -> Typing:
    """A mask of numbers, or of masks; ids of tokens are compared for being one."""
    call.op._check_kinds(call)
    return _aligned(call, [t for name in call.tensors for t in tensors_of(call.tensors[name])], "mask")


def _clip(call: OpCall) -> Typing:
    if call.settings["low"] is None and call.settings["high"] is None:
        raise fail("missing-argument", "`clip` needs `low`, `high` or both", call.span)
    return _infer(call)


def _where(call: OpCall) -> Typing:
    """A mask, and what stands where it is true and where it is not; numbers may stand for tensors."""
    call.op._check_kinds(call)
    tensors = [t for name in call.tensors for t in tensors_of(call.tensors[name])]
    kinds = {t.kind for t in tensors[1:]} or {"real"}
    if len(kinds) > 1:
        raise fail(
            "wrong-kind",
            "both values of `where` must be of one kind",
            call.span,
            f"these are {' and '.join(sorted(kinds))}",
        )
    return _aligned(call, tensors, kinds.pop())


def _outer(call: OpCall) -> Typing:
    x, y = call.tensors["x"], call.tensors["y"]
    both = [d.name for d in y.dims if any(d is e for e in x.dims)]
    if both:
        raise fail(
            "dim-mismatch",
            f"both operands of `outer` have `{both[0]}`",
            call.span,
            help="`*` multiplies along dims that both have",
        )
    return Typing({"A": tuple(x.dims), "B": tuple(y.dims)}, (x, y), (("real", (*x.dims, *y.dims)),))


def _flops(sizes: Mapping[str, int], attrs: Mapping[str, Any]) -> float:
    return float(sizes["D"])


_ANY = {"x": _KINDS, "y": _KINDS}
OPS = (
    *(
        Op(name, "x[D] -> z[D]", meaning, infer_with=_infer, linear=LINEAR.get(name, ()), flops=_flops,
           operand_kinds=_ANY, detached=name == "constant", source="ours")
        for name, meaning in UNARY.items()
    ),
    *(
        Op(name, "x[D], y[D] -> z[D]", meaning, infer_with=_infer, linear=LINEAR.get(name, ()), flops=_flops,
           operand_kinds=_ANY, source="ours")
        for name, meaning in BINARY.items()
    ),
    *(
        Op(name, "x[D], y[D] -> m[D]", meaning, infer_with=_compare, flops=_flops, source="ours",
           operand_kinds=dict.fromkeys("xy", (*_KINDS, "token") if name in ("eq", "ne") else _KINDS))
        for name, meaning in COMPARE.items()
    ),
    *(
        Op(name, "x[D] -> m[D]" if name == "logical_not" else "x[D], y[D] -> m[D]", meaning, infer_with=_compare,
           flops=_flops, operand_kinds={"x": ("mask",), "y": ("mask",)}, source="ours")
        for name, meaning in LOGIC.items()
    ),
    Op("clip", "x[D] -> z[D]", "x, but at least `low` and at most `high`", infer_with=_clip, flops=_flops,
       settings=(Setting("low", "number", None), Setting("high", "number", None)), operand_kinds=_ANY, source="ours"),
    Op("where", "mask[D], x[D], y[D] -> z[D]", "x where the mask is true, else y", infer_with=_where, flops=_flops,
       linear=(("x", "y"),), source="ours",
       operand_kinds={"mask": ("mask",), "x": (*_KINDS, "token"), "y": (*_KINDS, "token")}),
    Op("outer", "x[A], y[B] -> z[A, B]", "the product of each place of x with each of y", infer_with=_outer,
       linear=(("x",), ("y",)), operand_kinds=_ANY, flops=lambda sizes, attrs: float(sizes["A"] * sizes["B"]),
       source="ours"),
)  # fmt: skip
