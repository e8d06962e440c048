"""From syntax nodes to canonical text, with the fewest parentheses: `parse(print_module(m)) == m`."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Iterator
from fractions import Fraction

from . import syntax as sx
from .diagnostics import InternalError

WIDTH = 120
INDENT = 4

# How tightly an expression holds together: what may stand where is the chain of rules in `grammar.lark`.
EXPR, TEST, CONJ, NEGATION, COMPARISON, SUM, TERM, FACTOR, POWER, POSTFIX = range(10)
_LEVEL = {"or": TEST, "and": CONJ, "+": SUM, "-": SUM, "*": TERM, "/": TERM, "//": TERM, "%": TERM, "^": POWER}


def print_expr(expr: sx.Expr) -> str:
    """An expression on one line (long strings keep their lines)."""
    return _expr(expr, EXPR)


def print_module(module: sx.Module) -> str:
    """A file. Lines longer than 120 columns are broken at commas."""
    parts = ["\n".join(_use(u) for u in module.uses)] if module.uses else []
    parts += ["\n".join(_declaration(d)) for d in module.declarations]
    return "\n\n".join(parts) + "\n" if parts else ""


# --- expressions ---------------------------------------------------------------------------------


def level(expr: sx.Expr) -> int:
    """How tightly the outermost operator of an expression binds."""
    match expr:
        case sx.Choose() | sx.Arrow() | sx.Range():
            return EXPR
        case sx.Unary(operator=operator):
            return NEGATION if operator == "not" else FACTOR
        case sx.Binary(operator=operator):
            return _LEVEL.get(operator, COMPARISON)
        case sx.Number(value=value, text=""):
            return TERM if isinstance(value, Fraction) else FACTOR if value < 0 else POSTFIX
    return POSTFIX


def _expr(expr: sx.Expr, least: int) -> str:
    """An expression where only one that binds at least so tightly may stand."""
    text = _bare(expr)
    return f"({text})" if level(expr) < least else text


def _bare(expr: sx.Expr) -> str:
    match expr:
        case sx.Name(id=name):
            return name
        case sx.Number():
            return _number(expr)
        case sx.String():
            return _string(expr)
        case sx.Constant(value=value):
            return {None: "none", True: "true", False: "false"}[value]
        case sx.ListOf(items=items):
            return f"[{_arguments(items)}]"
        case sx.TupleOf(items=items):
            return f"({_arguments(items)}{',' if len(items) == 1 else ''})"
        case sx.Range(first=first, last=last, step=step):
            tail = f" step {_expr(step, SUM)}" if step is not None else ""
            return f"{_expr(first, SUM)} .. {_expr(last, SUM)}{tail}"
        case sx.Comprehension(body=body, names=names, source=source, condition=condition):
            tail = f" if {_expr(condition, TEST)}" if condition is not None else ""
            return f"[{_expr(body, EXPR)} for {', '.join(names)} in {_expr(source, TEST)}{tail}]"
        case sx.Table(pairs=pairs):
            return "{" + ", ".join(_pair(p) for p in pairs) + "}"
        case sx.Call(function=function, arguments=arguments):
            return f"{_expr(function, POSTFIX)}({_arguments(arguments)})"
        case sx.Index(value=value, arguments=arguments):
            return f"{_expr(value, POSTFIX)}[{_arguments(arguments)}]"
        case sx.Member(value=value, name=name):
            return f"{_expr(value, POSTFIX)}.{name}"
        case sx.Members(value=value, items=items):
            return f"{_expr(value, POSTFIX)}.[{_arguments(items)}]"
        case sx.Unary(operator="not", value=value):
            return f"not {_expr(value, NEGATION)}"
        case sx.Unary(value=value):
            return f"-{_expr(value, FACTOR)}"
        case sx.Binary():
            return _binary(expr)
        case sx.Choose(condition=condition, yes=yes, no=no):
            return f"{_expr(yes, TEST)} if {_expr(condition, TEST)} else {_expr(no, EXPR)}"
        case sx.Arrow(source=source, target=target):
            return f"{_expr(source, SUM)} -> {_expr(target, SUM)}"
    raise InternalError(f"no expression: {expr!r}")


def _binary(expr: sx.Binary) -> str:
    """Chains nest to the left and may be long: the left side is walked, not recursed into."""
    tails: list[str] = []
    at = expr
    while True:
        own = level(at)
        left, right = {COMPARISON: (SUM, SUM), POWER: (POSTFIX, FACTOR)}.get(own, (own, own + 1))
        tails.append(f" {at.operator} {_expr(at.right, right)}")
        below = at.left
        if not (isinstance(below, sx.Binary) and level(below) >= left):
            return _expr(below, left) + "".join(reversed(tails))
        at = below


def _number(number: sx.Number) -> str:
    value = number.value
    if number.text:
        return number.text
    if isinstance(value, Fraction):
        return f"{value.numerator} / {value.denominator}"
    text = repr(value)
    if not re.fullmatch(r"-?\d+(\.\d+)?(e[+-]?\d+)?", text):
        raise InternalError(f"no number of the language: {text}")
    return text


def _string(string: sx.String) -> str:
    value = string.value
    if not string.long and '"' not in value and "\n" not in value:
        return f'"{value}"'
    if '"""' in value or value.endswith('"'):
        raise InternalError("a string of the language has no three quotes in a row, and none at its end")
    return '"""\n' + textwrap.indent(value, " " * 2 * INDENT) + '"""'


