"""Embedders: chunks of tokens to vectors of length 1, so that inner products are cosines.

The one that needs no download is TF-IDF over hashed n-grams of tokens, folded into few dims by signed hashing
(Weinberger et al. 2009). Any encoder in a folder of Hugging Face is another: the mean of its last states.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ..data import Tokenizer
from ..errors import UserError

WIDTH = 256
"""Dims of a vector of n-grams."""
BUCKETS = 1 << 20
"""Classes of n-grams that share how rare they are."""
HASHES = 4
"""Places of a vector that an n-gram adds to."""


class Embedder(Protocol):
    """Vectors of chunks. `name` says with which words it is asked for, `identity` what its vectors depend on, `width`
    how many numbers one has."""

    name: str
    identity: str
    width: int

    def learn(self, chunks: Iterator[np.ndarray]) -> np.ndarray | None:
        """What it must see all chunks for, kept in the index; None if nothing."""

    def embed(self, chunks: np.ndarray, learnt: np.ndarray | None) -> np.ndarray:
        """int32 [n, length], -1 behind the end of a chunk -> float32 [n, width], rows of length 1 (or 0)."""


def open_embedder(name: str, tokenizer: Tokenizer) -> Embedder:
    """`tfidf`, `tfidf:LOW-HIGH` (n-grams of so many tokens) or a folder with an encoder. Raises UserError
    `no-such-file`, `unknown-setting`."""
    kind, _, orders = name.partition(":")
    if kind == "tfidf":
        low, high = (3, 5) if tokenizer.name == "bytes" else (1, 2)
        if orders:
            first, dash, last = orders.partition("-")
            if not first.isdigit() or (dash and not last.isdigit()) or not 1 <= int(first) <= int(last or first) <= 16:
                raise UserError("unknown-setting", f"`{name}` is no embedder", help="n-grams are given as `tfidf:3-5`")
            low, high = int(first), int(last or first)
        return Grams(low, high)
    if Path(name).is_dir():
        return Encoder(Path(name), tokenizer)
    raise UserError(
        "unknown-setting", f"`{name}` is no embedder", help="`tfidf`, or a folder with an encoder of Hugging Face"
    )


class Grams:
    """TF-IDF of hashed n-grams of low .. high tokens."""

    def __init__(self, low: int, high: int):
        self.low, self.high, self.width = low, high, WIDTH
        self.name = self.identity = f"tfidf:{low}-{high}"

    def learn(self, chunks: Iterator[np.ndarray]) -> np.ndarray:
        """float32 [BUCKETS]: log((chunks + 1) / (chunks with the n-gram + 1))."""
        seen, count = np.zeros(BUCKETS, np.int64), 0
        for block in chunks:
            grams, real = self._grams(block)
            rows = np.broadcast_to(np.arange(len(block))[:, None], grams.shape)
            pairs = np.unique((rows[real].astype(np.uint64) << np.uint64(20)) | (grams[real] % BUCKETS))
            seen += np.bincount((pairs % BUCKETS).astype(np.int64), minlength=BUCKETS)
            count += len(block)
        return np.log((count + 1) / (seen + 1)).astype(np.float32)

    def embed(self, chunks: np.ndarray, learnt: np.ndarray | None) -> np.ndarray:
        assert learnt is not None
        grams, real = self._grams(chunks)
        weight = np.where(real, learnt[(grams % BUCKETS).astype(np.int64)], 0)
        rows = np.arange(len(chunks))[:, None]
        total = np.zeros(len(chunks) * WIDTH)
        for i in range(HASHES):
            mixed = _mix(grams + np.uint64(i + 1))
            sign = np.where(mixed >> np.uint64(63), 1.0, -1.0)
            place = rows * WIDTH + (mixed % WIDTH).astype(np.int64)
            total += np.bincount(place.ravel(), (weight * sign).ravel(), len(total))
        found = total.reshape(len(chunks), WIDTH)
        length = np.linalg.norm(found, axis=1, keepdims=True)
        return (found / np.where(length > 0, length, 1)).astype(np.float32)

    def _grams(self, chunks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """uint64 [n, grams], and which of them there are."""
        ids = chunks.astype(np.int64).astype(np.uint64)
        found, real = [], []
        for order in range(self.low, min(self.high, chunks.shape[1]) + 1):
            wide = chunks.shape[1] - order + 1
            made = np.full((len(chunks), wide), order, np.uint64)
            for i in range(order):
                made = _mix(made ^ ids[:, i : i + wide])
            found.append(made)
            real.append(chunks[:, order - 1 :] >= 0)
        if not found:
            return np.zeros((len(chunks), 0), np.uint64), np.zeros((len(chunks), 0), bool)
        return np.concatenate(found, 1), np.concatenate(real, 1)


def _mix(x: np.ndarray) -> np.ndarray:
    """A 64-bit hash of each number (the finaliser of SplitMix64, Steele et al. 2014)."""
    with np.errstate(over="ignore"):
        x = x + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


class Encoder:
    """The mean of the last states of an encoder, over the tokens of the chunk's text."""

    def __init__(self, folder: Path, tokenizer: Tokenizer):
        try:
            from transformers import AutoModel, AutoTokenizer
        except ImportError:
            raise UserError(
                "unknown-setting", "an encoder needs the package `transformers`", help="pip install 'heddle-lang[hf]'"
            ) from None
        try:
            self._words: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            self._model: Any = AutoModel.from_pretrained(folder, local_files_only=True).eval()
        except Exception as error:  # whatever is wrong with a file, the packages raise as it comes to them
            first = f"{error}".strip().split("\n")[0]
            raise UserError(
                "no-such-file", f"`{folder}` holds no encoder: {first}", help="its weights, config.json and a tokenizer"
            ) from None
        sizes = self._model.config
        if getattr(sizes, "is_encoder_decoder", False) or not hasattr(sizes, "hidden_size"):
            raise UserError("unknown-setting", f"`{folder}` holds a {sizes.model_type}, which is no encoder alone")
        if self._words.pad_token is None:
            raise UserError("unknown-setting", f"the tokenizer of `{folder}` has no padding token")
        self.width = int(sizes.hidden_size)
        self._most = min(self._words.model_max_length, getattr(sizes, "max_position_embeddings", 1 << 20))
        self._tokens, self.name = tokenizer, str(folder.resolve())
        digest = hashlib.sha256()
        for name, weight in sorted(self._model.state_dict().items()):
            digest.update(name.encode())
            digest.update(weight.float().contiguous().numpy().tobytes())
        self.identity = f"encoder:{digest.hexdigest()}"

    def learn(self, chunks: Iterator[np.ndarray]) -> None:
        return None

    def embed(self, chunks: np.ndarray, learnt: np.ndarray | None) -> np.ndarray:
        import torch

        texts = [self._tokens.decode([int(i) for i in row if i >= 0]) for row in chunks]
        found = []
        settings = {"padding": True, "truncation": True, "max_length": self._most, "return_tensors": "pt"}
        with torch.no_grad():
            for start in range(0, len(texts), 64):
                given = self._words(texts[start : start + 64], **settings)
                states = self._model(**given).last_hidden_state
                real = given["attention_mask"][..., None]
                mean = (states * real).sum(1) / real.sum(1).clamp_min(1)
                found.append(torch.nn.functional.normalize(mean.float(), dim=-1).numpy())
        return np.concatenate(found).astype(np.float32)
