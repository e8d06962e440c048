"""Expressions of chains as lines of Triton: what is used twice, or has a name in the spec, is a statement."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from ..lowering.chains.expr import REDUCTIONS, Expr, ordered
from ..lowering.chains.padding import IDENTITY, held
from ..lowering.chains.table import CALL, MUL, TABLE

_LONG = 84  # characters of a value, beyond which an operand of it gets a name
LONG_INSIDE = 56  # of one inside a `where`
_BOTH = {"r": "[:, None]", "c": "[None, :]"}
REDUCE = {"sum": "tl.sum", "max_over": "tl.max"}


def literal(value: float, columns: int, whole: bool = True) -> tuple[str, int]:
    """A number as text, and how tightly that binds; `2 / C` for parts of a row."""
    times = value * columns
    if columns > 8 and value and abs(times) <= 8 and times == int(times) and times / columns == value:
        return f"{int(times)} / C", MUL
    if value in (float("inf"), float("-inf")) or value != value:
        return f'float("{value}")', CALL
    return (str(int(value)) if whole and value == int(value) and abs(value) < 1e6 else repr(value)), CALL


def of_row(e: Expr, columns: int) -> Expr | None:
    """x where the value is 1 / C * x: it is printed as x / C."""
    if e.op == "mul" and e.args[0].op == "number" and literal(e.args[0].value, columns)[0] == "1 / C":
        return e.args[1]
    return None


class Printer:
    """Lines of one kernel, indented as it goes. A scope maps values to the names that they have there."""

    def __init__(self, named: Mapping[Expr, str], taken: Iterable[str], columns: int) -> None:
        self.named, self.columns = named, columns
        self.taken = set(taken)
        self.lines: list[str] = []
        self.depth = 1
        self.counts = {"t": 0, "s": 0}
        self.uses: dict[Expr, int] = {}
        self.masked = False
        self.padded: dict[Expr, float | None] = {}
        self.names: dict[Expr, str] = {}

    def line(self, text: str) -> None:
        self.lines.append("    " * self.depth + text)

    def begin(self, values: Iterable[Expr], masked: bool) -> None:
        """What the kernel is to compute; masked: some columns of its tiles are none of the tensors'."""
        values = list(values)
        self.masked, self.padded = masked, held(values, "c")
        self.count(values, {})

    def count(self, values: Iterable[Expr], scope: Mapping[Expr, str]) -> None:
        """How often each value is used in what is left to compute."""
        values = list(values)
        self.uses = {}
        for e in ordered(values, scope):
            for a in () if e in scope else e.args:
                self.uses[a] = self.uses.get(a, 0) + 1
        for e in values:
            self.uses[e] = self.uses.get(e, 0) + 1

    def load(self, e: Expr) -> str:
        """The text of a load; a kernel says how."""
        raise NotImplementedError

    def name(self, e: Expr) -> str:
        """The spec's name, else `t1`, `t2` for tiles and `s1`, `s2` for what a row has one of; the same wherever a
        kernel computes it again."""
        if e not in self.names:
            wanted = self.named.get(e) or (e.name if e.op == "load" else None)
            while wanted is None or wanted in self.taken:
                kind = "t" if "c" in e.dims else "s"
                if wanted is None or e.op != "load":
                    self.counts[kind] += 1
                wanted = f"{wanted}_" if e.op == "load" else f"{kind}{self.counts[kind]}"
            self.taken.add(wanted)
            self.names[e] = wanted
        return self.names[e]

    def stands_alone(self, e: Expr, user: Expr | None) -> bool:
        """Whether a value is a statement of its own."""
        if e.op == "number":
            return False
        if e.op in ("load", *REDUCTIONS) or e in self.named or self.uses.get(e, 0) > 1:
            return True
        return "c" not in e.dims and "r" in e.dims and user is not None and "c" in user.dims

    def text(self, e: Expr, scope: dict[Expr, str], user: Expr | None = None) -> tuple[str, int]:
        """The value as text, after the statements that it needs, and how tightly it binds."""
        if e in scope:
            return scope[e], CALL
        if e.op == "number":
            return literal(e.value, self.columns)
        found = self.computed(e, scope)
        if not self.stands_alone(e, user):
            return found
        return self.assign(e, found[0], scope), CALL

    def assign(self, e: Expr, text: str, scope: dict[Expr, str]) -> str:
        name = scope[e] = self.name(e)
        self.line(f"{name} = {text}")
        return name

    def computed(self, e: Expr, scope: dict[Expr, str]) -> tuple[str, int]:
        if e.op == "load":
            return self.load(e), CALL
        if e.op in REDUCTIONS:
            return f"{REDUCE[e.op]}({self.filled(e, scope)}, axis={int('r' in e.dims)})", CALL
        if (part := of_row(e, self.columns)) is not None and "c" not in e.dims:
            return f"{self.operand(part, e, MUL, scope)} / C", MUL
        op = TABLE[e.op]
        for i, a in enumerate(e.args):  # what the text repeats is computed once
            if op.text.count(f"{{{i}}}") > 1 and a.op != "number" and a not in scope:
                text = self.text(a, scope, e)[0]
                if a not in scope:
                    self.assign(a, text, scope)
        while True:
            args = [self.operand(a, e, need, scope) for a, need in zip(e.args, op.needs, strict=True)]
            text = op.text.format(*args, **dict(e.attrs))
            open_ = [a for a in e.args if a not in scope and a.op != "number"]
            if len(text) <= _LONG or not open_:
                return text, op.binds
            longest = max(open_, key=lambda a: len(self.text(a, scope, e)[0]))
            self.assign(longest, self.text(longest, scope, e)[0], scope)

    def filled(self, e: Expr, scope: dict[Expr, str]) -> str:
        """What is reduced, with the identity in columns that are none, unless it is there already."""
        (x,) = e.args
        text = self.text(x, scope, e)[0]
        if not self.masked or self.padded[x] == IDENTITY[e.op]:
            return text
        if len(text) > LONG_INSIDE and x not in scope:
            text = self.assign(x, text, scope)
        mask = "mask_c[None, :]" if "r" in x.dims else "mask_c"
        return f"tl.where({mask}, {text}, {literal(IDENTITY[e.op], self.columns, False)[0]})"

    def operand(self, x: Expr, user: Expr, need: int, scope: dict[Expr, str]) -> str:
        if x.op == "number":
            text, binds = literal(x.value, self.columns, whole=TABLE[user.op].binds != CALL)
        else:
            text, binds = self.text(x, scope, user)
        spread = _BOTH.get(x.dims, "") if user.dims == "rc" and TABLE[user.op].spreads else ""
        return f"({text}){spread}" if binds < (CALL if spread else need) else f"{text}{spread}"


def meaning(e: Expr, named: Mapping[Expr, str], columns: int, top: bool = False) -> tuple[str, int]:
    """The value as one line of math, for a comment: other named values by their names."""
    if not top and e in named:
        return named[e], CALL
    if e.op == "number":
        return literal(e.value, columns)
    if e.op == "load":
        return e.name, CALL
    if e.op in REDUCTIONS:
        return f"{'sum' if e.op == 'sum' else 'max'}_c({meaning(e.args[0], named, columns)[0]})", CALL
    op = TABLE[e.op]
    if (part := of_row(e, columns)) is not None:
        text, binds = meaning(part, named, columns)
        return (f"({text})" if binds < MUL else text) + " / C", MUL
    parts = []
    for a, need in zip(e.args, op.needs, strict=True):
        text, binds = meaning(a, named, columns)
        parts.append(f"({text})" if binds < need and op.binds != CALL else text)
    if op.binds == CALL:
        words = {"at_least": "max", "at_most": "min", "maximum": "max", "minimum": "min"}
        return f"{words.get(e.op, e.op)}({', '.join(parts)})", CALL
    return op.text.format(*parts), op.binds
