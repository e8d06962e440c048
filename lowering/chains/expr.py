"""Expressions over tiles of rows and columns: what a chain computes, and what its gradients compute.

A value has dims: `rc` a tile x[r, c], `r` a statistic of each row, `c` a weight, "" a number. Operands of different
dims broadcast, and nobody says so: the dims of a result are those of its operands together.
Equal expressions are one object, so that a value that is used twice is computed once.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from .table import DEFINED, TABLE

MONOIDS = ("sum", "max")
_DIMS = ("rc", "r", "c", "")


class Unfit(ValueError):
    """No kernel is generated for a chain; the text says what is in the way, in words for who wrote the spec."""


@dataclass(frozen=True)
class View:
    """How a chain's tile lies in a tensor.

    Row r of the chain reads row (r // divide) % modulo of the tensor (None: of r // divide). Its columns begin at
    column `start` of the tensor's row, which has `width` columns (None: the chain's own).
    """

    divide: int = 1
    modulo: int | None = None
    start: int = 0
    width: int | None = None

    def __post_init__(self) -> None:
        if self.divide < 1 or self.start < 0 or (self.modulo is not None and self.modulo < 1):
            raise ValueError(f"not a view: {self}")

    @property
    def period(self) -> int:
        """After how many rows of the chain the rows of the tensor come again; 1 where they never do."""
        return self.divide * self.modulo if self.modulo is not None else 1


WHOLE = View()


@dataclass(frozen=True, eq=False)
class Expr:
    """A value. `op` is `load`, `number`, `sum`, `max_over` or one of the table; equal ones are one object."""

    op: str
    args: tuple[Expr, ...]
    dims: str
    attrs: tuple[tuple[str, Any], ...] = ()

    def __getattr__(self, name: str) -> Any:
        for key, value in self.__dict__.get("attrs", ()):
            if key == name:
                return value
        raise AttributeError(f"{self.op} has no `{name}`")

    def __repr__(self) -> str:
        of = [*map(repr, self.args), *(f"{k}={v!r}" for k, v in self.attrs)]
        return f"{self.op}({', '.join(of)})"


_KNOWN: weakref.WeakValueDictionary[Any, Expr] = weakref.WeakValueDictionary()


def made(op: str, args: tuple[Expr, ...], dims: str, attrs: tuple[tuple[str, Any], ...] = ()) -> Expr:
    """The one expression that is all this."""
    if dims not in _DIMS:
        raise ValueError(f"dims are one of {', '.join(map(repr, _DIMS))}, not {dims!r}")
    key = (op, tuple(map(id, args)), dims, tuple((k, repr(v)) for k, v in attrs))
    found = _KNOWN.get(key)
    if found is None:
        found = _KNOWN[key] = Expr(op, args, dims, attrs)  # it holds its operands, so their ids stay theirs
    return found


def load(name: str, dims: str, view: View = View(), grad: bool = True, drawn: bool = False) -> Expr:
    """A tensor. `grad`: whether a gradient is wanted; `drawn`: int64, what `dropped` counts on from, or not there.

    A tensor whose rows come again (a view with `modulo`) has no `r` for a kernel: one program reads one of its rows.
    """
    if view.modulo is not None and "r" not in dims:
        raise ValueError(f"`{name}` has no rows to read modulo {view.modulo}")
    seen = dims.replace("r", "") if view.modulo is not None else dims
    return made("load", (), seen, (("name", name), ("view", view), ("grad", grad and not drawn), ("drawn", drawn)))


def number(value: float) -> Expr:
    """A constant of the spec."""
    return made("number", (), "", (("value", float(value)),))


def union(args: Iterable[Expr]) -> str:
    """The dims of a result of these."""
    have = "".join(a.dims for a in args)
    return "".join(d for d in "rc" if d in have)


def apply(op: str, *args: Expr, **attrs: Any) -> Expr:
    """A pointwise op of the table, or one that is said in terms of those (silu, gelu, clip, pow, ...)."""
    if op in DEFINED:
        return DEFINED[op](_PLAIN, *args, **attrs)
    if op not in TABLE:
        raise Unfit(f"`{op}` has no text for a kernel")
    if len(args) != TABLE[op].arity:
        raise ValueError(f"`{op}` has {TABLE[op].arity} operands, not {len(args)}")
    if op == "where" and args[0].op in ("load", "constant", "where"):  # a tensor of truth values is one of numbers here
        args = (apply("ne", args[0], number(0)), *args[1:])
    return made(op, args, union(args), tuple(sorted(attrs.items())))


class Algebra:
    """The ops of the table as methods, plain numbers among their operands: what definitions and derivatives speak."""

    def __getattr__(self, op: str) -> Any:
        return lambda *args, **attrs: self.make(op, *map(self.expr, args), **attrs)

    def make(self, op: str, *args: Expr, **attrs: Any) -> Expr:
        return apply(op, *args, **attrs)

    @staticmethod
    def expr(x: Expr | float) -> Expr:
        return x if isinstance(x, Expr) else number(x)

    @staticmethod
    def value(x: Expr | float) -> float | None:
        """The number that it is, None where it is none."""
        if not isinstance(x, Expr):
            return float(x)
        return x.value if x.op == "number" else None


_PLAIN = Algebra()


def reduce(monoid: str, x: Expr) -> Expr:
    """The sum or the largest of a row's columns."""
    if monoid not in MONOIDS:
        raise Unfit(f"`{monoid}` is not a reduction of chains: they have {' and '.join(MONOIDS)}")
    if "c" not in x.dims:
        raise ValueError("a reduction over columns of what has none")
    return made("sum" if monoid == "sum" else "max_over", (x,), x.dims.replace("c", ""))


