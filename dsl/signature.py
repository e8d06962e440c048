"""Signatures: one sentence that says what an op does along each dim.

    x[*, K+], weight[N, K] -> y[*, N]

`*` stands for any leading dims, which are parallel. A formal is a capital name; it may stand for several dims of the
program at once. Its mark says the role:

    D     parallel: computed pointwise along it          D!    reduce: a statistic along it, then a parallel step
    K+    contract: summed away                          S~    window: reads a few neighbours
    S>    scan: a state flows along it                   S@    attend: reads a masked set along it
    S/    fold: combined within groups of neighbours

An operand name with `?` may be absent; a name with `...` (`k...`) stands for any number of operands, with both for
any number of which each may be absent.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

ROLES = {
    "": "parallel",
    "+": "contract",
    "!": "reduce",
    "~": "window",
    ">": "scan",
    "@": "attend",
    "?": "route",
    "/": "fold",
}
_OPERAND = re.compile(r"(\w+)(\.\.\.)?(\?)?\[([^\]]*)\]")
_FORMAL = re.compile(r"([A-Z][a-z0-9]*)([+!~>@?/]?)")


@dataclass(frozen=True)
class Formal:
    """A dim of a signature."""

    name: str
    role: str


@dataclass(frozen=True)
class Operand:
    """An operand or result: `formals` are its dims from the right, behind leading dims if `leading`."""

    name: str
    formals: tuple[Formal, ...]
    leading: bool
    optional: bool = False
    repeated: bool = False


@dataclass(frozen=True)
class Signature:
    """The parsed sentence."""

    text: str
    operands: tuple[Operand, ...]
    results: tuple[Operand, ...]

    @classmethod
    def parse(cls, text: str) -> Signature:
        left, arrow, right = text.partition("->")
        if not arrow:
            raise ValueError(f"a signature needs `->`: {text}")
        return cls(text, _operands(left), _operands(right))

    def operand(self, name: str) -> Operand:
        return next(o for o in self.operands + self.results if o.name == name)

    def role(self, formal: str) -> str:
        """The strongest role that a formal has in any operand."""
        roles = [f.role for o in self.operands for f in o.formals if f.name == formal]
        return next((r for r in roles if r != "parallel"), "parallel")

    def formals(self) -> tuple[str, ...]:
        """Every formal once, in order of appearance."""
        return tuple(dict.fromkeys(f.name for o in self.operands + self.results for f in o.formals))


def _operands(text: str) -> tuple[Operand, ...]:
    found = []
    for name, many, absent, dims in _OPERAND.findall(text):
        items = [d.strip() for d in dims.split(",") if d.strip()]
        leading = bool(items) and items[0] == "*"
        formals = []
        for item in items[leading:]:
            match = _FORMAL.fullmatch(item)
            if not match:
                raise ValueError(f"`{item}` is no formal in the signature `{text.strip()}`")
            formals.append(Formal(match[1], ROLES[match[2]]))
        found.append(Operand(name, tuple(formals), leading, bool(absent), bool(many)))
    return tuple(found)
