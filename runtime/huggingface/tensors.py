"""safetensors files, read lazily and written as a stream: peak memory is one tensor of theirs."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
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


class Tensors:
    """Tensors of one or several files, by name; `get` reads one."""

    def __init__(self, files: Iterable[Path]):
        self._places: dict[str, Path] = {}
        self._about: dict[str, tuple[str, tuple[int, ...]]] = {}
        self._open: dict[Path, Any] = {}
        for path in files:
            self._add(path)

    def _add(self, path: Path) -> None:
        for name, about in read_header(path).items():
            if name in self._places:
                raise UserError("damaged-weights", f"`{name}` is in `{self._places[name].name}` and in `{path.name}`")
            self._places[name] = path
            self._about[name] = (about["dtype"], tuple(about["shape"]))

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def names(self) -> list[str]:
        return list(self._places)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._about[name][1]

    def dtype(self, name: str) -> torch.dtype:
        text = self._about[name][0]
        if text not in SPELLED:
            raise UserError("damaged-weights", f"`{name}` has the dtype {text}, which is not known")
        return SPELLED[text]

    def get(self, name: str) -> Tensor:
        path = self._places[name]
        try:
            if path not in self._open:
                self._open[path] = safe_open(path, framework="pt")
            return self._open[path].get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise UserError("damaged-weights", f"`{name}` cannot be read from `{path}`: {error}") from None


def read_header(path: Path) -> dict[str, dict[str, Any]]:
    """The table of a safetensors file; its sizes are held against the file's. Raises UserError `damaged-weights`."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > size - 8:
                raise ValueError("its table is longer than the file")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
        if 8 + length + end != size:
            cut = [n for n, e in header.items() if 8 + length + e["data_offsets"][1] > size]
            what = f"`{cut[0]}` is cut off" if cut else "it is longer than its table says"
            raise ValueError(f"{what} (the file has {size} bytes, its table says {8 + length + end})")
        return header
    except OSError as error:
        raise UserError("no-such-file", f"`{path}` cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, struct.error) as error:
        raise UserError("damaged-weights", f"`{path}` is no whole safetensors file: {error}") from None


@contextmanager
def writing(path: Path, about: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> Iterator[Any]:
    """Write a safetensors file tensor by tensor, in the order of `about`; gives a function (name, tensor).

    The file appears whole or not at all. Raises UserError `cannot-write`.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (dtype, shape) in about.items():
        count = 1
        for side in shape:
            count *= side
        end = offset + count * torch.empty((), dtype=dtype).element_size()
        header[name] = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    partial = path.with_name(f".{path.name}.partial")
    order = list(about)
    try:
        with partial.open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)

            def put(name: str, tensor: Tensor) -> None:
                expected = order.pop(0)
                if name != expected or tuple(tensor.shape) != tuple(about[name][1]):
                    raise ValueError(f"{name} {list(tensor.shape)} where {expected} {list(about[expected][1])} is due")
                flat = tensor.detach().cpu().contiguous().to(about[name][0]).reshape(-1)
                if flat.numel():
                    file.write(flat.view(torch.uint8).numpy().tobytes())

            yield put
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        raise UserError("cannot-write", f"cannot write `{path}`: {error.strerror}") from None
    finally:
        partial.unlink(missing_ok=True)
