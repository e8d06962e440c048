"""The formatter: canonical spacing and indentation around the author's own lines, comments and alignment.

What is kept: line breaks, comments, single empty lines, `=` that stand in one column on neighbouring lines, and the
columns of comments behind code. What is made: four spaces a level, spaces around operators, continuation lines
aligned behind their bracket, and line breaks where a line is longer than 120 columns and has a comma to break at.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from .diagnostics import InternalError, SpecError
from .parse import parse, parse_with_tokens
from .printer import INDENT, WIDTH, print_expr, print_module
from .source import Source
from .tokens import LAYOUT, Token

__all__ = ["format_source", "print_expr", "print_module"]

_OPERANDS = frozenset(
    {"NAME", "NUMBER", "STRING", "LONG_STRING", "NONE", "TRUE", "FALSE", "_RPAR", "_RSQB", "_RBRACE", "OPTIONAL"}
)
_TIGHT_BEFORE = frozenset({"COMMA", "SEMICOLON", "COLON", "DOT", "OPTIONAL", "_RPAR", "_RSQB", "_RBRACE"})
_TIGHT_BEHIND = frozenset({"DOT", "_LPAR", "_LSQB", "_LBRACE"})
_OPENING = ("_LPAR", "_LSQB", "_LBRACE")
_CLOSING = ("_RPAR", "_RSQB", "_RBRACE")
_ELEMENTS = ("COMMA", *_OPENING)
_SUITES = frozenset({"IF", "ELIF", "ELSE", "FOR"})


def format_source(source: Source) -> str:
    """The text of a file in canonical form; formatting it again changes nothing. Raises `SpecError`: syntax errors."""
    module, found = parse_with_tokens(source)
    text = _Layout(source.text, found).text()
    try:
        same = parse(Source(source.name, text)) == module
    except SpecError:
        same = False
    if not same:
        raise InternalError(f"formatting would change the meaning of {source.name}")
    return text


@dataclass
class _Comment:
    """A comment; `column` is where it stood."""

    text: str
    column: int


@dataclass
class _Row:
    """The tokens of one physical line, what stands on lines of its own before it, and the comment behind it."""

    tokens: list[Token]
    above: list[_Comment | None] = field(default_factory=list)
    comment: _Comment | None = None


@dataclass
class _Line:
    """A logical line: `level` counts bodies around it, `margin` is where it stood, `key` is what may be aligned."""

    rows: list[_Row]
    level: int
    margin: int
    first: int
    last: int
    key: int | None = None
    key_kind: str = ""
    padding: int = 0


@dataclass
class _Bracket:
    """An open bracket: where its elements go, and the columns of their starts, as they were and as they are."""

    column: int
    hanging: bool
    base: int
    anchors: dict[int, int] = field(default_factory=dict)


class _Layout:
    """Formats the tokens of one file."""

    def __init__(self, text: str, found: list[Token]):
        self.source = text
        self.starts = [0, *(m.end() for m in re.finditer("\n", text))]
        self.lines: list[_Line] = []
        self.tail: list[_Comment | None] = []
        self._read(found)
        self._align()

    # --- reading ----------------------------------------------------------------------------------

    def column(self, offset: int) -> int:
        return offset - self.starts[bisect_right(self.starts, offset) - 1]

    def _read(self, found: Iterable[Token]) -> None:
        level, end, number = 0, 0, 0
        current: _Line | None = None
        for token in found:
            if token.type in LAYOUT:
                level += {"_INDENT": 1, "_DEDENT": -1}.get(token.type, 0)
                current = None if token.type == "_NL" else current
                continue
            gap = self.source[end : token.start]
            breaks = gap.count("\n")
            number += breaks
            if current is None or breaks:
                row = _Row([], self._gap(gap, end, self.lines[-1].rows[-1] if self.lines else None))
                if current is None:
                    current = _Line([row], level, self.column(token.start), number, number)
                    self.lines.append(current)
                else:
                    current.rows.append(row)
            current.rows[-1].tokens.append(token._replace(text=token.text.replace("\r\n", "\n")))
            number += token.text.count("\n")
            current.last = number
            end = token.end
        self.tail = self._gap(self.source[end:], end, self.lines[-1].rows[-1] if self.lines else None)
        for line in self.lines:
            _find_key(line)

    def _gap(self, gap: str, start: int, before: _Row | None) -> list[_Comment | None]:
        """What stands between two rows: comments on lines of their own, None for empty lines. The rest of the first
        line belongs to the row before."""
        above: list[_Comment | None] = []
        offset = start
        for i, piece in enumerate(gap.split("\n")):
            stripped = piece.strip()
            comment = (
                _Comment(_tidy(stripped), self.column(offset) + piece.find("#")) if stripped.startswith("#") else None
            )
            if i == 0 and before is not None:
                before.comment = comment
            elif comment is not None:
                above.append(comment)
            elif not stripped and (not above or above[-1] is not None) and i < gap.count("\n"):
                above.append(None)
            offset += len(piece) + 1
        return above

    # --- aligning ---------------------------------------------------------------------------------

    def _align(self) -> None:
        """Neighbouring lines whose `=` stood in one column get it in one column."""
        run: list[_Line] = []
        for line in [*self.lines, None]:
            if run and (line is None or not self._continues(run[-1], line)):
                wanted = max(self._natural(one) for one in run)
                for one in run:
                    one.padding = wanted - self._natural(one)
                run = []
            if line is not None and line.key is not None:
                run.append(line)

    def _continues(self, before: _Line, line: _Line) -> bool:
        if line.key is None or before.key is None or line.key_kind != before.key_kind or line.level != before.level:
            return False
        columns = [self.column(one.rows[0].tokens[one.key].start) for one in (before, line)]  # type: ignore[index]
        return line.first == before.last + 1 and columns[0] == columns[1]

    def _natural(self, line: _Line) -> int:
        """The column of the key without padding."""
        assert line.key is not None
        return line.level * INDENT + len(_spaced(line.rows[0].tokens[: line.key])) + 1

    # --- writing ----------------------------------------------------------------------------------

    def text(self) -> str:
        written: list[_Written] = []
        margins: list[int] = []
        for line in self.lines:
            starts = line.level >= len(margins)
            written += self._above(line.rows[0].above, line, margins, starts)
            written += self._written(line)
            margins = [*margins[: line.level], line.margin]
        written += self._above(self.tail, None, margins, not self.lines)
        while written and not written[-1].code and written[-1].comment is None:
            written.pop()
        return _joined(written)

    def _above(
        self, above: list[_Comment | None], line: _Line | None, margins: list[int], starts: bool
    ) -> Iterator[_Written]:
        """Lines of their own before a line; no empty ones where a file or body starts."""
        for comment in above:
            if comment is None:
                if not starts:
                    yield _Written("")
                continue
            starts = False
            yield _Written(" " * INDENT * _level(comment.column, line, margins) + comment.text)

    def _written(self, line: _Line) -> Iterator[_Written]:
        """The rows of a logical line as they are printed."""
        brackets: list[_Bracket] = []
        indent = line.level * INDENT
        for number, row in enumerate(line.rows):
            breakable = not any("\n" in token.text for token in row.tokens)
            at = 0
            while at < len(row.tokens):
                if number or at:
                    indent, comments = self._continuation(row.tokens[at], brackets)
                    for comment in row.above if not at else ():
                        if comment is not None:
                            yield _Written(" " * comments + comment.text)
                head = line if not number and not at else None
                tokens = row.tokens[at : at + WIDTH]  # more cannot fit on a line
                cut = _break_at(tokens, self._row_text(tokens, head, indent)[1], brackets) if breakable else None
                tokens = row.tokens[at:] if cut is None else tokens[:cut]
                text, ends = self._row_text(tokens, head, indent)
                self._track(tokens, ends, brackets, indent)
                at += len(tokens)
                yield _Written(text, row.comment if at == len(row.tokens) else None)

    def _continuation(self, first: Token, brackets: list[_Bracket]) -> tuple[int, int]:
        """The column of a row inside brackets, and of comments above it."""
        bracket = brackets[-1]
        elements = bracket.base + INDENT if bracket.hanging else bracket.column
        kept = bracket.anchors.get(self.column(first.start))
        if first.type in _CLOSING:
            return (bracket.base if bracket.hanging else elements if kept is None else kept), elements
        column = elements if bracket.hanging or kept is None else kept
        return column, column

    def _row_text(self, tokens: list[Token], line: _Line | None, indent: int) -> tuple[str, list[int]]:
        """Tokens of a row as text, and the column in which each ends; `line` is given where they start one."""
        parts = [" " * indent]
        ends: list[int] = []
        column = indent
        for i, token in enumerate(tokens):
            space = _space(tokens, i) if i else ""
            if line is not None and i and i == line.key:
                space = " " * (1 + line.padding)
            parts += [space, token.text]
            column = column + len(space) + len(token.text)
            if "\n" in token.text:
                column = len(token.text) - token.text.rfind("\n") - 1
            ends.append(column)
        return "".join(parts), ends

    def _track(self, tokens: list[Token], ends: list[int], brackets: list[_Bracket], indent: int) -> None:
        """Follow the brackets that a row opens and closes, and where their elements start."""
        for i, token in enumerate(tokens):
            start = ends[i] - len(token.text.rsplit("\n", 1)[-1])
            if brackets and i and tokens[i - 1].type in _ELEMENTS and "\n" not in token.text:
                brackets[-1].anchors.setdefault(self.column(token.start), start)
            if token.type in _OPENING:
                brackets.append(_Bracket(ends[i], i == len(tokens) - 1, indent))
            elif token.type in _CLOSING:
                brackets.pop()


@dataclass
class _Written:
    """A printed line and the comment behind it."""

    code: str
    comment: _Comment | None = None


def _joined(written: list[_Written]) -> str:
    """The printed lines, comments behind code in their columns: neighbours that shared a column still do."""
    lines: list[str] = []
    at = 0
    while at < len(written):
        comment = written[at].comment
        group = [written[at]]
        while comment and at + len(group) < len(written):
            following = written[at + len(group)].comment
            if following is None or following.column != comment.column:
                break
            group.append(written[at + len(group)])
        if comment is None:
            lines.append(written[at].code)
        else:
            least = max(len(w.code.rsplit("\n", 1)[-1]) for w in group) + 2
            longest = max(len(w.comment.text) for w in group if w.comment)
            column = max(least, min(comment.column, WIDTH - longest))
            for w in group:
                padding = column - len(w.code.rsplit("\n", 1)[-1])
                lines.append(f"{w.code}{' ' * padding}{w.comment.text if w.comment else ''}")
        at += len(group)
    return "".join(f"{line.rstrip()}\n" for line in lines)


def _find_key(line: _Line) -> None:
    """Which token of a line may be aligned with its neighbours: its first `=`, or what follows `if ...:`."""
    depth = 0
    tokens = line.rows[0].tokens
    suite = tokens[0].type in _SUITES
    for i, token in enumerate(tokens):
        if "\n" in token.text:
            return
        depth += (token.type in _OPENING) - (token.type in _CLOSING)
        if depth == 0 and i and token.type == "EQUAL" and not suite:
            line.key, line.key_kind = i, "equal"
            return
        if depth == 0 and suite and token.type == "COLON" and i + 1 < len(tokens):
            line.key, line.key_kind = i + 1, "suite"
            return


def _level(column: int, line: _Line | None, margins: list[int]) -> int:
    """The level of a comment of its own: that of the next line, unless it stands further right where a body ends."""
    least = line.level if line else 0
    if line is not None and (column <= line.margin or line.level >= len(margins) - 1):
        return least
    deepest = max((i for i, margin in enumerate(margins) if margin <= column), default=0)
    return max(least, deepest)


def _break_at(tokens: list[Token], ends: list[int], brackets: list[_Bracket]) -> int | None:
    """The token before which a row that is too long is broken: behind the outermost comma that fits."""
    if ends[-1] <= WIDTH:
        return None
    columns = [b.base + INDENT if b.hanging else b.column for b in brackets]
    best: tuple[int, int] | None = None
    for i, token in enumerate(tokens[:-1]):
        if ends[i] > WIDTH:
            break
        if token.type in _OPENING:
            columns.append(ends[i])
        elif token.type in _CLOSING:
            columns.pop()
        elif (
            token.type == "COMMA"
            and columns
            and columns[-1] < ends[i] - 1
            and (best is None or len(columns) <= best[0])
        ):
            best = (len(columns), i + 1)
    return best and best[1]


def _spaced(tokens: list[Token]) -> str:
    return "".join((_space(tokens, i) if i else "") + token.text for i, token in enumerate(tokens))


def _space(tokens: list[Token], i: int) -> str:
    """What stands between a token and the one before it."""
    before, token = tokens[i - 1].type, tokens[i].type
    if token in _TIGHT_BEFORE or before in _TIGHT_BEHIND:
        return ""
    if token in ("_LPAR", "_LSQB") and before in _OPERANDS:
        return ""
    if before == "MINUS" and (i < 2 or tokens[i - 2].type not in _OPERANDS):
        return ""
    return " "


def _tidy(comment: str) -> str:
    """A comment with a space behind its signs."""
    match = re.match(r"(#+)(.*)", comment)
    signs, text = match.groups() if match else ("#", "")
    return f"{signs}{'' if not text or text[0].isspace() else ' '}{text}".rstrip()
