"""Megatron-LM's indexed token files: `.bin` has the tokens, `.idx` where each sequence and document begins.

Index layout (megatron/core/datasets/indexed_dataset.py): magic `MMIDIDX\\0\\0`, version u64 = 1, dtype code u8, number
of sequences u64, number of document boundaries u64, lengths i32, byte offsets i64, document boundaries i64.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np

from ..errors import UserError

MAGIC = b"MMIDIDX\x00\x00"
DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 6: np.float64, 7: np.float32, 8: np.uint16}


def read_index(path: Path) -> Iterator[np.ndarray]:
    """The documents of a pair of files, each int32[n]. Raises UserError `bad-index`."""
    data, index = path.with_suffix(".bin"), path.with_suffix(".idx")
    for file in (data, index):
        if not file.is_file():
            raise UserError("no-such-file", f"`{file}` is missing beside `{path.name}`")
    raw = index.read_bytes()
    try:
        if raw[:9] != MAGIC:
            raise ValueError("it does not begin with MMIDIDX")
        version, code, sequences, boundaries = struct.unpack_from("<QBQQ", raw, 9)
        if version != 1 or code not in DTYPES:
            raise ValueError(f"version {version}, dtype code {code}")
        at = 9 + struct.calcsize("<QBQQ")
        lengths = np.frombuffer(raw, np.int32, sequences, at)
        pointers = np.frombuffer(raw, np.int64, sequences, at + 4 * sequences)
        documents = np.frombuffer(raw, np.int64, boundaries, at + 12 * sequences)
    except (struct.error, ValueError, OverflowError) as error:
        raise UserError("bad-index", f"`{index}` is no index: {error}") from None
    kind = np.dtype(DTYPES[code])
    held = data.stat().st_size // kind.itemsize
    _check_places(index, lengths, pointers, documents, kind.itemsize, held)
    tokens = np.memmap(data, kind, "r", shape=(held,)) if held else np.zeros(0, kind)
    for first, last in pairwise(documents):
        parts = [
            tokens[p // kind.itemsize : p // kind.itemsize + n]
            for p, n in zip(pointers[first:last], lengths[first:last], strict=True)
        ]
        yield np.concatenate(parts).astype(np.int32) if parts else np.zeros(0, np.int32)


def _check_places(
    index: Path, lengths: np.ndarray, pointers: np.ndarray, documents: np.ndarray, size: int, held: int
) -> None:
    """Every sequence lies within the `held` tokens of the file, and every document within the sequences."""
    if (lengths < 0).any() or (pointers < 0).any() or (pointers % size).any():
        raise UserError("bad-index", f"`{index}` has a sequence that begins before the file or between two tokens")
    if (pointers // size > held - lengths.astype(np.int64)).any():
        raise UserError("bad-index", f"`{index}` has a sequence that goes on behind the end of its `.bin`")
    if len(documents) and (documents[0] < 0 or documents[-1] > len(lengths) or (np.diff(documents) < 0).any()):
        raise UserError("bad-index", f"`{index}` has documents of sequences that are not there")


def write_index(path: Path, documents: Sequence[np.ndarray]) -> None:
    """Write documents as one sequence each, int32 tokens."""
    lengths = np.array([len(d) for d in documents], np.int32)
    pointers = np.concatenate([[0], np.cumsum(lengths[:-1], dtype=np.int64) * 4]).astype(np.int64)[: len(lengths)]
    boundaries = np.arange(len(documents) + 1, dtype=np.int64)
    with path.with_suffix(".bin").open("wb") as file:
        for document in documents:
            file.write(np.asarray(document, np.int32).tobytes())
    header = MAGIC + struct.pack("<QBQQ", 1, 4, len(lengths), len(boundaries))
    path.with_suffix(".idx").write_bytes(header + lengths.tobytes() + pointers.tobytes() + boundaries.tobytes())
