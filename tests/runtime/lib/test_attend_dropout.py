"""Attention whose weights are dropped while it trains: which, how often, and what the rest become.

That it is the reference with these weights zeroed, with every gradient, is a law of `tests/lowering/test_ops.py`; that
layouts change nothing one of `tests/runtime/test_layouts.py`.
"""

from __future__ import annotations

import math
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from heddle.runtime import lib
from heddle.runtime.lib import chance as numbers
from heddle.runtime.lib.chance import state_of
from heddle.runtime.lib.simulated import simulate

CAUSAL = lib.Mask(lambda query, key: key.position <= query.position, behind=None, ahead=0)
FULL = lib.Mask(None, None, None)
NEAR = lib.Mask(lambda q, k: (k.position <= q.position) & (q.position - k.position < 4), 3, 0)
SURE = 1e-9
"""How probable it may be that a right mean is refused, over all that is compared."""


def dropping(rate: float, at: lib.At, number: int = 3, **more: Any) -> Any:
    at.chance = number
    return lib.drop(rate, SimpleNamespace(training=True, site=5), "o", at, **more)


def drawn(seed: int, batch: int, seq: int, heads: int, groups: int, width: int = 4) -> list[Tensor]:
    source = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, seq, h, width, generator=source, dtype=torch.float64) for h in (heads, groups, groups)]


