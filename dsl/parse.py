"""From text to syntax nodes."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from lark import Lark, Token
from lark.exceptions import UnexpectedInput
from lark.indenter import DedentError, Indenter

from . import syntax as sx
from .diagnostics import Collector, Diagnostic, Label, SpecError, fail
from .source import Source, Span
from .wording import unexpected

MOST_CHARACTERS = 4_000_000
DEEPEST = 100


class SpecIndenter(Indenter):
    """Indentation as in Python; inside brackets it means nothing."""

    NL_type = "_NL"
    INDENT_type = "_INDENT"
    DEDENT_type = "_DEDENT"
    tab_len = 8
    OPEN_PAREN_types = ["_LPAR", "_LSQB", "_LBRACE"]
    CLOSE_PAREN_types = ["_RPAR", "_RSQB", "_RBRACE"]

    def process(self, stream: Iterator[Token]) -> Iterator[Token]:
        self.paren_level = 0
        self.indent_level = [0]
        return super().process(stream)


class _Nodes:
    """Callbacks of the parser, one for each rule of the grammar. Children are tokens and nodes in order of the text."""

    source: Source

    # --- places -----------------------------------------------------------------------------------

    def span(self, children: list[Any]) -> Span:
        real = [c for c in children if not (isinstance(c, Token) and c.type in ("_NL", "_INDENT", "_DEDENT"))]
        return _place(self.source, real[0]).to(_place(self.source, real[-1]))

    def at(self, item: Any) -> Span:
        return _place(self.source, item)

    # --- files and declarations -------------------------------------------------------------------

    def start(self, c: list[Any]) -> sx.Module:
        return sx.Module(
            tuple(x for x in c if isinstance(x, sx.Use)), tuple(x for x in c if isinstance(x, sx.Declaration)),
            span=Span(self.source, 0, len(self.source.text)),
        )  # fmt: skip

    def use(self, c: list[Any]) -> sx.Use:
        names = tuple(sx.Name(str(t), span=self.at(t)) for t in _tokens(c, "NAME"))
        (path,) = _tokens(c, "STRING")
        return sx.Use(names, str(path)[1:-1], path_span=self.at(path), span=self.span(c))

    def function(self, c: list[Any]) -> sx.Function:
        name = c[1]
        parameters = next((x for x in c if isinstance(x, _Parameters)), ())
        body = c[-1]
        start, end = self.at(c[0]), self.at(c[-2])
        span = start.to(body[-1].span) if body else start.to(end)
        return sx.Function(str(c[0]), str(name), tuple(parameters), tuple(body), self._doc(c[0]), self.at(name), span=span)

    def variant(self, c: list[Any]) -> sx.Variant:
        rules = tuple(c[-1]) if isinstance(c[-1], _Rules) else ()
        span = self.at(c[0]).to(rules[-1].span if rules else c[3].span)
        return sx.Variant(str(c[0]), str(c[1]), c[3], rules, self._doc(c[0]), self.at(c[1]), span=span)

    def sheet(self, c: list[Any]) -> sx.Sheet:
        rules = tuple(c[-1])
        return sx.Sheet(str(c[0]), str(c[1]), rules, self._doc(c[0]), self.at(c[1]), span=self.at(c[0]).to(rules[-1].span))

    def checkpoint(self, c: list[Any]) -> sx.Checkpoint:
        name, target, model = c[1], c[2], c[4]
        equations = tuple(c[-1])
        return sx.Checkpoint(
            str(name), str(target)[1:-1], sx.Name(str(model), span=self.at(model)), equations, self._doc(c[0]),
            self.at(name), span=self.at(c[0]).to(equations[-1].span),
        )  # fmt: skip

    def _doc(self, token: Token) -> str:
        """The `##` lines right above a declaration."""
        lines = []
        number = self.source.position(token.start_pos)[0] - 1
        while number >= 1 and self.source.line(number).startswith("##"):
            lines.insert(0, self.source.line(number)[2:].strip())
            number -= 1
        return "\n".join(lines)

    def parameters(self, c: list[Any]) -> _Parameters:
        return _Parameters(x for x in c if isinstance(x, sx.Parameter))

    def parameter(self, c: list[Any]) -> sx.Parameter:
        return sx.Parameter(str(c[0]), c[2] if len(c) > 1 else None, span=self.span(c))

    # --- statements -------------------------------------------------------------------------------

    def suite(self, c: list[Any]) -> _Suite:
        return _Suite(s for x in c if not isinstance(x, Token) for s in (x if isinstance(x, _Suite) else (x,)))

    def line(self, c: list[Any]) -> _Suite:
        return _Suite(x for x in c if not isinstance(x, Token))

    def input(self, c: list[Any]) -> sx.Statement:
        shape = next((tuple(x) for x in c if isinstance(x, _Shape)), None)
        kind = next((x for x in c if isinstance(x, _Kind)), None)
        default = c[-1] if _has(c, "EQUAL") else None
        if shape is None and default is not None and kind is not None and isinstance(kind.expr, sx.Index):
            return self.typed(c)
        return sx.Input(
            str(c[0]), shape, kind.expr if kind else None, kind.optional if kind else False, default, span=self.span(c)
        )

    def coordinate_input(self, c: list[Any]) -> sx.CoordinateInput:
        kind = next(x for x in c if isinstance(x, _Kind))
        default = c[-1] if _has(c, "EQUAL") else None
        return sx.CoordinateInput(str(c[0]), str(c[2]), kind.expr, kind.optional, default, span=self.span(c))

    def kind(self, c: list[Any]) -> _Kind:
        return _Kind(c[0], len(c) > 1, self.span(c))

    def assign(self, c: list[Any]) -> sx.Assign:
        return sx.Assign(tuple(map(str, _tokens(c, "NAME"))), tuple(c[-1]), span=self.span(c))

    def assign_shaped(self, c: list[Any]) -> sx.Assign:
        return sx.Assign((str(c[0]),), (c[3],), tuple(c[1]), span=self.span(c))

    def coordinate(self, c: list[Any]) -> sx.Coordinate:
        return sx.Coordinate(str(c[0]), str(c[2]), c[4], span=self.span(c))

    def shared(self, c: list[Any]) -> sx.Assign:
        return sx.Assign((str(c[1]),), (c[3],), None, True, span=self.span(c))

    def typed(self, c: list[Any]) -> sx.Typed:
        names = tuple(map(str, _tokens(c, "NAME")))
        kinds = [x.expr for x in c if isinstance(x, _Kind)]
        for k in kinds:
            if not (isinstance(k, sx.Index) and isinstance(k.value, sx.Name)):
                raise fail("syntax", "a typed line says a kind and dims for each result", k.span, "expected `real[seq, hidden]`")
        shapes = tuple(
            tuple(sx.DimItem(a.value.id, span=a.span) for a in k.arguments if isinstance(a.value, sx.Name)) for k in kinds
        )
        return sx.Typed(names, tuple(k.value.id for k in kinds), shapes, c[-1], span=self.span(c))

    def declare(self, c: list[Any]) -> sx.Declare:
        return sx.Declare(str(c[0]), str(c[1]), tuple(c[2]), c[4] if len(c) > 3 else None, span=self.span(c))

    def emit(self, c: list[Any]) -> sx.Emit:
        return sx.Emit(str(c[0]), str(c[1]), c[3], span=self.span(c))

    def init(self, c: list[Any]) -> sx.InitRule:
        return sx.InitRule(tuple(c[1]), c[3], span=self.span(c))

    def return_(self, c: list[Any]) -> sx.Return:
        return sx.Return(tuple(c[1]), span=self.span(c))

    def values(self, c: list[Any]) -> _Values:
        made = _Values(x for x in c if not isinstance(x, Token))
        made.span = self.span(c)
        return made

    def shape(self, c: list[Any]) -> _Shape:
        made = _Shape(x for x in c if isinstance(x, sx.DimItem))
        made.span = self.span(c)
        return made

    def dim(self, c: list[Any]) -> sx.DimItem:
        if c[0].type == "NUMBER":
            return sx.DimItem(None, self.number(c), span=self.span(c))
        return sx.DimItem(str(c[0]), c[2] if len(c) > 1 else None, span=self.span(c))

    def if_(self, c: list[Any]) -> sx.If:
        branches, otherwise = [], ()
        for i, item in enumerate(c):
            if isinstance(item, Token) and item.type in ("IF", "ELIF"):
                branches.append((c[i + 1], tuple(c[i + 3])))
            elif isinstance(item, Token) and item.type == "ELSE":
                otherwise = tuple(c[i + 2])
        last = otherwise or branches[-1][1]
        return sx.If(tuple(branches), otherwise, span=self.at(c[0]).to(last[-1].span))

    def for_(self, c: list[Any]) -> sx.For:
        names = tuple(map(str, _tokens(c, "NAME")))
        body = tuple(c[-1])
        return sx.For(names, c[-3], body, span=self.at(c[0]).to(body[-1].span))

    # --- sheets and maps --------------------------------------------------------------------------

    def rules(self, c: list[Any]) -> _Rules:
        return _Rules(r for x in c if not isinstance(x, Token) for r in (x if isinstance(x, _Rules) else (x,)))

    def rule_line(self, c: list[Any]) -> _Rules:
        return _Rules(x for x in c if not isinstance(x, Token))

    def scoped(self, c: list[Any]) -> sx.Scoped:
        rules = tuple(c[-1])
        return sx.Scoped(tuple(c[1]), rules, span=self.at(c[0]).to(rules[-1].span))

    def setting(self, c: list[Any]) -> sx.Setting:
        return sx.Setting(str(c[0]), c[2], span=self.span(c))

    def apply(self, c: list[Any]) -> sx.Apply:
        return sx.Apply(tuple(c[0]), c[2], span=self.span(c))

    def mesh(self, c: list[Any]) -> sx.Mesh:
        return sx.Mesh(tuple(x for x in c if isinstance(x, sx.Setting)), span=self.span(c))

    def shard(self, c: list[Any]) -> sx.Shard:
        names = list(map(str, _tokens(c, "NAME")))
        between = names.pop() if _has(c, "BETWEEN") else None
        return sx.Shard(tuple(x for x in c if isinstance(x, sx.Selector)), tuple(names), between, span=self.span(c))

    def shardable(self, c: list[Any]) -> sx.Selector:
        return sx.Selector(c[0], len(c) > 1, span=self.span(c))

    def dotted(self, c: list[Any]) -> sx.Expr:
        made: sx.Expr = sx.Name(str(c[0]), span=self.at(c[0]))
        for token in _tokens(c[1:], "NAME"):
            made = sx.Member(made, str(token), span=self.at(c[0]).to(self.at(token)))
        return made

    def stages(self, c: list[Any]) -> sx.Stages:
        return sx.Stages(str(c[2]), tuple(x for x in c if isinstance(x, sx.Setting)), span=self.span(c))

    def recompute(self, c: list[Any]) -> sx.Recompute:
        return sx.Recompute(tuple(c[1]), span=self.span(c))

    def expect(self, c: list[Any]) -> sx.Expect:
        names = list(map(str, _tokens(c, "NAME")))
        (comparison,) = _tokens(c, "COMPARE")
        return sx.Expect(names[0], names[1] if len(names) > 1 else None, str(comparison), c[-1], span=self.span(c))

    def selectors(self, c: list[Any]) -> _Values:
        made = _Values(x for x in c if isinstance(x, sx.Selector))
        made.span = self.span(c)
        return made

    def selector(self, c: list[Any]) -> sx.Selector:
        return sx.Selector(c[0], len(c) > 1, span=self.span(c))

    def equations(self, c: list[Any]) -> _Rules:
        return _Rules(e for x in c if isinstance(x, _Rules) for e in x)

    def equation_line(self, c: list[Any]) -> _Rules:
        return _Rules(x for x in c if not isinstance(x, Token))

    def equation(self, c: list[Any]) -> sx.Equation:
        form = condition = None
        for i, item in enumerate(c):
            if isinstance(item, Token) and item.type == "AS":
                form = c[i + 1] if isinstance(c[i + 1], sx.ListOf) else sx.Name(str(c[i + 1]), span=self.at(c[i + 1]))
            elif isinstance(item, Token) and item.type == "IF":
                condition = c[i + 1]
        return sx.Equation(tuple(c[0]), c[2], form, condition, span=self.span(c))

    def ignore(self, c: list[Any]) -> sx.Ignore:
        return sx.Ignore(tuple(self.string([t]) for t in _tokens(c, "STRING")), span=self.span(c))

    # --- expressions ------------------------------------------------------------------------------

    def choose(self, c: list[Any]) -> sx.Choose:
        return sx.Choose(c[2], c[0], c[4], span=self.span(c))

    def arrow(self, c: list[Any]) -> sx.Arrow:
        return sx.Arrow(c[0], c[2], span=self.span(c))

    def binary(self, c: list[Any]) -> sx.Binary:
        return sx.Binary(str(c[1]), c[0], c[2], span=self.span(c))

    def unary(self, c: list[Any]) -> sx.Unary:
        return sx.Unary(str(c[0]), c[1], span=self.span(c))

    def call(self, c: list[Any]) -> sx.Call:
        return sx.Call(c[0], _arguments(c), span=self.span(c))

    def index(self, c: list[Any]) -> sx.Index:
        return sx.Index(c[0], _arguments(c), span=self.span(c))

    def member(self, c: list[Any]) -> sx.Member:
        return sx.Member(c[0], str(c[2]), span=self.span(c))

    def members(self, c: list[Any]) -> sx.Members:
        return sx.Members(c[0], c[2].items, span=self.span(c))

    def name(self, c: list[Any]) -> sx.Name:
        return sx.Name(str(c[0]), span=self.at(c[0]))

    def number(self, c: list[Any]) -> sx.Number:
        text = str(c[0])
        plain = text.replace("_", "")
        if len(plain) > 400:
            raise fail("too-large", "this number has too many digits", self.at(c[0]))
        return sx.Number(int(plain) if plain.isdigit() else float(plain), text, span=self.at(c[0]))

    def string(self, c: list[Any]) -> sx.String:
        text = str(c[0])
        if not text.startswith('"""'):
            return sx.String(text[1:-1], span=self.at(c[0]))
        inner = text[3:-3]
        return sx.String(textwrap.dedent(inner[1:] if inner.startswith("\n") else inner), True, span=self.at(c[0]))

    def constant(self, c: list[Any]) -> sx.Constant:
        return sx.Constant({"none": None, "true": True, "false": False}[str(c[0])], span=self.at(c[0]))

    def parenthesized(self, c: list[Any]) -> sx.Expr:
        return c[1]

    def tuple(self, c: list[Any]) -> sx.TupleOf:
        return sx.TupleOf(_arguments(c), span=self.span(c))

    def list(self, c: list[Any]) -> sx.ListOf:
        return sx.ListOf(_arguments(c), span=self.span(c))

    def comprehension(self, c: list[Any]) -> sx.Comprehension:
        names = tuple(map(str, _tokens(c, "NAME")))
        source = next(c[i + 1] for i, x in enumerate(c) if isinstance(x, Token) and x.type == "IN")
        condition = next((c[i + 1] for i, x in enumerate(c) if isinstance(x, Token) and x.type == "IF"), None)
        return sx.Comprehension(c[1], names, source, condition, span=self.span(c))

    def table(self, c: list[Any]) -> sx.Table:
        return sx.Table(tuple(x for x in c if isinstance(x, sx.Pair)), span=self.span(c))

    def pair(self, c: list[Any]) -> sx.Pair:
        quoted = c[0].type == "STRING"
        return sx.Pair(str(c[0])[1:-1] if quoted else str(c[0]), c[2], quoted, span=self.span(c))

    def arguments(self, c: list[Any]) -> _Values:
        made = _Values(x for x in c if isinstance(x, sx.Argument))
        made.span = self.span(c)
        return made

    def argument(self, c: list[Any]) -> sx.Argument:
        return sx.Argument(c[0], span=self.span(c))

    def keyword(self, c: list[Any]) -> sx.Argument:
        return sx.Argument(c[2], str(c[0]), span=self.span(c))

    def given(self, c: list[Any]) -> sx.Argument:
        return sx.Argument(c[3], str(c[1]), True, span=self.span(c))

    def span_(self, c: list[Any]) -> sx.Range:
        return sx.Range(c[0], c[2], c[4] if len(c) > 3 else None, span=self.span(c))


