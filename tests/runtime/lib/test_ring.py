"""Attention of ranks that share a sequence: what they hold, what they send, and how the work is shared out.

That it is attention, with every gradient, is a law of `tests/lowering/test_lifts.py`.
"""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from heddle.runtime import lib
from heddle.runtime.lib.ring import _Ring
from heddle.runtime.lib.simulated import simulate

CAUSAL = lib.Mask(lambda query, key: key.position <= query.position, behind=None, ahead=0)
FULL = lib.Mask(None, None, None)


def window(behind: int, ahead: int = 0) -> lib.Mask:
    return lib.Mask(
        lambda q, k: (k.position >= q.position - behind) & (k.position <= q.position + ahead), behind, ahead
    )


def run(
    mesh: Any, mask: lib.Mask, seq: int, order: str | None, dtype: Any = torch.float64, document: Any = None
) -> Any:
    """One rank's part of attention of 4 heads to 2 key heads, forward and backward."""
    source = torch.Generator().manual_seed(1)
    q, k, v, up = (torch.randn(2, seq, h, 4, generator=source, dtype=torch.float64).to(dtype) for h in (4, 2, 2, 4))
    group = mesh["context"]
    q, k, v = (group.parts(x, 1)[group.rank].clone().requires_grad_() for x in (q, k, v))
    at = lib.At((2, seq), document=document)
    o = lib.attend_ring(q, (k, v, mask), at=at, group=group, scale=0.5, order=order)
    o.backward(group.parts(up, 1)[group.rank])
    return o.detach(), q.grad, k.grad, v.grad


def whole(mask: lib.Mask, seq: int, dtype: Any = torch.float64, document: Any = None) -> Any:
    source = torch.Generator().manual_seed(1)
    q, k, v, up = (torch.randn(2, seq, h, 4, generator=source, dtype=torch.float64).to(dtype) for h in (4, 2, 2, 4))
    for x in (q, k, v):
        x.requires_grad_()
    o = lib.attend(q, (k, v, mask), at=lib.At((2, seq), document=document), scale=0.5)
    o.backward(up)
    return o.detach(), q.grad, k.grad, v.grad


@settings(max_examples=30, deadline=None)
@given(
    ranks=st.integers(1, 5), size=st.sampled_from([2, 4, 6]), order=st.sampled_from([None, "zigzag"]),
    mask=st.one_of(st.sampled_from([CAUSAL, FULL]), st.builds(window, st.integers(0, 30), st.integers(0, 9))),
    seed=st.one_of(st.none(), st.integers(0, 99)),
)  # fmt: skip
def test_it_is_attention(ranks: int, size: int, order: str | None, mask: lib.Mask, seed: int | None) -> None:
    seq, document = ranks * size, None
    if seed is not None:
        document = (torch.rand(2, seq, generator=torch.Generator().manual_seed(seed)) < 0.2).cumsum(1)
    wanted = whole(mask, seq, document=document)
    found = simulate({"context": ranks}, lambda mesh: run(mesh, mask, seq, order, document=document))
    for which, want in enumerate(wanted):
        torch.testing.assert_close(torch.cat([r[which] for r in found], 1), want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("order", [None, "zigzag"])
def test_in_16_bits_it_is_as_exact_as_one_kernel(order: str | None) -> None:
    true = whole(CAUSAL, 32)
    one = whole(CAUSAL, 32, torch.bfloat16)
    found = simulate({"context": 4}, lambda mesh: run(mesh, CAUSAL, 32, order, torch.bfloat16))
    for which, want in enumerate(true):
        ours = (torch.cat([r[which] for r in found], 1) - want).abs().max()
        assert ours <= 2 * (one[which] - want).abs().max()


def test_under_autocast_it_is_what_it_is_in_16_bits() -> None:
    """Rotated queries and keys are in fp32 there, values in bf16."""
    source = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(1, 8, h, 4, generator=source) for h in (4, 2, 2))

    def rank(mesh: Any) -> Any:
        group = mesh["context"]
        mine, keys, values = (group.parts(x, 1)[group.rank].clone().requires_grad_() for x in (q, k, v))
        given = {"at": lib.At((1, 8)), "group": group, "scale": 0.5}
        with torch.autocast("cpu", torch.bfloat16):
            o = lib.attend_ring(mine, (keys, values.bfloat16(), CAUSAL), **given)
        o.sum().backward()
        plain = [x.detach().bfloat16().requires_grad_() for x in (mine, keys, values)]
        same = lib.attend_ring(plain[0], (plain[1], plain[2], CAUSAL), **given)
        same.sum().backward()
        assert o.dtype == torch.bfloat16 and torch.equal(o, same)
        return [torch.equal(x.grad, y.grad.float()) for x, y in zip((mine, keys, values), plain, strict=True)]

    assert simulate({"context": 2}, rank) == [[True] * 3] * 2


