"""Diagnostics as data: what is wrong, where, why there, and what would help. Rendering is in `render.py`."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from .source import Span


@dataclass(frozen=True)
class Label:
    """A place and what to say about it."""

    span: Span
    text: str = ""


@dataclass(frozen=True)
class Diagnostic:
    """One independent error or warning. `code` is stable and has a page (`heddle explain CODE`)."""

    code: str
    message: str
    primary: Label
    secondary: tuple[Label, ...] = ()
    help: str | None = None
    severity: str = "error"

    def to_json(self) -> dict[str, Any]:
        """Plain data for `--format json`."""
        return {
            "code": self.code,
            "severity": self.severity,
            "message": self.message,
            "primary": _label_json(self.primary),
            "secondary": [_label_json(label) for label in self.secondary],
            "help": self.help,
        }


def _label_json(label: Label) -> dict[str, Any]:
    span = label.span
    end_line, end_column = span.source.position(span.end)
    return {
        "file": span.source.name,
        "line": span.line,
        "column": span.column,
        "end_line": end_line,
        "end_column": end_column,
        "text": label.text,
    }


class SpecError(Exception):
    """The user's program is wrong. Carries every independent diagnostic that was found."""

    def __init__(self, diagnostics: Iterable[Diagnostic]):
        self.diagnostics = tuple(diagnostics)
        super().__init__("\n".join(f"{d.primary.span}: {d.code}: {d.message}" for d in self.diagnostics))


class InternalError(Exception):
    """A broken invariant of the compiler: never the user's fault."""


def fail(
    code: str,
    message: str,
    span: Span,
    label: str = "",
    secondary: Iterable[Label] = (),
    help: str | None = None,
) -> SpecError:
    """A `SpecError` with one diagnostic, to be raised."""
    return SpecError([Diagnostic(code, message, Label(span, label), tuple(secondary), help)])


@dataclass
class Collector:
    """Gathers the diagnostics of one phase; `finish` raises them together."""

    found: list[Diagnostic] = field(default_factory=list)

    def add(self, error: SpecError | Diagnostic) -> None:
        news = error.diagnostics if isinstance(error, SpecError) else (error,)
        self.found.extend(d for d in news if d not in self.found)

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Note a `SpecError` raised inside, and go on behind the block."""
        try:
            yield
        except SpecError as error:
            self.add(error)

    def finish(self) -> None:
        if any(d.severity == "error" for d in self.found):
            raise SpecError(self.found)


def nearest(name: str, candidates: Iterable[str], most: int = 3) -> list[str]:
    """At most three names that look like `name`, the nearest first: `RMSNorm` is `rms_norm`, and where a name is that
    near, others that share some letters are not given."""
    if len(name) > _LONGEST:
        return []
    matcher = difflib.SequenceMatcher(b=_letters(name))
    rated: list[tuple[float, str]] = []
    for candidate in sorted(set(candidates)):
        matcher.set_seq1(_letters(candidate))
        if matcher.real_quick_ratio() >= _ALIKE and matcher.quick_ratio() >= _ALIKE:
            rated.append((matcher.ratio(), candidate))
    best = max((rate for rate, _ in rated), default=0.0)
    near = [(rate, c) for rate, c in rated if rate >= max(_ALIKE, best - _MARGIN)]
    return [c for _, c in sorted(near, key=lambda pair: (-pair[0], pair[1]))][:most]


_LONGEST = 200
_ALIKE = 0.6
_MARGIN = 0.15


def _letters(name: str) -> str:
    return name.casefold().replace("_", "")


def did_you_mean(name: str, candidates: Iterable[str], what: str) -> str | None:
    """Help that states which near names exist, or None."""
    near = nearest(name, candidates)
    if not near:
        return None
    if len(near) == 1:
        return f"{what} named `{near[0]}` exists"
    return f"names that look like it: {listed(near)}"


def listed(names: Iterable[str]) -> str:
    """Names as they stand in a message, with commas between them."""
    return ", ".join(f"`{n}`" for n in names)


def near_or_all(name: str, candidates: Iterable[str], what: str, all_are: str, most: int = 8) -> str | None:
    """Help that states which near names exist; where none is near, all of them if they are few, behind `all_are`."""
    known = list(dict.fromkeys(candidates))
    return did_you_mean(name, known, what) or (f"{all_are} {listed(known)}" if 0 < len(known) <= most else None)
