"""Whether every name of a file stands for something, before anything is elaborated.

A name is a parameter, an input, a dim, a variable, a declaration in scope, or a word of the language. Selectors name
parts of a model: any variable, block or dim of any file in reach. What only elaboration can know (members, the parts
that a standalone sheet will meet) is left to it. The walk keeps its own stack, since a sum may nest thousands deep.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from typing import Any
from weakref import WeakKeyDictionary

from . import syntax as sx
from .bindings import bound_twice
from .diagnostics import Diagnostic, Label, did_you_mean, near_or_all
from .load import File, Found, standard_file, standard_index
from .sheets import sheet_errors
from .source import Span
from .vocabulary import BUILTINS, KINDS, OPS, SELECTING_ARGUMENTS

SIZED = frozenset({"linear", "embed", "conv", "take"})
"""Ops whose target dims must exist: their sizes come from nowhere else."""

OWN_PARTS = frozenset({"out", "weight", "bias", "scale", "blocks", "parts", "rows", "columns"})
"""What a selector may name although no file binds it: parts of ops, and the call in a `return`."""

_HOLE = re.compile(r"\{([A-Za-z_][^{}\n\"]*)\}")
_WORD = re.compile(r"(?<![\w.])[A-Za-z_]\w*(?!\w)")
_IN_HOLE = re.compile(r"[\w.()\[\], +*-]*")


def check_names(file: File) -> list[Diagnostic]:
    """Everything wrong with the names of a file, in the order of the text. Never raises for a parsed file.

    Codes: unknown-name, duplicate-name, no-such-parameter, too-many-arguments, duplicate-argument, shadows-op, and
    those of `sheets.py` and `bindings.py`.
    """
    found: list[Diagnostic] = []
    for declaration in file.module.declarations:
        found += _Checker(file, declaration).check()
        found += sheet_errors(file, declaration)
        found += bound_twice(declaration)
    return sorted(found, key=lambda d: d.primary.span.start)


class _Scope:
    """Names bound so far; those of a loop or comprehension end with it."""

    __slots__ = ("names", "outer")

    def __init__(self, names: Iterable[str] = (), outer: _Scope | None = None):
        self.names = set(names)
        self.outer = outer

    def __contains__(self, name: str) -> bool:
        scope: _Scope | None = self
        while scope is not None:
            if name in scope.names:
                return True
            scope = scope.outer
        return False

    def all(self) -> set[str]:
        return self.names | (self.outer.all() if self.outer else set())


Work = tuple[Callable[..., None], Any, _Scope]


class _Checker:
    """The names of one declaration."""

    def __init__(self, file: File, declaration: sx.Declaration):
        self.file = file
        self.declaration = declaration
        self.keyword = getattr(declaration, "keyword", "checkpoint")
        self.found: list[Diagnostic] = []
        self.reported: set[str] = set()
        self.stack: list[Work] = []

    def check(self) -> list[Diagnostic]:
        d = self.declaration
        if isinstance(d, sx.Function):
            self._function(d)
        elif isinstance(d, sx.Checkpoint):
            self._checkpoint(d)
        else:
            self._sheet_like(d)
        return self.found

    def later(self, work: Iterable[Work]) -> None:
        """Put work before all that waits, its first item first."""
        self.stack.extend(reversed(list(work)))

    def run(self) -> None:
        while self.stack:
            step, item, scope = self.stack.pop()
            step(item, scope)

    # --- what names stand for ----------------------------------------------------------------------

    def is_declared(self, name: str) -> bool:
        return name in self.file.declared or name in self.file.used or name in standard_index()

    def resolve(self, name: str, span: Span, scope: _Scope) -> None:
        if not (name in scope or name in BUILTINS or self.is_declared(name)):
            self.unknown(name, span, scope.all() | BUILTINS.keys() | self.file.names(), "something")

    def resolve_part(self, name: str, span: Span, scope: _Scope) -> None:
        """A name in a selector: a part of some model in reach."""
        if name in scope or name in BUILTINS or name in OWN_PARTS or self.is_declared(name):
            return
        if name not in parts_in_reach(self.file):
            known = scope.all() | BUILTINS.keys() | self.file.names() | parts_in_reach(self.file)
            self.unknown(name, span, known, "a part")

    def unknown(self, name: str, span: Span, known: Iterable[str], what: str) -> None:
        """Report a name once for each declaration: one misspelt binding is one error, however often it is read."""
        if name not in self.reported:
            self.reported.add(name)
            self.found.append(
                Diagnostic(
                    "unknown-name",
                    f"nothing is named `{name}` here",
                    Label(span, "not found"),
                    help=did_you_mean(name, known, what),
                )
            )

    # --- functions ---------------------------------------------------------------------------------

    def _function(self, d: sx.Function) -> None:
        scope = _Scope(p.name for p in d.parameters)
        inputs = [s for s in d.body if isinstance(s, sx.Input)]
        for statement in inputs:
            scope.names.add(statement.name)
            scope.names.update(i.name for i in statement.shape or () if i.name is not None)
        self._duplicates(d, inputs)
        self._shadows(d.name, d.name_span)
        for parameter in d.parameters:
            self._shadows(parameter.name, _head(parameter.span, parameter.name))
        self.later(
            [
                *((self.expr, p.default, scope) for p in d.parameters if p.default is not None),
                *((self.statement, s, scope) for s in d.body),
            ]
        )
        self.run()

    def _duplicates(self, d: sx.Function, inputs: list[sx.Input]) -> None:
        seen: dict[str, tuple[str, Span]] = {}
        items: list[tuple[str, sx.Parameter | sx.Input]] = [("parameter", p) for p in d.parameters]
        items += [("input", i) for i in inputs]
        for what, item in items:
            span = _head(item.span, item.name)
            if item.name in seen:
                before, first = seen[item.name]
                kinds = f"two {what}s are" if before == what else f"a {before} and an {what} are"
                self.found.append(
                    Diagnostic(
                        "duplicate-name",
                        f"{kinds} named `{item.name}`",
                        Label(span, "the second"),
                        (Label(first, "the first"),),
                    )
                )
            seen.setdefault(item.name, (what, span))

    def _shadows(self, name: str, span: Span) -> None:
        """Names of blocks and models must not hide an op or a standard block."""
        if self.keyword not in ("block", "model") or self.file.is_standard and name == self.declaration.name:
            return
        is_block = name in standard_index() and _base(self.file, name) is not None
        if name in OPS or is_block and name not in self.file.declared:
            what = "an op" if name in OPS else "a standard block"
            self.found.append(
                Diagnostic(
                    "shadows-op",
                    f"`{name}` is the name of {what}",
                    Label(span, "hides it"),
                    help=f"choose another name, so that `{name}` means the same in every spec",
                )
            )

    def _bind(self, names: Iterable[str], span: Span, scope: _Scope) -> None:
        for name in names:
            if name not in scope:
                self._shadows(name, _inside(span, name))
                scope.names.add(name)

    # --- statements --------------------------------------------------------------------------------

    def statement(self, s: Any, scope: _Scope) -> None:
        getattr(self, f"_{type(s).__name__.lower()}")(s, scope)

    def statements(self, body: tuple[sx.Statement, ...], scope: _Scope) -> None:
        self.later((self.statement, s, scope) for s in body)

    def _input(self, s: sx.Input, scope: _Scope) -> None:
        self._shadows(s.name, _head(s.span, s.name))
        self.later([*self._sizes(s.shape or (), scope), *self._kind(s.kind, scope), *self._maybe(s.default, scope)])

    def _coordinateinput(self, s: sx.CoordinateInput, scope: _Scope) -> None:
        self.resolve(s.dim, _head(s.span, s.dim), scope)
        self.later([*self._kind(s.kind, scope), *self._maybe(s.default, scope)])

    def _kind(self, kind: sx.Expr | None, scope: _Scope) -> Iterator[Work]:
        """What stands behind the colon of an input: a word of the language, perhaps with options."""
        if isinstance(kind, sx.Call) and isinstance(kind.function, sx.Name):
            yield self._kind_word, kind.function, scope
            yield self.arguments, kind.arguments, scope
        elif isinstance(kind, sx.Name):
            yield self._kind_word, kind, scope
        elif kind is not None:
            yield self.expr, kind, scope

    def _kind_word(self, name: sx.Name, scope: _Scope) -> None:
        if name.id not in KINDS:
            self.unknown(name.id, name.span, KINDS, "a kind of input")

    def _assign(self, s: sx.Assign, scope: _Scope) -> None:
        values = ((self.expr, v, scope) for v in s.values)
        self.later([*values, *self._sizes(s.shape or (), scope), (self._bound, s, scope)])

    def _typed(self, s: sx.Typed, scope: _Scope) -> None:
        dims = ((self._dims, shape, scope) for shape in s.shapes)
        self.later([(self.expr, s.value, scope), *dims, (self._bound, s, scope)])

    def _bound(self, s: sx.Assign | sx.Typed, scope: _Scope) -> None:
        if isinstance(s, sx.Assign):
            self._dims(s.shape or (), scope)
        self._bind(s.names, s.span, scope)

    def _dims(self, shape: tuple[sx.DimItem, ...], scope: _Scope) -> None:
        scope.names.update(i.name for i in shape if i.name is not None)

    def _sizes(self, shape: tuple[sx.DimItem, ...], scope: _Scope) -> Iterator[Work]:
        return ((self.expr, i.size, scope) for i in shape if i.size is not None)

    def _maybe(self, expr: sx.Expr | None, scope: _Scope) -> Iterator[Work]:
        if expr is not None:
            yield self.expr, expr, scope

    def _coordinate(self, s: sx.Coordinate, scope: _Scope) -> None:
        self.resolve(s.dim, _head(s.span, s.dim), scope)
        self.expr(s.value, scope)

    def _declare(self, s: sx.Declare, scope: _Scope) -> None:
        self._bind([s.name], s.span, scope)
        self._dims(s.shape, scope)
        self.later([*self._sizes(s.shape, scope), *self._maybe(s.value, scope)])

    def _emit(self, s: sx.Emit, scope: _Scope) -> None:
        if s.keyword == "update" and s.name not in scope:
            self.unknown(s.name, _inside(s.span, s.name), scope.all(), "a buffer")
        self.expr(s.value, scope)

    def _initrule(self, s: sx.InitRule, scope: _Scope) -> None:
        self.later([*((self.part, x.value, scope) for x in s.selectors), (self.expr, s.value, scope)])

    def _return(self, s: sx.Return, scope: _Scope) -> None:
        self.later((self.expr, v, scope) for v in s.values)

    def _if(self, s: sx.If, scope: _Scope) -> None:
        work: list[Work] = []
        for condition, body in s.branches:
            work += [(self.expr, condition, scope), (self.statements, body, scope)]
        self.later([*work, (self.statements, s.otherwise, scope)])

    def _for(self, s: sx.For, scope: _Scope) -> None:
        self.later([(self.expr, s.source, scope), (self._loop, s, _Scope((), scope))])

    def _loop(self, s: sx.For, scope: _Scope) -> None:
        self._bind(s.names, s.span, scope)
        self.statements(s.body, scope)

    # --- expressions -------------------------------------------------------------------------------

    def expr(self, e: sx.Expr, scope: _Scope) -> None:
        if isinstance(e, sx.Name):
            self.resolve(e.id, e.span, scope)
        elif isinstance(e, sx.Call):
            self._call(e, scope)
        elif isinstance(e, sx.Arrow):
            self.later([(self.expr, e.source, scope), (self._target, e.target, scope)])
        elif isinstance(e, sx.Comprehension):
            inner = _Scope(e.names, scope)
            self.later([(self.expr, e.source, scope), *self._maybe(e.condition, inner), (self.expr, e.body, inner)])
        elif isinstance(e, sx.String):
            self._holes(e, scope)
        elif isinstance(e, sx.Members):
            self.later([(self.expr, e.value, scope)])
        else:
            self.later((self.expr, c, scope) for c in _children(e))

    def arguments(self, arguments: tuple[sx.Argument, ...], scope: _Scope) -> None:
        self.later((self.expr, a.value, scope) for a in arguments)

    def _call(self, e: sx.Call, scope: _Scope) -> None:
        name = e.function.id if isinstance(e.function, sx.Name) else None
        work: list[Work] = [(self.expr, e.function, scope)]
        for a in e.arguments:
            if self.keyword == "recipe" and a.name in SELECTING_ARGUMENTS:
                continue
            sized = name in SIZED and name not in scope and isinstance(a.value, sx.Arrow)
            work += self._sized(a.value, scope) if sized else [(self.expr, a.value, scope)]
        self.later(work)
        self._named_twice(e)
        if name is not None and name not in scope:
            self._fits(e, name)

    def _sized(self, e: Any, scope: _Scope) -> list[Work]:
        """An arrow to dims that exist already: only `name = size` makes a new one."""
        return [(self.expr, e.source, scope), (self._new_with_size, e.target, scope), (self.expr, e.target, scope)]

    def _new_with_size(self, target: sx.Expr, scope: _Scope) -> None:
        if isinstance(target, sx.ListOf):
            scope.names.update(a.name for a in target.items if a.name is not None)

    def _target(self, target: sx.Expr, scope: _Scope) -> None:
        """What stands behind an arrow may be new dims."""
        items = target.items if isinstance(target, sx.ListOf) else (sx.Argument(target),)
        for a in items:
            if a.name is not None:
                scope.names.add(a.name)
            elif isinstance(a.value, sx.Name):
                scope.names.add(a.value.id)
        self.arguments(items, scope)

    def _fits(self, e: sx.Call, name: str) -> None:
        """Whether a call fits the declaration that it names."""
        found = _base(self.file, name)
        if found is None:
            return
        d = found.declaration
        assert isinstance(d, sx.Function)
        inputs = [s for s in d.body if isinstance(s, sx.Input)]
        names = [s.name for s in inputs] + [p.name for p in d.parameters]
        declared = Label(d.name_span, "declared here")
        for a in e.arguments:
            if a.name is not None and not a.given and a.name not in names:
                message = f"`{name}` has no parameter `{a.name}`"
                help = near_or_all(a.name, names, "a parameter", "its inputs and parameters are")
                self.found.append(
                    Diagnostic("no-such-parameter", message, Label(_head(a.span, a.name)), (declared,), help)
                )
        if any(isinstance(s.kind, sx.Name) and s.kind.id == "keys" for s in inputs):
            return
        given = [a for a in e.arguments if a.name is None]
        if len(given) > len(names):
            message = f"`{name}` takes {len(names)} argument{'s' * (len(names) != 1)}, this is one more"
            self.found.append(Diagnostic("too-many-arguments", message, Label(given[len(names)].span), (declared,)))
        elif given and found.declaration is getattr(self.file.lookup(name), "declaration", None):
            self._given_twice(e, given, [s.name for s in inputs], [p.name for p in d.parameters])

    def _given_twice(self, e: sx.Call, given: list[sx.Argument], inputs: list[str], parameters: list[str]) -> None:
        """A parameter by its place and again by its name, where that is so whether or not the call has its inputs."""
        by_place = [dict(zip(slots, given, strict=False)) for slots in (inputs + parameters, parameters)]
        if not inputs or isinstance(given[0].value, (sx.Number, sx.String, sx.Constant)):
            by_place = by_place[1:]
        elif len(given) > len(parameters):
            by_place = by_place[:1]
        for a in e.arguments:
            if a.name is not None and not a.given and all(a.name in places for places in by_place):
                self._twice(a.name, by_place[0][a.name], a)

    def _named_twice(self, e: sx.Call) -> None:
        """`f(x, a = 1, a = 2)`, whatever is called."""
        seen: dict[str, sx.Argument] = {}
        for a in e.arguments:
            if a.name is not None and not a.given and seen.setdefault(a.name, a) is not a:
                self._twice(a.name, seen[a.name], a)

    def _twice(self, name: str, first: sx.Argument, second: sx.Argument) -> None:
        by_place = first.name is None
        self.found.append(
            Diagnostic(
                "duplicate-argument",
                f"`{name}` is given twice",
                Label(second.span, "the second"),
                (Label(first.span, f"the first: this is `{name}`, by its place" if by_place else "the first"),),
            )
        )

    def _holes(self, e: sx.String, scope: _Scope, part: bool = False) -> None:
        """The names in `{...}` of a text, where texts are filled in: pipelines, recipes, checkpoint maps."""
        if "{" not in e.value or self.keyword not in ("pipeline", "recipe", "checkpoint"):
            return
        for hole in _HOLE.finditer(e.span.text):
            if not _IN_HOLE.fullmatch(hole[1]):
                continue
            for word in _WORD.finditer(hole[1]):
                start = e.span.start + hole.start(1) + word.start()
                (self.resolve_part if part else self.resolve)(
                    word[0], Span(e.span.source, start, start + len(word[0])), scope
                )

    # --- selectors, sheets, checkpoint maps --------------------------------------------------------

    def part(self, e: sx.Expr, scope: _Scope) -> None:
        """A selector; names that index it are its own."""
        if isinstance(e, sx.Name):
            self.resolve_part(e.id, e.span, scope)
        elif isinstance(e, sx.Index):
            scope.names.update(a.value.id for a in e.arguments if isinstance(a.value, sx.Name))
            self.later([(self.part, e.value, scope), (self.arguments, e.arguments, scope)])
        elif isinstance(e, sx.Members):
            self.later([(self.part, e.value, scope)])
        elif isinstance(e, sx.String):
            self._holes(e, scope, part=True)
        else:
            self.later((self.part, c, scope) for c in _children(e))

    def _sheet_like(self, d: sx.Variant | sx.Sheet) -> None:
        scope = _Scope()
        if isinstance(d, sx.Variant):
            self._shadows(d.name, d.name_span)
            self.later([(self.expr, d.value, scope)])
        else:
            self._shadows(d.name, d.name_span)
        self.run()
        self.rules(d.rules, scope)
        self.run()

    def rules(self, rules: tuple[sx.Rule, ...], scope: _Scope) -> None:
        self.later((self.rule, r, scope) for r in rules)

    def rule(self, r: sx.Rule, scope: _Scope) -> None:
        """The selectors of a sheet wait for its model; those of a model's `with:` meet only what is in reach."""
        if isinstance(r, (sx.Apply, sx.Scoped)) and self.keyword not in ("precision", "layout"):
            self.later((self.part, s.value, scope) for s in r.selectors)
        if isinstance(r, sx.Scoped):
            self.rules(r.rules, scope)
        elif isinstance(r, sx.Setting):
            self.expr(r.value, scope)
        elif isinstance(r, sx.Apply):
            if self.keyword == "layout" and isinstance(r.value, sx.Call):
                self.later([(self.expr, r.value.function, scope)])
            elif self.keyword != "layout":
                self.expr(r.value, scope)
        elif isinstance(r, sx.Mesh):
            self.later((self.expr, a.value, scope) for a in r.axes)
        elif isinstance(r, sx.Stages):
            self.later((self.expr, a.value, scope) for a in r.settings)
        elif isinstance(r, sx.Expect):
            self.expr(r.bound, scope)

    def _checkpoint(self, d: sx.Checkpoint) -> None:
        self.resolve(d.model.id, d.model.span, _Scope())
        for equation in d.equations:
            if isinstance(equation, sx.Equation):
                scope = _Scope()
                self.later(
                    [
                        *((self.part, s.value, scope) for s in equation.ours),
                        (self.part, equation.theirs, scope),
                        *((self.part, e, scope) for e in (equation.form, equation.condition) if e is not None),
                    ]
                )
                self.run()


