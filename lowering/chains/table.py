"""The pointwise ops of chains, one entry each: Triton text, derivative, and what becomes of numbers.

`a` in definitions and derivatives is an algebra: its methods are these ops. The compiler gives one of expressions, that
folds; a test gives one of fp64 tensors, so that the same line is the derivative that is printed and the one that an
error bound follows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

CALL, NEG, MUL, ADD, COMPARE = 100, 50, 40, 30, 10
"""How tightly text binds, as in Python."""

Slopes = Callable[..., tuple[Any, ...]]


@dataclass(frozen=True)
class PointOp:
    """`text` with a place for each operand; `binds`: how tightly it does; `needs`: how tightly its operands must.

    slopes(a, y, g, *x): what y = op(*x) adds to the gradient of each operand where that of y is g; None: nothing.
    value(*x): of plain floats. error: its rounding in units of u |y|, `u` half the distance of numbers by 1: what
    hardware promises (CUDA C++ Programming Guide, mathematical functions; PTX ISA, div.full, ex2.approx). is_mask: it
    is true or false. by_result: its derivative follows from y as it is stored, which what reads y keeps anyway. calls:
    the function that its text calls, which is printed above the kernels. spreads: operands with fewer dims are spread
    over a tile in the text; else the function does it.
    """

    text: str
    slopes: Slopes
    value: Callable[..., float]
    binds: int = CALL
    needs: tuple[int, ...] = (0,)
    error: float = 2.0
    is_mask: bool = False
    by_result: bool = False
    calls: str | None = None
    spreads: bool = True

    @property
    def arity(self) -> int:
        return len(self.needs)


def _one(*_: Any) -> tuple[None]:
    return (None,)


def _two(*_: Any) -> tuple[None, None]:
    return (None, None)


def _infix(sign: str, level: int, slopes: Slopes, value: Callable[..., float], error: float = 1.0) -> PointOp:
    return PointOp(f"{{0}} {sign} {{1}}", slopes, value, level, (level, level + 1), error, is_mask=level == COMPARE)


def _call(name: str, slopes: Slopes, value: Callable[..., float], error: float = 2.0, calls: bool = False) -> PointOp:
    function = name if calls else f"tl.{name}"
    return PointOp(f"{function}({{0}})", slopes, value, error=error, calls=name if calls else None)


def _larger(a: Any, y: Any, g: Any, p: Any, q: Any) -> tuple[Any, Any]:
    """Where both are one, half to each, as torch does."""
    tie = a.where(a.eq(p, q), a.mul(0.5, g), 0.0)
    return a.where(a.gt(p, q), g, tie), a.where(a.lt(p, q), g, tie)


def _smaller(a: Any, y: Any, g: Any, p: Any, q: Any) -> tuple[Any, Any]:
    tie = a.where(a.eq(p, q), a.mul(0.5, g), 0.0)
    return a.where(a.lt(p, q), g, tie), a.where(a.gt(p, q), g, tie)


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


_BOTH = "tl.{}({{0}}, {{1}}, tl.PropagateNan.ALL)"
TABLE: dict[str, PointOp] = {
    "neg": PointOp("-{0}", lambda a, y, g, x: (a.neg(g),), lambda x: -x, NEG, (NEG,), 0.0),
    "exp": _call("exp", lambda a, y, g, x: (a.mul(g, y),), math.exp, 4.0),
    "log": _call("log", lambda a, y, g, x: (a.div(g, x),), math.log),
    "sqrt": _call("sqrt", lambda a, y, g, x: (a.div(a.mul(0.5, g), y),), math.sqrt),
    "rsqrt": _call("rsqrt", lambda a, y, g, x: (a.mul(a.mul(a.mul(a.mul(-0.5, g), y), y), y),),
                   lambda x: 1 / math.sqrt(x), 4.0),
    "abs": _call("abs", lambda a, y, g, x: (a.mul(g, a.sign(x)),), abs, 0.0),
    "sign": _call("sign", _one, lambda x: float((x > 0) - (x < 0)), 0.0, calls=True),
    "sigmoid": _call("sigmoid", lambda a, y, g, x: (a.mul(g, a.mul(y, a.sub(1.0, y))),), _sigmoid, 10.0),
    "relu": PointOp("tl.where({0} < 0, 0.0, {0})", lambda a, y, g, x: (a.where(a.gt(x, 0.0), g, 0.0),),
                    lambda x: max(x, 0.0), needs=(CALL,), error=0.0),
    # max(x, 0) is the root of its square, to the last bit where the square is a normal number.
    "relu2": PointOp("tl.where({0} < 0, 0.0, {0} * {0})", lambda a, y, g, x: (a.mul(g, a.mul(2.0, a.sqrt(y))),),
                     lambda x: max(x, 0.0) ** 2, needs=(CALL,), error=1.0, by_result=True),
    "tanh": _call("tanh", lambda a, y, g, x: (a.mul(g, a.sub(1.0, a.mul(y, y))),), math.tanh, 8.0, calls=True),
    "softplus": _call("softplus", lambda a, y, g, x: (a.mul(g, a.sigmoid(x)),),
                      lambda x: max(x, 0.0) + math.log1p(math.exp(-abs(x))), 8.0, calls=True),
    "erf": _call("erf", lambda a, y, g, x: (a.mul(g, a.mul(2 / math.sqrt(math.pi), a.exp(a.neg(a.mul(x, x))))),),
                 math.erf, 4.0),
    "sin": _call("sin", lambda a, y, g, x: (a.mul(g, a.cos(x)),), math.sin, 4.0),
    "cos": _call("cos", lambda a, y, g, x: (a.neg(a.mul(g, a.sin(x))),), math.cos, 4.0),
    "constant": PointOp("{0}", _one, lambda x: x, CALL, (CALL,), 0.0),
    "add": _infix("+", ADD, lambda a, y, g, p, q: (g, g), lambda p, q: p + q),
    "sub": _infix("-", ADD, lambda a, y, g, p, q: (g, a.neg(g)), lambda p, q: p - q),
    "mul": _infix("*", MUL, lambda a, y, g, p, q: (a.mul(g, q), a.mul(g, p)), lambda p, q: p * q),
    "div": _infix("/", MUL, lambda a, y, g, p, q: (a.div(g, q), a.neg(a.div(a.mul(g, y), q))), lambda p, q: p / q, 4.0),
    "maximum": PointOp(_BOTH.format("maximum"), _larger, max, needs=(0, 0), error=0.0),
    "minimum": PointOp(_BOTH.format("minimum"), _smaller, min, needs=(0, 0), error=0.0),
    # Against a number of the spec, where the whole gradient passes at the bound, as it does in torch's clamp.
    "at_least": PointOp("tl.where({0} < {1}, {1}, {0})", lambda a, y, g, x, k: (a.where(a.lt(x, k), 0.0, g), None), max,
                        needs=(CALL, CALL), error=0.0),
    "at_most": PointOp("tl.where({0} > {1}, {1}, {0})", lambda a, y, g, x, k: (a.where(a.gt(x, k), 0.0, g), None), min,
                       needs=(CALL, CALL), error=0.0),
    "where": PointOp("tl.where({0}, {1}, {2})", lambda a, y, g, m, p, q: (None, a.where(m, g, 0.0), a.where(m, 0.0, g)),
                     lambda m, p, q: p if m else q, needs=(0, 0, 0), error=0.0),
    "lt": _infix("<", COMPARE, _two, lambda p, q: float(p < q), 0.0),
    "le": _infix("<=", COMPARE, _two, lambda p, q: float(p <= q), 0.0),
    "gt": _infix(">", COMPARE, _two, lambda p, q: float(p > q), 0.0),
    "ge": _infix(">=", COMPARE, _two, lambda p, q: float(p >= q), 0.0),
    "eq": _infix("==", COMPARE, _two, lambda p, q: float(p == q), 0.0),
    "ne": _infix("!=", COMPARE, _two, lambda p, q: float(p != q), 0.0),
    # Linear, so that the gradient is dropped in the same places: nothing of the forward pass is kept for it.
    "dropped": PointOp("dropped({0}, {1}, cols, {least}, {scale!r})",
                       lambda a, y, g, x, s: (a.dropped(g, s, least=y.least, scale=y.scale), None),
                       lambda x, s: 0.0 if x == 0 else math.nan, needs=(0, 0), calls="dropped", spreads=False),
}  # fmt: skip


# --- ops that are said in terms of those ------------------------------------------------------------------------------


def _extreme(both: str, one: str) -> Callable[..., Any]:
    def define(a: Any, x: Any, y: Any) -> Any:
        if a.value(y) is not None:
            return a.make(one, x, y)
        return a.make(one, y, x) if a.value(x) is not None else a.make(both, x, y)

    return define


def _clip(a: Any, x: Any, low: float | None = None, high: float | None = None) -> Any:
    x = x if low is None else a.at_least(x, low)
    return x if high is None else a.at_most(x, high)


def _pow(a: Any, x: Any, y: Any) -> Any:
    """By products and roots where the exponent is a number of the spec that has them, else e^(y log x)."""
    from .expr import Unfit

    p = a.value(y)
    if p is None:
        raise Unfit("an exponent that is a tensor: a kernel has no power of it, whatever the sign of its base")
    if p == 0:
        return a.expr(1.0)
    if p < 0:
        return a.rsqrt(x) if p == -0.5 else a.div(1.0, _pow(a, x, -p))
    whole, rest = divmod(p, 1)
    if rest not in (0, 0.5) or whole > 64:
        return a.exp(a.mul(p, a.log(x)))
    parts = [a.sqrt(x)] if rest else []
    square = x
    for bit in reversed(f"{int(whole):b}"):
        parts += [square] if bit == "1" else []
        square = a.mul(square, square)
    found = parts.pop()
    for part in reversed(parts):
        found = a.mul(found, part)
    return found


def _gelu_tanh(a: Any, x: Any) -> Any:
    k = math.sqrt(2 / math.pi)
    return a.mul(a.mul(0.5, x), a.add(1.0, a.tanh(a.mul(x, a.add(k, a.mul(0.044715 * k, a.mul(x, x)))))))


def _dropout(a: Any, x: Any, drawn: Any, rate: float) -> Any:
    """x / (1 - rate) where the place's number, of 53 bits, is at least rate 2^53, else 0; x where nothing is drawn.

    drawn int64[r]: what `runtime/lib/dropping.py` says of rows, from which the columns count on.
    """
    return a.dropped(x, drawn, least=math.ceil(rate * 2**53), scale=1 / (1 - rate))


DEFINED: dict[str, Callable[..., Any]] = {
    "silu": lambda a, x: a.mul(x, a.sigmoid(x)),
    "gelu": lambda a, x: a.mul(a.mul(0.5, x), a.add(1.0, a.erf(a.mul(math.sqrt(0.5), x)))),
    "gelu_tanh": _gelu_tanh,
    "log_sigmoid": lambda a, x: a.neg(a.softplus(a.neg(x))),
    "max": _extreme("maximum", "at_least"),
    "min": _extreme("minimum", "at_most"),
    "clip": _clip,
    "pow": _pow,
    "dropout": _dropout,
}
