"""Tokenizers: bytes, built in, and `tokenizer.json` files."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import numpy as np

from ..errors import UserError


class Tokenizer(Protocol):
    """Text to token ids and back. `vocab` is one more than the largest id."""

    name: str
    vocab: int

    def encode(self, text: str) -> np.ndarray: ...

    def decode(self, ids: list[int]) -> str: ...


class Bytes:
    """The bytes of UTF-8 text. Documents need no end token: their ends are coordinates of the sequence."""

    name = "bytes"
    vocab = 256

    def encode(self, text: str) -> np.ndarray:
        """int32[n]."""
        return np.frombuffer(text.encode("utf-8"), dtype=np.uint8).astype(np.int32)

    def decode(self, ids: list[int]) -> str:
        return bytes(i for i in ids if i < 256).decode("utf-8", "replace")


class FromFile:
    """A `tokenizer.json` through the `tokenizers` package."""

    def __init__(self, path: Path):
        from tokenizers import Tokenizer as Loaded

        try:
            self._loaded = Loaded.from_file(str(path))
        except Exception as error:  # the package raises bare Exception
            raise UserError("bad-tokenizer", f"`{path}` is no tokenizer: {error}") from None
        self.name = str(path)
        self.vocab = self._loaded.get_vocab_size()

    def encode(self, text: str) -> np.ndarray:
        """int32[n], without special tokens."""
        return np.array(self._loaded.encode(text, add_special_tokens=False).ids, dtype=np.int32)

    def decode(self, ids: list[int]) -> str:
        return self._loaded.decode(ids)


def open_tokenizer(name: str | Path) -> Tokenizer:
    """`bytes`, or the path of a tokenizer.json. Raises UserError `no-such-file`, `bad-tokenizer`."""
    if str(name) == "bytes":
        return Bytes()
    path = Path(name)
    if not path.is_file():
        raise UserError(
            "no-such-file", f"there is no tokenizer `{name}`", help="`bytes`, or the path of a tokenizer.json"
        )
    return FromFile(path)
