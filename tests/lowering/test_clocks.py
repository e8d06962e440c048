"""What masks between clocks let be seen, against every pair of positions; groups of tokens, against counting."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from heddle.dsl import syntax as sx
from heddle.dsl.program import TOKENS, Clock
from heddle.lowering.clocks import function, groups, is_steady, reach, spread, widest

QUERY, KEY = (sx.Member(sx.Name(n), "position") for n in ("query", "key"))
TOKENS_SEEN = 48


def times(expr: sx.Expr, factor: int) -> sx.Expr:
    return sx.Binary("*", expr, sx.Number(factor))


def plus(expr: sx.Expr, number: int) -> sx.Expr:
    return sx.Binary("+", expr, sx.Number(number)) if number >= 0 else sx.Binary("-", expr, sx.Number(-number))


def floor(expr: sx.Expr, by: int) -> sx.Expr:
    return sx.Binary("//", expr, sx.Number(by))


def grouped(size: int, shift: int, begins: bool, rows: int = 1) -> Clock:
    """(position + shift) // size, which may begin below 0."""
    return Clock("piece", floor(plus(QUERY, shift), size), rows, begins)


clocks = st.one_of(
    st.just(TOKENS),
    st.builds(grouped, st.integers(1, 5), st.integers(-4, 0), st.booleans(), st.integers(1, 3)),
)
differences = st.builds(
    lambda a, b, c: plus(sx.Binary("-", floor(QUERY, a), floor(KEY, b)), c),
    st.integers(1, 4), st.integers(1, 4), st.integers(-3, 3),
)  # fmt: skip
comparisons = st.builds(
    lambda d, op: sx.Binary(op, d, sx.Number(0)), differences, st.sampled_from(("<", "<=", ">", ">=", "=="))
)
masks = st.recursive(comparisons, lambda m: st.builds(sx.Binary, st.sampled_from(("and", "or")), m, m), max_leaves=3)


def rows_with(clock: Clock, token: int) -> range:
    """The rows of a clock that come with a token."""
    return range(groups(clock, token) * clock.times, groups(clock, token + 1) * clock.times)


@settings(max_examples=60)
@given(clock=clocks, tokens=st.integers(0, 30))
def test_groups_come_with_their_first_token_or_with_their_last(clock, tokens):
    number = function(clock.value)
    seen = [number(p, 0) for p in range(tokens)]
    begun = {g for g in seen if g >= 0}
    ended = {g for g in begun if number(tokens, 0) > g}
    assert groups(clock, tokens) == len(begun if clock.begins else ended)


@settings(max_examples=40)
@given(size=st.integers(1, 6), shift=st.integers(-9, 9), begins=st.booleans())
def test_steady_clocks_grow_one_by_one_from_0(size, shift, begins):
    clock = grouped(size, shift, begins)
    assert is_steady(clock) == (shift < size)
    assert widest(clock) == size
    assert not is_steady(Clock("twice", times(QUERY, 2), 1, begins))
    assert not is_steady(Clock("back", sx.Unary("-", QUERY), 1, begins))


@settings(max_examples=150)
@given(mask=masks, query=clocks, key=clocks)
def test_reach_covers_every_pair_that_a_mask_lets_see(mask, query, key):
    """No query sees a key beyond `keep`, nor one that comes later where `late` is false."""
    found, sees = reach(mask, query, key), function(mask)
    for token in range(TOKENS_SEEN):
        before, there = (groups(key, t) * key.times for t in (token, token + 1))
        for p in rows_with(query, token):
            for k in range(groups(key, TOKENS_SEEN) * key.times):
                if sees(p, k):
                    assert found.late or k < there
                    assert found.keep is None or k >= before - found.keep


@pytest.mark.parametrize("size", [1, 3, 4])
@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize("back", [1, 2, 5])
def test_reach_is_tight_for_groups_that_ended(size, rank, back):
    """The last `back` groups, whose rows come with their last token."""
    key = grouped(size, 0, False, rank)
    piece, theirs = floor(QUERY, size), floor(KEY, rank)
    ended = sx.Binary("and", sx.Binary("<", theirs, piece), sx.Binary("<=", piece, plus(theirs, back)))
    found = reach(ended, TOKENS, key)
    # The rows that come with a group's last token stand in front of those that were there before.
    assert found.late is False and found.keep == back * rank


@settings(max_examples=150)
@given(mask=masks, expr=differences, query=clocks, key=clocks)
def test_spread_holds_every_pair(mask, expr, query, key):
    found = spread(expr, mask, query, key)
    values = _values(expr, mask, query, key, range(TOKENS_SEEN))
    if found is not None and values:
        assert found[0] <= min(values) and max(values) <= found[1]


@settings(max_examples=60)
@given(first=comparisons, second=comparisons, expr=differences)
def test_spread_is_exact_within_a_sequence(first, second, expr):
    """Far enough from the start that no key is missing."""
    mask = sx.Binary("and", first, second)
    found = spread(expr, mask, TOKENS, TOKENS)
    if found is not None:
        values = _values(expr, mask, TOKENS, TOKENS, range(TOKENS_SEEN // 2, TOKENS_SEEN))
        assert found == ((min(values), max(values)) if values else (0, 0))


def _values(expr: sx.Expr, mask: sx.Expr, query: Clock, key: Clock, tokens: range) -> list[int]:
    sees, at = function(mask), function(expr)
    keys = range(groups(key, TOKENS_SEEN + 24) * key.times)
    return [at(p, k) for t in tokens for p in rows_with(query, t) for k in keys if sees(p, k)]


def test_a_distance_that_the_mask_does_not_bound_has_no_spread():
    causal = sx.Binary("<=", KEY, QUERY)
    assert spread(sx.Binary("-", QUERY, KEY), causal, TOKENS, TOKENS) is None
    window = sx.Binary("and", causal, sx.Binary(">", KEY, plus(QUERY, -4)))
    assert spread(sx.Binary("-", QUERY, KEY), window, TOKENS, TOKENS) == (0, 3)
    assert spread(QUERY, window, TOKENS, TOKENS) is None
