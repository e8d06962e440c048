"""Models for the laws of compression: programs of text, modules in fp64, folders of Hugging Face."""

from __future__ import annotations

from typing import Any

import torch

from heddle.dsl.load import load, load_text, shipped_folder
from heddle.dsl.program import Program
from heddle.runtime.check import program_of
from heddle.runtime.compile import build, instantiate
from heddle.runtime.lib import Model

TINY = ("llama/tiny", "mistral/tiny", "nemotron4/tiny", "nemotron_h/tiny", "nemotron_h/tiny_moe")


def shipped(name: str, **over: Any) -> Program:
    return program_of(load(shipped_folder() / f"{name}.spec"), None, over)


def of_text(text: str, model: str | None = None, **over: Any) -> Program:
    return program_of(load_text(text, folder=shipped_folder()), model, over)


def module(program: Program, seed: int = 0, weights: dict[str, torch.Tensor] | None = None) -> Model:
    """A module in fp64: with these weights, or with random ones that are large enough to see every path."""
    model = instantiate(build(program), seed=seed).cast(torch.float64)
    if weights is not None:
        model.load_state_dict(weights)
        return model.eval()
    source = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=source, dtype=p.dtype))
        for name, p in model.named_buffers():
            if name.endswith("routing.bias"):
                p.add_(0.1 * torch.randn(p.shape, generator=source, dtype=p.dtype))
    return model.eval()


SHARED = """
block twin(ffn):
    x[hidden]
    return x + mlp(rms_norm(x), ffn)

model around(vocab = 31, hidden = 12, ffn = 10, layers = 3, heads = 4, head_dim = 4):
    tokens[batch, seq]: token
    embedding = embed(tokens, vocab -> hidden)
    shared tail = twin(ffn)
    x = tail(embedding)
    for layer in layers:
        x = x + attention(rms_norm(x), heads, 2, head_dim)
        x = tail(x)
    final = rms_norm(x)
    logits = linear(final, hidden -> vocab, weight = embedding.weight)
    return logits
"""
"""One block in front of a loop and in each of its iterations, and a head that is the embedding."""
OTHERS: dict[str, dict[str, Any]] = {
    "retro/tiny": {"ffn": 20, "hidden": 8, "heads": 1}, "transformer_ls/tiny": {"ffn": 20, "hidden": 12},
    "transformer_ls/tiny_released": {"ffn": 20}, "shared": {"ffn": 7, "hidden": 9, "heads": 2},
}  # fmt: skip
"""Models of other families, and smaller sizes of each."""


def other(name: str, **over: Any) -> Program:
    return of_text(SHARED, "around", **over) if name == "shared" else shipped(name, **over)


def arguments(name: str, seq: int = 16, seed: int = 0) -> dict[str, torch.Tensor]:
    """What a model of `OTHERS` is called with."""
    found = {"tokens": tokens(31, 2, seq, seed)}
    if name == "retro/tiny":  # [batch, chunks of 4, near, length]
        source = torch.Generator().manual_seed(seed + 1)
        found["neighbors"] = torch.randint(0, 31, (2, seq // 4, 2, 8), generator=source)
    return found


def tokens(vocab: int, batch: int = 2, seq: int = 12, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, vocab, (batch, seq), generator=torch.Generator().manual_seed(seed))


def error_of(call: Any) -> Any:
    """The first diagnostic of the `SpecError` that a call raises."""
    import pytest

    from heddle.dsl.diagnostics import SpecError

    with pytest.raises(SpecError) as caught:
        call()
    return caught.value.diagnostics[0]
