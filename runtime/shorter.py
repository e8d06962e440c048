"""A model with fewer rounds of its loops, for those who ask how it runs and not what it gives."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import nn


def shorten(model: Any) -> None:
    """Keep two blocks of each kind in a loop, or among experts: what is carried is alike behind each. Stages of a
    pipeline, which are parts of loops, stay as they are."""
    for module in list(model.modules()) if model.pipe is None else ():
        for name, own in module.named_children():
            if isinstance(own, nn.ModuleList) and type(module) is not nn.ModuleList:
                seen: Counter[type] = Counter()
                kept = [block for block in own if seen.update([type(block)]) or seen[type(block)] <= 2]
                setattr(module, name, nn.ModuleList(kept))