class _Items(tuple):
    """Several nodes of one rule; `span` is set where the rule has brackets of its own."""

    span: Span | None = None


class _Parameters(_Items):
    pass


class _Suite(_Items):
    pass


class _Rules(_Items):
    pass


class _Values(_Items):
    pass


class _Shape(_Items):
    pass


class _Kind:
    """The kind of an input, and whether it may be absent."""

    def __init__(self, expr: sx.Expr, optional: bool, span: Span):
        self.expr, self.optional, self.span = expr, optional, span


def _place(source: Source, item: Any) -> Span:
    if isinstance(item, Token):
        return Span(source, item.start_pos or 0, item.end_pos or 0)
    if isinstance(item, _Items) and item.span is None:
        return _place(source, item[0]).to(_place(source, item[-1]))
    return item.span


def _tokens(children: list[Any], kind: str) -> list[Token]:
    return [c for c in children if isinstance(c, Token) and c.type == kind]


def _has(children: list[Any], kind: str) -> bool:
    return any(isinstance(c, Token) and c.type == kind for c in children)


def _arguments(children: list[Any]) -> tuple[sx.Argument, ...]:
    """The arguments among the children of a call, list or tuple."""
    found: list[sx.Argument] = []
    for c in children:
        if isinstance(c, _Values):
            found.extend(c)
        elif isinstance(c, sx.Argument):
            found.append(c)
    return tuple(found)


