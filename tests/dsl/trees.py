"""Syntax trees drawn at random: everything that the grammar can say, in trees that it would give.

They nest to a fixed depth, and the outer ones have fewer parts, so that no tree is large: an expression has at most
`MOST_LEAVES` leaves.
"""

from __future__ import annotations

import string
from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st

from heddle.dsl import syntax as sx
from heddle.dsl.grammar_tables import KEYWORDS

_LETTERS = string.ascii_letters + "_"
names = st.one_of(
    st.sampled_from(["x", "q", "hidden", "heads", "norm1", "a_long_name_of_a_variable", "attention"]),
    st.text(_LETTERS, min_size=1, max_size=8).filter(lambda name: name not in KEYWORDS),
)
# What a short string may hold: anything but a quote, a line break and NUL, which no file may hold.
plain_text = st.text(st.characters(exclude_characters='"\n\0', exclude_categories=["Cs"]), max_size=12)


def _number(text: str) -> sx.Number:
    plain = text.replace("_", "")
    return sx.Number(int(plain) if plain.isdigit() else float(plain), text)


numbers = st.one_of(
    st.integers(0, 10**20).map(lambda n: sx.Number(n)),
    st.floats(0, 1e30, allow_nan=False).map(lambda x: sx.Number(x)),
    st.sampled_from(["0", "1e-5", "150_000_000", "0.5", "4.5e-7", "3E8", "007"]).map(_number),
)
_lines = st.text("ab{}.: #'", min_size=1, max_size=10).filter(lambda line: not line.isspace())
long_texts = st.builds(
    lambda first, rest: "\n".join([first.lstrip() or "x", *rest]),
    _lines,
    st.lists(st.one_of(_lines, st.just("")), max_size=3),
)
strings = st.one_of(plain_text.map(lambda text: sx.String(text)), long_texts.map(lambda text: sx.String(text, True)))
constants = st.sampled_from([None, True, False]).map(lambda value: sx.Constant(value))
leaves = st.one_of(names.map(lambda name: sx.Name(name)), numbers, strings, constants)


def _several(items: st.SearchStrategy[Any], least: int = 0, most: int = 3) -> st.SearchStrategy[Any]:
    return st.lists(items, min_size=least, max_size=most).map(tuple)


