"""What tests of generated kernels share: loading, poisoned memory, the rule of error, drawn tensors, planted faults.

A kernel's text is run in Triton's interpreter. All memory that it allocates is filled with a pattern first and stands
between guards, so that a place which was not written, and a store beside the tensor, are found.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from heddle.runtime import judging
from heddle.runtime.interpreted import module_of
from heddle.runtime.lib import kernels

GOLDEN = Path(__file__).parent / "golden"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Wider than what a store with a forgotten mask reaches at the sizes drawn here: outside it the process may die.
GUARD_BYTES = 1 << 14
# NaN in fp32, bf16 and fp16, and with bits below its first that no computation makes by itself.
_PATTERNS = {1: 0x5A, 2: 0x7FD5, 4: 0x7FD5D5D5, 8: 0x7FF5D5D5D5D5D5D5}
_GUARD = 0xA5


def load(text: str, interpret: bool = True) -> ModuleType:
    """The module of a kernel's file; one text is loaded once a process, so its ops are registered once."""
    name = f"kernel_{hashlib.sha256(text.encode()).hexdigest()[:12]}{'' if interpret else '_built'}"
    return module_of(text, name, f"{name}.py", interpret)


# --- memory ---------------------------------------------------------------------------------------------------------


class _Guarded:
    """One allocation: a pattern between two guards; the tensor's storage begins at its first element."""

    def __init__(self, shape: Sequence[int], dtype: torch.dtype) -> None:
        size = dtype.itemsize
        count = math.prod(shape)
        self.bytes = np.full(2 * GUARD_BYTES + count * size, _GUARD, np.uint8)
        plain = np.dtype(f"u{size}")
        self.inside = self.bytes[GUARD_BYTES : GUARD_BYTES + count * size].view(plain)
        self.pattern = plain.type(_PATTERNS[size])
        self.inside[:] = self.pattern
        self.tensor = torch.empty(tuple(shape), dtype=dtype)
        if count:
            self.tensor = torch.frombuffer(self.bytes, dtype=dtype, count=count, offset=GUARD_BYTES).view(tuple(shape))

    def check(self, what: str) -> None:
        ends = (("before", self.bytes[:GUARD_BYTES]), ("after", self.bytes[GUARD_BYTES + self.inside.nbytes :]))
        for where, guard in ends:
            assert (guard == _GUARD).all(), f"a store {where} {what}, outside of its memory"
        missing = np.flatnonzero(self.inside == self.pattern)
        if len(missing):
            place = np.unravel_index(missing[0], tuple(self.tensor.shape))
            raise AssertionError(
                f"{what} is not written at {tuple(map(int, place))}, and at {len(missing)} of {self.inside.size} places"
            )