REDUCTIONS = ("sum", "max_over")


@dataclass(frozen=True)
class Output:
    """A tensor that a chain gives; several with one name and different columns of `view` write one tensor.

    dims `r` are fp32, `rc` of the dtype of the chain's first tile. `grad`: whether gradients come back through it.
    """

    name: str
    value: Expr
    dims: str = "rc"
    view: View = WHOLE
    grad: bool = True

    def __post_init__(self) -> None:
        if self.dims not in ("rc", "r") or not set(self.value.dims) <= set(self.dims):
            raise ValueError(f"output `{self.name}` of dims {self.dims!r} is a value of dims {self.value.dims!r}")
        if self.view.divide != 1 or self.view.modulo is not None:
            raise ValueError(f"output `{self.name}`: each row is written once")


@dataclass(frozen=True)
class Chain:
    """What becomes a kernel. `columns` of a row; `named`: the spec's names of values; `lines`: of the spec."""

    name: str
    columns: int
    outputs: tuple[Output, ...]
    named: tuple[tuple[str, Expr], ...] = ()
    lines: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.columns < 1 or not self.outputs:
            raise ValueError(f"chain `{self.name}` has {self.columns} columns and {len(self.outputs)} outputs")
        loads_of([o.value for o in self.outputs])


def ordered(roots: Iterable[Expr], stop: Iterable[Expr] = ()) -> list[Expr]:
    """Everything that the roots are made of, operands first, in one order; not what lies behind `stop`."""
    seen: dict[Expr, None] = {}
    ends = set(stop)
    for root in roots:
        stack: list[tuple[Expr, bool]] = [(root, False)]
        while stack:
            node, done = stack.pop()
            if node in seen:
                continue
            if done:
                seen[node] = None
                continue
            stack.append((node, True))
            if node not in ends:
                stack.extend((a, False) for a in reversed(node.args))
    return list(seen)


def loads_of(roots: Iterable[Expr]) -> list[Expr]:
    """The tensors that they read, in the order of first use. Raises ValueError where one name is two shapes."""
    found = [e for e in ordered(roots) if e.op == "load"]
    kinds: dict[str, tuple[Any, ...]] = {}
    for e in found:
        kind = ("r" in e.dims, "c" in e.dims, e.view.divide, e.view.modulo, e.view.width, e.grad, e.drawn)
        if kinds.setdefault(e.name, kind) != kind:
            raise ValueError(f"`{e.name}` is read in two ways that differ in more than the first column")
    return found


def level_of(roots: Iterable[Expr]) -> dict[Expr, int]:
    """How many reductions over columns lie one behind another below each value."""
    found: dict[Expr, int] = {}
    for e in ordered(roots):
        found[e] = max((found[a] for a in e.args), default=0) + (e.op in REDUCTIONS)
    return found


def rebuilt(roots: Iterable[Expr], change: dict[Expr, Expr], how: Any = None) -> dict[Expr, Expr]:
    """Each value with `change` put in place of its parts; `how(op, args, dims, attrs)` makes the new ones."""
    how = how or (lambda op, args, attrs, dims: made(op, args, dims, attrs))
    found: dict[Expr, Expr] = dict(change)
    for e in ordered(roots, change):
        if e not in found:
            args = tuple(found[a] for a in e.args)
            found[e] = how(e.op, args, e.attrs, e.dims) if e.args else e
    return found
