"""What bisection finds of a mask, against the mask asked of every query and key."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from heddle.codegen.writer import _python_mask
from heddle.dsl import syntax as sx
from heddle.dsl.format import print_expr
from heddle.lowering.intervals import is_apart, tells_apart, why_no_interval
from heddle.runtime import lib
from heddle.runtime.lib import intervals as found_by
from heddle.runtime.lib.rows import Keys

law = settings(max_examples=settings.default.max_examples)
number = st.integers(-4, 9)


def drawn_masks(n: int, m: int, w: int) -> dict[str, Any]:
    return {
        "causal": lambda query, key: key.position <= query.position,
        "window": lambda query, key: (key.position <= query.position) & (query.position - key.position < m),
        "piece": lambda query, key: (key.position + n) // w == (query.position + n) // w,
        "past pieces": lambda query, key: key.position // w < query.position // w,
        "recent pieces": lambda query, key: (key.position // w < query.position // w)
        & (query.position // w - key.position // w <= m),
        "tile": lambda query, key: (key.position >= query.position // w * w - n)
        & (key.position < query.position // w * w + w + n),
        "prefix": lambda query, key: (key.position <= query.position) | (key.position < n),
        "not late": lambda query, key: ~(key.position > query.position + n),
        "neither of two": lambda query, key: ~((key.position > query.position) | (key.position > query.position - n)),
        "backwards": lambda query, key: -2 * key.position + n >= -query.position,
        "only late queries": lambda query, key: (query.position >= n) & (key.position <= query.position),
        "nothing": lambda query, key: (key.position <= query.position) & False,
        "all": None,
    }


def coordinates(draw: Any, batch: int, size: int, packed: bool, ids: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Documents side by side, in any order of their names, and positions that never fall inside one."""
    document = torch.zeros(batch, size, dtype=torch.int64)
    position = torch.zeros(batch, size, dtype=torch.int64)
    for b in range(batch):
        names = list(draw(st.permutations(ids))) if packed else [0]
        cuts = sorted(draw(st.integers(0, size)) for _ in names[1:])
        for name, start, end in zip(names, [0, *cuts], [*cuts, size]):
            document[b, start:end] = name
            steps = [draw(st.integers(0, 3)) for _ in range(end - start)]
            position[b, start:end] = torch.tensor(steps, dtype=torch.int64).cumsum(0)
    return position, document


@law
@given(st.data(), st.integers(1, 2), st.integers(0, 9), st.integers(0, 9), st.booleans(), st.booleans(), number, number,
       st.integers(1, 4))  # fmt: skip
def test_bounds_are_what_the_mask_lets_be_seen(data, batch, t, k, packed, ragged, n, m, w):
    name = data.draw(st.sampled_from(sorted(drawn_masks(n, m, w))))
    mask = _mask(drawn_masks(n, m, w)[name])
    cuts = found_by.cuts(mask)
    assert cuts is not None
    asked, theirs = (coordinates(data.draw, batch, size, packed, [4, 1, 7]) for size in (t, k))
    valid = None
    if ragged:  # rows at both ends that do not count, with anything written on them
        first, last = sorted((data.draw(st.integers(0, k)), data.draw(st.integers(0, k))))
        valid = ((torch.arange(k) >= first) & (torch.arange(k) < last)).expand(batch, k)
        theirs = tuple(torch.where(valid, x, 10**6 - torch.arange(k)) for x in theirs)
    queries, keys = Keys(*asked, None), Keys(theirs[0], theirs[1] if packed else None, valid)
    low, high = found_by.bounds(cuts, queries, keys)
    row = torch.arange(k)
    inside = (row >= low[..., None]) & (row < high[..., None])
    assert torch.equal(inside, mask.between(queries, keys)[:, 0])
    empty = ~inside.any(-1)
    assert bool((low[empty] == found_by.NEVER).all()) and bool((high[empty] == 0).all())

    first, last = found_by.askers(low, high, k)
    for b in range(batch):
        some = ~empty[b]
        ordered = all(bool((x[b][some].diff() >= 0).all()) for x in (low, high))
        for j in range(k):
            who = inside[b, :, j].nonzero().flatten().tolist()
            if who and ordered:
                assert (int(first[b, j]), int(last[b, j])) == (who[0], who[-1] + 1)
            elif who:  # documents in another order: none is missed
                assert int(first[b, j]) <= who[0] and who[-1] < int(last[b, j])


