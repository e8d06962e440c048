"""What a mask lets see, read off its comparisons, against a count of all pairs of positions."""

from __future__ import annotations

import operator

from hypothesis import example, given, settings
from hypothesis import strategies as st

from heddle.dsl import syntax as sx
from heddle.dsl.parse import parse
from heddle.dsl.source import Source
from heddle.lowering.masks import hull

COMPARE = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
    "==": operator.eq,
    "!=": operator.ne,
}
ARITHMETIC = {"+": operator.add, "-": operator.sub, "*": operator.mul, "//": operator.floordiv}
POSITIONS = range(40)
MIDDLE = range(16, 24)


def value(expr: sx.Expr, query: int, key: int) -> int:
    """An expression at a pair of positions."""
    match expr:
        case sx.Number(value=v) | sx.Constant(value=v):
            return v
        case sx.Member(value=sx.Name(id=which)):
            return query if which == "query" else key
        case sx.Unary(operator="not", value=inner):
            return not value(inner, query, key)
        case sx.Unary(value=inner):
            return -value(inner, query, key)
        case sx.Binary(operator="and", left=left, right=right):
            return bool(value(left, query, key)) and bool(value(right, query, key))
        case sx.Binary(operator="or", left=left, right=right):
            return bool(value(left, query, key)) or bool(value(right, query, key))
        case sx.Binary(operator=op, left=left, right=right):
            return {**COMPARE, **ARITHMETIC}[op](value(left, query, key), value(right, query, key))
    raise AssertionError(expr)


QUERY, KEY = (sx.Member(sx.Name(name), "position") for name in ("query", "key"))
numbers = st.integers(0, 9).map(lambda n: sx.Number(n, str(n)))
steps = st.integers(1, 5).map(lambda n: sx.Number(n, str(n)))
terms = st.recursive(
    st.sampled_from([QUERY, KEY]) | numbers,
    lambda inner: (
        st.builds(sx.Binary, st.sampled_from(["+", "-"]), inner, inner)
        | st.builds(sx.Binary, st.just("//"), inner, steps)
        | st.builds(sx.Binary, st.just("*"), numbers, inner)
        | st.builds(sx.Unary, st.just("-"), inner)
    ),
    max_leaves=5,
)
comparisons = st.builds(sx.Binary, st.sampled_from(list(COMPARE)), terms, terms)
masks = st.recursive(
    comparisons | st.booleans().map(sx.Constant),
    lambda inner: (
        st.builds(sx.Binary, st.sampled_from(["and", "or"]), inner, inner) | st.builds(sx.Unary, st.just("not"), inner)
    ),
    max_leaves=4,
)


def seen(mask: sx.Expr) -> list[int]:
    """Offsets key - query of the pairs that a mask allows; queries from the middle, so that no end cuts them off."""
    return [k - q for q in MIDDLE for k in POSITIONS if value(mask, q, k)]


@settings(max_examples=600)
@given(mask=masks)
def test_nothing_outside_of_the_hull_is_seen(mask):
    bounds = hull(mask)
    for offset in seen(mask):
        assert bounds.behind is None or offset >= -bounds.behind
        assert bounds.ahead is None or offset <= bounds.ahead


@settings(max_examples=100)
@given(a=st.integers(0, 12), b=st.integers(0, 12))
@example(a=0, b=0)
def test_windows_are_exact(a, b):
    mask = parsed(f"query.position - key.position <= {a} and key.position - query.position < {b + 1}")
    assert (hull(mask).behind, hull(mask).ahead) == (a, b) == (-min(seen(mask)), max(seen(mask)))


@settings(max_examples=60)
@given(size=st.integers(1, 8), shift=st.integers(0, 7))
def test_pieces_are_exact(size, shift):
    """Within pieces of `size` a query sees at most size - 1 back and ahead; in finished pieces at least one back."""
    inside = parsed(f"(key.position + {shift}) // {size} == (query.position + {shift}) // {size}")
    assert (hull(inside).behind, hull(inside).ahead) == (size - 1, size - 1)
    before = parsed(f"(key.position + {shift}) // {size} < (query.position + {shift}) // {size}")
    assert hull(before).ahead == -1 and hull(before).behind is None


def parsed(text: str) -> sx.Expr:
    (block,) = parse(Source("<mask>", f"block m(): return {text}\n")).declarations
    return block.body[0].values[0]
