"""safetensors files, mapped into memory when read and written in place: at most a few tensors are held at a time."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import UserError

DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip
SPELLED = {text: dtype for dtype, text in DTYPES.items()}
About = tuple[torch.dtype, tuple[int, ...]]


class Tensors:
    """Tensors of one or several files, by name; `get` reads one, or one index of its first axis.

    Raises UserError `damaged-weights` with every file that is no whole safetensors file, `no-such-file`.
    """

    def __init__(self, files: Iterable[Path]):
        self._places: dict[str, Path] = {}
        self._about: dict[str, About] = {}
        self._open: dict[Path, Any] = {}
        problems: list[UserError] = []
        for path in files:
            try:
                self._add(path)
            except UserError as error:
                problems.append(error)
        if problems:
            raise UserError(problems[0].code, "\n  ".join(p.message for p in problems), problems[0].help)

    def _add(self, path: Path) -> None:
        for name, (dtype, shape) in read_header(path).items():
            if name in self._places:
                raise UserError("damaged-weights", f"`{name}` is in `{self._places[name]}` and in `{path}`")
            self._places[name], self._about[name] = path, (dtype, shape)

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def names(self) -> list[str]:
        return list(self._places)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._about[name][1]

    def dtype(self, name: str) -> torch.dtype:
        return self._about[name][0]

    def get(self, name: str, index: int | None = None) -> Tensor:
        path = self._places[name]
        try:
            if path not in self._open:
                self._open[path] = safe_open(path, framework="pt")
            if index is not None:
                return self._open[path].get_slice(name)[index : index + 1][0]
            return self._open[path].get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise UserError("damaged-weights", f"`{name}` cannot be read from `{path}`: {error}") from None


def read_header(path: Path) -> dict[str, About]:
    """The dtype and shape of each tensor of a safetensors file; the sizes are held against the file's.

    Raises UserError `damaged-weights`, `no-such-file`.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > size - 8:
                raise ValueError("its table is longer than the file")
            header = json.loads(file.read(length))
        if not isinstance(header, dict):
            raise ValueError("its table is no table")
        header.pop("__metadata__", None)
        ends = {name: _end(name, entry) for name, entry in header.items()}
        end = 8 + length + max(ends.values(), default=0)
        if end != size:
            cut = [n for n, e in ends.items() if 8 + length + e > size]
            what = f"`{cut[0]}` is cut off" if cut else "it is longer than its table says"
            raise ValueError(f"{what} (the file has {size} bytes, its table says {end})")
        return {name: (SPELLED[entry["dtype"]], tuple(entry["shape"])) for name, entry in header.items()}
    except OSError as error:
        raise UserError("no-such-file", f"`{path}` cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError, struct.error) as error:
        said = str(error) if type(error) is ValueError else "its table is damaged"
        raise UserError("damaged-weights", f"`{path}` is no whole safetensors file: {said}") from None


def _end(name: str, entry: Any) -> int:
    """Where a tensor ends, counted from the end of the table. Raises `ValueError`."""
    if entry["dtype"] not in SPELLED:
        raise ValueError(f"`{name}` has the dtype {entry['dtype']}, which cannot be read")
    shape, (start, end) = entry["shape"], entry["data_offsets"]
    if not all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in (*shape, start, end)):
        raise ValueError(f"the table has no sizes for `{name}`")
    needed = prod(shape) * SPELLED[entry["dtype"]].itemsize
    if end - start != needed:
        raise ValueError(f"`{name}` has {end - start} bytes, {entry['dtype']} {shape} needs {needed}")
    return end


# --- writing -------------------------------------------------------------------------------------

Put = Callable[..., None]


@contextmanager
def writing(path: Path, about: Mapping[str, About]) -> Iterator[Put]:
    """Write a safetensors file; gives `put(name, tensor, index=None)`, which may be called in any order, with `index`
    for one index of the first axis.

    The file appears whole or not at all. Raises UserError `cannot-write`.
    """
    header, offsets, total = _header(about)
    partial = path.with_name(f".{path.name}.partial")
    written = 0
    try:
        with partial.open("wb") as file:
            file.write(header)

            def put(name: str, tensor: Tensor, index: int | None = None) -> None:
                nonlocal written
                dtype, shape = about[name]
                part = shape if index is None else shape[1:]
                if tensor.dtype != dtype or tuple(tensor.shape) != part:
                    raise ValueError(f"`{name}` is {tensor.dtype} {list(tensor.shape)}, {dtype} {list(part)} is due")
                data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
                file.seek(len(header) + offsets[name] + (0 if index is None else index * data.nbytes))
                file.write(data.data)
                written += data.nbytes

            yield put
            if written != total:
                raise ValueError(f"{written} of {total} bytes were written")
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        raise UserError("cannot-write", f"cannot write `{path}`: {error.strerror}") from None
    finally:
        partial.unlink(missing_ok=True)


def _header(about: Mapping[str, About]) -> tuple[bytes, dict[str, int], int]:
    """The first bytes of a file, where each tensor lies behind them, and how many bytes all have."""
    table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offsets: dict[str, int] = {}
    end = 0
    # The format wants no holes and its readers alignment, so the widest elements come first.
    for name in sorted(about, key=lambda n: -about[n][0].itemsize):
        dtype, shape = about[name]
        offsets[name], end = end, end + prod(shape) * dtype.itemsize
        table[name] = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [offsets[name], end]}
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text, offsets, end
