"""Syntax errors in the user's words, told from what stood there and what could have.

Each method of `_CASES` knows one mistake by example and answers None for any other; the first that answers is it.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass, field

from .diagnostics import Label, SpecError, did_you_mean, fail
from .grammar_tables import KEYWORDS
from .source import Source, Span
from .tokens import DEEPEST, LAYOUT, OPENS, Token, open_brackets

DECLARATIONS = ("use", "block", "model", "pipeline", "recipe", "precision", "layout", "checkpoint")
_HEADERS = (*DECLARATIONS[1:], "if", "elif", "else", "for", "in")
_VALUES = frozenset({"NAME", "NUMBER", "STRING", "LONG_STRING", "NONE", "TRUE", "FALSE", "_LPAR", "_LSQB", "_LBRACE"})
_ENDS = frozenset({"NAME", "NUMBER", "STRING", "LONG_STRING", "NONE", "TRUE", "FALSE", "_RPAR", "_RSQB", "_RBRACE"})
_STARTS = ("return", "param", "buffer", "shared", "loss", "metric", "update", "init", "for", "if", "elif", "else")
_SAYS = "statements bind names (`y = ...`), declare inputs (`x[hidden]`) or start with a word such as `return`"
_WORDS = {
    "NAME": "a name",
    "NUMBER": "a number",
    "STRING": "a string",
    "COLON": "`:`",
    "EQUAL": "`=`",
    "COMMA": "`,`",
    "_RPAR": "`)`",
    "_RSQB": "`]`",
    "_RBRACE": "`}`",
    "_LPAR": "`(`",
    "_LSQB": "`[`",
    "FROM": "`from`",
    "IN": "`in`",
    "OVER": "`over`",
    "FOR": "`for`",
    "ELSE": "`else`",
    "WITH": "`with`",
    "_ARROW": "`->`",
    "DOT": "`.`",
    "_NL": "the end of the line",
}
_FOREIGN = {
    "'": "strings stand in double quotes",
    "&": "`and` joins conditions",
    "|": "`or` joins conditions",
    "!": "`not` negates, `!=` compares",
    "\\": "a line goes on where a bracket is open",
    "@": "nothing is written with this sign",
    "$": "strings take `{name}` without a sign before it",
}


@dataclass
class Unexpected:
    """A token that does not fit: what would (`accepted`), what stood before it, where this parse began."""

    source: Source
    token: Token
    accepted: set[str]
    previous: Token | None
    began: int
    brackets: list[Token] = field(init=False)

    def __post_init__(self) -> None:
        self.brackets = open_brackets(self.text, self.began, self.token.start)

    @property
    def text(self) -> str:
        return self.source.text

    @property
    def span(self) -> Span:
        """Where the token stands; a line end is the place behind what was written last."""
        if self.token.type in LAYOUT and self.token.type != "_INDENT":
            return self.behind
        return Span(self.source, self.token.start, max(self.token.end, self.token.start))

    @property
    def behind(self) -> Span:
        end = self.previous.end if self.previous else 0
        return Span(self.source, end, end)

    def place(self, token: Token) -> Span:
        return Span(self.source, token.start, token.end)

    def before(self, offset: int) -> str:
        """The part of a line before an offset."""
        return self.text[self.text.rfind("\n", 0, offset) + 1 : offset]

    @property
    def line_before(self) -> str:
        return self.before(self.token.start)

    @property
    def at_line_start(self) -> bool:
        return not self.line_before.strip()

    @property
    def at_line_word(self) -> bool:
        """Whether what stood before is the first word of its line."""
        return self.previous is not None and not self.before(self.previous.start).strip()

    @property
    def first_word(self) -> str:
        """The word that the statement or declaration begins with, as far as its line tells."""
        end = self.previous.end if self.previous else self.token.end
        start = self.brackets[0].start if self.brackets else end
        line = self.text[self.text.rfind("\n", 0, start) + 1 : end]
        match = re.match(r"\s*([A-Za-z_]\w*)", line[:200])
        return match[1] if match else ""

    @property
    def ends_line(self) -> bool:
        return self.token.type in LAYOUT


def unexpected(u: Unexpected) -> SpecError:
    """The diagnostic for a token that does not fit."""
    return next(error for case in _CASES if (error := case(u)) is not None)


Case = Callable[[Unexpected], SpecError | None]


def _character(u: Unexpected) -> SpecError | None:
    if u.token.type != "BAD":
        return None
    c = u.token.text
    if c.startswith('"'):
        help_ = "a long text ends in three quotes" if c == '"""' else "strings end on their line"
        what = "text has no closing quotes" if c == '"""' else "string has no closing quote"
        return fail("unclosed-string", f"this {what}", u.span, help=help_)
    if c.isascii() and c.isprintable():
        return fail("syntax", f"`{c}` does not belong here", u.span, help=_FOREIGN.get(c))
    name = unicodedata.name(c, f"character {ord(c)}").lower()
    return fail(
        "syntax",
        f"a character that the language does not use: {name}",
        u.span,
        help="names have letters a to z, digits and `_`; any text may stand in strings and comments",
    )


