"""From text to syntax nodes: a table-driven LALR(1) parser over the tables of `grammar_tables.py`.

The tables come from lark (see `tables.py`). Driving them here costs a start-up no import of lark, gives every node its
exact span, and lets a syntax error be told from the state and the token, with recovery at the next declaration.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

from . import syntax as sx
from .diagnostics import Collector, InternalError, SpecError, fail
from .grammar_tables import END, KEYWORDS, ROWS, RULES
from .nodes import NESTING, Nodes
from .source import Source, Span
from .tokens import DEEPEST, LAYOUT, Token, tokens
from .wording import Unexpected, unexpected

MOST_CHARACTERS = 4_000_000
MOST_ERRORS = 50

_DECLARATION = re.compile(r"^(?:use|block|model|pipeline|recipe|precision|layout|checkpoint)\b", re.MULTILINE)


def parse(source: Source) -> sx.Module:
    """The syntax of a file. Raises `SpecError` with the first syntax error of each of its declarations."""
    return _parse(source, [])


def parse_with_tokens(source: Source) -> tuple[sx.Module, list[Token]]:
    """The syntax of a file, and its tokens with the types that the parser gave them."""
    found: list[Token] = []
    return _parse(source, found), found


def _parse(source: Source, record: list[Token]) -> sx.Module:
    text = source.text
    if len(text) > MOST_CHARACTERS:
        message = f"this file has {len(text)} characters, at most {MOST_CHARACTERS} are read"
        raise fail("too-large", message, Span(source, 0, 0))
    if "\0" in text:
        at = text.index("\0")
        raise fail("syntax", "this is a NUL character: no text file", Span(source, at, at + 1))
    padded = text if text.endswith("\n") else f"{text}\n"
    collector = Collector()
    at = 0
    while True:
        run = _Run(source, padded, record)
        try:
            module = run.module(at)
            break
        except SpecError as error:
            collector.add(error)
        at = _next_declaration(padded, at, run.reached)
        if at < 0 or len(collector.found) >= MOST_ERRORS:
            break
    collector.finish()
    return module


def _next_declaration(text: str, start: int, reached: int) -> int:
    """Where to go on behind an error: the line that it is in if that starts a declaration, else the next that does."""
    line = text.rfind("\n", 0, reached) + 1
    found = _DECLARATION.search(text, max(line, start + 1))
    return found.start() if found else -1


class _Rule(NamedTuple):
    """A rule ready to run. `splice` are places of collections among the children; `passes` is set where a single symbol
    stands for the whole; `deeper` is 1 for a rule that counts when depth is bounded."""

    made: str
    length: int
    method: str
    children: tuple[int | None, ...]
    splice: frozenset[int]
    passes: bool
    deeper: int


def _rule(name: str, length: int, method: str, children: tuple[int | None, ...]) -> _Rule:
    plain = tuple(c if c is None or c >= 0 else -1 - c for c in children)
    splice = frozenset(-1 - c for c in children if c is not None and c < 0)
    return _Rule(name, length, method, plain, splice, method.startswith("?") and length == 1, int(method in NESTING))


class _Tables:
    """The tables in the form that the parser reads; rows are decoded when first needed."""

    def __init__(self) -> None:
        self.rules = [_rule(*rule) for rule in RULES]
        self._rows: list[dict[str, int] | None] = [None] * len(ROWS)
        self.passed: dict[tuple[int, int, str], int] = {}

    def row(self, state: int) -> dict[str, int]:
        """What each terminal and each made part lead to in a state."""
        row = self._rows[state]
        if row is None:
            words = ROWS[state].split()
            row = self._rows[state] = dict(zip(words[::2], map(int, words[1::2]), strict=True))
        return row

    def passes(self, below: int, top: int, terminal: str) -> int:
        """The state behind a chain of rules that pass their only child on: a bare name goes through a dozen levels."""
        state = top
        while (action := self.row(state).get(terminal, 0)) < 0 and (rule := self.rules[-action - 1]).passes:
            state = self.row(below)[rule.made] - 1
        self.passed[below, top, terminal] = state
        return state


_tables = cache(_Tables)


class _Run:
    """One parse from an offset to the end or the first error. `reached` is how far it came."""

    def __init__(self, source: Source, text: str, record: list[Token]):
        self.source, self.text, self.record = source, text, record
        self.tables = _tables()
        self.nodes = Nodes(source)
        self.methods: dict[str, Callable[[list[Any], Span], Any]] = {}
        self.states = [0]
        self.values: list[Any] = []
        self.extents: list[tuple[int, int, int]] = []
        self.reached = 0

    def module(self, at: int) -> sx.Module:
        """The file from an offset on. Raises `SpecError` with the first syntax error."""
        states, values, extents = self.states, self.values, self.extents
        row_of, rules, passed = self.tables.row, self.tables.rules, self.tables.passed
        previous: Token | None = None
        for token in tokens(self.text, at):
            kind, text, start, end = token
            row = row_of(states[-1])
            if kind == "NAME" and KEYWORDS.get(text) in row:
                kind = KEYWORDS[text]
                token = Token(kind, text, start, end)
            action = row.get(kind, 0)
            while action < 0:
                rule = rules[-action - 1]
                if rule.passes:
                    below, top = states[-2:]
                    states[-1] = passed.get((below, top, kind)) or self.tables.passes(below, top, kind)
                else:
                    self.reached = start
                    self.reduce(rule)
                    if states[-1] == END and kind == "$END":
                        return values[-1]
                action = row_of(states[-1]).get(kind, 0)
            if not action:
                self.reached = start
                raise unexpected(Unexpected(self.source, token, self.accepted(), previous, at))
            states.append(action - 1)
            values.append(token)
            if kind in LAYOUT:
                extents.append((-1, -1, 0))
            else:
                extents.append((start, end, 0))
                previous = token
            self.record.append(token)
        raise InternalError("a text ends with a token that says so")

    def reduce(self, rule: _Rule) -> None:
        """Replace the symbols of a rule by what it makes."""
        n = rule.length
        start = end = -1
        depth = 0
        if n:
            for first, last, inner in self.extents[-n:]:
                if first >= 0:
                    if start < 0:
                        start = first
                    end = last
                if inner > depth:
                    depth = inner
        extent = (start, end, depth + rule.deeper)
        value = self.made(rule, self.values[-n:] if n else [], extent)
        if n:
            del self.states[-n:], self.values[-n:], self.extents[-n:]
        self.states.append(self.tables.row(self.states[-1])[rule.made] - 1)
        self.values.append(value)
        self.extents.append(extent)

    def made(self, rule: _Rule, taken: list[Any], extent: tuple[int, int, int]) -> Any:
        """The node of a rule, or a list where the rule only collects."""
        if rule.splice:
            first = rule.children[0]
            if not rule.method and first == 0 and 0 in rule.splice:
                children = taken[0]  # the list grows in place, else a long one would be copied for each item
                children.extend(None if c is None else taken[c] for c in rule.children[1:])
                return children
            children = []
            for c in rule.children:
                if c in rule.splice:
                    children.extend(taken[c])
                else:
                    children.append(None if c is None else taken[c])
        else:
            children = [None if c is None else taken[c] for c in rule.children]
        if not rule.method:
            return children
        start, end, depth = extent
        if depth > DEEPEST:
            raise fail(
                "too-deep",
                f"this nests more than {DEEPEST} deep",
                Span(self.source, start, start + 1),
                "a bracket, an operator of a chain and a body count one each",
                help="bind a part of it to a name of its own",
            )
        method = self.methods.get(rule.method)
        if method is None:
            method = self.methods[rule.method] = getattr(self.nodes, rule.method)
        return method(children, Span(self.source, max(start, 0), max(end, 0)))

    def accepted(self) -> set[str]:
        """The terminals that could stand here: those that, after the reductions they call for, are taken."""
        return {t for t in self.tables.row(self.states[-1]) if t.isupper() and self._fits(t)}

    def _fits(self, terminal: str) -> bool:
        kept = len(self.states)
        made: list[int] = []
        while True:
            state = made[-1] if made else self.states[kept - 1]
            if state == END:
                return terminal == "$END"
            action = self.tables.row(state).get(terminal, 0)
            if action >= 0:
                return action > 0
            rule = self.tables.rules[-action - 1]
            kept -= max(0, rule.length - len(made))
            del made[max(0, len(made) - rule.length) :]
            state = made[-1] if made else self.states[kept - 1]
            made.append(self.tables.row(state)[rule.made] - 1)
