"""Parsing: exact places, errors in the user's words, recovery, and bounds instead of crashes."""

from __future__ import annotations

import random
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from heddle.dsl import syntax as sx
from heddle.dsl.diagnostics import Diagnostic, SpecError
from heddle.dsl.parse import MOST_CHARACTERS, parse, parse_with_tokens
from heddle.dsl.render import render_all
from heddle.dsl.source import Source
from heddle.dsl.tokens import LAYOUT

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = sorted([*(ROOT / "specs").rglob("*.spec"), *(ROOT / "tests" / "programs").glob("*.spec")])
HEAD = "block a(p):\n    x[hidden]\n"


def parsed(text: str) -> sx.Module:
    return parse(Source("a.spec", text))


def first_error(text: str) -> tuple[str, str, tuple[int, int], str]:
    """Code, message, place and marked text of the first diagnostic; rendering it must work too."""
    with pytest.raises(SpecError) as caught:
        parsed(text)
    assert render_all(caught.value.diagnostics)
    d = caught.value.diagnostics[0]
    span = d.primary.span
    return d.code, d.message, (span.line, span.column), span.text


def diagnostics(text: str) -> tuple[Diagnostic, ...]:
    """What parsing says: nothing where all is well, and nothing but diagnostics else."""
    try:
        parsed(text)
    except SpecError as error:
        return error.diagnostics
    return ()


def nodes(node: Any) -> Iterator[sx.Syntax]:
    """A node and all below it."""
    if isinstance(node, tuple):
        for item in node:
            yield from nodes(item)
    elif isinstance(node, sx.Syntax):
        yield node
        for one in fields(node):
            yield from nodes(getattr(node, one.name))


# --- what is right -------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda p: p.stem)
def test_programs_parse_with_exact_places(path: Path) -> None:
    """The text of an expression's span is that expression; a declaration's name stands where it says."""
    source = Source(path.name, path.read_text(encoding="utf-8"))
    module = parse(source)
    assert module.declarations
    for d in module.declarations:
        assert d.name_span.text == d.name
        assert d.span.text.startswith(getattr(d, "keyword", "checkpoint"))
        assert re.fullmatch(r"(?:[^\S\n]*(?:#.*)?\n|\s|\Z)*", source.text[d.span.end : d.span.end + 1])
    expressions = [n for n in nodes(module) if isinstance(n, get_args(sx.Expr)) and not isinstance(n, sx.Range)]
    assert expressions
    again = parse(Source("again", "".join(f"model x = ({e.span.text}\n)\n" for e in expressions)))
    for expression, variant in zip(expressions, again.declarations, strict=True):
        assert isinstance(variant, sx.Variant)
        assert variant.value == expression


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda p: p.stem)
def test_spans_nest(path: Path) -> None:
    for node in nodes(parse(Source(path.name, path.read_text(encoding="utf-8")))):
        for one in fields(node):
            for child in nodes(getattr(node, one.name)):
                assert node.span.start <= child.span.start <= child.span.end <= node.span.end, (node, child)


def test_docs_are_the_lines_right_above() -> None:
    module = parsed("## lost\n\n## one\n##two\nblock a(): return 1\n# no doc\nblock b(): return 1\n")
    assert [d.doc for d in module.declarations] == ["one\ntwo", ""]


def test_words_are_keywords_only_where_the_grammar_says_so() -> None:
    module = parsed(
        "recipe a(step, over):\n    mesh = f(from = step, with = over)\n"
        "    for layer in mesh: y = layer.none\n    return mesh\n"
    )
    (function,) = module.declarations
    assert isinstance(function, sx.Function)
    assert [p.name for p in function.parameters] == ["step", "over"]


def test_lines_of_a_graph_dump() -> None:
    module = parsed("block a():\n    h: real[batch, seq] = f(x)\n    q: real[], k: token[b] = g(h)\n    return q\n")
    (function,) = module.declarations
    assert isinstance(function, sx.Function)
    h, qk, _ = function.body
    assert h == sx.Typed(("h",), ("real",), ((sx.DimItem("batch"), sx.DimItem("seq")),), h.value)  # type: ignore[union-attr]
    assert isinstance(qk, sx.Typed)
    assert (qk.names, qk.kinds, qk.shapes) == (("q", "k"), ("real", "token"), ((), (sx.DimItem("b"),)))