# --- what is in reach ------------------------------------------------------------------------------


def _base(file: File, name: str) -> Found | None:
    """The function that a name stands for, through variants; None if it is none."""
    seen: set[tuple[int, str]] = set()
    while (id(file), name) not in seen:
        seen.add((id(file), name))
        found = file.lookup(name)
        if found is None or isinstance(found.declaration, sx.Function):
            return found
        if not isinstance(found.declaration, sx.Variant):
            return None
        value: sx.Expr = found.declaration.value
        while isinstance(value, sx.Call):
            value = value.function
        if not isinstance(value, sx.Name):
            return None
        file, name = found.file, value.id
    return None


_parts: WeakKeyDictionary[File, frozenset[str]] = WeakKeyDictionary()


def parts_in_reach(file: File) -> frozenset[str]:
    """Every name that a file, those that it uses and the standard library bind: what a selector may mean."""
    if file not in _parts:
        names = set(_standard_parts())
        for other in file.all_files():
            names |= _bound_names(other.module)
        _parts[file] = frozenset(names)
    return _parts[file]


@cache
def _standard_parts() -> frozenset[str]:
    files = [standard_file(name) for name in standard_index()]
    return frozenset(n for f in {id(f): f for f in files if f}.values() for n in _bound_names(f.module))


def _bound_names(module: sx.Module) -> set[str]:
    names: set[str] = set()
    stack: list[Any] = list(module.declarations)
    while stack:
        node = stack.pop()
        if isinstance(node, tuple):
            stack.extend(node)
        elif isinstance(node, sx.Syntax) and not isinstance(node, sx.Checkpoint):
            if isinstance(node, sx.Arrow):
                items = node.target.items if isinstance(node.target, sx.ListOf) else (sx.Argument(node.target),)
                names.update(a.name for a in items if a.name is not None)
                names.update(a.value.id for a in items if isinstance(a.value, sx.Name))
            elif isinstance(node, (sx.Assign, sx.Typed, sx.For)):
                names.update(node.names)
            elif isinstance(node, (sx.Function, sx.Variant, sx.Parameter, sx.Input, sx.Declare, sx.Coordinate,
                                   sx.CoordinateInput, sx.DimItem)) and node.name:  # fmt: skip
                names.add(node.name)
            stack.extend(v for v in vars(node).values() if isinstance(v, (sx.Syntax, tuple)))
    return names


