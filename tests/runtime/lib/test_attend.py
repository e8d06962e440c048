"""Attention against the sum over the keys that each query sees."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from heddle.runtime import lib

from .tiny import attention

law = settings(deadline=None, max_examples=25)
MASKS = {
    "causal": (lib.Mask(lambda q, k: k.position <= q.position, None, 0), lambda q, k: k <= q),
    "full": (lib.Mask(None, None, None), lambda q, k: True),
    "window": (
        lib.Mask(lambda q, k: (k.position <= q.position) & (k.position > q.position - 3), 2, 0),
        lambda q, k: q - 3 < k <= q,
    ),
    "piece": (lib.Mask(lambda q, k: k.position // 3 == q.position // 3, 2, 2), lambda q, k: q // 3 == k // 3),
    "past pieces": (lib.Mask(lambda q, k: k.position // 2 < q.position // 2, None, -1), lambda q, k: k // 2 < q // 2),
    "ahead": (lib.Mask(lambda q, k: q.position + 1 == k.position, -1, 1), lambda q, k: k == q + 1),
}


def make(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).requires_grad_()


def seen_by(rule, document, valid):
    """bool [t, t] of one row: positions count from each document's start."""
    n = len(document)
    position = [sum(d == document[i] for d in document[:i]) for i in range(n)]
    return torch.tensor(
        [
            [document[i] == document[j] and valid[j] and bool(rule(position[i], position[j])) for j in range(n)]
            for i in range(n)
        ]
    )


@law
@given(
    st.data(),
    st.integers(1, 2),
    st.integers(1, 8),
    st.integers(1, 2),
    st.integers(1, 3),
    st.booleans(),
    st.booleans(),
    st.lists(st.sampled_from(sorted(MASKS)), min_size=1, max_size=2),
)
def test_attend_is_the_sum_over_what_is_seen(data, batch, seq, kv, per_kv, packed, ragged, names):
    q = make(batch, seq, kv * per_kv, 4)
    sources = [
        (make(batch, seq, kv, 4, seed=2 * i + 1), make(batch, seq, kv, 3, seed=2 * i + 2)) for i in range(len(names))
    ]
    document = torch.zeros(batch, seq, dtype=torch.long)
    valid = torch.ones(batch, seq, dtype=torch.bool)
    if packed:
        document = torch.tensor([[data.draw(st.integers(0, 2)) == 0 for _ in range(seq)] for _ in range(batch)]).cumsum(
            1
        )
    if ragged:
        valid = torch.arange(seq) < torch.tensor([[data.draw(st.integers(1, seq))] for _ in range(batch)])
    at = lib.At((batch, seq), document=document if packed else None, valid=valid if ragged else None)
    o = lib.attend(q, *((k, v, MASKS[name][0]) for (k, v), name in zip(sources, names, strict=True)), at=at, scale=0.7)
    rows = []
    for i in range(batch):
        seen = torch.cat([seen_by(MASKS[name][1], document[i].tolist(), valid[i].tolist()) for name in names], 1)
        k, v = (torch.cat([source[part][i] for source in sources]) for part in (0, 1))
        rows.append(attention(q[i], k, v, seen, 0.7))
    expected = torch.stack(rows)
    assert o.shape == (batch, seq, kv * per_kv, 3)
    live = valid[..., None, None]
    assert ((o - expected) * live).abs().max() < 1e-10
    wrt = [q, *(x for source in sources for x in source)]
    up = torch.randn_like(expected) * live
    zero = {"allow_unused": True, "materialize_grads": True}
    for a, b in zip(
        torch.autograd.grad(o, wrt, up), torch.autograd.grad(expected.requires_grad_(), wrt, up, **zero), strict=True
    ):
        assert (a - b).abs().max() < 1e-10


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_query_that_sees_nothing_gets_exactly_zero(dtype):
    q, k, v = (make(1, 4, 2, 4, seed=i).detach().to(dtype).requires_grad_() for i in range(3))
    o = lib.attend(q, (k, v, MASKS["past pieces"][0]), at=lib.At((1, 4)), scale=0.5)
    assert torch.equal(o[:, :2], torch.zeros_like(o[:, :2]))
    grads = torch.autograd.grad(o.sum(), [q, k, v])
    assert all(bool(g.isfinite().all()) for g in grads)
    assert torch.equal(grads[0][:, :2], torch.zeros_like(q[:, :2]))


@law
@given(st.integers(1, 7), st.sampled_from(sorted(MASKS)), st.sampled_from([torch.float64, torch.float32]))
def test_another_document_changes_no_bit(cut, name, dtype):
    at = lib.At((1, 8), document=(torch.arange(8) >= cut).long()[None])
    results = []
    for seed in (10, 20):
        q, k, v = (make(1, 8, 2, 4, seed=i).detach().to(dtype) for i in range(3))
        for i, x in enumerate((q, k, v)):
            x[:, :cut] = 5 * make(1, 8, 2, 4, seed=seed + i).detach()[:, :cut]
            x.requires_grad_()
        o = lib.attend(q, (k, v, MASKS[name][0]), at=at, scale=0.5)[:, cut:]
        results.append([o, *(g[:, cut:] for g in torch.autograd.grad(o.sum(), [q, k, v]))])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_padding_may_be_nan():
    q, k, v = (make(1, 5, 2, 4, seed=i).detach() for i in range(3))
    valid = torch.tensor([[True, True, True, False, False]])
    at = lib.At((1, 5), valid=valid)
    clean = lib.attend(q, (k, v, MASKS["full"][0]), at=at, scale=0.5)
    for x in (k, v):
        x[:, 3:] = float("nan")
    assert torch.equal(lib.attend(q, (k, v, MASKS["full"][0]), at=at, scale=0.5), clean)


