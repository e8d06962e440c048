"""Whether a mask lets each query see one interval of keys, and whether a distance tells the keys of a query apart.

Both are read off the expression: a comparison whose two sides differ by something of the query plus something that
never falls, or never rises, along the keys cuts them at one place. `and` cuts again; `or` keeps one interval where all
that it joins is cut on one side. Kernels take such masks as bounds (`runtime/lib/intervals.py` finds them by the same
rules, and says no where these do).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..dsl import syntax as sx
from ..dsl.format import print_expr


class _Refused(Exception):
    """An expression is not of this kind; the text says why, in words for who wrote the spec."""


@dataclass(frozen=True)
class _Sum:
    """Something of the query, and of the key: rising is 1 where that never falls along the keys, -1 where it never
    rises, 0 where there is none; even: it moves by one a key."""

    query: bool = False
    rising: int = 0
    even: bool = False

    def plus(self, other: _Sum) -> _Sum:
        if self.rising and other.rising and self.rising != other.rising:
            raise _Refused("what rises along the keys and what falls have no direction together")
        even = (self.even and not other.rising) or (other.even and not self.rising)
        return _Sum(self.query or other.query, self.rising or other.rising, even)

    def times(self, by: int) -> _Sum:
        return _Sum(self.query, self.rising if by > 0 else -self.rising, self.even and abs(by) == 1) if by else _Sum()

    def divided(self, by: int) -> _Sum:
        if by < 1:
            raise _Refused(f"`// {by}` keeps no direction")
        if self.query and self.rising:
            raise _Refused("a query and a key are divided together")
        return _Sum(self.query, self.rising, self.even and by == 1)


Clauses = tuple[tuple[_Sum, ...], ...]


@dataclass(frozen=True)
class _Cuts:
    """Clauses of sums of which one is to be at most 0: `low` cut keys off in front, `high` behind."""

    low: Clauses = ()
    high: Clauses = ()

    def both(self, other: _Cuts) -> _Cuts:
        return _Cuts(self.low + other.low, self.high + other.high)

    def either(self, other: _Cuts) -> _Cuts:
        if not (self.low or self.high) or not (other.low or other.high):
            return _Cuts()
        if (self.low or other.low) and (self.high or other.high):
            raise _Refused("either what is cut off in front or what is cut off behind may be two runs of keys")
        pairs = ((self.low, other.low), (self.high, other.high))
        return _Cuts(*(tuple(a + b for a in mine for b in theirs) for mine, theirs in pairs))

    def neither(self) -> _Cuts:
        if not (self.low or self.high):
            return _Cuts(high=((_Sum(),),))
        found: _Cuts | None = None
        for clause in self.low + self.high:
            none = _Cuts()
            for one in clause:
                none = none.both(_at_most(one.times(-1)))
            found = none if found is None else found.either(none)
        assert found is not None
        return found


def why_no_interval(mask: sx.Expr) -> str | None:
    """Why a mask is not proved to let each query see one interval of the keys of its document; None where it is."""
    try:
        _cuts(mask)
    except _Refused as refused:
        return str(refused)
    return None


def is_apart(distance: sx.Expr) -> bool:
    """Whether a distance is proved to be a sum of what is the query's and what is the key's."""
    return _parts(distance) is not None


def tells_apart(distance: sx.Expr) -> bool:
    """Whether it is proved to be such a sum, and another one for each key of a document."""
    found = _parts(distance)
    return found is not None and found.even


def _parts(distance: sx.Expr) -> _Sum | None:
    try:
        found = _sum(distance)
    except _Refused:
        return None
    return _of(found)


def _at_most(less: _Sum) -> _Cuts:
    return _Cuts(high=((less,),)) if less.rising >= 0 else _Cuts(low=((less,),))


def _cuts(mask: sx.Expr) -> _Cuts:
    match mask:
        case sx.Constant(value=bool(value)):
            return _Cuts() if value else _Cuts(high=((_Sum(),),))
        case sx.Unary(operator="not", value=value) if not isinstance(value, sx.Constant):
            return _cuts(value).neither()
        case sx.Binary(operator="and", left=left, right=right):
            return _cuts(left).both(_cuts(right))
        case sx.Binary(operator="or", left=left, right=right):
            return _cuts(left).either(_cuts(right))
        case sx.Binary(operator="<" | "<=" | ">" | ">=" | "==" | "!=" as how, left=left, right=right):
            return _compared(how, _sum(left), _sum(right))
    raise _Refused(f"`{print_expr(mask)}` is no comparison of positions")


def _compared(how: str, left: Any, right: Any) -> _Cuts:
    if isinstance(left, int) and isinstance(right, int):
        raise _Refused("numbers are compared that are no coordinates")
    difference = _of(left).plus(_of(right).times(-1))
    below, above = _at_most(difference), _at_most(difference.times(-1))
    if how in ("==", "!="):
        return below.both(above) if how == "==" else below.both(above).neither()
    return below if how in ("<", "<=") else above


def _of(x: Any) -> _Sum:
    return _Sum() if isinstance(x, int) else x


def _sum(expr: sx.Expr) -> Any:
    """A number, or a sum. Raises _Refused."""
    match expr:
        case sx.Number(value=int(value)):
            return value
        case sx.Member(value=sx.Name(id="key"), name="position"):
            return _Sum(rising=1, even=True)
        case sx.Member(value=sx.Name(id="query"), name="position"):
            return _Sum(query=True)
        case sx.Unary(operator="-", value=value):
            inner = _sum(value)
            return -inner if isinstance(inner, int) else inner.times(-1)
        case sx.Binary(operator="+" | "-" | "*" | "//" as how, left=left, right=right):
            return _combined(how, _sum(left), _sum(right))
        case sx.Member(value=sx.Name(id="key" | "query")):
            raise _Refused(f"`{print_expr(expr)}` is in no order along the keys that is known")
    raise _Refused(f"`{print_expr(expr)}` is no sum of positions")


def _combined(how: str, a: Any, b: Any) -> Any:
    if isinstance(a, int) and isinstance(b, int):
        if how == "//" and not b:
            raise _Refused("a number is divided by 0")
        return a + b if how == "+" else a - b if how == "-" else a * b if how == "*" else a // b
    match how:
        case "+":
            return _of(a).plus(_of(b))
        case "-":
            return _of(a).plus(_of(b).times(-1))
        case "*" if isinstance(a, int) or isinstance(b, int):
            return b.times(a) if isinstance(a, int) else a.times(b)
        case "//" if isinstance(b, int):
            return a.divided(b)
    raise _Refused(f"`{how}` takes a coordinate and a number, here it has two coordinates")
