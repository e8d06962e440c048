"""Syntax errors in the user's words, found from where the parser stood."""

from __future__ import annotations

import re

from lark import Token
from lark.exceptions import UnexpectedCharacters, UnexpectedInput, UnexpectedToken

from .diagnostics import Label, SpecError, fail
from .source import Source, Span

RESERVED = (
    "use block model pipeline recipe precision layout checkpoint param buffer shared loss metric update init return if elif "
    "else for with in ignore mesh shard stages recompute expect from as step given and or not none true false"
).split()
_CLOSES = {"(": ")", "[": "]", "{": "}"}


def unexpected(source: Source, error: UnexpectedInput) -> SpecError:
    """The diagnostic for what the parser did not expect."""
    if isinstance(error, UnexpectedCharacters):
        return _character(source, error)
    assert isinstance(error, UnexpectedToken)
    return _token(source, error)


def _character(source: Source, error: UnexpectedCharacters) -> SpecError:
    at = error.pos_in_stream
    span = Span(source, at, at + 1)
    text = source.text[at : at + 1]
    if text == '"':
        return fail("unclosed-string", "this string has no closing quote", span, help="strings end on their line")
    if text == "\t":
        return fail("tabs", "this line is indented with a tab", span, "a tab", help="indent with four spaces")
    opened = _open_bracket(source.text, at)
    if opened is not None and _starts_statement(source.text, at):
        return _unclosed(source, opened, span)
    return fail("syntax", f"`{text}` does not belong here", span)


def _token(source: Source, error: UnexpectedToken) -> SpecError:
    token: Token = error.token
    expected = set(error.expected) | set(getattr(error, "accepts", None) or ())
    start = len(source.text) if token.type == "$END" else token.start_pos or 0
    end = start if token.type == "$END" else token.end_pos or start + 1
    span = Span(source, start, end)
    word = str(token)
    opened = _open_bracket(source.text, start)
    if opened is not None and (token.type in ("$END", "_NL") or _starts_statement(source.text, start)):
        return _unclosed(source, opened, span)
    if "_INDENT" in expected:
        return fail("empty-body", "a body must follow, indented", Span(source, max(start - 1, 0), start))
    if token.type in ("_NL", "$END", "_DEDENT", "_INDENT"):
        return _line_end(source, token, expected, start)
    if word in (")", "]", "}"):
        return fail("unclosed-bracket", f"`{word}` closes nothing that is open here", span)
    if word in RESERVED and "NAME" in expected:
        return fail("reserved-word", f"`{word}` is a word of the language and cannot be a name", span, "choose another name")
    if "COLON" in expected and expected <= {"COLON", "_LPAR", "EQUAL"} or word and "COLON" in expected and _at_line_start(
        source.text, start
    ):
        return fail("missing-colon", f"expected `:` before `{word}`", span)
    if _at_line_start(source.text, start) and not source.text[:start].rsplit("\n", 1)[-1]:
        return fail("syntax", f"a declaration cannot start with `{word}`", span,
                    help="files declare: use, block, model, pipeline, recipe, precision, layout, checkpoint")
    wanted = _wanted(expected)
    return fail("syntax", f"`{word.strip()}` does not belong here", span, f"expected {wanted}" if wanted else "")


def _line_end(source: Source, token: Token, expected: set[str], start: int) -> SpecError:
    here = Span(source, max(start, 0), max(start, 0))
    last = re.search(r"\S[ \t]*$", source.text[:start].split("#")[0] if "\n" not in source.text[:start] else
                     source.text[:start].rsplit("\n", 1)[-1])
    line_start = source.text[:start].rfind("\n") + 1
    if last is not None:
        here = Span(source, line_start + last.start(), line_start + last.start() + 1)
    if token.type == "_INDENT":
        return fail("bad-indentation", "this line is indented, but nothing above it opens a body", Span(source, start, start))
    if "_INDENT" in expected:
        return fail("empty-body", "a body must follow, indented", here)
    if "COLON" in expected and expected <= {"COLON", "_LPAR", "EQUAL", "_LSQB", "DOT", "IF"}:
        return fail("missing-colon", "expected `:` at the end of this line", here)
    if expected == {"_NL"} or "_NL" in expected and token.type == "_DEDENT":
        return fail("syntax", "the line ends here in the middle", here)
    wanted = _wanted(expected)
    return fail("syntax", "the line ends too early", here, f"expected {wanted}" if wanted else "")


def _wanted(expected: set[str]) -> str:
    """What could stand here, if that is short enough to help."""
    words = {"NAME": "a name", "NUMBER": "a number", "STRING": "a string", "COLON": "`:`", "EQUAL": "`=`", "COMMA": "`,`",
             "_RPAR": "`)`", "_RSQB": "`]`", "_RBRACE": "`}`", "FROM": "`from`", "IN": "`in`", "OVER": "`over`",
             "_NL": "the end of the line", "DOT": "`.`"}
    if {"NAME", "NUMBER", "_LPAR"} <= expected:
        return "a value"
    found = [words[e] for e in sorted(expected) if e in words]
    return " or ".join(found) if 0 < len(found) <= 3 and len(found) == len(expected) else ""


def _open_bracket(text: str, end: int) -> int | None:
    """Where the innermost bracket that is open at `end` was opened."""
    stack: list[tuple[str, int]] = []
    for match in re.finditer(r'"""(?:.|\n)*?"""|"[^"\n]*"|#[^\n]*|[(\[{)\]}]', text[:end]):
        c = match[0]
        if c in _CLOSES:
            stack.append((c, match.start()))
        elif c in ")]}" and stack:
            stack.pop()
    return stack[-1][1] if stack else None


def _unclosed(source: Source, opened: int, span: Span) -> SpecError:
    bracket = source.text[opened]
    return fail("unclosed-bracket", f"`{bracket}` is never closed", Span(source, opened, opened + 1), "opened here",
                [Label(span, f"`{_CLOSES[bracket]}` is missing before this")])


def _starts_statement(text: str, at: int) -> bool:
    """Whether what stands at `at` looks like the start of a statement or declaration: first on its line."""
    return _at_line_start(text, at) and bool(re.match(r"[A-Za-z_]\w*\s*(=[^=]|\(|:|\[|\w)", text[at:]) or at >= len(text))


def _at_line_start(text: str, at: int) -> bool:
    return not text[text.rfind("\n", 0, at) + 1 : at].strip()
