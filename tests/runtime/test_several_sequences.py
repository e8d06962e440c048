"""A model that reads several sequences for each batch row does to each what one that reads one does."""

from __future__ import annotations

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from heddle.dsl.load import load_text, shipped_folder
from heddle.runtime.bench import measure
from heddle.runtime.check import program_of
from heddle.runtime.compile import build, instantiate

SPEC = """
use long_short_xl from "transformer_ls.spec"

model made(vocab = 7, hidden = 8, heads = 2):
    tokens[{dims}]: token
    embedding = embed(tokens, vocab -> hidden)
    x = embedding + attention(embedding, heads, rotary = rope())
    y = x + mamba2(x, heads, head_dim = 4, state = 3, groups = 1, chunk = 4)
    z = y + long_short_xl(y, heads, hidden / heads, 3, 2, 4, 2)
    final = z + causal_conv(z, 3)
    loss even = mean(sum(final ^ 2, over = hidden))
    logits = linear(final, hidden -> vocab)
    return logits
"""


@functools.cache
def compiled(dims):
    program = program_of(load_text(SPEC.format(dims=dims), folder=shipped_folder() / "transformer_ls"))
    model = instantiate(build(program), seed=1).cast(torch.float64)
    source = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=source, dtype=p.dtype))
    return program, model


@settings(max_examples=8)
@given(
    batch=st.integers(1, 3), pair=st.integers(1, 3), length=st.integers(1, 11), padding=st.booleans(),
    packed=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_each_sequence_is_read_for_itself(batch, pair, length, padding, packed, seed):
    _, several = compiled(f"batch, pair = {pair}, seq")
    _, one = compiled("batch, seq")
    source = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 7, (batch, pair, length), generator=source)
    rows = {}
    if padding:
        rows["valid"] = torch.arange(length) < torch.randint(1, length + 1, (batch, pair, 1), generator=source)
    if packed:
        rows["document"] = torch.randint(0, 2, tokens.shape, generator=source).cumsum(-1)
    flat = {name: x.flatten(0, 1) for name, x in rows.items()}
    there = rows.get("valid", torch.ones_like(tokens, dtype=torch.bool))
    found, wanted = several(tokens, **rows), one(tokens.flatten(0, 1), **flat)
    torch.testing.assert_close(found[there], wanted.view(found.shape)[there], rtol=0, atol=1e-12)
    several.zero_grad()
    one.zero_grad()
    ours, theirs = several.losses(tokens, **rows), one.losses(tokens.flatten(0, 1), **flat)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)
    assert several.counts(tokens, **rows) == one.counts(tokens.flatten(0, 1), **flat)
    sum(ours.values()).backward()
    sum(theirs.values()).backward()
    for (name, p), q in zip(several.named_parameters(), one.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=0, atol=1e-9, msg=name)


def test_tokens_of_other_dims_are_said():
    _, several = compiled("batch, pair = 2, seq")
    for wrong in ((4, 6), (1, 3, 6)):
        with pytest.raises(ValueError, match=r"must be \[any, 2, any\]"):
            several(torch.zeros(wrong, dtype=torch.long))
    _, one = compiled("batch, seq")
    with pytest.raises(ValueError, match=r"tokens are \[1, 3, 6\], must be \[any, any\]"):
        one(torch.zeros(1, 3, 6, dtype=torch.long))
    with pytest.raises(ValueError, match=r"a `seq` for each of \[batch, pair\]"):
        several.stream(1, 4)
    rows = measure(compiled("batch, pair = 2, seq")[0], 1, 5)
    assert [r["job"] for r in rows] == ["forward", "train step"]