def test_line_endings_and_layout_do_not_matter() -> None:
    text = (ROOT / "tests" / "programs" / "retro.spec").read_text(encoding="utf-8")
    module = parsed(text)
    assert parsed(text.replace("\n", "\r\n")) == module
    assert parsed(text.rstrip("\n")) == module
    assert parsed("\n\n  # note\n" + text + "    # end") == module
    doubled = re.sub(r"^( +)", lambda m: m[1] * 2, text, flags=re.MULTILINE)
    assert parsed(doubled).declarations[1] == module.declarations[1]


@pytest.mark.parametrize("text", ["", "\n", "  \n\n", "# a comment", "   # another\n\n"])
def test_an_empty_file_is_an_empty_module(text: str) -> None:
    assert parsed(text) == sx.Module((), ())


# --- what is wrong: examples by message ----------------------------------------------------------

EXAMPLES = [
    (
        "missing-colon",
        "expected `:` at the end of this line",
        [
            "block a(x)\n    return 1\n",
            "model a = b with\n    q: it\n",
            HEAD + "    if p == 2\n        y = x\n",
            HEAD + "    for i in 3\n        y = x\n",
            "precision a\n    linear: fp8\n",
            'checkpoint h "X" for a\n    b = "c"\n',
            HEAD + "    if p:\n        y = x\n    else\n        y = x\n",
        ],
    ),
    ("missing-colon", "expected `:` before `return`", ["block a() return 1\n", HEAD + "    if p return 1\n"]),
    ("missing-colon", "expected `:` before `fp8`", ["precision a:\n    linear fp8\n"]),
    (
        "unclosed-bracket",
        "`(` is never closed",
        [
            "block a(x:\n    return 1\n",
            HEAD + "    y = f(x, p\n    z = 2\n",
            HEAD + "    y = f(x, p\n",
            HEAD + "    y = f(x,\n    return y\n",
            HEAD + "    y = f(x\n    w, z = y, y\n",
            "block a(x,\n    y = 3):\n    return f(x\nblock b(): return 1\n",
        ],
    ),
    (
        "unclosed-bracket",
        "`[` is never closed",
        [HEAD + "    y = [x, p\n    z = 2\n", "block a():\n    x[hidden\n    return x\n"],
    ),
    ("unclosed-bracket", "`)` does not close `[`", [HEAD + "    y = [x, p)\n"]),
    ("unclosed-bracket", "`]` closes nothing that is open here", [HEAD + "    y = x]\n", "block a(x): return x]\n"]),
    (
        "unclosed-string",
        "this string has no closing quote",
        [HEAD + '    y = "abc\n    return y\n', 'use a from "b.spec\n'],
    ),
    ("unclosed-string", "this text has no closing quotes", [HEAD + '    y = """abc\n    return y\n']),
    ("tabs", "this line is indented with a tab", ["block a():\n\treturn 1\n", HEAD + "  \ty = x\n"]),
    (
        "bad-indentation",
        "this line is indented like no line above it",
        [HEAD + "  y = x\n", "block a():\n    return 1\n  block b(): return 1\n"],
    ),
    (
        "bad-indentation",
        "this line is indented, but nothing above it opens a body",
        [HEAD + "      y = x\n", "  block a(): return 1\n"],
    ),
    (
        "empty-body",
        "a body must follow, indented",
        ["block a():\n", "block a():\nblock b(): return 1\n", HEAD + "    if p:\n    y = x\n", "layout a:\n\n# c\n"],
    ),
    (
        "reserved-word",
        "`loss` is a word of the language and cannot be a name",
        [HEAD + "    loss = x\n", HEAD + "    loss.x = 3\n", HEAD + "    loss[p] = x\n"],
    ),
    (
        "reserved-word",
        "`true` is a word of the language and cannot be a name",
        [
            "block a(true): return 1\n",
            HEAD + "    true = 1\n",
            "block true(): return 1\n",
            HEAD + "    for true in 3: y = x\n",
        ],
    ),
    ("syntax", 'expected `from` before `"b.spec"`', ['use a "b.spec"\n']),
    ("syntax", "expected `over` before `tensor`", ["layout a:\n    shard heads tensor\n"]),
    ("syntax", "expected `in` before `of`", [HEAD + "    for i of 3: y = x\n"]),
    ("syntax", "expected `else` before the end of the line", [HEAD + "    y = x if p\n"]),
    ("syntax", "a declaration cannot start with `modle`", ["modle a(): return 1\n", "modle\n"]),
    ("syntax", "a declaration cannot start with `x`", ["x = 3\n", "block a(): return 1\nx[hidden]\n"]),
    ("syntax", "`=` binds a name and cannot stand in a condition", [HEAD + "    if p = 2: y = x\n"]),
    ("syntax", "a call of `f` alone does nothing", [HEAD + "    f(x)\n"]),
    ("syntax", "`y` alone on a line says nothing", [HEAD + "    y\n"]),
    ("syntax", "a line cannot start with `retrun x`", [HEAD + "    retrun x\n"]),
    ("syntax", "there is no `+=`", [HEAD + "    y += 1\n"]),
    ("syntax", "there is no `**`", [HEAD + "    y = x ** 2\n"]),
    ("syntax", "comparisons cannot be chained", [HEAD + "    y = 1 < p < 3\n"]),
    ("syntax", "expected `,` or an operator before `p`", [HEAD + "    y = f(x p)\n", HEAD + "    y = [x p]\n"]),
    ("syntax", "expected an operator before `p`", [HEAD + "    y = x p\n"]),
    ("syntax", "expected `;` or a new line before `return`", ["block a(): x[hidden] return 1\n"]),
    ("syntax", "this `else` has no `if` above it in the same column", [HEAD + "    else:\n        y = x\n"]),
    (
        "syntax",
        "the line ends too early",
        [HEAD + "    y =\n", HEAD + "    y = x +\n", "model a =\n", HEAD + "    return\n", "layout a:\n    mesh\n"],
    ),
    ("syntax", "`'` does not belong here", [HEAD + "    y = 'x'\n"]),
    ("syntax", "`&` does not belong here", [HEAD + "    y = x & p\n"]),
    ("syntax", "a character that the language does not use: no-break space", [HEAD + "    y\u00a0= x\n"]),
    (
        "syntax",
        "this is a NUL character: no text file",
        ["block a(): return 1\0\n", "# \0\n", 'block a(): return "\0"\n'],
    ),
    (
        "too-large",
        "this number is too large to be held",
        [HEAD + "    y = 1e999\n", HEAD + "    y = " + "9" * 400 + "\n"],
    ),
    (
        "too-deep",
        "brackets nest more than 100 deep",
        ["block a(): return " + "[" * 500 + "]" * 500 + "\n", "block a(): return " + "(" * 99999],
    ),
    (
        "too-deep",
        "this nests more than 100 deep",
        [
            "block a(): return " + "-" * 500 + "x\n",
            "block a(): return " + "not " * 500 + "x\n",
            "block a(): return " + "x + " * 500 + "x\n",
            "block a(): return x" + ".x" * 500 + "\n",
            "block a(): return x" + "(x)" * 500 + "\n",
            "block a(): return " + "x ^ " * 500 + "x\n",
            "block a(): return " + "x if y else " * 500 + "x\n",
            "block a():\n" + "".join(" " * i + "if x:\n" for i in range(1, 500)) + " " * 500 + "y = x\n",
        ],
    ),
]