def _layout(u: Unexpected) -> SpecError | None:
    if u.token.type == "_TAB":
        return fail("tabs", "this line is indented with a tab", u.span, "a tab", help="indent with four spaces")
    if u.token.type == "_TOO_DEEP":
        return fail(
            "too-deep", f"brackets nest more than {DEEPEST} deep", u.span, help="bind the inner parts to variables"
        )
    if u.token.type == "_BAD_DEDENT":
        return fail(
            "bad-indentation",
            "this line is indented like no line above it",
            u.span,
            f"starts in column {_column(u)}",
            help=f"what is open above it starts in column {_either(_columns(u))}",
        )
    return None


def _brackets(u: Unexpected) -> SpecError | None:
    token = u.token
    closes = token.text in (")", "]", "}")
    if closes and not u.brackets:
        opening = next(o for o, c in OPENS.items() if c == token.text)
        return fail(
            "unclosed-bracket",
            f"`{token.text}` closes nothing that is open here",
            u.span,
            help=f"no `{opening}` stands before it",
        )
    if not u.brackets:
        return None
    opened = u.brackets[-1]
    missing = OPENS[opened.text]
    label = Label(u.span, f"`{missing}` is missing before this")
    if closes and token.text != missing:
        return fail(
            "unclosed-bracket",
            f"`{token.text}` does not close `{opened.text}`",
            u.place(opened),
            "opened here",
            [label],
        )
    if token.type == "$END":
        return fail("unclosed-bracket", f"`{opened.text}` is never closed", u.place(opened), "opened here", [label])
    if u.at_line_start and _starts_something(u):
        return fail("unclosed-bracket", f"`{opened.text}` is never closed", u.place(opened), "opened here", [label])
    if token.text == ":" and re.compile(r"[ \t]*(#[^\n]*)?(\r?\n|$)").match(u.text, token.end):
        return fail("unclosed-bracket", f"`{opened.text}` is never closed", u.place(opened), "opened here", [label])
    # The mistake may show one token late: in `f(a\n    y = b` and `f(a,\n    return b` the first word could go on.
    before = u.previous
    if before and u.at_line_word and (token.type in ("EQUAL", "COLON") or before.text in KEYWORDS):
        label = Label(u.place(before), f"`{missing}` is missing before this")
        return fail("unclosed-bracket", f"`{opened.text}` is never closed", u.place(opened), "opened here", [label])
    return None


def _starts_something(u: Unexpected) -> bool:
    """Whether a line that begins inside a bracket looks like a new statement or declaration."""
    return bool(
        re.compile(r"[A-Za-z_][\w.]*\s*(?:,\s*\w+\s*)*(=(?!=)|\(|:|\[|[A-Za-z_\"])").match(u.text, u.token.start)
    )


def _empty_body(u: Unexpected) -> SpecError | None:
    opened = u.token.type in LAYOUT and u.previous and u.previous.text == ":" and u.first_word in _HEADERS
    if opened or "_INDENT" in u.accepted and u.token.type != "_INDENT":
        return fail("empty-body", "a body must follow, indented", u.behind, "no line below is indented more")
    return None


def _indent(u: Unexpected) -> SpecError | None:
    if u.token.type != "_INDENT":
        return None
    word = re.compile(r"\S*").match(u.text, u.token.start)
    end = word.end() if word else u.token.end
    return fail(
        "bad-indentation",
        "this line is indented, but nothing above it opens a body",
        Span(u.source, u.token.start, end),
        f"starts in column {_column(u)}",
        help=f"the lines around it start in column {_columns(u)[-1]}",
    )


