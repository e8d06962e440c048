"""Damaged specs: the compiler finds what is wrong, or nothing, and never anything but diagnostics.

Each spec is damaged a fifth as often as the profile draws examples for a property (`suite`, `soak`: tests/conftest.py).
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given, note, settings
from hypothesis import strategies as st

from heddle.dsl.diagnostics import SpecError
from heddle.dsl.load import load_text
from heddle.dsl.render import render_all
from tests.dsl.checking import ROOT, check_maps

SPECS = sorted([*(ROOT / "specs").rglob("*.spec"), *(ROOT / "tests" / "programs").glob("*.spec")])
CASES = max(1, settings().max_examples // 10)
_TOKEN = re.compile(r'"[^"\n]*"|\w+|->|\.\.|[<>=!]=|[^\w\s]|\n[ ]*')
_NUMBER = re.compile(r"(?<![\w.])\d[\d_]*(?:\.\d+)?|\b(?:true|false|none)\b")
_ODD = [
    *"()[]{}:=,.;?\"#\\\t\n\0@$\u00e9\u6f22 ",
    "->", "..", "//", "^", "==", " in ", " if ", " else ", " for x in 3", " none ", " true ", "true", "none", "0", "-1",
    "1e400", "9" * 30, "0.5", '"""', "seq", "batch", "tokens", "identity", "given x = 1", " and ", " not ", "shared ",
    "return ", "causal", "index", "query.position", "[", "]", "{}", "[]", "()", '""', "x", "pi", "rms_norm", "embed",
]  # fmt: skip
_NUMBERS = ["0", "1", "-1", "2", "3", "7", "0.5", "1e9", "1e400", "99999999999999999999", "none", "true", '"a"', "[]"]


@st.composite
def damaged(draw: st.DrawFn, text: str) -> str:
    """The text with one to three small changes."""
    for change in draw(st.lists(st.sampled_from((_line, _tokens, _insert, _number)), min_size=1, max_size=3)):
        text = change(text, draw)
    return text


def _below(draw: st.DrawFn, size: int) -> int:
    return draw(st.integers(0, size - 1))


def _line(text: str, draw: st.DrawFn) -> str:
    lines = text.split("\n")
    at, other = _below(draw, len(lines)), _below(draw, len(lines))
    match draw(st.sampled_from(("remove", "repeat", "swap", "indent"))):
        case "remove":
            del lines[at]
        case "repeat":
            lines.insert(at, lines[other])
        case "swap":
            lines[at], lines[other] = lines[other], lines[at]
        case _:
            lines[at] = " " * _below(draw, 9) + lines[at].lstrip()
    return "\n".join(lines)


def _tokens(text: str, draw: st.DrawFn) -> str:
    found = list(_TOKEN.finditer(text))
    if len(found) < 2:
        return text
    first, second = sorted((_below(draw, len(found)), _below(draw, len(found))))
    a, b = found[first], found[second]
    match draw(st.sampled_from(("remove", "repeat", "overwrite", "swap"))):
        case "remove":
            return text[: a.start()] + text[a.end() :]
        case "repeat":
            return text[: a.end()] + " " + a[0] + text[a.end() :]
        case "swap" if first < second:
            return text[: a.start()] + b[0] + text[a.end() : b.start()] + a[0] + text[b.end() :]
        case _:
            return text[: a.start()] + b[0] + text[a.end() :]


def _insert(text: str, draw: st.DrawFn) -> str:
    at = draw(st.integers(0, len(text)))
    return text[:at] + draw(st.sampled_from(_ODD)) + text[at:]


def _number(text: str, draw: st.DrawFn) -> str:
    found = list(_NUMBER.finditer(text))
    if not found:
        return text
    match = draw(st.sampled_from(found))
    return text[: match.start()] + draw(st.sampled_from(_NUMBERS)) + text[match.end() :]


def outcome(text: str, folder: Path) -> str:
    """What checking a spec and its maps says, as text; empty if all is well."""
    from heddle.runtime.check import check_file

    try:
        checked = check_file(load_text(text, "broken.spec", folder))
        check_maps(checked.file, checked.programs)
    except SpecError as error:
        if not error.diagnostics:
            raise AssertionError("an error without a diagnostic") from error
        return render_all(error.diagnostics)
    return ""


@pytest.mark.parametrize("path", SPECS, ids=lambda p: str(p.relative_to(ROOT)))
@settings(max_examples=CASES)
@given(data=st.data())
def test_damaged_specs_give_diagnostics(path: Path, data: st.DataObject) -> None:
    text = data.draw(damaged(path.read_text(encoding="utf-8")), label="spec")
    note(text)
    outcome(text, path.parent)


def test_damage_reaches_both_outcomes() -> None:
    """The changes are neither so small that all stays well nor so large that only the parser speaks."""
    path = ROOT / "specs" / "llama" / "tiny.spec"
    seen: set[str] = set()

    @settings(max_examples=60, derandomize=True, database=None)
    @given(damaged(path.read_text(encoding="utf-8")))
    def look(text: str) -> None:
        said = outcome(text, path.parent)
        seen.add(said.partition("[")[2].partition("]")[0])

    look()
    assert {"", "syntax"} < seen
    assert len(seen) > 4
