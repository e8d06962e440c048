"""The formatter: it changes no meaning, keeps every comment, and is done after once."""

from __future__ import annotations

import random
import re
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from heddle.dsl.diagnostics import InternalError, SpecError
from heddle.dsl.format import format_source
from heddle.dsl.parse import parse
from heddle.dsl.printer import WIDTH
from heddle.dsl.source import Source

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = sorted((ROOT / "specs").rglob("*.spec"))
PROGRAMS = sorted((ROOT / "tests" / "programs").glob("*.spec"))


def formatted(text: str) -> str:
    return format_source(Source("a.spec", text))


def comments(text: str) -> list[str]:
    """What the comments of a text say, without the strings that look like them."""
    bare = re.sub(r'"""[\s\S]*?"""|"[^"\n]*"', '""', text)
    return [c.strip("# \t") for c in re.findall(r"#[^\n]*", bare)]


# --- laws ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda p: p.stem)
def test_programs_come_out_as_they_are(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert formatted(text) == text


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_shipped_specs_keep_meaning_comments_and_width(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    once = formatted(text)
    assert formatted(once) == once
    assert parse(Source("a", once)) == parse(Source("a", text))
    assert comments(once) == comments(text)
    assert all(len(line) <= WIDTH for line in once.splitlines())


@given(st.integers(0, 10**6))
def test_layout_drawn_at_random_is_put_right(seed: int) -> None:
    """Other indentation, spaces, breaks in brackets, empty lines and comments: the laws hold for what comes out."""
    rng = random.Random(seed)
    text = disturbed(rng.choice(PROGRAMS).read_text(encoding="utf-8"), rng)
    once = formatted(text)
    assert formatted(once) == once
    assert parse(Source("a", once)) == parse(Source("a", text))
    assert comments(once) == comments(text)
    assert (
        not re.search(r"[ \t]$|\n\n\n|\A\n|\n\n\Z", re.sub(r'"""[\s\S]*?"""', "", once), re.MULTILINE) or '"""' in once
    )


_TOKEN = re.compile(r'"""[\s\S]*?"""|"[^"\n]*"|#[^\n]*|\n *|[ ]+|->|\.\.|[=!<>]=|//|\w+|[^\w\s]')


def disturbed(text: str, rng: random.Random) -> str:
    """The same program, laid out badly."""
    step = rng.choice((1, 2, 3, 4, 8))
    parts: list[str] = []
    depth = 0
    for match in _TOKEN.finditer(text):
        piece = match[0]
        if piece.startswith("\n"):
            spaces = len(piece) - 1
            if depth:
                piece = "\n" + " " * rng.choice((spaces, spaces, rng.randrange(60)))
            else:
                piece = rng.choice(("", "", "", "   # odd", "\n", "\n\n\n")) + "\n" + " " * (spaces // 4 * step)
                if parts and parts[-1].startswith("#"):
                    piece = piece.replace("   # odd", "")
        elif piece.isspace():
            piece = " " * rng.choice((1, 1, 1, 2, 5))
        elif piece in "([{":
            depth += 1
            piece += rng.choice(("", "", "", "", " ", "\n   ", "  # why\n "))
        elif piece in ")]}":
            depth -= 1
            piece = rng.choice(("", "", "", "", " ", "\n")) + piece
        elif piece == "," and depth:
            piece += rng.choice(("", " ", " ", " ", "\n", " # note\n    "))
        parts.append(piece)
    return "".join(parts)


# --- examples ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("block a( x,y ) :\n  z=x+ y*-2\n  return  z\n", "block a(x, y):\n    z = x + y * -2\n    return z\n"),
        (
            "block a():\n x[ seq , hidden=4 ] : token ?\n return x [ 0 ]\n",
            "block a():\n    x[seq, hidden = 4]: token?\n    return x[0]\n",
        ),
        ("model m=f( a->[ b,c ] )( d )\n", "model m = f(a -> [b, c])(d)\n"),
        ("model m = f(not(a), -b, - c, d - -e, [- f])\n", "model m = f(not (a), -b, -c, d - -e, [-f])\n"),
        ('use a , b from "c.spec"\n', 'use a, b from "c.spec"\n'),
        ("layout a:\n  mesh  x=1,y=2;recompute  b\n", "layout a:\n    mesh x = 1, y = 2; recompute b\n"),
        (
            'checkpoint h  "X" for m :\n  a.[b,c]="d" as[e,f]if g\n',
            'checkpoint h "X" for m:\n    a.[b, c] = "d" as [e, f] if g\n',
        ),
        ("block a(): return 1  #why\n", "block a(): return 1  # why\n"),
        ("block a():\n    # first\n\n\n\n    return 1\n\n\n\n", "block a():\n    # first\n\n    return 1\n"),
        ("block a():\n\n    return 1\n", "block a():\n    return 1\n"),
        ("##doc\nblock a(): return (1,)", "## doc\nblock a(): return (1,)\n"),
        ("", ""),
        ("\n\n", ""),
        ("# only\n\n", "# only\n"),
        ("block a(): return 1\r\n", "block a(): return 1\n"),
    ],
)
def test_spaces_and_lines(text: str, wanted: str) -> None:
    assert formatted(text) == wanted


def test_columns_are_kept_where_neighbours_share_them() -> None:
    text = (
        "block a():\n"
        "    x[hidden]\n"
        "    norm    = f(x)\n"
        "    longer  = g(x,\n"
        "                y)\n"
        "    z       = h(x)\n"
        "    apart = k(x)\n"
        "\n"
        "    single    = x\n"
        "    if x: y = 1\n"
        "    if xx:    y = 2\n"
        "    if x:    yy = 3\n"
        "    if xx:   yy = 4\n"
        "    return z\n"
    )
    wanted = (
        "block a():\n"
        "    x[hidden]\n"
        "    norm   = f(x)\n"
        "    longer = g(x,\n"
        "               y)\n"
        "    z      = h(x)\n"
        "    apart = k(x)\n"
        "\n"
        "    single = x\n"
        "    if x: y = 1\n"
        "    if xx: y = 2\n"
        "    if x:  yy = 3\n"
        "    if xx: yy = 4\n"
        "    return z\n"
    )
    assert formatted(text) == wanted


def test_comments_stay_in_their_columns_and_make_room() -> None:
    text = "block a():\n    x= 1      # one\n    yy=22     # two\n    zzz = 1 # near\n    return x  # end\n"
    wanted = "block a():\n    x = 1     # one\n    yy = 22   # two\n    zzz = 1  # near\n    return x  # end\n"
    assert formatted(text) == wanted


def test_comments_between_lines_take_the_level_that_they_stood_at() -> None:
    text = (
        "block a():\n"
        "  for i in 3:\n"
        "    x = i\n"
        "    # in the loop\n"
        "  # in the block\n"
        "  return x\n"
        "  # still in the block\n"
        "# outside\n"
        "block b(): return 1\n"
    )
    assert formatted(text) == re.sub(r"^( +)", lambda m: m[1] * 2, text, flags=re.MULTILINE)


def test_lines_in_brackets_go_where_their_bracket_says() -> None:
    text = (
        "model a = f(\n  b = 1,\n      c = 2)\n"
        "model d = attend(q, (k, v,\n m), # first\n                    (k2, v2, m2),\n   # second\n   bias = b\n)\n"
    )
    wanted = (
        "model a = f(\n    b = 1,\n    c = 2)\n"
        "model d = attend(q, (k, v,\n                     m),  # first\n                    (k2, v2, m2),\n"
        "                 # second\n                 bias = b\n                 )\n"
    )
    assert formatted(text) == wanted


def test_long_lines_break_at_the_outermost_comma_that_fits() -> None:
    inner = ", ".join(f"name_{i} = value_{i}" for i in range(4))
    text = f"model a = outer(first = inner({inner}), second = inner({inner}), third = 3)\n"
    lines = formatted(text).splitlines()
    assert [len(line) <= WIDTH for line in lines] == [True] * len(lines)
    assert lines[1].startswith("                second = inner(")


def test_long_strings_are_left_alone() -> None:
    text = 'pipeline a():\n  q: text\n  return f(q, p = """\n      one\n        two {q}  \n\n""", z=1)\n'
    assert (
        formatted(text)
        == 'pipeline a():\n    q: text\n    return f(q, p = """\n      one\n        two {q}  \n\n""", z = 1)\n'
    )


def test_a_file_with_errors_is_not_formatted() -> None:
    with pytest.raises(SpecError):
        formatted("block a(:\n")


def test_a_change_of_meaning_is_our_fault_and_gives_no_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("heddle.dsl.format._space", lambda tokens, i: "")
    for text in ("block a(): return not b\n", "block a(): return -1 if a else b\n"):
        with pytest.raises(InternalError):
            formatted(text)


def test_a_line_of_a_megabyte_takes_seconds() -> None:
    text = "block a():\n    return [" + "abc, " * 40_000 + "x]\n"
    start = time.monotonic()
    lines = formatted(text).splitlines()
    assert time.monotonic() - start < 20
    assert all(len(line) <= WIDTH for line in lines)
