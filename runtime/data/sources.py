"""Where documents come from: text files and folders, JSON lines, Megatron's indexed token files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import UserError
from .indexed import read_index
from .tokenizers import Tokenizer

TEXT_SUFFIXES = (".txt", ".md", ".py", ".rst", ".spec")


@dataclass(frozen=True)
class Corpus:
    """Documents as token ids: document i is `tokens[ends[i - 1]:ends[i]]`. Empty documents are left out."""

    tokens: np.ndarray
    ends: np.ndarray

    @property
    def num_documents(self) -> int:
        return len(self.ends)

    @classmethod
    def of(cls, documents: Sequence[np.ndarray]) -> Corpus:
        kept = [d for d in documents if len(d)]
        tokens = np.concatenate(kept) if kept else np.zeros(0, np.int32)
        return cls(tokens, np.cumsum([len(d) for d in kept], dtype=np.int64))

    def select(self, chosen: Sequence[int]) -> Corpus:
        """Some of the documents."""
        starts = np.concatenate([[0], self.ends[:-1]])
        return Corpus.of([self.tokens[starts[i] : self.ends[i]] for i in chosen])


def open_corpus(paths: Sequence[Path], tokenizer: Tokenizer, field: str = "text", vocab: int | None = None) -> Corpus:
    """All documents of files and folders, folders walked in order of names.

    `.jsonl`: a document a line, in its `field`; `.bin` with `.idx` beside it: tokens as they are; every other file: one
    document of UTF-8 text. Raises UserError: no-such-file, bad-line, bad-index, not-text, no-data, token-out-of-range.
    """
    documents: list[np.ndarray] = []
    for path in paths:
        for file in _files(Path(path)):
            documents.extend(_documents(file, tokenizer, field))
    corpus = Corpus.of(documents)
    if not len(corpus.tokens):
        raise UserError("no-data", f"no text in {', '.join(f'`{p}`' for p in paths)}")
    if vocab is not None and int(corpus.tokens.max()) >= vocab:
        raise UserError(
            "token-out-of-range",
            f"the data have token {int(corpus.tokens.max())}, the model's vocabulary has {vocab}",
            help="another tokenizer, or a model with a larger `vocab`",
        )
    return corpus


def _files(path: Path) -> Iterator[Path]:
    if path.is_dir():
        found = sorted(p for p in path.rglob("*") if p.is_file() and not _is_hidden(p.relative_to(path)))
        kept = [p for p in found if p.suffix in (*TEXT_SUFFIXES, ".jsonl", ".bin")]
        if not kept:
            raise UserError(
                "no-data", f"the folder `{path}` has no text", help=f"files that count: {', '.join(TEXT_SUFFIXES)}"
            )
        yield from kept
    elif path.is_file():
        yield path
    elif path.with_suffix(".bin").is_file():
        yield path.with_suffix(".bin")
    else:
        raise UserError("no-such-file", f"there is no data at `{path}`")


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _documents(path: Path, tokenizer: Tokenizer, field: str) -> Iterator[np.ndarray]:
    if path.suffix in (".bin", ".idx"):
        yield from read_index(path)
    elif path.suffix == ".jsonl":
        for text in _lines(path, field):
            yield tokenizer.encode(text)
    else:
        yield tokenizer.encode(_text(path))


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError("not-text", f"byte {error.start} of `{path}` is not UTF-8") from None
    except OSError as error:
        raise UserError("no-such-file", f"`{path}` cannot be read: {error.strerror}") from None


def _lines(path: Path, field: str) -> Iterator[str]:
    # Not `splitlines`: U+2028 and its like may stand in a JSON string and end no line.
    for number, line in enumerate(_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError("bad-line", f"`{path}`:{number}:{error.colno}: {error.msg.lower()}") from None
        except RecursionError:
            raise UserError("bad-line", f"`{path}`:{number}:1: nested too deeply") from None
        if not isinstance(record, dict) or not isinstance(record.get(field), str):
            raise UserError("bad-line", f"`{path}`:{number}: no text in the field `{field}`")
        try:
            record[field].encode()
        except UnicodeEncodeError as error:
            raise UserError(
                "bad-line",
                f"`{path}`:{number}: half of a surrogate pair in the field `{field}`, at character {error.start}",
            ) from None
        yield record[field]


def split(corpus: Corpus, held_out: float) -> tuple[Corpus, Corpus]:
    """(training, held-out) documents. Which side a document is on follows from its own bytes, so that adding others
    never moves it."""
    starts = np.concatenate([[0], corpus.ends[:-1]])
    sides = []
    for start, end in zip(starts, corpus.ends, strict=True):
        digest = hashlib.sha256(corpus.tokens[start:end].tobytes()).digest()
        sides.append(int.from_bytes(digest[:8], "big") / 2**64 < held_out)
    held = [i for i, side in enumerate(sides) if side]
    kept = [i for i, side in enumerate(sides) if not side]
    if not kept:
        raise UserError(
            "no-data", "every document fell to the held-out side", help="more documents, or a smaller share"
        )
    return corpus.select(kept), corpus.select(held)
