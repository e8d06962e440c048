"""How diagnostics look: the form of the style guide, and that no place breaks it."""

from __future__ import annotations

import re
import time

from hypothesis import given
from hypothesis import strategies as st

from heddle.dsl.diagnostics import Diagnostic, Label
from heddle.dsl.render import WIDEST, len_shown, render, render_all
from heddle.dsl.source import Source, Span

SPEC = """\
model m(vocab, hidden):
    tokens[batch, seq]: token

    x = embed(tokens, vocab -> hidden)
    x = x + mlp(ffn, out = 4095)(rms_norm(x))
"""


def place(source: Source, text: str) -> Span:
    start = source.text.index(text)
    return Span(source, start, start + len(text))


def test_form_of_the_style_guide() -> None:
    source = Source("tiny.spec", SPEC)
    diagnostic = Diagnostic(
        "dim-mismatch",
        "`hidden` is 4096 in `embed`, but 4095 in `mlp`",
        Label(place(source, "out = 4095"), "expected [batch, seq, hidden = 4096]"),
        (Label(place(source, "hidden)\n    x = x"), "`hidden` was first bound to 4096 here"),),
        "drop `out`, it defaults to `hidden`",
    )
    assert render(diagnostic) == (
        "error[dim-mismatch]: `hidden` is 4096 in `embed`, but 4095 in `mlp`\n"
        "  --> tiny.spec:5:22\n"
        "    |\n"
        "  4 |     x = embed(tokens, vocab -> hidden)\n"
        "    |                                ------- `hidden` was first bound to 4096 here\n"
        "  5 |     x = x + mlp(ffn, out = 4095)(rms_norm(x))\n"
        "    |                      ^^^^^^^^^^ expected [batch, seq, hidden = 4096]\n"
        "    = help: drop `out`, it defaults to `hidden`"
    )


def test_other_files_and_distant_lines() -> None:
    source = Source("a.spec", "\n" * 119 + "here\n")
    other = Source("b.spec", "there\n")
    diagnostic = Diagnostic(
        "x", "m", Label(place(source, "here")), (Label(Span(source, 0, 0), "top"), Label(place(other, "there"), "why"))
    )
    assert render(diagnostic).split("\n") == [
        "error[x]: m",
        "  --> a.spec:120:1",
        "     |",
        "   1 |",
        "     | - top",
        "...",
        " 120 | here",
        "     | ^^^^",
        "  ::: b.spec:1:1",
        "     |",
        "   1 | there",
        "     | ----- why",
    ]


def test_tabs_and_wide_characters() -> None:
    source = Source("a.spec", 'a\t= "\u6f22\u5b57" bad')
    (_, _, _, line, under) = render(Diagnostic("x", "m", Label(place(source, "bad")))).split("\n")
    assert line == '  1 | a   = "\u6f22\u5b57" bad'
    assert under == "    |" + " " * 14 + "^^^"


def test_empty_source_is_an_arrow() -> None:
    assert render(Diagnostic("x", "m", Label(Span(Source("a.spec", ""), 0, 0)), help="h")) == (
        "error[x]: m\n  --> a.spec\n    = help: h"
    )


def test_several_lines_mark_the_first() -> None:
    source = Source("a.spec", "call(\n    one,\n)\n")
    assert render(Diagnostic("x", "m", Label(place(source, "(\n    one,\n)")))).endswith("  1 | call(\n    |     ^")


def test_long_lines_are_cut_quickly() -> None:
    text = "x + " * 250_000
    source = Source("a.spec", f"{text}bad{text}")
    before = time.perf_counter()
    lines = render(Diagnostic("x", "m", Label(place(source, "bad")), (Label(Span(source, 0, 1), "far"),))).split("\n")
    assert time.perf_counter() - before < 1
    assert max(map(len, lines)) <= WIDEST + 6
    marked = lines.index(next(line for line in lines if "^" in line))
    at = lines[marked].index("^")
    assert lines[marked - 1][at : at + 3] == "bad"


def test_counts() -> None:
    source = Source("a.spec", "a")
    error = Diagnostic("x", "m", Label(Span(source, 0, 1)))
    warning = Diagnostic("y", "m", Label(Span(source, 0, 1)), severity="warning")
    assert render_all([]) == ""
    assert render_all([error]) == render(error)
    assert render_all([error, error]).endswith("\n\n2 errors")
    assert render_all([error, warning, warning]).endswith("\n\n1 error, 2 warnings")


def test_control_characters_are_not_printed() -> None:
    source = Source("a\x1b.spec", "a \x1b[31m b")
    shown = render(Diagnostic("x", "bad \x1b[0m\n", Label(Span(source, 2, 3), "\x07"), help="one\ntwo"))
    assert all(c == "\n" or c.isprintable() for c in shown)
    assert shown.endswith("    = help: one\n            two")


def test_color_only_adds_escapes() -> None:
    source = Source("tiny.spec", SPEC)
    diagnostic = Diagnostic("x", "m", Label(place(source, "embed"), "e"), (Label(place(source, "model"), "why"),), "h")
    assert re.sub(r"\033\[[\d;]*m", "", render(diagnostic, color=True)) == render(diagnostic)


TEXTS = st.text(st.sampled_from("ab \n\t\r\u6f22\u0301\x00\x1b\u2028\U0001f600"), max_size=400) | st.text(max_size=300)
ASCII = st.text(st.sampled_from("ab=(),. \n"), max_size=700)


@st.composite
def diagnostics(draw: st.DrawFn, texts: st.SearchStrategy[str], slack: int = 3) -> Diagnostic:
    sources = [Source(name, draw(texts)) for name in ("a.spec", "b.spec")]

    def label() -> Label:
        source = draw(st.sampled_from(sources))
        start, end = (draw(st.integers(0, len(source.text) + slack)) for _ in range(2))
        return Label(Span(source, start, end), draw(st.sampled_from(["", "why"])))

    others = tuple(label() for _ in range(draw(st.integers(0, 3))))
    return Diagnostic("x", "m", label(), others, draw(st.none() | texts))


@given(diagnostics(TEXTS))
def test_any_place_can_be_rendered(diagnostic: Diagnostic) -> None:
    shown = render(diagnostic)
    assert all(c == "\n" or c.isprintable() for c in shown)
    assert render(diagnostic, color=True)


@given(diagnostics(ASCII))
def test_ascii_stays_ascii(diagnostic: Diagnostic) -> None:
    assert render(diagnostic).isascii()


@given(diagnostics(TEXTS | ASCII))
def test_lines_are_not_too_wide(diagnostic: Diagnostic) -> None:
    for line in render(diagnostic).split("\n"):
        if line.lstrip()[:1].isdigit():
            assert sum(map(len_shown, line)) <= WIDEST + 8


@given(st.lists(st.text(st.sampled_from("ab \u6f22\u0301"), max_size=200), min_size=1, max_size=4), st.data())
def test_caret_stands_under_its_character(lines: list[str], data: st.DataObject) -> None:
    number = data.draw(st.integers(0, len(lines) - 1))
    lines[number] += "X"
    text = "\n".join(lines)
    at = sum(len(line) + 1 for line in lines[:number]) + len(lines[number]) - 1
    shown = render(Diagnostic("x", "m", Label(Span(Source("a.spec", text), at, at + 1), "why"))).split("\n")
    under = next(i for i, line in enumerate(shown) if line.endswith("^ why"))
    line = shown[under - 1]
    assert line.startswith(f"  {number + 1} | ")
    column = sum(map(len_shown, line[: line.rindex("X")]))
    assert shown[under].index("^") == column
