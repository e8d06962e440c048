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


def tokens(vocab: int, batch: int = 2, seq: int = 12, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, vocab, (batch, seq), generator=torch.Generator().manual_seed(seed))


def error_of(call: Any) -> Any:
    """The first diagnostic of the `SpecError` that a call raises."""
    import pytest

    from heddle.dsl.diagnostics import SpecError

    with pytest.raises(SpecError) as caught:
        call()
    return caught.value.diagnostics[0]