def _pair(pair: sx.Pair) -> str:
    key = f'"{pair.key}"' if pair.quoted else pair.key
    return f"{key}: {_expr(pair.value, EXPR)}"


def _arguments(arguments: Iterable[sx.Argument]) -> str:
    return ", ".join(map(_argument, arguments))


def _argument(argument: sx.Argument) -> str:
    if argument.name is None:
        return _expr(argument.value, EXPR)
    return f"{'given ' if argument.given else ''}{argument.name} = {_expr(argument.value, EXPR)}"


# --- declarations --------------------------------------------------------------------------------


def _use(use: sx.Use) -> str:
    return f'use {", ".join(n.id for n in use.names)} from "{use.path}"'


def _declaration(d: sx.Declaration) -> Iterator[str]:
    yield from (f"## {line}".rstrip() for line in d.doc.splitlines())
    match d:
        case sx.Function():
            yield broken(f"{d.keyword} {d.name}({', '.join(map(_parameter, d.parameters))}):")
            yield from _body(d.body, INDENT)
        case sx.Variant():
            yield broken(f"{d.keyword} {d.name} = {_expr(d.value, EXPR)}{' with:' if d.rules else ''}")
            yield from _rules(d.rules, INDENT)
        case sx.Sheet():
            yield f"{d.keyword} {d.name}:"
            yield from _rules(d.rules, INDENT)
        case sx.Checkpoint():
            yield f'checkpoint {d.name} "{d.target}" for {d.model.id}:'
            yield from (broken(" " * INDENT + _equation(e)) for e in d.equations)


def _parameter(parameter: sx.Parameter) -> str:
    return f"{parameter.name} = {_expr(parameter.default, EXPR)}" if parameter.default is not None else parameter.name


def _equation(equation: sx.Equation | sx.Ignore) -> str:
    if isinstance(equation, sx.Ignore):
        return f"ignore {', '.join(map(_string, equation.patterns))}"
    form = f" as {_expr(equation.form, POSTFIX)}" if equation.form is not None else ""
    condition = f" if {_expr(equation.condition, TEST)}" if equation.condition is not None else ""
    return f"{_selectors(equation.ours)} = {_expr(equation.theirs, TEST)}{form}{condition}"


def _selectors(selectors: Iterable[sx.Selector]) -> str:
    return ", ".join(f"{_expr(s.value, TEST)}{'?' if s.optional else ''}" for s in selectors)


# --- statements ----------------------------------------------------------------------------------


def _body(body: Iterable[sx.Statement], indent: int) -> Iterator[str]:
    for statement in body:
        match statement:
            case sx.If(branches=branches, otherwise=otherwise):
                for i, (condition, inner) in enumerate(branches):
                    yield broken(" " * indent + f"{'elif' if i else 'if'} {_expr(condition, EXPR)}:")
                    yield from _body(inner, indent + INDENT)
                if otherwise:
                    yield " " * indent + "else:"
                    yield from _body(otherwise, indent + INDENT)
            case sx.For(names=names, source=source, body=inner):
                yield broken(" " * indent + f"for {', '.join(names)} in {_expr(source, EXPR)}:")
                yield from _body(inner, indent + INDENT)
            case _:
                yield broken(" " * indent + _statement(statement))


