"""What is computed again in the backward pass in place of being kept (Chen et al. 2016)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from .gathered import Gathered
from .later import later, waiting
from .regather import gathering_as_ever
from .rows import At


def recompute(run: Callable[..., Any], at: At, *given: Any) -> Any:
    """run(*given), of which the backward pass keeps nothing but what went in.

    What blocks state beside their results counts the first time only.
    """
    if not torch.is_grad_enabled():
        return run(*given)
    ran, uses, store = [False], dict(at.uses), waiting()

    def once(*inputs: Any) -> Any:
        if not ran[0]:
            ran[0] = True
            with gathering_as_ever():
                return run(*inputs)
        stated, at.uses = (at.gathered, at.losses, at.uses), dict(uses)
        at.gathered, at.losses = None if stated[0] is None else Gathered(), {}
        try:
            with later(store), gathering_as_ever():  # as the first time, and maybe in another thread
                return run(*inputs)
        finally:
            at.gathered, at.losses, at.uses = stated

    # Random numbers are counted, not drawn from a state: there is none to keep.
    return checkpoint(once, *given, use_reentrant=False, preserve_rng_state=False)
