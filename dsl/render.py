"""Diagnostics as text, in plain ASCII: where, the lines concerned, `^` for what is wrong, `-` for why."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from .diagnostics import Diagnostic, Label
from .source import Source

WIDEST = 160
"""Longer lines are cut around what is marked in them."""
_BEFORE = 60
_DISTANT = 8
_TAB = 4
_DOTS = "..."
_PAINT = {"error": "1;31", "warning": "1;33", "place": "1;34", "strong": "1"}


def render(diagnostic: Diagnostic, color: bool = False) -> str:
    """One diagnostic as lines of text, without a line break at the end."""
    pen = _Pen(color)
    marks = [_mark(diagnostic.primary, "^", diagnostic.severity)]
    marks += [_mark(label, "-", "place") for label in diagnostic.secondary]
    width = max([2, *(len(str(m.line)) for m in marks)])
    head = pen(diagnostic.severity, f"{diagnostic.severity}[{diagnostic.code}]")
    lines = [head + pen("strong", f": {_clean(diagnostic.message)}")]
    for arrow, part in _by_file(marks):
        lines.extend(_part(arrow, part, width, pen))
    if diagnostic.help:
        first, *rest = diagnostic.help.split("\n")
        lines.append(" " * (width + 2) + pen("place", "= ") + f"help: {_clean(first)}")
        lines.extend(" " * (width + 10) + _clean(line) for line in rest)
    return "\n".join(line.rstrip() for line in lines)


def render_all(diagnostics: Iterable[Diagnostic], color: bool = False) -> str:
    """Several diagnostics with a blank line between them, and how many they are if that is more than one."""
    found = list(diagnostics)
    parts = [render(d, color) for d in found]
    if len(found) > 1:
        counts = {word: sum(d.severity == word for d in found) for word in dict.fromkeys(d.severity for d in found)}
        parts.append(", ".join(f"{n} {word}{'s' if n > 1 else ''}" for word, n in sorted(counts.items())))
    return "\n\n".join(parts)


class _Pen:
    """Colours a piece of text, or leaves it as it is."""

    def __init__(self, color: bool):
        self.color = color

    def __call__(self, style: str, text: str) -> str:
        return f"\033[{_PAINT.get(style, '1')}m{text}\033[0m" if self.color and text else text


@dataclass(frozen=True)
class _Mark:
    """A label at its place: characters `start` to `end` of the first line that its span touches."""

    source: Source
    text: str
    sign: str
    style: str
    line: int
    line_start: int
    line_end: int
    start: int
    end: int

    @property
    def place(self) -> str:
        name = _clean(self.source.name)
        if self.source.text:
            return f"{name}:{self.line}:{self.start - self.line_start + 1}"
        return f"{name}: {self.text}" if self.text else name


def _mark(label: Label, sign: str, style: str) -> _Mark:
    source, text = label.span.source, label.span.source.text
    start = min(max(label.span.start, 0), len(text))
    line_start = text.rfind("\n", 0, start) + 1
    line_end = text.find("\n", start)
    line_end = len(text) if line_end < 0 else line_end
    while line_end > line_start and text[line_end - 1] == "\r":
        line_end -= 1
    end = max(min(label.span.end, line_end), start)
    number = text.count("\n", 0, start) + 1
    return _Mark(source, _clean(label.text), sign, style, number, line_start, line_end, start, end)


def _by_file(marks: Sequence[_Mark]) -> Iterator[tuple[str, list[_Mark]]]:
    """The marks of each file with the arrow that leads to them; the file of the first mark comes first."""
    left = list(marks)
    arrow = "-->"
    while left:
        source = left[0].source
        here = [m for m in left if m.source.name == source.name and m.source.text == source.text]
        left = [m for m in left if m not in here]
        if arrow == "-->" or source.text or any(m.text for m in here):
            yield arrow, list(dict.fromkeys(here))
        arrow = ":::"


def _part(arrow: str, marks: list[_Mark], width: int, pen: _Pen) -> Iterator[str]:
    """What concerns one file: the place of its first mark, then each marked line with its marks below it."""
    yield "  " + pen("place", arrow) + f" {marks[0].place}"
    if not marks[0].source.text:
        return
    gutter = pen("place", " " * (width + 2) + "|")
    yield gutter
    before = None
    for number in sorted({m.line for m in marks}):
        if before is not None and number - before > _DISTANT:
            yield pen("place", _DOTS)
        before = number
        here = [m for m in marks if m.line == number]
        for shown, rows in _windows(here):
            yield pen("place", f" {number:>{width}} |") + f" {shown}"
            for mark, column, length in rows:
                under = pen(mark.style, f"{mark.sign * length} {mark.text}")
                yield f"{gutter} {' ' * column}{under}"


def _windows(marks: list[_Mark]) -> Iterator[tuple[str, list[tuple[_Mark, int, int]]]]:
    """A line as it is shown, with the column and length of each mark; a long line once for each mark that needs it."""
    first = marks[0]
    line_start, line_end = first.line_start, first.line_end
    if line_end - line_start <= WIDEST:
        cells = _cells(first.source.text[line_start:line_end])
        if sum(map(len_shown, cells)) <= WIDEST:
            rows = [(m, *_extent(cells, m.start - line_start, m.end - line_start)) for m in marks]
            yield "".join(cells).rstrip(), rows
            return
    left = list(marks)
    while left:
        start, end, shown, shift, cells = _cut(left[0])
        fits = [m for m in left if m is left[0] or start <= m.start and m.end <= end]
        left = [m for m in left if m not in fits]
        rows = []
        for m in fits:
            column, length = _extent(cells, m.start - start, min(m.end, end) - start)
            rows.append((m, column + shift, length))
        yield shown, rows


def _cut(mark: _Mark) -> tuple[int, int, str, int, list[str]]:
    """The part of a long line around a mark: its ends, the text with dots, how far the dots shift it, its cells."""
    text = mark.source.text
    start = max(mark.line_start, mark.start - _BEFORE)
    if mark.line_end - start < WIDEST - _BEFORE:
        start = max(mark.line_start, min(start, mark.line_end - (WIDEST - 2 * len(_DOTS))))
    front = _DOTS if start > mark.line_start else ""
    cells = _cells(text[start : min(mark.line_end, start + WIDEST)])
    room = WIDEST - len(front) - len(_DOTS)
    while sum(map(len_shown, cells)) > room:
        cells.pop()
    end = start + len(cells)
    if mark.start > end:  # wide characters before the mark have taken the room
        start, front = mark.start, _DOTS
        cells = _cells(text[start : min(mark.line_end, start + room // 2)])
        end = start + len(cells)
    return start, end, front + "".join(cells) + (_DOTS if end < mark.line_end else ""), len(front), cells


def _extent(cells: list[str], start: int, end: int) -> tuple[int, int]:
    """Column and length of characters `start` to `end` as they are shown; at least one column."""
    column = sum(map(len_shown, cells[:start]))
    return column, max(sum(map(len_shown, cells[start:end])), 1)


def _cells(text: str) -> list[str]:
    """How each character is shown: tabs as spaces, what cannot be printed as `?`."""
    if text.isascii() and text.isprintable():
        return list(text)
    cells = []
    column = 0
    for c in text:
        cell = " " * (_TAB - column % _TAB) if c == "\t" else c if c.isprintable() else "?"
        cells.append(cell)
        column += len_shown(cell)
    return cells


def len_shown(cell: str) -> int:
    """How many columns a terminal gives to one character, or to the spaces that stand for a tab."""
    if cell.isascii():
        return len(cell)
    if unicodedata.combining(cell):
        return 0
    return 2 if unicodedata.east_asian_width(cell) in "WF" else 1


def _clean(text: str) -> str:
    """Text of a message without what would disturb a terminal: line breaks and control characters as escapes."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
