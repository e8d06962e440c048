"""Sentences that several calls say."""

from __future__ import annotations

import re
from collections.abc import Sequence

from ..diagnostics import Label, SpecError, fail
from ..source import Span


def given_twice(name: str, first: Span, second: Span) -> SpecError:
    """The `duplicate-argument` of two arguments for one parameter."""
    how = (
        "the first" if re.match(rf"{re.escape(name)}\s*=", first.text) else f"the first: this is `{name}`, by its place"
    )
    return fail("duplicate-argument", f"`{name}` is given twice", second, "the second", [Label(first, how)])


def count_of(slots: Sequence[str]) -> str:
    return f"{len(slots)} argument{'s' * (len(slots) != 1)}"