_FIELDS: dict[type, tuple[str, ...]] = {
    sx.ListOf: ("items",), sx.TupleOf: ("items",), sx.Range: ("first", "last", "step"), sx.Table: ("pairs",),
    sx.Pair: ("value",), sx.Argument: ("value",), sx.Call: ("function", "arguments"), sx.Index: ("value", "arguments"),
    sx.Member: ("value",), sx.Unary: ("value",), sx.Binary: ("left", "right"), sx.Choose: ("yes", "condition", "no"),
    sx.Arrow: ("source", "target"), sx.Comprehension: ("source", "condition", "body"),
}  # fmt: skip


def _children(node: Any) -> Iterator[Any]:
    """The parts of an expression that are expressions, in the order of the text."""
    for name in _FIELDS.get(type(node), ()):
        value = getattr(node, name)
        if isinstance(value, tuple):
            yield from value
        elif value is not None:
            yield value


def _head(span: Span, name: str) -> Span:
    """The place of a name that starts a node."""
    return Span(span.source, span.start, span.start + len(name))


def _inside(span: Span, name: str) -> Span:
    """The place of a name somewhere in a node: its first occurrence as a word."""
    match = re.search(rf"\b{re.escape(name)}\b", span.text)
    start = span.start + (match.start() if match else 0)
    return Span(span.source, start, start + len(name))
