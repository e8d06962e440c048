"""A question to a model that retrieves: the nearest passages stand before it, a line each, the next ones are
given beside it.

Wang et al. 2023 (there the first passage is in the prompt). The prompt is padded on the left to whole groups of tokens,
so that the first token of the answer already follows on the neighbours of the last group.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .feeding import Feed


class Asked:
    """prompt: int64 [1, n], of which the first `padding` tokens are 0. Called as `Feed` is while generating, it gives
    every group the same neighbours: those of the question behind its `passages`."""

    def __init__(self, feed: Feed, question: np.ndarray, passages: int):
        """question: int [n]."""
        index = feed.index
        vector = index.embed(question[None].astype(np.int32), feed.words)
        ids, _ = index.search(vector, passages + feed.near)
        self.feed, self.ids = feed, ids[0]
        rows = index.chunks[self.ids[:passages][self.ids[:passages] >= 0]]
        line = feed.words.encode("\n")
        before = [
            part for d, s, _ in rows for part in (index.tokens[s : min(s + feed.length, int(index.ends[d]))], line)
        ]
        tokens = np.concatenate([*before, question]).astype(np.int64)
        self.padding = -len(tokens) % index.chunk
        self.prompt = torch.from_numpy(np.concatenate([np.zeros(self.padding, np.int64), tokens]))[None]
        self._rows = feed.rows(self.ids[passages:])

    def __call__(self, tokens: Tensor, groups: range) -> Tensor:
        """int64 [batch, groups, near, length]."""
        return self._rows.expand(len(tokens), len(groups), *self._rows.shape).to(tokens.device)
