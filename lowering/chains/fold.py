"""Expressions made smaller by the rules of algebra: numbers meet, signs come out of products, and what is one number a
row is multiplied before it meets the row's columns."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from .expr import Algebra, Expr, apply, made, number, rebuilt

_MOVED = ("mul", "div")


class Folding(Algebra):
    """The algebra in which derivatives are taken; `columns` of a row say what a sum of equal parts is."""

    def __init__(self, columns: int) -> None:
        self.columns = columns

    def make(self, op: str, *args: Expr, **attrs: Any) -> Expr:
        rule = getattr(type(self), f"_{op}", None)
        if rule is not None:
            return rule(self, *args)
        if op in ("sum", "max_over"):
            (x,) = args
            return made(op, args, x.dims.replace("c", "")) if "c" in x.dims else x
        return apply(op, *args, **attrs)

    def _neg(self, x: Expr) -> Expr:
        if x.op == "neg":
            return x.args[0]
        if x.op == "number":
            return number(-x.value)
        if x.op == "sub":
            return self._sub(x.args[1], x.args[0])
        return apply("neg", x)

    def _add(self, x: Expr, y: Expr) -> Expr:
        p, q = self.value(x), self.value(y)
        if p is not None and q is not None:
            return number(p + q)
        if p == 0:
            return y
        if q == 0:
            return x
        if x is y:
            return self._mul(number(2), x)
        if y.op == "neg":
            return self._sub(x, y.args[0])
        return self._sub(y, x.args[0]) if x.op == "neg" else apply("add", x, y)

    def _sub(self, x: Expr, y: Expr) -> Expr:
        p, q = self.value(x), self.value(y)
        if p is not None and q is not None:
            return number(p - q)
        if q == 0:
            return x
        if x is y:
            return number(0)
        if p == 0:
            return self._neg(y)
        if y.op == "neg":
            return self._add(x, y.args[0])
        return self._neg(self._add(x.args[0], y)) if x.op == "neg" else apply("sub", x, y)

    def _mul(self, x: Expr, y: Expr) -> Expr:
        p, q = self.value(x), self.value(y)
        if q is not None:
            x, y, p, q = y, x, q, p
        if p is not None:
            if q is not None:
                return number(_product(p, q))
            if p in (0, 1):
                return y if p else number(0)
            if p < 0:
                return self._neg(self._mul(number(-p), y))
        if x.op == "neg":
            return self._neg(self._mul(x.args[0], y))
        if y.op == "neg":
            return self._neg(self._mul(x, y.args[0]))
        if p is not None and y.op == "mul" and (k := self.value(y.args[0])) is not None:
            return self._mul(number(_product(k, p)), y.args[1])
        for a, b in ((x, y), (y, x)):  # a number comes to the front, but stays with a row's, which is multiplied once
            if a.op == "mul" and self.value(a.args[0]) is not None and not ("c" in b.dims and "c" not in a.dims):
                return self._mul(a.args[0], self._mul(a.args[1], b))
        return self._met(x, y) or self._met(y, x) or apply("mul", x, y)

    def _met(self, tile: Expr, row: Expr) -> Expr | None:
        """tile (p * q) times a row's number, where q is one too: p * (q * row)."""
        if "c" in row.dims or "c" not in tile.dims or tile.op not in _MOVED:
            return None
        p, q = tile.args
        if tile.op == "div":
            return None if "c" in q.dims else self._mul(p, self._div(row, q))
        if "c" in q.dims:
            p, q = q, p
        return None if "c" in q.dims else self._mul(p, self._mul(row, q))

    def _div(self, x: Expr, y: Expr) -> Expr:
        p, q = self.value(x), self.value(y)
        if q is not None and q != 0:
            return self._mul(number(1 / q), x)
        if p == 0:
            return x
        if x.op == "neg" or y.op == "neg":
            found = self._div(*(z.args[0] if z.op == "neg" else z for z in (x, y)))
            return found if x.op == y.op else self._neg(found)
        if x.op == "mul" and self.value(x.args[0]) is not None and "c" in x.dims:
            return self._mul(x.args[0], self._div(x.args[1], y))
        if "c" not in y.dims and x.op == "mul" and "c" in x.dims:
            a, b = x.args if "c" in x.args[0].dims else x.args[::-1]
            if "c" not in b.dims:
                return self._mul(a, self._div(b, y))
        return apply("div", x, y)

    def _where(self, mask: Expr, x: Expr, y: Expr) -> Expr:
        """A mask may be a tensor of truth values, which are numbers here."""
        if x is y:
            return x
        known = self.value(mask)
        return apply("where", mask, x, y) if known is None else (x if known else y)

    def _constant(self, x: Expr) -> Expr:
        return x if x.op in ("number", "constant") else apply("constant", x)

    def _sum(self, x: Expr) -> Expr:
        """Of the columns; what a row's columns have in common comes out."""
        if "c" not in x.dims:
            return self._mul(number(self.columns), x)
        if x.op == "neg":
            return self._neg(self._sum(x.args[0]))
        if x.op == "div" and "c" not in x.args[1].dims:
            return self._div(self._sum(x.args[0]), x.args[1])
        if x.op == "mul":
            rows, tiles = self._parts(x)
            if rows is not None:
                return self._mul(self._sum(tiles), rows)
        if x.op in ("add", "sub"):
            # In two sums where a row's number comes out of one: it may be a sum, which this one then need not wait for.
            # What is centred sums to 0; otherwise a sum of differences stays one, which loses fewer digits.
            found = self.make(x.op, *map(self._sum, x.args))
            if all("c" in a.dims for a in x.args):
                if any(self._parts(a)[0] is not None for a in x.args):
                    return found
            elif self.value(found) == 0:
                return found
        return made("sum", (x,), x.dims.replace("c", ""))

    def _parts(self, x: Expr) -> tuple[Expr | None, Expr]:
        """A product as (its factors without columns, the rest)."""
        if x.op != "mul" or "c" not in x.dims:
            return (None, x) if "c" in x.dims else (x, number(1))
        (p, left), (q, right) = map(self._parts, x.args)
        if p is None and q is None:
            return None, x
        rows = q if p is None else p if q is None else self._mul(p, q)
        return rows, self._mul(left, right)


def _product(p: float, q: float) -> float:
    """49 (1 / 49) is 1, which it is not in fp64."""
    whole = round(p * q) if abs(p * q) < 2**52 else p * q
    return float(whole) if whole and abs(p * q - whole) <= 2**-52 * abs(whole) else p * q


def folded(roots: Iterable[Expr], columns: int) -> dict[Expr, Expr]:
    """Each value below the roots, made smaller."""
    algebra = Folding(columns)
    return rebuilt(roots, {}, lambda op, args, attrs, dims: algebra.make(op, *args, **dict(attrs)))
