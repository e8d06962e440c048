"""What a model is given of an index: for each group of tokens that needs rows, the neighbours of the newest tokens.

An input that follows the tokens gets its rows with the first token of a group. They are looked up by the tokens that
end there, as many as a group has: by a chunk as soon as it is whole. Ahead of training all rows of the data are looked
up once, into memory-mapped files; while generating, each time a chunk is whole.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..data import Batch, Packed, Tokenizer
from ..errors import UserError
from ..lib import Model
from ..lib.clocks import Clock, on
from ..lib.rows import At
from .index import Index, checksum, hashes_of

ROWS = 64
"""Rows of data that are looked up at once."""


class Feed:
    """Neighbours for one input of a model. Raises UserError: unknown-setting, bad-tokenizer, out-of-range."""

    def __init__(self, model: Model, name: str, index: Index, tokenizer: str, words: Tokenizer):
        self.name, self.index, self.words = name, index, words
        if name not in model.follows:
            known = ", ".join(f"`{n}`" for n in model.follows) or "none"
            raise UserError(
                "unknown-setting",
                f"`{name}` is no input of {type(model).__name__} that follows its tokens",
                help=f"its inputs that do: {known}",
            )
        index.check_tokenizer(tokenizer)
        self.clock: Clock = model.follows[name]
        self.near, self.length = _sizes(model, name)
        if self.clock.width != index.chunk:
            raise UserError(
                "out-of-range",
                f"`{index.folder}` has chunks of {index.chunk} tokens, `{name}` comes with every {self.clock.width}",
                help=f"an index that is built with --chunk {self.clock.width}",
            )

    def find(self, chunks: np.ndarray, without: list[frozenset[int]] | None = None) -> np.ndarray:
        """int64 [n, near]: neighbours of chunks int32 [n, width]."""
        if not len(chunks):
            return np.zeros((0, self.near), np.int64)
        return self.index.search(self.index.embed(chunks, self.words), self.near, without)[0]

    def rows(self, ids: np.ndarray) -> Tensor:
        """int64 [*, near, length]."""
        return torch.from_numpy(self.index.text(ids, self.length))

    def __call__(self, tokens: Tensor, groups: range) -> Tensor:
        """While generating: int64 [batch, groups, near, length] for all tokens so far, int64 [batch, n], where these
        are."""
        position = torch.arange(tokens.shape[1])
        ends = self.clock.come(position).nonzero().flatten()[groups.start : groups.stop]
        chunks = _ending(tokens.cpu().numpy(), ends.numpy(), self.index.chunk)
        found = self.find(chunks.reshape(-1, self.index.chunk).astype(np.int32))
        return self.rows(found.reshape(len(tokens), len(groups), self.near)).to(tokens.device)


def _ending(tokens: np.ndarray, ends: np.ndarray, width: int) -> np.ndarray:
    """[batch, ends, width]: the tokens that end with those."""
    return tokens[:, ends[:, None] - width + 1 + np.arange(width)]


def _sizes(model: Model, name: str) -> tuple[int, int]:
    """How many neighbours of how many tokens each. Raises UserError `out-of-range`."""
    value = next(v for v in model.program.model.inputs if v.name == name)
    sizes = [model.program.model.dim(d).size for d in value.type.dims[2:]]
    if len(sizes) != 2 or None in sizes or value.type.kind != "token":
        raise UserError(
            "out-of-range",
            f"`{name}` has the dims [{', '.join(value.type.dims)}], neighbours are tokens "
            "[batch, chunks, how many, tokens of each]",
        )
    return int(sizes[0] or 0), int(sizes[1] or 0)


class Looked:
    """The neighbours of all rows of some data, looked up ahead: ids [groups, near] and where each row's begin.

    A folder: `ids.npy`, `starts.npy`, and `of.json` that says of what they are and their checksums. Rows of other data,
    and those of damaged files, are looked up again.
    """

    def __init__(self, feed: Feed, data: Packed, folder: Path):
        self.feed, self.data = feed, data
        about = self._about()
        self.identity = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
        try:
            known = json.loads((folder / "of.json").read_text(encoding="utf-8"))
            there = known == {**about, "files": _sums(folder)}
        except (OSError, ValueError):
            there = False
        if not there:
            self._look_up(folder, about)
        self.ids = np.load(folder / "ids.npy", mmap_mode="r")
        self.starts = np.load(folder / "starts.npy", mmap_mode="r")

    def _about(self) -> dict[str, Any]:
        corpus = self.data.corpus
        text = hashlib.sha256(corpus.tokens.tobytes() + corpus.ends.tobytes()).hexdigest()
        files = hashlib.sha256(json.dumps(self.feed.index.manifest, sort_keys=True).encode()).hexdigest()
        return {"text": text, "seq": self.data.seq, "near": self.feed.near, "index": files}

    def _look_up(self, folder: Path, about: dict[str, Any]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "of.json").unlink(missing_ok=True)  # from here on the files are of nothing that it could say
        hashes = hashes_of(self.data.corpus)
        starts, found = [0], []
        for first in range(0, self.data.num_rows, ROWS):
            numbers = list(range(first, min(first + ROWS, self.data.num_rows)))
            batch = self.data.rows(numbers)
            row, end = _begins(self.feed.clock, batch)
            chunks = _ending(batch.tokens.numpy(), end, self.feed.index.chunk)[row, np.arange(len(row))]
            own = self._documents(numbers, hashes)
            found.append(self.feed.find(chunks.astype(np.int32), [own[r] for r in row]))
            starts += list(starts[-1] + np.cumsum(np.bincount(row, minlength=len(numbers))))
        for name, array in (("ids", np.concatenate(found)), ("starts", np.array(starts, np.int64))):
            with (folder / f"{name}.npy.part").open("wb") as file:
                np.save(file, array)
            os.replace(folder / f"{name}.npy.part", folder / f"{name}.npy")
        (folder / "of.json").write_text(json.dumps({**about, "files": _sums(folder)}) + "\n", encoding="utf-8")

    def _documents(self, rows: list[int], hashes: np.ndarray) -> list[frozenset[int]]:
        """The documents that each row has tokens of."""
        first = np.searchsorted(self.data.corpus.ends, np.array(rows) * self.data.seq, side="right")
        last = np.searchsorted(self.data.corpus.ends, (np.array(rows) + 1) * self.data.seq - 1, side="right")
        return [frozenset(int(h) for h in hashes[a : b + 1]) for a, b in zip(first, last, strict=True)]

    def __call__(self, batch: Batch) -> Tensor:
        """int64 [batch, groups, near, length] for a batch of the data."""
        groups = on(At(batch.tokens.shape, batch.tokens.device, None, batch.document), self.feed.clock).seq
        ids = np.full((len(batch.rows), groups, self.feed.near), -1, np.int64)
        for i, row in enumerate(batch.rows):
            own = self.ids[self.starts[row] : self.starts[row + 1]]
            ids[i, : len(own)] = own
        return self.feed.rows(ids)


def _sums(folder: Path) -> dict[str, str]:
    return {name: checksum(folder / name) for name in ("ids.npy", "starts.npy")}


def _begins(clock: Clock, batch: Batch) -> tuple[np.ndarray, np.ndarray]:
    """The rows and places of the tokens with which groups begin, in order."""
    at = At(batch.tokens.shape, batch.tokens.device, None, batch.document)
    row, place = clock.come(at.position).nonzero(as_tuple=True)
    return row.numpy(), place.numpy()
