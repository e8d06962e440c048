"""Printing: what is printed parses to what was printed, with no more parentheses than needed."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given

from heddle.dsl import syntax as sx
from heddle.dsl.diagnostics import InternalError
from heddle.dsl.format import format_source, print_expr, print_module
from heddle.dsl.parse import parse
from heddle.dsl.source import Source
from tests.dsl.trees import MOST_LEAVES, expressions, modules


def _parsed(text: str) -> sx.Module:
    return parse(Source("printed", text))


def _expression(text: str) -> sx.Expr:
    (variant,) = _parsed(f"model x = {text}\n").declarations
    assert isinstance(variant, sx.Variant)
    return variant.value


@given(expressions)
def test_no_expression_that_is_drawn_is_large(expression: sx.Expr) -> None:
    assert _leaves(expression) <= MOST_LEAVES


def _leaves(node: object) -> int:
    if isinstance(node, tuple):
        return sum(map(_leaves, node))
    if not isinstance(node, sx.Syntax):
        return 0
    return sum(map(_leaves, vars(node).values())) or isinstance(node, (sx.Name, sx.Number, sx.String, sx.Constant))


@given(expressions)
def test_an_expression_survives_printing(expression: sx.Expr) -> None:
    assert _expression(print_expr(expression)) == expression


@given(modules)
def test_a_module_survives_printing(module: sx.Module) -> None:
    assert _parsed(print_module(module)) == module


@given(modules)
def test_what_is_printed_is_formatted(module: sx.Module) -> None:
    text = print_module(module)
    assert format_source(Source("printed", text)) == text


@pytest.mark.parametrize(
    "text",
    [
        "a + b - c",
        "a - (b - c)",
        "a * (b + c)",
        "-a ^ 2",
        "(-a) ^ 2",
        "2 ^ -x",
        "(2 ^ x) ^ y",
        "2 ^ x ^ y",
        "a ^ -(b / c)",
        "not a and b",
        "not (a and b)",
        "(a or b) and c",
        "a and b or c",
        "a < b and b < c",
        "(a < b) < c",
        "a in b",
        "(a if b else c) if d else e",
        "a if b else c if d else e",
        "a if (b if c else d) else e",
        "(a if b else c).d",
        "f(x)(y).z[0 .. 3 step 2]",
        "mamba2.[z, u]",
        "-f(x)",
        "- -x".replace("- -", "--"),
        "a -> [b, c = 2]",
        "(a -> b)",
        "[x for x in y if z]",
        "[(a if b else c) for x, y in z]".replace("(", "").replace(")", ""),
        "(a,)",
        "(a, b = c)",
        '{"M": a, code: 14.0}',
        "{}",
        "[]",
        "f(given x = 1, y = 2)",
        "none",
        "x[1e-5, 150_000_000]",
    ],
)
def test_parentheses_are_the_fewest(text: str) -> None:
    wanted = text[1:-1] if text == "(a -> b)" else text
    assert print_expr(_expression(text)) == wanted


def test_long_lines_are_broken_behind_their_bracket() -> None:
    call = sx.Call(sx.Name("attention"), tuple(sx.Argument(sx.Name(f"value_{i}"), f"name_{i}") for i in range(20)))
    text = print_module(sx.Module((), (sx.Variant("model", "long", call),)))
    assert all(len(line) <= 120 for line in text.splitlines())
    assert {line.index("name") for line in text.splitlines()} == {len("model long = attention(")}
    assert _parsed(text).declarations[0] == sx.Variant("model", "long", call)


def test_printer_and_formatter_break_alike() -> None:
    text = f'model m = f(a, "{"b" * 118}")\n'
    assert format_source(Source("a", text)) == print_module(_parsed(text)) == text.replace("a, ", "a,\n            ")


def test_numbers_that_elaboration_makes_are_printed() -> None:
    assert print_expr(sx.Number(-3)) == "-3"
    assert print_expr(sx.Binary("^", sx.Number(-3), sx.Number(2))) == "(-3) ^ 2"
    assert print_expr(sx.Binary("^", sx.Number(2), sx.Number(Fraction(1, 3)))) == "2 ^ (1 / 3)"  # type: ignore[arg-type]
    assert print_expr(sx.Number(1e-05)) == "1e-05"


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_what_the_language_cannot_say_is_our_fault(value: float) -> None:
    with pytest.raises(InternalError):
        print_expr(sx.Number(value))