# --- what is held and sent --------------------------------------------------------------------------


@pytest.mark.parametrize("order", [None, "zigzag"])
def test_a_rank_holds_the_keys_of_one_other_at_most(order: str | None) -> None:
    """What came is gone when that of the next rank begins to come: while values come, only the keys that they are of."""

    def rank(mesh: Any) -> int:
        group, came, most = mesh["context"], [], 0
        swap, keys = group.swap, torch.Size([2, 8, 2, 4])

        def counted(x: Any, to: int, like: Any, from_: int) -> Any:
            nonlocal most
            most = max(most, sum(ref() is not None for ref in came))
            made = swap(x, to, like, from_)
            if made.shape == keys:
                came.append(weakref.ref(made))
            return made

        group.swap = counted
        run(mesh, CAUSAL, 32, order)
        assert len(came) == 3 * (2 + 2 + 2)
        return most

    assert simulate({"context": 4}, rank) == [1] * 4


@pytest.mark.parametrize(
    ("mask", "distances"),
    [(CAUSAL, [1, 2, 3]), (FULL, [1, 2, 3]), (window(0), []), (window(1), [1]), (window(8), [1]), (window(9), [1, 2]),
     (window(8, 8), [1, 3]), (window(1, 1), [1, 3])],
)  # fmt: skip
def test_only_ranks_that_a_mask_reaches_are_told(mask: lib.Mask, distances: list[int]) -> None:
    """Rows of 8: under a window of 8 neighbours only; distance 3 of 4 ranks is the next rank."""

    def rank(mesh: Any) -> Any:
        mesh.record = []
        run(mesh, mask, 32, None)
        return [r.bytes for r in mesh.record if r.kind == "send"]

    size = 2 * 8 * 2 * 4 * 8  # k, or v, [2, 8, 2, 4] of fp64
    # Forward they are told; backward they are told again, and the gradients come back.
    assert simulate({"context": 4}, rank) == [[size] * 2 * 3 * len(distances)] * 4


@pytest.mark.parametrize("ranks", [2, 3, 4, 5])
def test_zigzag_gives_all_ranks_as_much_to_do(ranks: int) -> None:
    """Pairs of a query and a key that it sees, under a causal mask, by rank."""

    def pairs(rank: int, halves: int) -> float:
        at, group = lib.At((1, 8 * ranks)), lib.Mesh({"context": ranks}, rank)
        group._wire = lambda axes: None  # type: ignore[method-assign]
        x = torch.zeros(1, 8, 1, 1)
        ring = _Ring(at, group["context"], 1.0, halves, [lib.Source(x, x, CAUSAL)])
        parts = [p for other in range(ranks) for p in ring.parts(0, other)]
        areas = [(p.queries.stop - p.queries.start, p.seen()) for p in parts]
        return sum(n * (n + 1) / 2 if seen == "causal" else n * n for n, seen in areas)

    plain, folded = ([pairs(rank, halves) for rank in range(ranks)] for halves in (1, 2))
    assert sum(plain) == sum(folded) == 8 * ranks * (8 * ranks + 1) / 2
    assert len(set(folded)) == 1 and len(set(plain)) == ranks


@pytest.mark.parametrize(("seq", "order"), [(6, None), (12, "zigzag")])
def test_rows_that_do_not_divide_are_an_error(seq: int, order: str | None) -> None:
    def rank(mesh: Any) -> Any:
        x = torch.zeros(1, 2, 1, 1)
        return lib.attend_ring(x, (x, x, CAUSAL), at=lib.At((1, seq)), group=mesh["context"], scale=1.0, order=order)

    with pytest.raises(
        RuntimeError, match=f"{seq} tokens a row do not divide over {8 if order else 4} parts of a ring"
    ):
        simulate({"context": 4}, rank)
