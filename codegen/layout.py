"""Generated lines of at most 120 characters: statements open at a bracket, comments and docstrings go on below."""

from __future__ import annotations

import re
import textwrap

WIDTH = 120
_CLOSES = {"(": ")", "[": "]", "{": "}"}
_TOKENS = re.compile(r"\"(?:[^\"\\]|\\.)*\"|'(?:[^'\\]|\\.)*'|lambda [\w, =]*|.", re.DOTALL)
_OPERATORS = re.compile(r" (?:[-+*/@&|]|\*\*|//|if|else) ")
_PREFIX = re.compile(r"(?:return |[\w.]+(?:, [\w.]+)* = )?")


def statement(text: str, indent: int) -> str:
    """A statement at an indentation; one that is too long is opened at its brackets, else put into a pair of them.

    What is left alone: what was laid out already, and what has no place to break.
    """
    return "\n".join(_folded(text, indent))


def comment(text: str, indent: int) -> str:
    """`# text`, the lines behind the first aligned with what stands behind its first gap of two spaces."""
    start = text.find("  ") + 2
    begin, further = " " * indent + "# ", " " * indent + "# " + " " * (start if start > 1 else 0)
    if indent + 2 + len(text) <= WIDTH:
        return begin + text
    return textwrap.fill(
        text, WIDTH, initial_indent=begin, subsequent_indent=further, break_on_hyphens=False, expand_tabs=False
    )


def docstring(text: str, indent: int) -> str:
    """Text in triple quotes, whatever it holds."""
    safe = text.replace("\\", "\\\\").replace('"""', r"\"\"\"")
    if safe.endswith('"'):
        safe = safe[:-1] + '\\"'
    line = " " * indent + f'"""{safe}"""'
    if len(line) <= WIDTH:
        return line
    lines = textwrap.wrap(
        f'"""{safe}', WIDTH - indent, break_long_words=False, break_on_hyphens=False, expand_tabs=False
    )
    return textwrap.indent("\n".join([*lines, '"""']), " " * indent)


def _folded(text: str, indent: int) -> list[str]:
    if "\n" in text or indent + len(text) <= WIDTH:
        return [" " * indent + text]
    pad = " " * indent
    for start, end in sorted(_groups(text), key=lambda g: g[0] - g[1]):
        head, inside, tail = text[: start + 1], text[start + 1 : end], text[end:]
        if inside and indent + max(len(head), len(tail)) <= WIDTH:
            return [pad + head, *_inside(inside, indent + 4), pad + tail]
    prefix = _PREFIX.match(text)
    rest = text[prefix.end() :] if prefix else ""
    if prefix and prefix.group() and len(_pieces(rest)) + len(_terms(rest)) > 2:
        return [f"{pad}{prefix.group()}(", *_inside(rest, indent + 4), f"{pad})"]
    return [pad + text]


def _inside(text: str, indent: int) -> list[str]:
    """What stands in brackets: on one line, else a line for each item, else one for each term of a sum or product."""
    if indent + len(text) <= WIDTH:
        return [" " * indent + text]
    pieces = _pieces(text)
    if len(pieces) > 1:
        return [line for piece in pieces if piece for line in _folded(f"{piece},", indent)]
    terms = _terms(text)
    return [line for term in terms for line in _folded(term, indent)]


def _tokens(text: str) -> list[tuple[int, str, int]]:
    """(place, token, how many brackets are open around it); a string and the head of a lambda are one token."""
    found, depth = [], 0
    for match in _TOKENS.finditer(text):
        token = match.group()
        depth -= token in _CLOSES.values()
        found.append((match.start(), token, depth))
        depth += token in _CLOSES
    return found


def _groups(text: str) -> list[tuple[int, int]]:
    """Places of the outermost brackets."""
    outer = [(place, token) for place, token, depth in _tokens(text) if depth == 0]
    opening = [place for place, token in outer if token in _CLOSES]
    return list(zip(opening, (place for place, token in outer if token in _CLOSES.values()), strict=True))


def _pieces(text: str) -> list[str]:
    """Text between commas that no bracket holds."""
    commas = [place for place, token, depth in _tokens(text) if token == "," and depth == 0]
    return [text[a:b].strip(" ,") for a, b in zip([0, *commas], [*commas, len(text)], strict=True)]


def _terms(text: str) -> list[str]:
    """Text between operators that no bracket holds; an operator begins its line."""
    plain = "".join(token if depth == 0 and len(token) == 1 else "." * len(token) for _, token, depth in _tokens(text))
    breaks = [match.start() for match in _OPERATORS.finditer(plain)]
    return [text[a:b].strip() for a, b in zip([0, *breaks], [*breaks, len(text)], strict=True)]