def mixed(x: int) -> int:
    """The finaliser of SplitMix64 (Steele, Lea and Flood 2014, figure 15)."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
    return x ^ (x >> 31)


@settings(max_examples=20)
@given(
    shape=st.tuples(*[st.integers(1, 4)] * 4), firsts=st.tuples(*[st.integers(0, 2**20)] * 4), seed=st.integers(0, 2**62),
    rate=st.sampled_from([0.1, 0.25, 0.9]), most=st.sampled_from([1, 8, 1 << 22]),
)  # fmt: skip
def test_what_is_kept_follows_from_the_place_in_the_whole(
    shape: Any, firsts: Any, seed: int, rate: float, most: int
) -> None:
    """From what it is along each dim, however much is worked out at a time; numbers wrap around at 64 bits."""
    golden, start = 0x9E3779B97F4A7C15, 0
    for part in (seed, 7):
        start = mixed(((start + part) * golden + golden) % 2**64)
    rows, *along = (torch.arange(f, f + n) for f, n in zip(firsts, shape, strict=True))
    before, numbers.MOST = numbers.MOST, most
    try:
        found = numbers.kept(rate, numbers.further(state_of((seed, 7), None), rows), along)
    finally:
        numbers.MOST = before
    for index in torch.cartesian_prod(*map(torch.arange, shape)).view(-1, 4).tolist():
        state = start
        for i, first in zip(index, firsts, strict=True):
            state = mixed((state + (first + i + 1) * golden) % 2**64)
        assert bool(found[tuple(index)]) == ((state >> 11) / 2**53 >= rate)


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_as_many_are_dropped_as_the_rate_says(rate: float) -> None:
    """Along each dim by itself too; Hoeffding 1963, theorem 1."""
    sizes = (4, 6, 40, 50)
    found = numbers.kept(rate, state_of((1, 2), None), list(map(torch.arange, sizes))).double()
    for dim, size in enumerate(sizes):
        mean = found.mean([d for d in range(4) if d != dim])
        near = math.sqrt(math.log(2 * sum(sizes) / SURE) / (2 * math.prod(sizes) / size))
        assert (mean - (1 - rate)).abs().max() < near
    planes = found.flatten(0, 1).flatten(1)  # those of two heads, or of two rows, agree as often as chance has it
    agree = (planes[:, None] == planes[None]).double().mean(-1)
    pairs, near = ~torch.eye(len(planes), dtype=torch.bool), math.sqrt(math.log(2 * 24**2 / SURE) / (2 * 2000))
    assert (agree[pairs] - (rate**2 + (1 - rate) ** 2)).abs().max() < near


@pytest.mark.parametrize("mask", [CAUSAL, FULL, NEAR])
def test_the_mean_over_many_draws_is_attention_without(mask: lib.Mask) -> None:
    """A draw of one result is a sum over keys of independent numbers in a range |p v| / (1 - rate); Hoeffding 1963,
    theorem 2."""
    times, rate = 2000, 0.3
    q, k, v = drawn(1, 1, 6, 2, 1)
    at = lib.At((times, 6))
    rows = [x.expand(times, -1, -1, -1) for x in (q, k, v)]
    many = lib.attend(rows[0], (*rows[1:], mask), at=at, scale=0.5, drop=dropping(rate, at))
    plain = lib.attend(q, (k, v, mask), at=lib.At((1, 6)), scale=0.5)[0]
    ones = torch.eye(6, dtype=torch.float64)[None, :, None]
    weights = lib.attend(q, (k, ones, mask), at=lib.At((1, 6)), scale=0.5)[0]  # [t, H, n]
    widths = torch.einsum("thn,ne->the", weights**2, v[0, :, 0] ** 2) / (1 - rate) ** 2
    near = (widths * math.log(2 * plain.numel() / SURE) / (2 * times)).sqrt()
    assert ((many.mean(0) - plain).abs() <= near + 1e-12).all()
    assert (many.var(0).sum() > 0) and near.max() < 0.5


def test_nothing_is_dropped_but_in_training() -> None:
    q, k, v = drawn(2, 2, 5, 4, 2)
    at = lib.At((2, 5))
    assert lib.drop(0.5, SimpleNamespace(training=False), "o", at) is None
    assert lib.drop(0.0, SimpleNamespace(training=True), "o", at) is None
    assert not at.uses and at.chance is None, "nothing was drawn, so that nothing behind draws otherwise"
    some, plain = (lib.attend(q, (k, v, CAUSAL), at=lib.At((2, 5)), scale=0.5, drop=d) for d in (dropping(0.5, at), None))
    assert not torch.equal(some, plain)


def test_each_use_draws_anew_and_is_made_again_the_same() -> None:
    q, k, v = drawn(3, 1, 8, 2, 2)
    at = lib.At((1, 8))
    at.chance = 4
    owner = SimpleNamespace(training=True, site=1)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return lib.attend(q, (k, v, CAUSAL), at=at, scale=0.5, drop=lib.drop(0.5, owner, "o", at))

    first, second = run(q, k, v), run(q, k, v)
    assert not torch.equal(first, second)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    at.uses = {}
    lib.recompute(run, at, *leaves).sum().backward()
    plain = [x.clone().requires_grad_() for x in (q, k, v)]
    at.uses = {}
    run(*plain).sum().backward()
    for x, y in zip(leaves, plain, strict=True):
        torch.testing.assert_close(x.grad, y.grad, rtol=0, atol=1e-12)


@settings(max_examples=15, deadline=None)
@given(
    seq=st.integers(1, 40), heads=st.sampled_from([(1, 1), (4, 2)]), packed=st.booleans(), seed=st.integers(0, 99),
    least=st.integers(1, 9),
)  # fmt: skip
def test_tiles_drop_what_the_whole_does(seq: int, heads: Any, packed: bool, seed: int, least: int) -> None:
    """Attention to a window is worked out a few queries at a time, with the keys that they reach."""
    module: Any = import_module("heddle.runtime.lib.attend")
    q, k, v = drawn(seed, 2, seq, *heads)
    document = (torch.rand(2, seq, generator=torch.Generator().manual_seed(seed)) < 0.2).cumsum(1) if packed else None
    far = torch.randn(2, 3, heads[1], 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + 1))
    made = []
    before = module.LEAST_TILE
    for size in (least, 10**6):
        module.LEAST_TILE = size
        try:
            at = lib.At((2, seq), document=document)
            leaves = [x.clone().requires_grad_() for x in (q, k, v, far)]
            o = lib.attend(leaves[0], (*leaves[1:3], NEAR), (leaves[3], leaves[3], FULL, None), at=at, scale=0.5,
                           drop=dropping(0.4, at))  # fmt: skip
            o.square().sum().backward()
        finally:
            module.LEAST_TILE = before
        made.append([o.detach(), *(x.grad for x in leaves)])
    for a, b in zip(*made, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


@settings(max_examples=15, deadline=None)
@given(
    ranks=st.integers(1, 4), size=st.sampled_from([2, 4]), order=st.sampled_from([None, "zigzag"]), packed=st.booleans(),
    mask=st.sampled_from([CAUSAL, FULL, NEAR]), beside=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_a_ring_drops_what_one_device_does(
    ranks: int, size: int, order: Any, packed: bool, mask: lib.Mask, beside: bool, seed: int
) -> None:
    """Queries and keys are counted in the whole, in whatever order ranks have them, and rows of a source beside."""
    seq = ranks * size
    q, k, v = drawn(seed, 2, seq, 4, 2)
    source = torch.Generator().manual_seed(seed)
    document = (torch.rand(2, seq, generator=source) < 0.2).cumsum(1) if packed else None
    far = torch.randn(2, 3, 2, 4, dtype=torch.float64, generator=source)

    def run(mesh: Any) -> list[Tensor]:
        group = None if mesh is None else mesh["context"]
        mine = [x if group is None else group.parts(x, 1)[group.rank] for x in (q, k, v)]
        leaves = [x.clone().requires_grad_() for x in (*mine, far)]
        at = lib.At((2, seq), document=document)
        at.mesh = mesh
        drop = dropping(0.4, at, axes=None if mesh is None else ((), ("context",), ()))
        sources = [(*leaves[1:3], mask)] + ([(leaves[3], leaves[3], FULL, None)] if beside else [])
        more = {} if group is None else {"group": group, "order": order}
        o = (lib.attend if group is None else lib.attend_ring)(leaves[0], *sources, at=at, scale=0.5, drop=drop, **more)
        o.square().sum().backward()
        return [o.detach(), *(torch.zeros_like(x) if x.grad is None else x.grad for x in leaves)]

    wanted = run(None)
    found = simulate({"context": ranks}, run)
    for which in range(4):
        together = torch.cat([r[which] for r in found], 1)
        torch.testing.assert_close(together, wanted[which], rtol=0, atol=1e-11)
    torch.testing.assert_close(torch.stack([r[4] for r in found]).sum(0), wanted[4], rtol=0, atol=1e-11)


def test_weights_that_are_kept_take_what_is_published() -> None:
    """5 bytes for each score in 16 bits: the softmax and its dropped form twice two, what is kept one (Korthikanti et
    al. 2022, section 4.1)."""
    q, k, v = (x.bfloat16().requires_grad_() for x in drawn(5, 2, 64, 4, 4))
    at, saved = lib.At((2, 64)), {}

    def pack(x: Tensor) -> Tensor:
        saved[x.untyped_storage().data_ptr()] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        lib.attend(q, (k, v, CAUSAL), at=at, scale=0.5, drop=dropping(0.1, at))
    scores = 2 * 4 * 64 * 64
    large = [x.untyped_storage().nbytes() for x in saved.values() if x.numel() >= scores]
    assert sorted(large) == [scores, 2 * scores, 2 * scores]
    assert sum(x.untyped_storage().nbytes() for x in saved.values()) - sum(large) == 3 * 2 * q.numel()