def _column(u: Unexpected) -> int:
    """The column of the first word of the line of a token; columns count from 1."""
    line = u.text[u.text.rfind("\n", 0, u.token.start) + 1 :]
    return len(line[:10_000]) - len(line[:10_000].lstrip(" ")) + 1


def _columns(u: Unexpected) -> list[int]:
    """Where the lines of the bodies start that are open above the line of a token, the outermost first."""
    found: list[int] = []
    depth = 0
    for line in u.text[u.began : u.text.rfind("\n", 0, u.token.start) + 1].split("\n"):
        said = _UNSAID.sub("", line)
        if said.strip() and not depth:
            column = len(line) - len(line.lstrip(" ")) + 1
            found = [*(c for c in found if c < column), column]
        depth += sum(said.count(c) for c in "([{") - sum(said.count(c) for c in ")]}")
    return found or [1]


def _either(columns: list[int]) -> str:
    *most, last = map(str, columns)
    return f"{', '.join(most)} or {last}" if most else last


_UNSAID = re.compile(r'"[^"]*"|#.*')


def _colon(u: Unexpected) -> SpecError | None:
    if "COLON" not in u.accepted or u.first_word not in _HEADERS or u.brackets:
        return None
    if u.ends_line:
        return fail("missing-colon", "expected `:` at the end of this line", u.behind)
    if u.token.text == "=" and u.first_word in ("if", "elif"):
        return fail("syntax", "`=` binds a name and cannot stand in a condition", u.span, help="`==` compares")
    if u.previous and u.token.type in _VALUES | {"RETURN", "EMIT", "DECLARE", "SHARED"} and ":" not in u.line_before:
        return fail("missing-colon", f"expected `:` before `{_short(u.token.text)}`", u.span)
    return None


def _declaration(u: Unexpected) -> SpecError | None:
    if "CHECKPOINT" not in u.accepted or u.ends_line:
        return None
    word = u.token.text
    near = did_you_mean(word, DECLARATIONS, "a declaration")
    return fail(
        "syntax",
        f"a declaration cannot start with `{_short(word)}`",
        u.span,
        help=near or f"files declare: {', '.join(DECLARATIONS)}",
    )


def _orphan(u: Unexpected) -> SpecError | None:
    if u.token.text in ("else", "elif") and u.at_line_start:
        return fail("syntax", f"this `{u.token.text}` has no `if` above it in the same column", u.span)
    return None


def _reserved(u: Unexpected) -> SpecError | None:
    """`loss = ...`: a word that starts a statement stands where a name should."""
    before = u.previous
    starts = before is not None and before.text in KEYWORDS and before.text not in DECLARATIONS
    if before and starts and u.accepted == {"NAME"} and u.token.text in ("=", ":", ",", ".", "[", "("):
        return fail(
            "reserved-word",
            f"`{before.text}` is a word of the language and cannot be a name",
            u.place(before),
            "choose another name",
        )
    if u.token.text in KEYWORDS and "NAME" in u.accepted:
        return fail(
            "reserved-word",
            f"`{u.token.text}` is a word of the language and cannot be a name",
            u.span,
            "choose another name",
        )
    return None


def _statement(u: Unexpected) -> SpecError | None:
    """A name or a call alone on its line does nothing."""
    if not (u.accepted and u.accepted <= {"_LSQB", "COLON", "EQUAL", "COMMA", "DOT"} and u.previous):
        return None
    if u.token.text == "(":
        return fail(
            "syntax",
            f"a call of `{u.previous.text}` alone does nothing",
            u.place(u.previous),
            help=f"bind its result, `y = {u.previous.text}(...)`, or `return` it",
        )
    if u.token.type in ("PLUS", "MINUS", "TIMES", "OVER_") and u.text[u.token.end : u.token.end + 1] == "=":
        sign = u.token.text
        return fail(
            "syntax",
            f"there is no `{sign}=`",
            Span(u.source, u.token.start, u.token.end + 1),
            help=f"`{u.previous.text} = {u.previous.text} {sign} ...`",
        )
    if u.token.type in _VALUES and u.at_line_word:
        words = did_you_mean(u.previous.text, _STARTS, "a word")
        return fail(
            "syntax",
            f"a line cannot start with `{u.previous.text} {_short(u.token.text)}`",
            u.place(u.previous).to(u.span),
            help=words or _SAYS,
        )
    if u.ends_line and "EQUAL" in u.accepted:
        return fail(
            "syntax", f"`{_short(u.previous.text)}` alone on a line says nothing", u.place(u.previous), help=_SAYS
        )
    return None