def _maybe(items: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.none() | items


def _nested(
    inner: st.SearchStrategy[Any], around: Callable[[st.SearchStrategy[Any], int], st.SearchStrategy[Any]], depth: int
) -> st.SearchStrategy[Any]:
    """What is drawn from `inner`, or put `around` it up to `depth` times; the innermost has `depth` parts at most, the
    outermost one."""
    level = inner
    for most in range(depth, 0, -1):
        level = _brief(inner | around(level, most))
    return level


def _brief(strategy: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """The same with a short `repr`. Hypothesis prints a strategy with all that it is made of; where each level names
    the one inside a dozen times, that takes gigabytes."""

    @st.composite
    def tree(draw: st.DrawFn) -> Any:
        return draw(strategy)

    return tree()


def arguments(inner: st.SearchStrategy[Any], ranges: bool = True) -> st.SearchStrategy[Any]:
    plain = st.builds(sx.Argument, inner) | st.builds(sx.Argument, inner, names)
    given = st.builds(sx.Argument, inner, names, st.just(True))
    if not ranges:
        return plain | given
    return plain | given | st.builds(sx.Argument, st.builds(sx.Range, inner, inner, _maybe(inner)))


DEPTH = 3
MOST_LEAVES = 3 * 3 * (1 + 3 * 3)
"""At each level three of what is inside, or what is called and its arguments; ranges stand in the innermost only."""


def _compound(inner: st.SearchStrategy[Any], most: int) -> st.SearchStrategy[Any]:
    items = _several(arguments(inner, ranges=most == DEPTH), most=most)
    operators = st.sampled_from(
        ["+", "-", "*", "/", "//", "%", "^", "==", "!=", "<=", ">=", "<", ">", "in", "and", "or"]
    )
    pairs = st.one_of(st.builds(sx.Pair, plain_text, inner), st.builds(sx.Pair, names, inner, st.just(False)))
    return st.one_of(
        st.builds(sx.Binary, operators, inner, inner),
        st.builds(sx.Unary, st.sampled_from(["-", "not"]), inner),
        st.builds(sx.Call, inner, items),
        st.builds(sx.Index, inner, items),
        st.builds(sx.Member, inner, names),
        st.builds(sx.Members, inner, items),
        st.builds(sx.ListOf, items),
        st.builds(sx.TupleOf, _several(arguments(inner, ranges=most == DEPTH), 1, most)),
        st.builds(sx.Comprehension, inner, _several(names, 1, 2), inner, _maybe(inner)),
        st.builds(sx.Table, _several(pairs, most=most)),
        st.builds(sx.Choose, inner, inner, inner),
        st.builds(sx.Arrow, inner, inner),
    )


expressions = _nested(leaves, _compound, DEPTH)
selectors = _several(st.builds(sx.Selector, expressions, st.booleans()), 1, 2)
dims = st.one_of(
    st.builds(sx.DimItem, names),
    st.builds(sx.DimItem, names, expressions),
    numbers.map(lambda number: sx.DimItem(None, number)),
)
shapes = _several(dims)


@st.composite
def inputs(draw: st.DrawFn) -> sx.Input:
    shape = draw(_maybe(shapes))
    if shape is not None and draw(st.booleans()):
        return sx.Input(draw(names), shape)
    kind, default = draw(expressions), draw(_maybe(expressions))
    if shape is None and isinstance(kind, sx.Index):
        default = None  # `h: real[seq] = ...` is a line of a graph dump
    return sx.Input(draw(names), shape, kind, draw(st.booleans()), default)


@st.composite
def typed(draw: st.DrawFn) -> sx.Typed:
    results = draw(st.lists(st.tuples(names, names, _several(st.builds(sx.DimItem, names))), min_size=1, max_size=3))
    found, kinds, dims_of = zip(*results, strict=True)
    return sx.Typed(found, kinds, dims_of, draw(expressions))


def _one(expression: sx.Expr) -> tuple[sx.Expr]:
    return (expression,)


simple_statements = st.one_of(
    inputs(),
    typed(),
    st.builds(sx.CoordinateInput, names, names, expressions, st.booleans(), _maybe(expressions)),
    st.builds(sx.Assign, _several(names, 1), _several(expressions, 1)),
    st.builds(sx.Assign, names.map(lambda name: (name,)), expressions.map(_one), shapes),
    st.builds(sx.Assign, names.map(lambda name: (name,)), expressions.map(_one), st.none(), st.just(True)),
    st.builds(sx.Coordinate, names, names, expressions),
    st.builds(sx.Declare, st.sampled_from(["param", "buffer"]), names, shapes, _maybe(expressions)),
    st.builds(sx.Emit, st.sampled_from(["loss", "metric", "update"]), names, expressions),
    st.builds(sx.InitRule, selectors, expressions),
    st.builds(sx.Return, _several(expressions, 1)),
)


def _bodies(inner: st.SearchStrategy[Any], most: int) -> st.SearchStrategy[Any]:
    body = _several(inner, 1, most)
    branches = _several(st.tuples(expressions, body), 1, most)
    return st.one_of(
        st.builds(sx.If, branches, st.just(()) | body),
        st.builds(sx.For, _several(names, 1, 2), expressions, body),
    )


statements = _nested(simple_statements, _bodies, 2)
settings_ = st.builds(sx.Setting, names, expressions)
dotted = st.lists(names, min_size=1, max_size=3).map(lambda found: _dotted(found))


def _dotted(found: list[str]) -> sx.Expr:
    made: sx.Expr = sx.Name(found[0])
    for name in found[1:]:
        made = sx.Member(made, name)
    return made


comparisons = st.sampled_from(["==", "!=", "<=", ">=", "<", ">"])
simple_rules = st.one_of(
    settings_,
    st.builds(sx.Apply, selectors, expressions),
    st.builds(sx.Mesh, _several(settings_, 1)),
    st.builds(
        sx.Shard, _several(st.builds(sx.Selector, dotted, st.booleans()), 1), _several(names, 1, 2), _maybe(names)
    ),
    st.builds(sx.Stages, names, _several(settings_)),
    st.builds(sx.Recompute, selectors),
    st.builds(sx.Expect, names, _maybe(names), comparisons, expressions),
)
rules = _nested(simple_rules, lambda inner, most: st.builds(sx.Scoped, selectors, _several(inner, 1, most)), 2)
equations = st.one_of(
    st.builds(
        sx.Equation,
        selectors,
        expressions,
        st.none() | st.builds(sx.Name, names) | st.builds(sx.ListOf, _several(arguments(expressions))),
        _maybe(expressions),
    ),
    st.builds(sx.Ignore, _several(plain_text.map(lambda text: sx.String(text)), 1)),
)
parameters = _several(st.builds(sx.Parameter, names, _maybe(expressions)))
declarations = st.one_of(
    st.builds(
        sx.Function,
        st.sampled_from(["block", "model", "pipeline", "recipe"]),
        names,
        parameters,
        _several(statements, 1),
    ),
    st.builds(
        sx.Variant,
        st.sampled_from(["block", "model", "pipeline", "recipe", "precision", "layout"]),
        names,
        expressions,
        _several(rules),
    ),
    st.builds(sx.Sheet, st.sampled_from(["precision", "layout"]), names, _several(rules, 1)),
    st.builds(sx.Checkpoint, names, plain_text, st.builds(sx.Name, names), _several(equations, 1)),
)
uses = st.builds(sx.Use, _several(st.builds(sx.Name, names), 1), plain_text)
modules = st.builds(sx.Module, _several(uses, 0, 2), _several(declarations, 0, 2))