class _Callbacks:
    """Gives lark the callbacks of `_Nodes`; a rule named like a method of ours has an underscore there."""

    def __init__(self) -> None:
        self.nodes = _Nodes()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.nodes, "span_" if name == "span" else name)


@cache
def _parser() -> tuple[Lark, _Nodes]:
    """The parser and the callbacks that need to know the source. Tables are kept in the user's cache folder."""
    callbacks = _Callbacks()
    grammar = files(__package__).joinpath("grammar.lark").read_text(encoding="utf-8")
    options: dict[str, Any] = dict(
        parser="lalr", postlex=SpecIndenter(), maybe_placeholders=False, keep_all_tokens=True, transformer=callbacks
    )
    return Lark(grammar, cache=_cache_file(), **options), callbacks.nodes


def _cache_file() -> str | bool:
    """Where lark keeps its tables, keyed by the grammar's hash; False where no such folder can be written."""
    folder = Path.home() / ".cache" / "heddle"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):
        return False
    return str(folder / "grammar.tables")


def parse(source: Source) -> sx.Module:
    """The syntax of a file. Raises `SpecError` with the syntax errors of each of its declarations."""
    _check_text(source)
    try:
        return _parse_whole(source)
    except SpecError as error:
        first = error
    collector = Collector()
    for start, end in _pieces(source.text):
        try:
            _parse_whole(Source(source.name, source.text[start:end]))
        except SpecError as error:
            collector.add(SpecError(_moved(d, source, start) for d in error.diagnostics))
    raise SpecError(collector.found) if collector.found else first


