"""Rows of tokens for training: documents one behind the other, cut into rows, in an order that one number says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError
from .sources import Corpus


@dataclass(frozen=True)
class Batch:
    """tokens int64[batch, seq]; document int64[batch, seq]: which document of its row a token belongs to; rows: their
    numbers in the data."""

    tokens: Tensor
    document: Tensor
    rows: tuple[int, ...] = ()


@dataclass(frozen=True)
class Cursor:
    """The position in the data: rows that were given out so far, since the beginning of training."""

    row: int = 0


class Source(Protocol):
    """What a model takes of each batch besides its tokens. `identity` says of what it is."""

    identity: str

    def __call__(self, batch: Batch) -> Tensor: ...


class Packed:
    """A corpus as rows of `seq` tokens. A row may hold several documents, and a long document several rows: its
    continuation in the next row starts afresh there.

    Each epoch goes through all rows in an order drawn from (seed, epoch) alone, so that a `Cursor` says everything.
    """

    def __init__(self, corpus: Corpus, seq: int, seed: int = 0):
        self.corpus, self.seq, self.seed = corpus, seq, seed
        self.given: dict[str, Source] = {}
        self.num_rows = len(corpus.tokens) // seq
        if not self.num_rows:
            raise UserError(
                "no-data",
                f"the data have {len(corpus.tokens)} tokens, too few for one row of {seq}",
                help="shorter rows, or more text",
            )
        self._order: tuple[int, np.ndarray] = (-1, np.zeros(0, np.int64))

    def _row_at(self, place: int) -> int:
        epoch, within = divmod(place, self.num_rows)
        if self._order[0] != epoch:
            self._order = (epoch, np.random.Generator(np.random.Philox([self.seed, epoch])).permutation(self.num_rows))
        return int(self._order[1][within])

    def batch(self, cursor: Cursor, rows: int) -> tuple[Batch, Cursor]:
        """The next rows, and the cursor behind them."""
        chosen = [self._row_at(cursor.row + i) for i in range(rows)]
        return self.rows(chosen), Cursor(cursor.row + rows)

    def rows(self, chosen: list[int]) -> Batch:
        """Rows by number."""
        index = np.array(chosen)[:, None] * self.seq + np.arange(self.seq)
        document = np.searchsorted(self.corpus.ends, index, side="right")
        document -= document[:, :1]
        tokens = torch.from_numpy(self.corpus.tokens[index].astype(np.int64))
        return Batch(tokens, torch.from_numpy(document), tuple(chosen))

    def inputs(self, batch: Batch) -> dict[str, Tensor]:
        """What a model takes of a batch besides tokens and documents, by name."""
        return {name: given(batch) for name, given in self.given.items()}