@contextmanager
def poisoned() -> Iterator[None]:
    """Inside, what kernels allocate holds a pattern and stands between guards; afterwards both are checked.

    Raises: AssertionError for a place that no program wrote to, and for a store outside of the tensors. Memory of
    tensors that have shapes only is left alone.
    """
    plain = kernels.empty
    made: list[_Guarded] = []

    def empty(shape: Sequence[int], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        usual = plain(shape, like, dtype)
        if type(usual) is not Tensor or usual.device.type != "cpu" or kernels._Watch.dry.depth:
            return usual
        made.append(_Guarded(shape, usual.dtype))
        return made[-1].tensor

    kernels.empty = empty
    try:
        yield
    finally:
        kernels.empty = plain
    for number, memory in enumerate(made):
        what = f"allocation {number}, {str(memory.tensor.dtype).removeprefix('torch.')}{list(memory.tensor.shape)},"
        memory.check(what)


# --- the rule of error ------------------------------------------------------------------------------------------------

floor, roundoff = judging.floor, judging.roundoff


def worst(
    got: Tensor, want: Tensor, eager: Tensor | None, floor: Tensor | float, what: str = "result", each: bool = False
) -> float:
    """The largest error as a share of what is allowed: |got - want| <= 2 max|eager - want| + floor.

    `want` is fp64; `eager` is the same math by plain PyTorch in the storage type, ignored where it is not finite (in
    any place, so with its NaN it excuses nothing); `each` compares with eager's error at each element.
    Raises: AssertionError with the worst place. NaN and infinities have to be those of `want`.
    """
    assert got.shape == want.shape, f"{what}: shape {tuple(got.shape)}, not {tuple(want.shape)}"
    found = judging.judged(got, want, eager, floor, each)
    if not found.worst <= 1:
        raise AssertionError(f"{what} {_at(found.share, got.detach(), want)}: {found.worst:.3g} times the error allowed")
    return found.worst


def _at(share: Tensor, found: Tensor, want: Tensor) -> str:
    place = tuple(int(i) for i in np.unravel_index(int(share.argmax()), tuple(share.shape)))
    return f"at {place} is {found[place].item():.9g}, not {want[place].item():.9g}"


# --- what is drawn ----------------------------------------------------------------------------------------------------


def sizes(block: int, most: int | None = None, least: int = 0) -> st.SearchStrategy[int]:
    """Sizes at which tiles of `block` go wrong: 0, 1, odd, prime, about one block and two."""
    most = 2 * block + 1 if most is None else most
    near = {0, 1, 2, 3, 7, block - 1, block, block + 1, 2 * block - 1, 2 * block, 2 * block + 1}
    return st.sampled_from(sorted(n for n in near if least <= n <= most))


def dtypes() -> st.SearchStrategy[torch.dtype]:
    """The storage types of activations and weights."""
    return st.sampled_from(DTYPES)


def scales() -> st.SearchStrategy[float]:
    """How large values are: so small that an epsilon matters, usual, and large."""
    return st.sampled_from((0.02, 1.0, 30.0))


def values(shape: Sequence[int], dtype: torch.dtype, seed: int, scale: float = 1.0) -> Tensor:
    """Normal values, with zeros and a few that are far larger and smaller; the same for the same `seed`."""
    of = torch.Generator().manual_seed(seed)
    found = torch.randn(tuple(shape), generator=of, dtype=torch.float64) * scale
    kind = torch.randint(0, 40, tuple(shape), generator=of)
    found = torch.where(kind == 0, 0.0, torch.where(kind == 1, found * 8, torch.where(kind == 2, found / 1024, found)))
    return found.to(dtype)


LAYOUTS = ("contiguous", "sliced", "transposed", "strided", "offset")
# Elements of poison before and after an input: what a load with a forgotten mask reads is NaN, not luck.
_AROUND = 1024


def layouts() -> st.SearchStrategy[str]:
    """How a tensor may lie in memory; see `laid`."""
    return st.sampled_from(LAYOUTS)


def laid(tensor: Tensor, how: str) -> Tensor:
    """The same values in other memory, with NaN (or the smallest whole number) in all places around them.

    `sliced`: columns of a wider tensor; `transposed`: its first two dims lie the other way round; `strided`: every
    second element of its last dim; `offset`: one element further, so that rows are not aligned to 16 bytes.
    """
    if not tensor.ndim:
        return tensor.clone()
    *lead, last = tensor.shape
    if how == "contiguous":
        place = _poison(tensor.shape, tensor.dtype)
    elif how == "offset":
        place = _poison((tensor.numel() + 1,), tensor.dtype)[1:].view(tensor.shape)
    elif how == "sliced" or (how == "transposed" and tensor.ndim == 1):
        place = _poison((*lead, last + 5), tensor.dtype)[..., 3 : 3 + last]
    elif how == "strided":
        place = _poison((*lead, 2 * last), tensor.dtype)[..., ::2]
    elif how == "transposed":
        first, second, *rest = tensor.shape
        place = _poison((second, first + 1, *rest), tensor.dtype)[:, :first].transpose(0, 1)
    else:
        raise ValueError(f"no layout {how!r}: one of {', '.join(LAYOUTS)}")
    return place.copy_(tensor)


def _poison(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    low = 0 if dtype == torch.bool else math.nan if dtype.is_floating_point else torch.iinfo(dtype).min
    count = math.prod(shape)
    return torch.full((count + 2 * _AROUND,), low, dtype=dtype)[_AROUND : _AROUND + count].view(tuple(shape))


@st.composite
def documents(draw: st.DrawFn, length: int) -> tuple[int, ...]:
    """Lengths of packed documents that fill `length` rows: one, all of length 1, or drawn with some of length 1."""
    how = draw(st.sampled_from(("one", "ones", "some")))
    if not length:
        return ()
    if how == "one":
        return (length,)
    if how == "ones":
        return (1,) * length
    found: list[int] = []
    while (rest := length - sum(found)) > 0:
        found.append(min(rest, draw(st.sampled_from((1, 1, 2, 3, 5, 8, 13)))))
    return tuple(found)


def seeds() -> st.SearchStrategy[int]:
    """For `values`."""
    return st.integers(0, 2**31 - 1)


# --- planted faults ---------------------------------------------------------------------------------------------------


def plant(text: str, old: str, new: str) -> str:
    """The text with a fault in it. Raises ValueError where `old` is not there, or the fault changes nothing."""
    if old not in text:
        raise ValueError(f"there is no `{old}` to plant a fault at")
    if old == new:
        raise ValueError(f"`{old}` for itself is no fault")
    return text.replace(old, new)


@dataclass(frozen=True)
class Fault:
    """Another text for one place of a kernel's file, and what is wrong with it."""

    old: str
    new: str


def survivors(text: str, faults: Mapping[str, Fault], check: Callable[[ModuleType], Any]) -> list[str]:
    """The names of faults that `check` does not find; first it has to pass without any.

    `check` takes the module of the text and raises AssertionError. What else it raises is a fault badly planted.
    """
    check(load(text))
    found = []
    for name, fault in faults.items():
        module = load(plant(text, fault.old, fault.new))
        try:
            check(module)
        except AssertionError:
            continue
        found.append(name)
    return found


# --- golden files -----------------------------------------------------------------------------------------------------


def agrees_with_golden(name: str, text: str, update: bool) -> None:
    """Compare a generated file with `golden/NAME.py`; `update` (`--update-golden`, the fixture `golden`) writes it."""
    path = GOLDEN / f"{name}.py"
    if update:
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
    assert path.exists(), f"there is no {path.name}: pytest --update-golden writes it"
    assert path.read_text(encoding="utf-8") == text, f"{path.name} is not what is generated: pytest --update-golden"


def stable(text: str) -> None:
    """A generated file names no address, date or path of the machine that wrote it."""
    for wrong in (r"0x[0-9a-f]{8,}", r"\b20\d\d-\d\d-\d\d\b", r"/(?:home|tmp|work|root)/"):
        assert not re.search(wrong, text), f"{wrong} in a generated file"
