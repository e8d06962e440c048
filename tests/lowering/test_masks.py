"""What a mask lets see, read off its comparisons, against a count of all pairs of positions."""

from __future__ import annotations

import operator

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from heddle.codegen.writer import _python_mask
from heddle.dsl import syntax as sx
from heddle.dsl.load import load_text, shipped_folder
from heddle.dsl.parse import parse
from heddle.dsl.source import Source
from heddle.lowering.masks import ALL, Hull, hull
from heddle.lowering.pipeline import lower
from heddle.runtime import lib
from heddle.runtime.check import program_of
from heddle.runtime.compile import build, instantiate

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


@settings(max_examples=400)
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


# --- compositions, with documents ----------------------------------------------------------------

OFFSETS = range(-30, 31)
# (text, what it means for a query, a key and whether they share a document)
EVERYDAY = (
    ("causal", lambda q, k, same: k <= q),
    ("full", lambda q, k, same: True),
    ("window(4)", lambda q, k, same: 0 <= q - k < 4),
    ("window(1)", lambda q, k, same: k == q),
    ("prefix_of(3)", lambda q, k, same: k <= q or k < 3),
    ("query.document == key.document", lambda q, k, same: same),
    ("query.document != key.document", lambda q, k, same: not same),
    ("key.position - query.position >= -2", lambda q, k, same: k - q >= -2),
    ("key.position // 3 == query.position // 3", lambda q, k, same: k // 3 == q // 3),
    ("key.position < 5", lambda q, k, same: k < 5),
)


def _both(op, a, b):
    return (
        f"({a[0]}) {op} ({b[0]})",
        (lambda q, k, same: a[1](q, k, same) and b[1](q, k, same))
        if op == "and"
        else (lambda q, k, same: a[1](q, k, same) or b[1](q, k, same)),
    )


everyday = st.recursive(
    st.sampled_from(EVERYDAY),
    lambda inner: (
        st.builds(_both, st.sampled_from(["and", "or"]), inner, inner)
        | st.builds(lambda a: (f"not ({a[0]})", lambda q, k, same: not a[1](q, k, same)), inner)
    ),
    max_leaves=4,
)


def attending(mask: str) -> str:
    """A model of one layer of attention with this mask."""
    return f"""
model made(vocab = 16, hidden = 8, heads = 2):
    tokens[batch, seq]: token
    x = embed(tokens, vocab -> hidden)
    x = x + attention(x, heads, mask = {mask})
    logits = linear(x, hidden -> vocab)
    init linear, embed: normal(0.7)
    return logits
"""


@settings(max_examples=80)
@given(mask=everyday)
def test_masks_of_a_spec_are_bounded_by_what_they_mean(mask):
    """Names and documents included: the graph's mask is what the text means, and its hull has all that it sees."""
    text, meaning = mask
    graphs = lower(program_of(load_text(attending(text), folder=shipped_folder())))
    (found,) = (m for g in graphs.graphs.values() for n in g.nodes if n.op == "attend" for m in n.attr("masks"))
    bounds = hull(found)
    for q in MIDDLE:
        for k in POSITIONS:
            for same in (True, False):
                if meaning(q, k, same):
                    assert bounds.behind is None or k - q >= -bounds.behind
                    assert bounds.ahead is None or k - q <= bounds.ahead
    (state,) = (s for states in graphs.states.values() for s in states)
    assert state.keep == (None if bounds.behind is None else max(0, bounds.behind))


lines = st.sampled_from(["<", "<=", ">", ">="]).flatmap(
    lambda op: st.integers(0, 9).map(
        lambda n: f"key.position - query.position {op} {n + 1 if op[0] == '<' else -n - 1}"
    )
)
around_zero = st.recursive(
    lines, lambda inner: st.builds("({}) {} ({})".format, inner, st.sampled_from(["and", "or"]), inner), max_leaves=6
)


@settings(max_examples=200)
@given(text=around_zero, negated=st.booleans())
def test_bounds_of_distances_are_exact(text, negated):
    """Half-lines that all have 0 in them: what `and` and `or` make of them is an interval, and the hull is it."""
    mask = parsed(text)
    if negated:
        mask = sx.Unary("not", opposite(mask))
    allowed = [d for d in OFFSETS if value(mask, 50, 50 + d)]
    assert allowed == list(range(allowed[0], allowed[-1] + 1)) and 0 in allowed
    behind = None if allowed[0] == OFFSETS[0] else -allowed[0]
    ahead = None if allowed[-1] == OFFSETS[-1] else allowed[-1]
    assert hull(mask) == Hull(behind, ahead)


def opposite(mask: sx.Expr) -> sx.Expr:
    """What the mask does not allow, by the laws of De Morgan."""
    turned = {"<": ">=", "<=": ">", ">": "<=", ">=": "<", "and": "or", "or": "and"}
    if mask.operator in ("and", "or"):
        return sx.Binary(turned[mask.operator], opposite(mask.left), opposite(mask.right))
    return sx.Binary(turned[mask.operator], mask.left, mask.right)


@settings(max_examples=100)
@given(mask=masks, other=masks)
def test_laws_of_bounds(mask, other):
    """Turned round it is the same comparison; twice not is nothing; who sees more has no less a bound."""
    mirror = {"<": ">", "<=": ">=", ">": "<", ">=": "<=", "==": "==", "!=": "!="}
    if isinstance(mask, sx.Binary) and mask.operator in mirror:
        assert hull(sx.Binary(mirror[mask.operator], mask.right, mask.left)) == hull(mask)
    assert hull(sx.Unary("not", sx.Unary("not", mask))) == hull(mask)
    for op in ("and", "or"):
        assert hull(sx.Binary(op, mask, other)) == hull(sx.Binary(op, other, mask))
    assert within(hull(sx.Binary("and", mask, other)), hull(mask))
    assert within(hull(mask), hull(sx.Binary("or", mask, other)))


def within(inner: Hull, outer: Hull) -> bool:
    def fits(a: int | None, b: int | None) -> bool:
        return b is None or (a is not None and a <= b)

    return fits(inner.behind, outer.behind) and fits(inner.ahead, outer.ahead)


@settings(max_examples=200)
@given(mask=masks)
def test_the_library_proves_no_other_bounds(mask):
    """What the emitter writes for a mask is accepted by the library, which reads bounds off the predicate itself."""
    written = eval(f"lambda query, key: {_python_mask(mask)}")
    bounds = hull(mask)
    made = lib.Mask(written, behind=bounds.behind, ahead=bounds.ahead)
    if made.interval:
        allowed = [k - q for q in MIDDLE for k in range(80) if value(mask, q, k)]
        low = min(allowed) if bounds.behind is None else -bounds.behind
        high = max(allowed) if bounds.ahead is None else bounds.ahead
        assert {(q, k) for q in MIDDLE for k in range(80) if value(mask, q, k)} == {
            (q, k) for q in MIDDLE for k in range(80) if low <= k - q <= high
        }


@pytest.mark.parametrize(
    "text", ["query.document == key.document", "key.position < 5", "query.position + key.position <= 9", "true"]
)
def test_what_does_not_compare_positions_with_each_other_bounds_nothing(text):
    assert hull(parsed(text)) == ALL


@settings(max_examples=25)
@given(mask=everyday, seed=st.integers(0, 2**31 - 1), width=st.integers(1, 4))
def test_what_a_stream_keeps_is_enough(mask, seed, width):
    """Causal masks of any shape: fed by pieces, a model gives what it gives in full, in fp64."""
    made = build(program_of(load_text(attending(f"causal and ({mask[0]})"), folder=shipped_folder())))
    model = instantiate(made, seed=seed % 7, dtype=torch.float64)
    tokens = torch.randint(0, 16, (2, 13), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        full = model(tokens)
        stream = model.stream(2, 13)
        pieces = [model.prefill(piece, stream) for piece in tokens.split(width, 1)]
    torch.testing.assert_close(torch.cat(pieces, 1), full, rtol=0, atol=1e-10)
