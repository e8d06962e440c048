"""The ops of chains as the CuTe DSL has them: on fragments, what a thread holds of a tile in fp32.

What a matrix product ends with is written in these. An op that is not here has no text there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from .expr import Expr, apply, made, number, rebuilt
from .table import ADD, CALL, MUL, NEG


@dataclass(frozen=True)
class Fragment:
    """As `table.PointOp` has it: `text` with a place for each operand, how tightly it binds, and its operands must."""

    text: str
    binds: int = CALL
    needs: tuple[int, ...] = (0,)


_RECIPROCAL = "cute.math.rcp({}, approx=True, ftz=True)"
_E = "cute.math.exp({}, fastmath=True)"
# A comparison with NaN is false, so what is replaced is what is known to be beyond the bound, as torch does it.
FRAGMENTS: Mapping[str, Fragment] = MappingProxyType(
    {
        "neg": Fragment("-{0}", NEG, (NEG,)),
        "add": Fragment("{0} + {1}", ADD, (ADD, ADD + 1)),
        "sub": Fragment("{0} - {1}", ADD, (ADD, ADD + 1)),
        "mul": Fragment("{0} * {1}", MUL, (MUL, MUL + 1)),
        "div": Fragment("{0} * " + _RECIPROCAL.format("{1}"), MUL, (MUL, 0)),
        "exp": Fragment(_E.format("{0}")),
        "sigmoid": Fragment(_RECIPROCAL.format(f"1.0 + {_E.format('-{0}')}"), needs=(NEG,)),
        "tanh": Fragment("1.0 - 2.0 * " + _RECIPROCAL.format(f"1.0 + {_E.format('2.0 * {0}')}"), ADD, (MUL + 1,)),
        "relu": Fragment("cute.where({0} < 0.0, cute.full_like({0}, 0.0), {0})", needs=(CALL,)),
        "relu2": Fragment("cute.where({0} < 0.0, cute.full_like({0}, 0.0), {0} * {0})", needs=(CALL,)),
        "abs": Fragment("cute.where({0} < 0.0, -{0}, {0})", needs=(CALL,)),
        "at_least": Fragment("cute.where({0} < {1}, cute.full_like({0}, {1}), {0})", needs=(CALL, 0)),
        "at_most": Fragment("cute.where({0} > {1}, cute.full_like({0}, {1}), {0})", needs=(CALL, 0)),
    }
)


def for_fragments(e: Expr) -> Expr:
    """The same value in forms that keep their digits: 1 + tanh x, which loses those of what is nearly 0, is
    2 sigmoid(2 x)."""

    def kept(op: str, args: tuple[Expr, ...], attrs: tuple[tuple[str, object], ...], dims: str) -> Expr:
        for one, other in (args, args[::-1]) if op == "add" else ():
            if one is number(1) and other.op == "tanh":
                return apply("mul", number(2), apply("sigmoid", apply("mul", number(2), other.args[0])))
        return made(op, args, dims, attrs)

    return rebuilt([e], {}, kept)[e]