@pytest.mark.parametrize(
    ("code", "message", "text"), [(code, message, text) for code, message, texts in EXAMPLES for text in texts]
)
def test_broken_examples_map_to_their_message(code: str, message: str, text: str) -> None:
    assert first_error(text)[:2] == (code, message)


@pytest.mark.parametrize(
    ("text", "place", "marked"),
    [
        (HEAD + "    y = f(x, [p\n    z = 2\n", (3, 14), "["),
        (HEAD + "    y = f(x p)\n", (3, 13), "p"),
        ("block a(x)\n    return 1\n", (1, 11), ""),
        (HEAD + "    loss = x\n", (3, 5), "loss"),
        (HEAD + '    y = "abc\n', (3, 9), '"'),
        (HEAD + "    y = x +\n", (3, 11), "+"),
    ],
)
def test_the_mark_is_where_the_mistake_is(text: str, place: tuple[int, int], marked: str) -> None:
    assert first_error(text)[2:] == (place, marked)


def test_each_declaration_has_its_own_error() -> None:
    text = (
        "block a(:\n    return 1\n\nblock b(): return 1\n\nlayout c:\n    shard x tensor\n\nmodel d = \nmodel e = f(\n"
    )
    with pytest.raises(SpecError) as caught:
        parsed(text)
    assert [d.primary.span.line for d in caught.value.diagnostics] == [1, 7, 9, 10]