def _moved(diagnostic: Diagnostic, source: Source, by: int) -> Diagnostic:
    """A diagnostic of a piece of the text, at its place in the whole."""

    def move(label: Label) -> Label:
        return replace(label, span=Span(source, label.span.start + by, label.span.end + by))

    return replace(diagnostic, primary=move(diagnostic.primary), secondary=tuple(map(move, diagnostic.secondary)))


def _pieces(text: str) -> list[tuple[int, int]]:
    """Character ranges of top-level declarations: from a line that starts at the margin to the next one."""
    starts = [m.start() for m in re.finditer(r"^\S", text, re.MULTILINE) if text[m.start()] not in "#)]}"]
    return list(zip(starts, [*starts[1:], len(text)], strict=True))[:200]


def _parse_whole(source: Source) -> sx.Module:
    parser, nodes = _parser()
    nodes.source = source
    text = source.text if source.text.endswith("\n") else source.text + "\n"
    try:
        return parser.parse(text)
    except DedentError as error:
        raise _bad_dedent(source, error) from None
    except UnexpectedInput as error:
        raise unexpected(source, error) from None
    except RecursionError:
        raise fail("too-deep", "this file nests too deeply", Span(source, 0, 0)) from None


def _bad_dedent(source: Source, error: DedentError) -> SpecError:
    """The line whose indentation fits no line above it."""
    levels = [0]
    offset = 0
    for line in source.text.splitlines(keepends=True):
        width = len(line) - len(line.lstrip(" "))
        if line.strip() and not line.lstrip().startswith("#"):
            while levels and width < levels[-1]:
                levels.pop()
            if levels and width > levels[-1] and offset and width not in levels and _dedented(source.text, offset, width):
                break
            if width > levels[-1]:
                levels.append(width)
        offset += len(line)
    return fail("bad-indentation", "this line is indented like no line above it", Span(source, offset, offset + 1),
                help="the lines of a body start in one column")