def test_positions_that_are_given_are_used():
    q, k, v = (make(1, 4, 1, 4, seed=i) for i in range(3))
    position = torch.tensor([0, 1, 5, 6])
    o = lib.attend(q, (k, v, MASKS["window"][0]), at=lib.At((1, 4), position=position), scale=0.5)
    seen = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]).bool()
    assert (o[0] - attention(q[0], k[0], v[0], seen, 0.5)).abs().max() < 1e-10


@law
@given(st.integers(-3, 3), st.integers(-3, 3), st.integers(1, 5))
def test_only_a_proved_interval_is_served_by_a_fast_kernel(low, high, piece):
    """The symbolic proof says what a probe over all small positions says, and refuses a wrong hull."""
    if low <= high:
        mask = lib.Mask(
            lambda q, k: (k.position - q.position >= low) & (k.position < q.position + high + 1), -low, high
        )
        assert mask.interval
        position = torch.arange(12)
        seen = mask.sees(lib.Coordinates(position[None, :, None], None), lib.Coordinates(position[None, None], None))
        offset = position[None] - position[:, None]
        assert torch.equal(seen[0], (offset >= low) & (offset <= high))
        with pytest.raises(ValueError, match="the predicate sees keys from"):
            lib.Mask(
                lambda q, k: (k.position - q.position >= low) & (k.position < q.position + high + 1), -low, high + 1
            )
    assert not lib.Mask(lambda q, k: k.position // piece == q.position // piece, piece - 1, piece - 1).interval
    assert not lib.Mask(lambda q, k: (k.position <= q.position) | (k.position < piece), None, None).interval
    assert not lib.Mask(lambda q, k: k.position < piece, None, None).interval


def test_sources_need_a_cache_each():
    q, k, v = (make(1, 2, 1, 4, seed=i) for i in range(3))
    with pytest.raises(ValueError, match="2 sources need a cache each"):
        lib.attend(q, (k, v, MASKS["full"][0]), (k, v, MASKS["full"][0]), at=lib.At((1, 2)), scale=1.0, past=(None,))


@law
@given(
    st.sampled_from(["causal", "window", "past pieces"]),
    st.sampled_from([None, 2, 4]),
    st.lists(st.integers(1, 4), min_size=1, max_size=6),
    st.integers(0, 2),
)
def test_a_cache_may_keep_more_than_the_mask_sees(name, keep, widths, slack):
    """One source, steps of any width: the same as at once."""
    if name != "window":
        keep = None

    class Owner:
        def slots(self, stream):
            return lib.Slots(o=stream.cache(k=(2, 4), v=(2, 3), keep=keep))

    n = sum(widths)
    q, k, v = make(2, n, 4, 4).detach(), make(2, n, 2, 4, seed=1).detach(), make(2, n, 2, 3, seed=2).detach()
    mask = MASKS[name][0]
    whole = lib.attend(q, (k, v, mask), at=lib.At((2, n)), scale=0.5)
    stream = lib.Stream(Owner(), 2, n, slack, torch.float64)
    parts = []
    for a, b, c in zip(*(x.split(widths, 1) for x in (q, k, v)), strict=True):
        at = stream.begin(a.shape[1])
        parts.append(lib.attend(a, (b, c, mask), at=at, scale=0.5, past=stream.state.o))
        stream.commit(at)
    assert (torch.cat(parts, 1) - whole).abs().max() < 1e-10


@law
@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.integers(0, 2))
def test_two_sources_with_a_cache_each_decode_as_a_whole(widths, slack):
    """Stream form: near keys of a window and all earlier pieces under one softmax."""

    class Owner:
        def slots(self, stream):
            near = stream.cache(k=(1, 4), v=(1, 3), keep=2)
            return lib.Slots(o=(near, stream.cache(k=(1, 4), v=(1, 3))))

    n = sum(widths)
    q, k, v = make(2, n, 2, 4), make(2, n, 1, 4, seed=1), make(2, n, 1, 3, seed=2)
    far_k, far_v = make(2, n, 1, 4, seed=3), make(2, n, 1, 3, seed=4)
    near, far = MASKS["window"][0], MASKS["past pieces"][0]
    whole = lib.attend(q, (k, v, near), (far_k, far_v, far), at=lib.At((2, n)), scale=0.5)
    stream = lib.Stream(Owner(), 2, n, slack, torch.float64)
    parts = []
    for pieces in zip(*(x.detach().split(widths, 1) for x in (q, k, v, far_k, far_v)), strict=True):
        a, b, c, d, e = pieces
        at = stream.begin(a.shape[1])
        parts.append(lib.attend(a, (b, c, near), (d, e, far), at=at, scale=0.5, past=stream.state.o))
        stream.commit(at)
    assert (torch.cat(parts, 1) - whole).abs().max() < 1e-10