def _power(u: Unexpected) -> SpecError | None:
    if u.token.text == "*" and u.previous and u.previous.text == "*" and u.previous.end == u.token.start:
        return fail(
            "syntax", "there is no `**`", Span(u.source, u.previous.start, u.token.end), help="`^` is the power"
        )
    return None


def _comparison(u: Unexpected) -> SpecError | None:
    if u.token.type in ("EQUALS", "UNEQUAL", "LESS", "MORE", "AT_MOST", "AT_LEAST") and "AND" in u.accepted:
        return fail("syntax", "comparisons cannot be chained", u.span, help="`a < b and b < c`")
    return None


def _required(u: Unexpected) -> SpecError | None:
    """A word of the grammar that is missing: `use a "x.spec"`, `y if x`."""
    missing = u.accepted & {"ELSE", "OVER", "FROM"} or ({"IN"} if {"IN"} <= u.accepted <= {"IN", "COMMA"} else set())
    if len(missing) != 1 or not u.previous:
        return None
    word = _WORDS[missing.pop()]
    if u.ends_line:
        return fail("syntax", f"expected {word} before the end of the line", u.behind)
    return fail("syntax", f"expected {word} before `{_short(u.token.text)}`", u.span)


def _neighbours(u: Unexpected) -> SpecError | None:
    """Two values side by side."""
    if not (u.previous and u.token.type in _VALUES and u.previous.type in _ENDS):
        return None
    before = f"before `{_short(u.token.text)}`"
    if u.brackets and "COMMA" in u.accepted:
        return fail("syntax", f"expected `,` or an operator {before}", u.span)
    if not u.brackets and "SEMICOLON" in u.accepted and "PLUS" not in u.accepted:
        return fail("syntax", f"expected `;` or a new line {before}", u.span)
    if not u.brackets and "COLON" in u.accepted:
        return fail("missing-colon", f"expected `:` {before}", u.span)
    if "PLUS" in u.accepted:
        return fail("syntax", f"expected an operator {before}", u.span)
    return None


def _line_end(u: Unexpected) -> SpecError | None:
    if not u.ends_line:
        return None
    if u.previous is None:
        return fail("syntax", "this file ends in the middle", Span(u.source, 0, 0))
    span = u.place(u.previous)
    wanted = _wanted(u.accepted)
    return fail(
        "syntax",
        "the line ends too early",
        Span(u.source, span.end - 1, span.end),
        f"expected {wanted}" if wanted else "",
    )


def _anything(u: Unexpected) -> SpecError:
    wanted = _wanted(u.accepted)
    return fail(
        "syntax", f"`{_short(u.token.text)}` does not belong here", u.span, f"expected {wanted}" if wanted else ""
    )


_CASES: tuple[Case, ...] = (
    _character,
    _layout,
    _brackets,
    _indent,
    _empty_body,
    _colon,
    _declaration,
    _orphan,
    _power,
    _statement,
    _reserved,
    _comparison,
    _required,
    _neighbours,
    _line_end,
    _anything,
)


def _wanted(accepted: set[str]) -> str:
    """What could stand here, if that is short enough to help."""
    if accepted >= {"NAME", "NUMBER", "_LPAR"}:
        return "a value"
    found = [_WORDS[t] for t in sorted(accepted) if t in _WORDS]
    if not found or len(found) > 3 or len(found) < len(accepted):
        return ""
    return " or ".join([", ".join(found[:-1]), found[-1]]) if len(found) > 1 else found[0]


def _short(text: str) -> str:
    """A token as it is quoted in a message: its first line, not too long."""
    line = text.split("\n", 1)[0]
    return line if len(line) <= 40 and line == text else f"{line[:40]}..."
