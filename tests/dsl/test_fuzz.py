"""Damaged specs: the compiler finds what is wrong, or nothing, and never anything but diagnostics.

HEDDLE_FUZZ_SECONDS is the time for all shipped specs together.
"""

from __future__ import annotations

import os
import random
import re
import time
from pathlib import Path

import pytest

from heddle.dsl.diagnostics import SpecError
from heddle.dsl.load import load_text
from heddle.dsl.render import render_all
from tests.dsl.checking import ROOT

SPECS = sorted([*(ROOT / "specs").rglob("*.spec"), *(ROOT / "tests" / "programs").glob("*.spec")])
SECONDS = float(os.environ.get("HEDDLE_FUZZ_SECONDS", "20"))
SEED = int(os.environ.get("HEDDLE_FUZZ_SEED", "0"))
_TOKEN = re.compile(r'"[^"\n]*"|\w+|->|\.\.|[<>=!]=|[^\w\s]|\n[ ]*')
_ODD = [
    *"()[]{}:=,.;?\"#\\\t\n\0@$\u00e9\u6f22 ",
    "->", "..", "//", "^", "==", " in ", " if ", " else ", " for x in 3", " none ", " true ", "true", "none", "0", "-1",
    "1e400", "9" * 30, "0.5", '"""', "seq", "batch", "tokens", "identity", "given x = 1", " and ", " not ", "shared ",
    "return ", "causal", "index", "query.position", "[", "]", "{}", "[]", "()", '""', "x", "pi", "rms_norm", "embed",
]  # fmt: skip
_NUMBERS = ["0", "1", "-1", "2", "3", "7", "0.5", "1e9", "1e400", "99999999999999999999", "none", "true", '"a"', "[]"]


def damaged(text: str, rng: random.Random) -> str:
    """The text with one to three small changes."""
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        text = rng.choice((_line, _tokens, _tokens, _insert, _number))(text, rng)
    return text


def _line(text: str, rng: random.Random) -> str:
    lines = text.split("\n")
    at, other = rng.randrange(len(lines)), rng.randrange(len(lines))
    match rng.randrange(4):
        case 0:
            del lines[at]
        case 1:
            lines.insert(at, lines[other])
        case 2:
            lines[at], lines[other] = lines[other], lines[at]
        case _:
            lines[at] = " " * rng.randrange(9) + lines[at].lstrip()
    return "\n".join(lines)


def _tokens(text: str, rng: random.Random) -> str:
    found = list(_TOKEN.finditer(text))
    if len(found) < 2:
        return text
    a, b = sorted(rng.sample(found, 2), key=lambda m: m.start())
    match rng.randrange(4):
        case 0:
            return text[: a.start()] + text[a.end() :]
        case 1:
            return text[: a.end()] + " " + a[0] + text[a.end() :]
        case 2:
            return text[: a.start()] + b[0] + text[a.end() :]
        case _:
            return text[: a.start()] + b[0] + text[a.end() : b.start()] + a[0] + text[b.end() :]


def _insert(text: str, rng: random.Random) -> str:
    at = rng.randrange(len(text) + 1)
    return text[:at] + rng.choice(_ODD) + text[at:]


def _number(text: str, rng: random.Random) -> str:
    found = list(re.finditer(r"(?<![\w.])\d[\d_]*(?:\.\d+)?|\b(?:true|false|none)\b", text))
    if not found:
        return text
    match = rng.choice(found)
    return text[: match.start()] + rng.choice(_NUMBERS) + text[match.end() :]


def outcome(text: str, folder: Path) -> str:
    """What checking says, as text; empty if all is well."""
    from heddle.runtime.check import check_file

    try:
        check_file(load_text(text, "broken.spec", folder))
    except SpecError as error:
        if not error.diagnostics:
            raise AssertionError("an error without a diagnostic") from error
        return render_all(error.diagnostics)
    return ""


@pytest.mark.parametrize("path", SPECS, ids=lambda p: str(p.relative_to(ROOT)))
def test_damaged_specs_give_diagnostics(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    rng = random.Random(f"{SEED} {path.name}")
    end = time.monotonic() + SECONDS / len(SPECS)
    while time.monotonic() < end:
        broken = damaged(text, rng)
        try:
            outcome(broken, path.parent)
        except Exception as error:
            error.add_note(f"spec:\n{broken}")
            raise
