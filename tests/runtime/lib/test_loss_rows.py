"""Losses and coordinates: what is scored, where documents start, and what the next token is."""

import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from heddle.runtime import lib

law = settings(deadline=None, max_examples=25)


@law
@given(st.lists(st.integers(-1, 4), min_size=1, max_size=8), st.integers(0, 9))
def test_cross_entropy_is_the_sum_over_known_targets(target, seed):
    make = torch.Generator().manual_seed(seed)
    logits = (5 * torch.randn(1, len(target), 5, generator=make, dtype=torch.float64)).requires_grad_()
    target = torch.tensor([target])
    expected = F.cross_entropy(logits[0], target[0], ignore_index=-1, reduction="sum")
    got = lib.cross_entropy(logits, target)
    assert lib.known(target) == (target != -1).sum()
    assert abs(got - expected) < 1e-10
    a, b = (torch.autograd.grad(3 * x, logits)[0] for x in (got, expected))
    assert (a - b).abs().max() < 1e-10
    assert torch.autograd.gradcheck(lambda x: lib.cross_entropy(x, target), (logits,))


def test_rows_that_are_not_scored_may_hold_anything():
    logits = torch.randn(3, 4)
    logits[1] = float("nan")
    logits.requires_grad_()
    got = lib.cross_entropy(logits, torch.tensor([0, -1, 2]))
    (grad,) = torch.autograd.grad(got, logits)
    assert bool(got.isfinite())
    assert torch.equal(grad[1], torch.zeros(4))
    assert bool(grad.isfinite().all())


def test_bf16_logits_are_summed_in_fp32():
    logits = torch.randn(50, 7).bfloat16()
    target = torch.randint(0, 7, (50,))
    got = lib.cross_entropy(logits, target)
    truth = F.cross_entropy(logits.double(), target, reduction="sum")
    assert got.dtype == torch.float32
    assert abs(got - truth) < 1e-5 * truth


@law
@given(st.data(), st.integers(1, 3), st.integers(1, 9), st.integers(1, 3))
def test_next_token_stops_at_the_document_and_at_padding(data, batch, seq, by):
    tokens = torch.randint(0, 9, (batch, seq))
    document = torch.tensor([[data.draw(st.integers(0, 2)) == 0 for _ in range(seq)] for _ in range(batch)]).cumsum(1)
    valid = torch.arange(seq) < torch.tensor([[data.draw(st.integers(1, seq))] for _ in range(batch)])
    got = lib.next_token(tokens, lib.At((batch, seq), document=document, valid=valid), by)
    plain = lib.next_token(tokens, lib.At((batch, seq)), by)
    for i in range(batch):
        for t in range(seq):
            there = t + by < seq
            assert plain[i, t] == (tokens[i, t + by] if there else -1)
            there = there and document[i, t] == document[i, t + by] and valid[i, t + by]
            assert got[i, t] == (tokens[i, t + by] if there else -1)


@law
@given(st.data(), st.integers(1, 3), st.integers(1, 9))
def test_positions_restart_with_the_document(data, batch, seq):
    document = torch.tensor([[data.draw(st.integers(0, 2)) == 0 for _ in range(seq)] for _ in range(batch)]).cumsum(1)
    at = lib.At((batch, seq), document=document)
    for i, row in enumerate(document.tolist()):
        assert at.position[i].tolist() == [row[:t].count(row[t]) for t in range(seq)]
        assert at.starts[i].tolist() == [t == 0 or row[t] != row[t - 1] for t in range(seq)]
    assert not at.plain
    given_positions = lib.At((batch, seq), document=document, position=torch.arange(seq))
    assert torch.equal(given_positions.position, torch.arange(seq).expand(batch, seq))
    assert torch.equal(given_positions.since, at.position)
    assert lib.At((batch, seq)).plain