def _statement(s: sx.Statement) -> str:
    match s:
        case sx.Input():
            return f"{s.name}{_shape(s.shape)}{_kind(s.kind, s.optional, s.default)}"
        case sx.CoordinateInput():
            return f"{s.dim}.{s.name}{_kind(s.kind, s.optional, s.default)}"
        case sx.Assign():
            left = ", ".join(s.names) + _shape(s.shape)
            return f"{'shared ' if s.shared else ''}{left} = {_values(s.values)}"
        case sx.Typed():
            results = (f"{n}: {k}{_shape(d)}" for n, k, d in zip(s.names, s.kinds, s.shapes, strict=True))
            return f"{', '.join(results)} = {_expr(s.value, EXPR)}"
        case sx.Coordinate():
            return f"{s.dim}.{s.name} = {_expr(s.value, EXPR)}"
        case sx.Declare():
            value = f" = {_expr(s.value, EXPR)}" if s.value is not None else ""
            return f"{s.keyword} {s.name}{_shape(s.shape)}{value}"
        case sx.Emit():
            return f"{s.keyword} {s.name} = {_expr(s.value, EXPR)}"
        case sx.InitRule():
            return f"init {_selectors(s.selectors)}: {_expr(s.value, EXPR)}"
        case sx.Return():
            return f"return {_values(s.values)}"
    raise InternalError(f"no statement: {s!r}")


def _values(values: Iterable[sx.Expr]) -> str:
    return ", ".join(_expr(v, EXPR) for v in values)


def _shape(shape: tuple[sx.DimItem, ...] | None) -> str:
    return "" if shape is None else f"[{', '.join(map(_dim, shape))}]"


def _dim(item: sx.DimItem) -> str:
    if item.size is None:
        return item.name or ""
    size = _expr(item.size, SUM)
    return f"{item.name} = {size}" if item.name else size


def _kind(kind: sx.Expr | None, optional: bool, default: sx.Expr | None) -> str:
    if kind is None:
        return ""
    value = f" = {_expr(default, EXPR)}" if default is not None else ""
    return f": {_expr(kind, POSTFIX)}{'?' if optional else ''}{value}"


# --- rules ---------------------------------------------------------------------------------------


def _rules(rules: Iterable[sx.Rule], indent: int) -> Iterator[str]:
    for rule in rules:
        if isinstance(rule, sx.Scoped):
            yield broken(" " * indent + f"in {_selectors(rule.selectors)}:")
            yield from _rules(rule.rules, indent + INDENT)
        else:
            yield broken(" " * indent + _rule(rule))


def _rule(rule: sx.Rule) -> str:
    match rule:
        case sx.Setting(name=name, value=value):
            return f"{name} = {_expr(value, EXPR)}"
        case sx.Apply(selectors=selectors, value=value):
            return f"{_selectors(selectors)}: {_expr(value, EXPR)}"
        case sx.Mesh(axes=axes):
            return f"mesh {', '.join(map(_rule, axes))}"
        case sx.Shard(dims=dims, axes=names, between=between):
            tail = f" between {between}" if between else ""
            return f"shard {_selectors(dims)} over {', '.join(names)}{tail}"
        case sx.Stages(axis=axis, settings=settings):
            return ", ".join([f"stages over {axis}", *map(_rule, settings)])
        case sx.Recompute(selectors=selectors):
            return f"recompute {_selectors(selectors)}"
        case sx.Expect(what=what, per=per, comparison=comparison, bound=bound):
            return f"expect {what}{f' per {per}' if per else ''} {comparison} {_expr(bound, SUM)}"
    raise InternalError(f"no rule: {rule!r}")


# --- long lines ----------------------------------------------------------------------------------

_PIECES = re.compile(r'"""(?:.|\n)*?"""|"[^"\n]*"|#[^\n]*|[\[({})\],]')


def broken(line: str) -> str:
    """A line of at most 120 columns, or several: broken at the outermost comma that fits, aligned behind the bracket.

    What has no comma in brackets stays as long as it is, and so does a line with a string of several lines.
    """
    done: list[str] = []
    columns: list[int] = []
    while len(line) > WIDTH and "\n" not in line:
        cut = _cut(line, columns)
        if cut is None:
            break
        end, columns = cut
        done.append(line[:end])
        line = " " * columns[-1] + line[end:].lstrip(" ")
    return "\n".join([*done, line])


def _cut(line: str, columns: list[int]) -> tuple[int, list[int]] | None:
    """Where to break a line, and the columns behind the brackets open there; `columns` are of those open before."""
    opened = list(columns)
    best: tuple[int, list[int]] | None = None
    for match in _PIECES.finditer(line):
        piece, at = match[0], match.start()
        if at >= WIDTH:
            break
        if piece in "([{":
            opened.append(at + 1)
        elif piece in ")]}" and opened:
            opened.pop()
        elif piece == "," and opened and opened[-1] < at and (best is None or len(opened) <= len(best[1])):
            best = (at + 1, list(opened))
    return best
