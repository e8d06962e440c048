"""From text to tokens: words, signs, strings, and the lines and indentation that stand for brackets around bodies."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

from .grammar_tables import PATTERNS, SIGNS

OPENS = {"(": ")", "[": "]", "{": "}"}
LAYOUT = ("_NL", "_INDENT", "_DEDENT", "$END")
"""Tokens that are no text of their own: line ends and changes of indentation outside brackets."""


DEEPEST = 100
"""How deep a text may nest: whoever walks its tree may then recurse."""


class Token(NamedTuple):
    """`type` is a terminal of the grammar, or one that fits nowhere: BAD, _TAB, _BAD_DEDENT, _TOO_DEEP."""

    type: str
    text: str
    start: int
    end: int


_BLANK = re.compile(r"(?:[ \t\f]*(?:#[^\n]*)?\r?\n)*[ \t\f]*")
_SIGNS = "|".join(re.escape(sign) for sign in sorted(SIGNS, key=len, reverse=True))
_SCAN = re.compile(
    f"(?P<NAME>{PATTERNS['NAME']})|(?P<SPACE>[ \\t\\f]+)|(?P<SIGN>{_SIGNS})|(?P<NUMBER>{PATTERNS['NUMBER']})"
    r"|(?P<LINE>\r?\n(?:[ \t\f]*(?:#[^\n]*)?\r?\n)*[ \t\f]*)|(?P<SPACE2>#[^\n]*)"
    f'|(?P<LONG_STRING>{PATTERNS["LONG_STRING"]})|(?P<BAD>""")|(?P<STRING>{PATTERNS["STRING"]})|(?P<BAD2>[\\s\\S])'
)


def tokens(text: str, at: int = 0) -> Iterator[Token]:
    """The tokens of a text from an offset on, where a line starts. Inside brackets line ends mean nothing."""
    depth = 0
    levels = [0]
    first = _BLANK.match(text, at).end()  # type: ignore[union-attr]  # it matches the empty text too
    if first > text.rfind("\n", 0, first) + 1 and text[first : first + 1] not in ("", "#"):
        yield Token("_INDENT", "", first, first)
    for match in _SCAN.finditer(text, first):
        kind = match.lastgroup
        if kind == "NAME":
            yield Token("NAME", match[0], match.start(), match.end())
        elif kind == "SIGN":
            sign = match[0]
            if sign in "([{":
                depth += 1
                if depth > DEEPEST:
                    yield Token("_TOO_DEEP", sign, match.start(), match.end())
            elif sign in ")]}" and depth:
                depth -= 1
            yield Token(SIGNS[sign], sign, match.start(), match.end())
        elif kind == "SPACE" or kind == "SPACE2":
            continue
        elif kind == "LINE":
            if not depth:
                yield from _line(text, match.start(), match.end(), levels)
        elif kind == "BAD2":
            yield Token("BAD", match[0], match.start(), match.end())
        else:
            yield Token(str(kind), match[0], match.start(), match.end())
    end = len(text)
    if not depth:
        yield Token("_NL", "", end, end)
        for _ in levels[1:]:
            yield Token("_DEDENT", "", end, end)
    yield Token("$END", "", end, end)


def _line(text: str, start: int, end: int, levels: list[int]) -> Iterator[Token]:
    """The end of a line, and what the indentation of the next one says."""
    if end == len(text):
        return
    yield Token("_NL", text[start:end], start, end)
    margin = text.rfind("\n", start, end) + 1
    width = end - margin
    if "\t" in text[margin:end]:
        tab = text.index("\t", margin)
        yield Token("_TAB", "\t", tab, tab + 1)
    if width > levels[-1]:
        levels.append(width)
        yield Token("_INDENT", "", end, end)
    while width < levels[-1]:
        levels.pop()
        yield Token("_DEDENT", "", end, end)
        if width > levels[-1]:
            yield Token("_BAD_DEDENT", "", end, end)
            levels.append(width)
            break


def open_brackets(text: str, start: int, end: int) -> list[Token]:
    """The brackets that are open at `end`, the innermost last, if none is at `start`."""
    found: list[Token] = []
    for match in _SCAN.finditer(text, start, end):
        if match.lastgroup == "SIGN" and match[0] in "([{":
            found.append(Token("", match[0], match.start(), match.end()))
        elif match.lastgroup == "SIGN" and match[0] in ")]}" and found:
            found.pop()
    return found
