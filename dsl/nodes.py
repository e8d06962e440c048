"""From what the parser recognised to syntax nodes: one method for each rule of `grammar.lark`."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable
from typing import Any, NamedTuple

from . import syntax as sx
from .diagnostics import fail
from .source import Source, Span
from .tokens import Token

FORBIDDEN = frozenset(
    {"none", "true", "false", "and", "or", "not", "if", "elif", "else", "for", "in", "given", "return"}
)
"""Words that never are the name of something: where they are read they mean themselves."""

NESTING = frozenset(
    {
        "binary",
        "unary",
        "call",
        "index",
        "member",
        "members",
        "list_",
        "tuple_",
        "table",
        "comprehension",
        "choose",
        "arrow",
        "parenthesized",
        "if_",
        "for_",
        "scoped",
    }
)
"""Rules that count when the depth of a text is bounded: each is a step for everyone who walks the tree."""

_CONSTANTS = {"none": None, "true": True, "false": False}


class _Kind(NamedTuple):
    """The kind of an input, and whether it may be absent."""

    expr: sx.Expr
    optional: bool


Children = list[Any]


class Nodes:
    """Makes the nodes of a source. Each method gets the children of its rule (None for what is absent) and its span."""

    def __init__(self, source: Source):
        self.source = source

    def at(self, token: Token) -> Span:
        return Span(self.source, token.start, token.end)

    def named(self, token: Token) -> str:
        """The name that a construct binds. Raises `reserved-word`."""
        if token.text in FORBIDDEN:
            message = f"`{token.text}` is a word of the language and cannot be a name"
            raise fail("reserved-word", message, self.at(token), "choose another name")
        return token.text

    # --- files and declarations -------------------------------------------------------------------

    def start(self, c: Children, span: Span) -> sx.Module:
        whole = Span(self.source, 0, len(self.source.text))
        uses = tuple(x for x in c if isinstance(x, sx.Use))
        return sx.Module(uses, tuple(x for x in c if not isinstance(x, sx.Use)), span=whole)

    def use(self, c: Children, span: Span) -> sx.Use:
        *names, path = c
        return sx.Use(tuple(self.name([n], self.at(n)) for n in names), path.text[1:-1], self.at(path), span=span)

    def function(self, c: Children, span: Span) -> sx.Function:
        keyword, name, parameters, body = c
        return sx.Function(
            keyword.text,
            self.named(name),
            tuple(parameters or ()),
            tuple(body),
            self._doc(span),
            self.at(name),
            span=span,
        )

    def variant(self, c: Children, span: Span) -> sx.Variant:
        keyword, name, value, *rules = c
        return sx.Variant(
            keyword.text,
            self.named(name),
            value,
            tuple(rules[0]) if rules else (),
            self._doc(span),
            self.at(name),
            span=span,
        )

    def sheet(self, c: Children, span: Span) -> sx.Sheet:
        keyword, name, rules = c
        return sx.Sheet(keyword.text, self.named(name), tuple(rules), self._doc(span), self.at(name), span=span)

    def checkpoint(self, c: Children, span: Span) -> sx.Checkpoint:
        name, target, model, equations = c
        return sx.Checkpoint(
            self.named(name), target.text[1:-1], model, tuple(equations), self._doc(span), self.at(name), span=span
        )

    def _doc(self, span: Span) -> str:
        """The `##` lines right above a declaration."""
        lines: list[str] = []
        number = span.line - 1
        while number >= 1 and (line := self.source.line(number)).startswith("##"):
            lines.append(line[2:].strip())
            number -= 1
        return "\n".join(reversed(lines))

    def parameters(self, c: Children, span: Span) -> Children:
        return c

    def parameter(self, c: Children, span: Span) -> sx.Parameter:
        return sx.Parameter(self.named(c[0]), c[1], span=span)

    # --- statements -------------------------------------------------------------------------------

    def suite(self, c: Children, span: Span) -> list[sx.Statement]:
        return _flat(c)

    def line(self, c: Children, span: Span) -> list[sx.Statement]:
        return c

    def input(self, c: Children, span: Span) -> sx.Input:
        name, shape, kind, default = c
        return self._input(name, shape, kind, default, span)

    def plain_input(self, c: Children, span: Span) -> sx.Input | sx.Typed:
        name, kind, default = c
        if default is not None and isinstance(kind.expr, sx.Index):
            return self.typed([name, kind, default], span)
        return self._input(name, None, kind, default, span)

    def _input(self, name: Token, shape: Any, kind: _Kind | None, default: Any, span: Span) -> sx.Input:
        expr, optional = kind or (None, False)
        return sx.Input(self.named(name), shape, expr, optional, default, span=span)

    def coordinate_input(self, c: Children, span: Span) -> sx.CoordinateInput:
        dim, name, kind, default = c
        return sx.CoordinateInput(dim.text, name.text, kind.expr, kind.optional, default, span=span)

    def kind(self, c: Children, span: Span) -> _Kind:
        return _Kind(c[0], c[1] is not None)

    def assign(self, c: Children, span: Span) -> sx.Assign:
        *names, values = c
        return sx.Assign(tuple(map(self.named, names)), values, span=span)

    def assign_shaped(self, c: Children, span: Span) -> sx.Assign:
        name, shape, value = c
        return sx.Assign((self.named(name),), (value,), shape, span=span)

    def coordinate(self, c: Children, span: Span) -> sx.Coordinate:
        dim, name, value = c
        return sx.Coordinate(dim.text, name.text, value, span=span)

    def shared(self, c: Children, span: Span) -> sx.Assign:
        return sx.Assign((self.named(c[0]),), (c[1],), None, True, span=span)

    def typed(self, c: Children, span: Span) -> sx.Typed:
        *results, value = c
        kinds, shapes = zip(*map(self._result, results[1::2]), strict=True)
        return sx.Typed(tuple(map(self.named, results[::2])), kinds, shapes, value, span=span)

    def _result(self, kind: _Kind) -> tuple[str, tuple[sx.DimItem, ...]]:
        """Kind and dims of a result in a graph dump: `real[seq, heads]`."""
        e = kind.expr
        if isinstance(e, sx.Index) and isinstance(e.value, sx.Name) and not kind.optional:
            dims = [(a.value, a.span) for a in e.arguments if a.name is None]
            if len(dims) == len(e.arguments) and all(isinstance(dim, sx.Name) for dim, _ in dims):
                return e.value.id, tuple(
                    sx.DimItem(dim.id, span=span) for dim, span in dims if isinstance(dim, sx.Name)
                )
        message = "a typed line says a kind and dims for each result"
        raise fail("syntax", message, e.span, "expected `real[seq, hidden]`")

    def declare(self, c: Children, span: Span) -> sx.Declare:
        keyword, name, shape, value = c
        return sx.Declare(keyword.text, self.named(name), shape, value, span=span)

    def emit(self, c: Children, span: Span) -> sx.Emit:
        keyword, name, value = c
        return sx.Emit(keyword.text, name.text, value, span=span)

    def init(self, c: Children, span: Span) -> sx.InitRule:
        return sx.InitRule(c[0], c[1], span=span)

    def return_(self, c: Children, span: Span) -> sx.Return:
        return sx.Return(c[0], span=span)

    def values(self, c: Children, span: Span) -> tuple[sx.Expr, ...]:
        return tuple(c)

    def shape(self, c: Children, span: Span) -> tuple[sx.DimItem, ...]:
        return tuple(x for x in c if x is not None)

    def dim(self, c: Children, span: Span) -> sx.DimItem:
        if c[0].type == "NUMBER":
            return sx.DimItem(None, self.number(c, span), span=span)
        return sx.DimItem(self.named(c[0]), c[1], span=span)

    def if_(self, c: Children, span: Span) -> sx.If:
        *branches, otherwise = c
        pairs = zip(branches[::2], map(tuple, branches[1::2]), strict=True)
        return sx.If(tuple(pairs), tuple(otherwise or ()), span=span)

    def for_(self, c: Children, span: Span) -> sx.For:
        *names, source, body = c
        return sx.For(tuple(self.named(n) for n in names if n), source, tuple(body), span=span)

    # --- sheets and maps --------------------------------------------------------------------------

    def rules(self, c: Children, span: Span) -> list[sx.Rule]:
        return _flat(c)

    def rule_line(self, c: Children, span: Span) -> list[sx.Rule]:
        return c

    def scoped(self, c: Children, span: Span) -> sx.Scoped:
        return sx.Scoped(c[0], tuple(c[1]), span=span)

    def setting(self, c: Children, span: Span) -> sx.Setting:
        return sx.Setting(c[0].text, c[1], span=span)

    def apply(self, c: Children, span: Span) -> sx.Apply:
        return sx.Apply(c[0], c[1], span=span)

    def mesh(self, c: Children, span: Span) -> sx.Mesh:
        return sx.Mesh(tuple(c), span=span)

    def shard(self, c: Children, span: Span) -> sx.Shard:
        *dims, axes, between = c
        return sx.Shard(tuple(dims), axes, between and between.text, span=span)

    def axes(self, c: Children, span: Span) -> tuple[str, ...]:
        return tuple(token.text for token in c)

    def shardable(self, c: Children, span: Span) -> sx.Selector:
        return self.selector(c, span)

    def dotted(self, c: Children, span: Span) -> sx.Expr:
        made: sx.Expr = self.name(c, self.at(c[0]))
        for token in c[1:]:
            made = sx.Member(made, token.text, span=made.span.to(self.at(token)))
        return made

    def stages(self, c: Children, span: Span) -> sx.Stages:
        return sx.Stages(c[0].text, tuple(c[1:]), span=span)

    def recompute(self, c: Children, span: Span) -> sx.Recompute:
        return sx.Recompute(c[0], span=span)

    def expect(self, c: Children, span: Span) -> sx.Expect:
        what, per, comparison, bound = c
        return sx.Expect(what.text, per and per.text, comparison.text, bound, span=span)

    def selectors(self, c: Children, span: Span) -> tuple[sx.Selector, ...]:
        return tuple(c)

    def selector(self, c: Children, span: Span) -> sx.Selector:
        return sx.Selector(c[0], c[1] is not None, span=span)

    def equations(self, c: Children, span: Span) -> list[sx.Equation | sx.Ignore]:
        return _flat(c)

    def equation_line(self, c: Children, span: Span) -> list[sx.Equation | sx.Ignore]:
        return c

    def equation(self, c: Children, span: Span) -> sx.Equation:
        return sx.Equation(*c, span=span)

    def ignore(self, c: Children, span: Span) -> sx.Ignore:
        return sx.Ignore(tuple(self.string([token], self.at(token)) for token in c), span=span)

    # --- expressions ------------------------------------------------------------------------------

    def choose(self, c: Children, span: Span) -> sx.Choose:
        yes, condition, no = c
        return sx.Choose(condition, yes, no, span=span)

    def arrow(self, c: Children, span: Span) -> sx.Arrow:
        return sx.Arrow(c[0], c[1], span=span)

    def binary(self, c: Children, span: Span) -> sx.Binary:
        return sx.Binary(c[1].text, c[0], c[2], span=span)

    def unary(self, c: Children, span: Span) -> sx.Unary:
        return sx.Unary(c[0].text, c[1], span=span)

    def call(self, c: Children, span: Span) -> sx.Call:
        return sx.Call(c[0], c[1] or (), span=span)

    def index(self, c: Children, span: Span) -> sx.Index:
        return sx.Index(c[0], c[1] or (), span=span)

    def member(self, c: Children, span: Span) -> sx.Member:
        return sx.Member(c[0], c[1].text, span=span)

    def members(self, c: Children, span: Span) -> sx.Members:
        return sx.Members(c[0], c[1].items, span=span)

    def name(self, c: Children, span: Span) -> sx.Name:
        return sx.Name(c[0].text, span=span)

    def number(self, c: Children, span: Span) -> sx.Number:
        text = c[0].text
        plain = text.replace("_", "")
        value = int(plain) if plain.isdigit() and len(plain) < 400 else float(plain)
        if math.isinf(value):
            raise fail("too-large", "this number is too large to be held", span)
        return sx.Number(value, text, span=span)

    def string(self, c: Children, span: Span) -> sx.String:
        return sx.String(c[0].text[1:-1], span=span)

    def long_string(self, c: Children, span: Span) -> sx.String:
        inner = c[0].text[3:-3].replace("\r\n", "\n")
        return sx.String(textwrap.dedent(inner.removeprefix("\n")), True, span=span)

    def constant(self, c: Children, span: Span) -> sx.Constant:
        return sx.Constant(_CONSTANTS[c[0].text], span=span)

    def parenthesized(self, c: Children, span: Span) -> sx.Expr:
        return c[0]

    def tuple_(self, c: Children, span: Span) -> sx.TupleOf:
        return sx.TupleOf((c[0], *(c[1] or ())), span=span)

    def list_(self, c: Children, span: Span) -> sx.ListOf:
        return sx.ListOf(c[0] or (), span=span)

    def comprehension(self, c: Children, span: Span) -> sx.Comprehension:
        body, first, second, source, condition = c
        names = tuple(self.named(n) for n in (first, second) if n)
        return sx.Comprehension(body, names, source, condition, span=span)

    def table(self, c: Children, span: Span) -> sx.Table:
        return sx.Table(tuple(x for x in c if x is not None), span=span)

    def pair(self, c: Children, span: Span) -> sx.Pair:
        key, value = c
        quoted = key.type == "STRING"
        return sx.Pair(key.text[1:-1] if quoted else key.text, value, quoted, span=span)

    def arguments(self, c: Children, span: Span) -> tuple[sx.Argument, ...]:
        return tuple(c)

    def argument(self, c: Children, span: Span) -> sx.Argument:
        return sx.Argument(c[0], span=span)

    def keyword(self, c: Children, span: Span) -> sx.Argument:
        return sx.Argument(c[1], c[0].text, span=span)

    def given(self, c: Children, span: Span) -> sx.Argument:
        return sx.Argument(c[1], c[0].text, True, span=span)

    def range_(self, c: Children, span: Span) -> sx.Range:
        return sx.Range(*c, span=span)


def _flat(parts: Iterable[Any]) -> Any:
    """Lines are lists of statements or rules; a compound one stands for itself."""
    flat: Children = []
    for part in parts:
        if isinstance(part, list):
            flat.extend(part)
        else:
            flat.append(part)
    return flat
