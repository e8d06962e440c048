"""Summaries of groups of tokens: the CPU code is the reference, packed, padded, and in parts of a stream."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from heddle.lowering.ops.summarise import reference
from heddle.runtime import lib
from heddle.runtime.lib.clocks import Clock, on


def drawn(batch, length, heads, width, rank, seed):
    source = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, length, heads, width, generator=source, dtype=torch.float64)
    say = 3 * torch.randn(batch, length, heads, rank, generator=source, dtype=torch.float64)
    return x.requires_grad_(), say.requires_grad_()


def pieces(size):
    """Groups of `size` tokens, or with None one of the whole document."""
    return Clock(lambda query: query.position // size, size) if size else Clock(lambda query: 0, None)


sizes = st.fixed_dictionaries({
    "batch": st.integers(1, 2), "length": st.integers(1, 12), "heads": st.integers(1, 2), "width": st.integers(1, 3),
    "rank": st.integers(1, 3), "seed": st.integers(0, 99),
})  # fmt: skip


@settings(max_examples=30, deadline=None)
@given(shape=sizes, size=st.one_of(st.none(), st.integers(1, 5)))
def test_groups_are_the_reference_and_so_are_gradients(shape, size):
    x, say = drawn(**shape)
    at = lib.At(x.shape[:2], x.device)
    group = torch.arange(shape["length"]) // (size or shape["length"])
    wanted = reference.summarise(x, say, group)
    found = lib.summarise(x, say, on(at, pieces(size)))
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)
    up = torch.randn(found.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    ours, theirs = (torch.autograd.grad(y, (x, say), up) for y in (found, wanted))
    for mine, there in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, there, rtol=0, atol=1e-11)


@settings(max_examples=30, deadline=None)
@given(shape=sizes, size=st.integers(1, 5), starts=st.lists(st.booleans(), min_size=12, max_size=12))
def test_documents_have_groups_of_their_own(shape, size, starts):
    """Packed side by side, the first groups are those of each document alone, in order."""
    x, say = drawn(**{**shape, "batch": 1})
    document = torch.tensor(starts[: shape["length"]]).long().cumsum(0)[None]
    at = lib.At(x.shape[:2], x.device, None, document)
    found = lib.summarise(x, say, on(at, pieces(size)))
    wanted = []
    for which in document.unique():
        rows = document[0] == which
        wanted.append(reference.summarise(x[:, rows], say[:, rows], torch.arange(int(rows.sum())) // size))
    alone = torch.cat(wanted, 1)
    rows = on(at, pieces(size))
    torch.testing.assert_close(found[:, : alone.shape[1]], alone, rtol=0, atol=1e-12)
    assert bool((rows.validity[:, : alone.shape[1] // shape["rank"]]).all())
    assert not rows.validity[:, alone.shape[1] // shape["rank"] :].any()


@settings(max_examples=20, deadline=None)
@given(shape=sizes, cut=st.integers(1, 11))
def test_parts_combine_in_any_order(shape, cut):
    """The monoid of the room: parts of a group, lifted and combined, are the group."""
    x, say = drawn(**shape)
    cut = min(cut, shape["length"])
    whole = reference.finish(reference.lift(x, say))
    parts = [reference.identity(x, say)] + [
        reference.lift(a, b) for a, b in zip(x.split(cut, 1), say.split(cut, 1), strict=True)
    ]
    for order in (parts, parts[::-1]):
        state = order[0]
        for part in order[1:]:
            state = reference.combine(state, part)
        torch.testing.assert_close(reference.finish(state), whole, rtol=0, atol=1e-12)