def _dedented(text: str, offset: int, width: int) -> bool:
    above = text[:offset].rstrip("\n").rsplit("\n", 1)[-1]
    return len(above) - len(above.lstrip(" ")) > width


def _check_text(source: Source) -> None:
    """Refuse what cannot be a spec before the parser sees it: size, tabs, nesting."""
    text = source.text
    if len(text) > MOST_CHARACTERS:
        raise fail("too-large", f"this file has {len(text)} characters, at most {MOST_CHARACTERS} are read", Span(source, 0, 0))
    if "\0" in text:
        at = text.index("\0")
        raise fail("syntax", "this is a NUL character: no text file", Span(source, at, at + 1))
    tab = re.search(r"^[ ]*\t", text, re.MULTILINE)
    if tab:
        raise fail("tabs", "this line is indented with a tab", Span(source, tab.end() - 1, tab.end()), "a tab",
                   help="indent with four spaces")
    depth = 0
    for match in re.finditer(r'"""(?:.|\n)*?"""|"[^"\n]*"|#[^\n]*|[(\[{]|[)\]}]', text):
        c = match[0]
        depth += c in "([{"
        depth -= c in ")]}"
        if depth > DEEPEST:
            raise fail("too-deep", f"brackets nest more than {DEEPEST} deep", Span(source, match.start(), match.end()))
    _check_chains(source)


def _check_chains(source: Source) -> None:
    """Bound what nests without brackets: `-` and `not` in a row, `if ... else` chains, indentation, long sums."""
    for pattern, what in ((r"(?:-[ ]*){101,}", "minus signs"), (r"(?:\bnot[ ]+){101,}", "`not`s"),
                          (r"(?:->[ ]*[\w]*[ ]*){101,}", "arrows"), (r"(?:\^[^\n^]*){101,}", "powers"),
                          (r"^[ ]{800,}\S", "spaces of indentation"), (r"(?:\belse\b[^\n]*){101,}", "`else`s")):
        found = re.search(pattern, source.text, re.MULTILINE)
        if found:
            raise fail("too-deep", f"too many {what} in a row", Span(source, found.start(), found.start() + 1))
    for match in re.finditer(r"[^\n]{20000,}", source.text):
        operators = len(re.findall(r'"[^"\n]*"|(?<=[\w)\] ])[-+*/%.(]', match[0]))
        if operators > 20000:
            raise fail("too-deep", "this line has too many operators", Span(source, match.start(), match.start() + 1))