def _mask(predicate: Any) -> lib.Mask:
    """A mask whose hull is not given: bounds do not read it."""
    mask = lib.Mask(None, None, None)
    mask.predicate = predicate
    return mask


@pytest.mark.parametrize(
    "predicate",
    [
        lambda query, key: (key.position <= query.position) | (key.position > query.position + 3),  # two pieces
        lambda query, key: key.position != query.position,
        lambda query, key: (query.position - key.position) // 2 == 0,  # both sides under one division
        lambda query, key: key.document == query.document,
        lambda query, key: key.position - key.position // 2 <= query.position,  # rises and falls
    ],
)
def test_what_is_not_proved_to_be_an_interval_is_refused(predicate):
    assert found_by.cuts(_mask(predicate)) is None


def test_a_place_is_one_of_each_key_only_where_it_moves_by_one():
    assert found_by.places(lambda query, key: query.position - key.position).even
    assert found_by.places(lambda query, key: query.position // 4 * 2 - 1 - key.position).even
    for other in (lambda query, key: query.position - key.position // 2, lambda query, key: query.position,
                  lambda query, key: 2 * key.position, lambda query, key: (query.position - key.position) // 3):  # fmt: skip
        assert found_by.places(other) is None


def test_positions_that_fall_are_found():
    falling = torch.tensor([[0, 1, 3, 2]])
    assert found_by.rises(Keys(falling, None, None)) == (False, False)
    assert found_by.rises(Keys(falling, torch.tensor([[0, 0, 0, 1]]), None)) == (True, True)
    assert found_by.rises(Keys(falling, None, torch.tensor([[True, True, True, False]]))) == (True, True)
    assert found_by.rises(Keys(torch.tensor([[0, 1, 1]]), None, None)) == (True, False)


# --- the compiler says the same -------------------------------------------------------------------


QUERY, KEY = (sx.Member(sx.Name(name), "position") for name in ("query", "key"))
numbers = st.integers(0, 5).map(lambda n: sx.Number(n, str(n)))
terms = st.recursive(
    st.sampled_from([QUERY, KEY]) | numbers,
    lambda inner: (
        st.builds(sx.Binary, st.sampled_from(["+", "-"]), inner, inner)
        | st.builds(sx.Binary, st.just("//"), inner, numbers)
        | st.builds(sx.Binary, st.just("*"), inner, inner)
        | st.builds(sx.Unary, st.just("-"), inner)
    ),
    max_leaves=4,
)
comparisons = st.builds(sx.Binary, st.sampled_from(["<", "<=", ">", ">=", "==", "!="]), terms, terms)
masks = st.recursive(
    comparisons | st.booleans().map(sx.Constant),
    lambda inner: (
        st.builds(sx.Binary, st.sampled_from(["and", "or"]), inner, inner) | st.builds(sx.Unary, st.just("not"), inner)
    ),
    max_leaves=4,
)


def reads(expr: sx.Expr) -> bool:
    """Whether every comparison reads a coordinate: one of numbers alone is no mask that a spec can have."""
    if isinstance(expr, sx.Binary) and expr.operator in ("and", "or"):
        return reads(expr.left) and reads(expr.right)
    if isinstance(expr, sx.Unary) and expr.operator == "not":
        return reads(expr.value) and "position" in print_expr(expr.value)
    return isinstance(expr, sx.Constant) or "position" in print_expr(expr)


@settings(max_examples=settings.default.max_examples)
@given(masks.filter(reads))
def test_the_compiler_proves_what_the_library_proves(mask):
    written = eval(f"lambda query, key: {_python_mask(mask)}")
    assert (why_no_interval(mask) is None) == (found_by.cuts(_mask(written)) is not None)


@settings(max_examples=settings.default.max_examples)
@given(terms)
def test_the_compiler_and_the_library_agree_on_places(distance):
    written = eval(f"lambda query, key: {print_expr(distance)}")
    assert tells_apart(distance) == (found_by.places(written) is not None)
    assert is_apart(distance) == (found_by.terms(written) is not None)