def test_an_error_in_a_bracket_does_not_hide_the_next_declaration() -> None:
    with pytest.raises(SpecError) as caught:
        parsed("block a():\n    y = f(1,\n\nblock b(): return (\n")
    assert [d.primary.span.line for d in caught.value.diagnostics] == [2, 4]


# --- bounds --------------------------------------------------------------------------------------


def test_a_hundred_levels_are_allowed() -> None:
    parsed("block a(): return " + "(" * 99 + "x" + ")" * 99 + "\n")
    parsed("block a(): return " + "x + " * 100 + "x\n")


@pytest.mark.parametrize(
    "text",
    [
        "block a():\n    return [" + "abc, " * 60_000 + "x]\n",
        '"' * 300_000,
        "block a(:\n" * 30_000,
        " " * 900_000 + "x",
        "block a(x,\n    y = 3\n" * 30_000,
        'block a(): return """' + "a\n" * 300_000,
        "\n" * 900_000,
        "[" * 900_000,
        "block a():\n" + "    x = y\n" * 20_000,
        "# c\n" * 200_000,
        "a" * 900_000,
        "-" * 900_000,
        "block a(): return 1" + "0" * 900_000,
    ],
    ids=[
        "list",
        "quotes",
        "errors",
        "spaces",
        "unclosed",
        "long",
        "empty",
        "brackets",
        "lines",
        "comments",
        "name",
        "signs",
        "digits",
    ],
)
def test_big_files_take_time_in_proportion(text: str) -> None:
    start = time.monotonic()
    render_all(diagnostics(text))
    assert time.monotonic() - start < 20  # seconds; what is quadratic takes minutes


def test_a_file_that_is_too_large_is_refused() -> None:
    assert first_error(" " * (MOST_CHARACTERS + 1))[0] == "too-large"


@given(st.integers(0, 10**6))
def test_damaged_programs_give_diagnostics(seed: int) -> None:
    """Delete, repeat, swap, insert: a diagnostic with a place inside the file, or success."""
    rng = random.Random(seed)
    text = rng.choice(PROGRAMS).read_text(encoding="utf-8")
    for _ in range(rng.randint(1, 3)):
        a, b = sorted(rng.randrange(len(text) + 1) for _ in range(2))
        b = min(b, a + rng.choice((1, 5, 60)))
        middle = rng.choice(
            ["", text[a:b] * 2, text[a:b][::-1], rng.choice('()[]{}:=,.;?"#\\\t\n\0@é '), '"""', "\n    ", " if "]
        )
        text = text[:a] + middle + text[b:]
    found = diagnostics(text)
    for d in found:
        assert 0 <= d.primary.span.start <= d.primary.span.end <= len(text) + 1
        assert d.message == d.message.strip(". \n")
    assert bool(render_all(found)) == bool(found)


@given(st.text(max_size=60))
def test_any_text_gives_diagnostics(text: str) -> None:
    found = diagnostics(text)
    assert bool(render_all(found)) == bool(found)


# --- tokens and speed ----------------------------------------------------------------------------


@pytest.mark.parametrize("path", PROGRAMS[:8], ids=lambda p: p.stem)
def test_tokens_and_the_gaps_between_them_are_the_text(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    _, found = parse_with_tokens(Source("a", text))
    end = 0
    for token in (t for t in found if t.type not in LAYOUT):
        assert text[token.start : token.end] == token.text
        assert re.fullmatch(r"(?:\s|#[^\n]*)*", text[end : token.start])
        end = token.end


def test_parsing_does_not_import_lark() -> None:
    code = "from heddle.dsl.load import load_text; load_text('block a(): return 1'); import sys"
    run = subprocess.run(
        [sys.executable, "-c", f"{code}\nprint('lark' in sys.modules)"], capture_output=True, text=True
    )
    assert run.stdout.strip() == "False", run.stderr


def test_parsing_is_fast() -> None:
    """250 lines in 40 ms are wanted; the bound leaves room for a slow machine."""
    text = "".join(
        (ROOT / "tests" / "programs" / f"{name}.spec").read_text(encoding="utf-8")
        for name in ("retro", "cosmos3", "t5")
    )
    text = "\n".join(line for line in (text + text).splitlines() if not line.startswith("use"))
    spent = []
    for _ in range(5):
        start = time.process_time()
        parsed(text)
        spent.append(time.process_time() - start)
    assert min(spent) < 0.16 * len(text.splitlines()) / 250
