"""The kernel of an embedding's gradient: sums by token, in an order that does not depend on who is first."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from heddle.codegen.kernels import render
from heddle.lowering.ops.embed import reference
from heddle.lowering.ops.embed.triton import Facts
from heddle.runtime import lib
from heddle.runtime.lib.later import Later, later

from . import harness

FACTS = (Facts(17, run=4, block_n=16), Facts(3, run=2), Facts(16, run=5, block_n=16), Facts(1, run=1))


def text(facts: Facts) -> str:
    return render("embed", {"name": "rows", **facts.rendered()})


def load(facts: Facts) -> ModuleType:
    return harness.load(text(facts))


def check(module: ModuleType, dy: Tensor, tokens: Tensor, rows: int) -> Tensor:
    """The gradient. Raises AssertionError."""

    def through(dtype: torch.dtype, table: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        weight = torch.zeros(rows, dy.shape[1], dtype=dtype, requires_grad=True)
        return torch.autograd.grad(table(tokens, weight), weight, dy.to(dtype))[0]

    want = through(torch.float64, reference.embed)
    eager = through(dy.dtype, lambda t, w: torch.nn.functional.embedding(t, w))
    with harness.poisoned():
        got = module.rows(dy, tokens, rows)
    # A sum of n numbers, one after another in fp32, then one rounding.
    of_sizes = torch.zeros_like(want).index_add_(0, tokens, dy.double().abs())
    most = int(torch.bincount(tokens, minlength=1).max()) if len(tokens) else 0
    harness.worst(got, want, eager, harness.floor(want, dy.dtype, 0, harness.roundoff(torch.float32) * most * of_sizes), "dweight")
    missing = torch.ones(rows, dtype=torch.bool).index_fill_(0, tokens, False)
    assert not got[missing].any(), "a row that no token names has a gradient"
    return got


@settings(max_examples=30)
@given(data=st.data(), facts=st.sampled_from(FACTS), dtype=harness.dtypes(), seed=harness.seeds(), how=harness.layouts())
def test_it_is_the_reference(data: st.DataObject, facts: Facts, dtype: torch.dtype, seed: int, how: str) -> None:
    count = data.draw(harness.sizes(facts.run, 3 * facts.run + 1))
    rows = data.draw(st.sampled_from((1, 2, 7)))
    tokens = torch.tensor([data.draw(st.integers(0, rows - 1)) for _ in range(count)], dtype=torch.long)
    dy = harness.laid(harness.values((count, facts.width), dtype, seed, data.draw(harness.scales())), how)
    check(load(facts), dy, tokens, rows)


# Tokens of runs of 4: begun and ended in one, over two, over all, on a border, and alone in the last.
TOKENS = [
    [3, 1, 1, 0, 2, 2, 1],
    [5] * 13,
    [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2],
    [0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 6],
    [4, 4, 4, 4, 4, 4, 4, 4, 0],
]


def one(tokens: list[int], facts: Facts = FACTS[0]) -> tuple[Tensor, Tensor]:
    return harness.values((len(tokens), facts.width), torch.float32, 3), torch.tensor(tokens)


@pytest.mark.parametrize("tokens", TOKENS)
def test_every_way_in_which_runs_share_a_token(tokens: list[int]) -> None:
    dy, given = one(tokens)
    found = check(load(FACTS[0]), dy, given, 7)
    # Columns, warps and stages are no sum's order; runs are.
    again = load(replace(FACTS[0], block_n=32, warps=2, stages=1)).rows(dy, given, 7)
    assert torch.equal(found, again)
    check(load(replace(FACTS[0], run=3)), dy, given, 7)


def test_a_token_does_not_know_the_others_and_one_that_stands_alone_is_copied() -> None:
    dy, given = one(TOKENS[3])
    found = load(FACTS[0]).rows(dy, given, 7)
    other = torch.where(given[:, None] == 1, dy, torch.nan)
    assert torch.equal(load(FACTS[0]).rows(other, given, 7)[1], found[1])
    assert torch.equal(found[0], dy[0]) and torch.equal(found[6], dy[12])
    turned = torch.arange(len(given)).flip(0)
    assert torch.equal(load(FACTS[0]).rows(dy[turned], given[turned], 7)[0], found[0])


FAULTS = {
    "a token is not told from the next": harness.Fault("acc = tl.where(ends, 0.0, acc)", "acc = acc"),
    "no head": harness.Fault("ends & began_before, acc, head", "ends & began_before, head, head"),
    "the head is every token of the run": harness.Fault("began_before = began_before & (ends == 0)", "began_before = began_before"),
    "no tail": harness.Fault("tl.store(tail_ptr + at, acc,", "tl.store(tail_ptr + at, acc * 0.0,"),
    "runs between are left out": harness.Fault("            acc += tl.load(tail_ptr", "            acc = acc + 0.0 * tl.load(tail_ptr"),
    "the run where it ends is left out": harness.Fault("        acc += tl.load(head_ptr + at", "        acc += 0.0 * tl.load(head_ptr + at"),
    "every run with a tail writes": harness.Fault("if goes_on & begins:", "if goes_on:"),
    "a sum of places, not tokens": harness.Fault("dy_ptr + place * stride_dyr", "dy_ptr + i * stride_dyr"),
    "the last place is left out": harness.Fault("end = tl.minimum(start + RUN, num_places)", "end = tl.minimum(start + RUN, num_places - 1)"),
    "the last column is left out": harness.Fault("mask_n = cols < 17", "mask_n = cols < 16"),
}  # fmt: skip


def test_every_planted_fault_is_found() -> None:
    def checks(module: ModuleType) -> None:
        for tokens in TOKENS:
            check(module, *one(tokens), 7)

    assert harness.survivors(text(FACTS[0]), FAULTS, checks) == []


def test_rows_are_numbered_in_64_bits() -> None:
    assert "tl.load(token_ptr + i).to(tl.int64)" in text(FACTS[0]) and "run.to(tl.int64) * 17" in text(FACTS[0])


def test_its_op_is_an_op_of_torch_and_a_table_with_it_the_table() -> None:
    facts = FACTS[0]
    dy, given = one(TOKENS[0])
    torch.library.opcheck(load(facts).rows_bwd, (dy, given, 7))
    weight = harness.values((7, 17), torch.float32, 1).requires_grad_()
    tokens, kernel = given.view(1, 7), load(facts).rows

    def loss(weight: Tensor) -> Tensor:
        return lib.embed(tokens, weight, kernel).sin().sum()

    plain = torch.autograd.grad(lib.embed(tokens, weight).sin().sum(), weight)[0]
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    for found in (torch.autograd.grad(f(weight), weight)[0] for f in (compiled, loss)):
        assert (found - plain).abs().max() <= 1e-6
    store = Later()
    with later(store):
        loss(weight).backward()
    assert weight.grad is None
    store.run()
    assert (weight.grad - plain).abs().max() <= 1e-6
    compound = weight.detach()[:, :16].reshape(7, 4, 4).requires_grad_()
    parts = [
        torch.autograd.grad(lib.embed_part(tokens, compound[:2], 1, made).sin().sum(), compound)[0]
        for made in (None, load(replace(facts, width=16)).rows)
    ]
    assert (parts[0] - parts[1]).abs().max() <= 1e-6 and parts[0].any()


def test_same_facts_same_bytes(golden: Callable[[str, str], None]) -> None:
    assert text(Facts(4096)) == text(Facts(4096))
    harness.stable(text(Facts(4096)))
    golden("embed", text(Facts(4096)))
