"""Choosing the next token from logits."""

from __future__ import annotations

import torch
from torch import Tensor


def check_sampling(temperature: float, top_k: int | None, top_p: float | None) -> None:
    """Raises ValueError for settings that mean nothing."""
    if not temperature >= 0:
        raise ValueError(f"generate: temperature is {temperature}, must be at least 0 (0 takes the likeliest token)")
    if top_k is not None and top_k < 1:
        raise ValueError(f"generate: top_k is {top_k}, must be at least 1")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"generate: top_p is {top_p}, must be above 0 and at most 1")


def choose(
    logits: Tensor, temperature: float, top_k: int | None, top_p: float | None, source: torch.Generator | None
) -> Tensor:
    """logits [batch, vocab] -> int64 [batch].

    temperature 0 takes the largest. Else softmax(logits / temperature), cut to the top_k likeliest tokens and then to
    the fewest whose probability reaches top_p (Holtzman et al. 2020), and drawn from.
    """
    if temperature == 0:
        return logits.argmax(-1)
    p = (logits.float() / temperature).softmax(-1)
    p, token = p.sort(dim=-1, descending=True, stable=True)
    if top_k is not None:
        p[:, top_k:] = 0
    if top_p is not None:
        # A token stays while those before it, of what top_k left, have not reached top_p; the first always stays.
        share = p / p.sum(-1, keepdim=True)
        p[share.cumsum(-1) - share >= top_p] = 0
    return token.gather(1, torch.multinomial(p, 1, generator=source))[:, 0]
