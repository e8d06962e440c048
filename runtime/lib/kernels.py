"""What generated kernels stand on: ops that torch knows, launches, and the memory that they write to.

A kernel's Python function allocates with `empty` and launches with `launch`. Registered by `op` it is a `torch.library`
op, whose fake form is the same function without its launches: shapes are said once.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor


class Launch(NamedTuple):
    """One launch: the kernel, how many programs, and its arguments; `how` are its constants and options by name."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    how: dict[str, Any]


class _Dry(threading.local):
    """How many fake ops this thread is in: their launches are left out, those of other threads are not."""

    depth = 0


class _Watch:
    """What happens to launches besides: whether they are left out, and who is told of each; and the bodies of ops by
    their names in torch."""

    dry = _Dry()
    told: list[Launch] | None = None
    bodies: ClassVar[dict[str, Callable[..., Any]]] = {}
    elsewhere = False


def op(module: str, mutates: Sequence[str] = ()) -> Callable[[Callable[..., Any]], Any]:
    """Make a function of a kernel's file an op of torch; `module` is the file's `__name__`, which names it.

    `mutates` are arguments that it writes to. Gradients: `register_autograd` of what this gives, whose backward calls
    another such op.
    """

    def register(body: Callable[..., Any]) -> Any:
        def fake(*args: Any, **more: Any) -> Any:
            with unlaunched():
                return body(*args, **more)

        name = f"{re.sub(r'[^A-Za-z0-9_]', '_', module)}::{body.__name__}"
        made = torch.library.custom_op(name, body, mutates_args=tuple(mutates))
        made.register_fake(fake)
        _Watch.bodies[name] = body
        return made

    return register


def body_of(name: str) -> Callable[..., Any] | None:
    """The function that an op of torch was made of by `op`, by the op's name there; None for all others."""
    return _Watch.bodies.get(name)


@contextmanager
def unlaunched() -> Iterator[None]:
    """Nothing that this thread launches inside runs."""
    _Watch.dry.depth += 1
    try:
        yield
    finally:
        _Watch.dry.depth -= 1


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **how: Any) -> None:
    """Run a kernel on `grid` programs; nothing runs where there are none, or where tensors have shapes only."""
    if _Watch.told is not None:
        _Watch.told.append(Launch(kernel, grid, args, how))
    if _Watch.dry.depth or any(isinstance(a, Tensor) and a.is_meta for a in args) or not all(grid):
        return
    kernel[grid](*args, **how)


def empty(shape: Sequence[int], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Memory for a result of `shape` on the device of `like`, contiguous; every place must be written."""
    return torch.empty(tuple(shape), dtype=dtype or like.dtype, device=like.device)


# --- tensors as a kernel of rows and columns reads them ---------------------------------------------------------------

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def floats(*tensors: Tensor) -> None:
    """Raises TypeError where a tensor has none of the dtypes that generated kernels load: they compute in fp32."""
    for x in tensors:
        if x.dtype not in FLOATS:
            raise TypeError(f"kernels compute fp32, bf16 and fp16 in fp32; this tensor is {x.dtype}")


def lead(x: Tensor, width: int) -> tuple[int, ...]:
    """The shape of the rows of x[*, *over]: the first dims, so many that the sizes of the rest, `over`, make `width`
    (the last dim is one of them); and how many equal runs of `width` these are, where they are more.

    Raises ValueError.
    """
    dims = x.dim() - 1
    over, inner = x.shape[dims] if x.dim() else 0, 1
    while dims > 0 and over < width:
        dims -= 1
        over, inner = over * x.shape[dims], over
    if not over or over % width or width % inner:
        raise ValueError(f"no last dims of {tuple(x.shape)} make rows of {width}")
    return (*x.shape[:dims], *([over // width] if over != width else []))


def rows(x: Tensor, width: int, count: int | None = None) -> Tensor:
    """x[*, *over] as [rows, width], read as it lies where its rows lie one stride apart, their columns side by side.

    Raises ValueError where it has no such rows, or not `count` of them.
    """
    lead(x, width)
    flat = x.reshape(-1, width)
    if count is not None and flat.shape[0] != count:
        raise ValueError(f"{tuple(x.shape)} has {flat.shape[0]} rows of {width}, where {count} are needed")
    return flat if flat.stride(1) == 1 and (width > 1 or flat.stride(0) == 1) else flat.contiguous()


def table(x: Tensor | None, count: int, width: int) -> Tensor | None:
    """A weight, or a statistic of rows, as [count, width], contiguous; what is not there stays away. Raises ValueError
    where it has another size."""
    if x is None:
        return None
    if x.numel() != count * width:
        raise ValueError(f"{tuple(x.shape)} is not {count} rows of {width}")
    return x.reshape(count, width).contiguous()


def suits(*tensors: Tensor | None) -> bool:
    """Whether kernels compute with these: fp32, bf16 and fp16, of any size but 0; the library's own math takes all."""
    return all(x is None or x.dtype in FLOATS and x.numel() > 0 for x in tensors)


@contextmanager
def launches(elsewhere: bool = False) -> Iterator[list[Launch]]:
    """What is launched inside, in order; with tensors on the `meta` device nothing runs. `elsewhere`: what would be on
    the GPU that kernels are for, whatever there is here; for tensors without numbers."""
    before = _Watch.told, _Watch.elsewhere
    _Watch.told, _Watch.elsewhere = [], elsewhere
    try:
        yield _Watch.told
    finally:
        _Watch.told, _Watch.elsewhere = before


def is_elsewhere() -> bool:
    """Whether kernels are asked for as on the GPU that they are for."""
    return _Watch.elsewhere
