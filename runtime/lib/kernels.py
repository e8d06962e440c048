"""What generated kernels stand on: ops that torch knows, launches, and the memory that they write to.

A kernel's Python function allocates with `empty` and launches with `launch`. Registered by `op` it is a `torch.library`
op, whose fake form is the same function without its launches: shapes are said once.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Launch(NamedTuple):
    """One launch: the kernel, how many programs, and its arguments; `how` are its constants and options by name."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    how: dict[str, Any]


class _Watch:
    """What happens to launches besides: whether they are left out, and who is told of each."""

    dry = 0
    told: list[Launch] | None = None


def op(module: str, mutates: Sequence[str] = ()) -> Callable[[Callable[..., Any]], Any]:
    """Make a function of a kernel's file an op of torch; `module` is the file's `__name__`, which names it.

    `mutates` are arguments that it writes to. Gradients: `register_autograd` of what this gives, whose backward calls
    another such op.
    """

    def register(body: Callable[..., Any]) -> Any:
        def fake(*args: Any, **more: Any) -> Any:
            _Watch.dry += 1
            try:
                return body(*args, **more)
            finally:
                _Watch.dry -= 1

        name = f"{re.sub(r'[^A-Za-z0-9_]', '_', module)}::{body.__name__}"
        made = torch.library.custom_op(name, body, mutates_args=tuple(mutates))
        made.register_fake(fake)
        return made

    return register


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **how: Any) -> None:
    """Run a kernel on `grid` programs; nothing runs where there are none, or where tensors have shapes only."""
    if _Watch.told is not None:
        _Watch.told.append(Launch(kernel, grid, args, how))
    if _Watch.dry or any(isinstance(a, Tensor) and a.is_meta for a in args) or not all(grid):
        return
    kernel[grid](*args, **how)


def empty(shape: Sequence[int], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Memory for a result of `shape` on the device of `like`, contiguous; every place must be written."""
    return torch.empty(tuple(shape), dtype=dtype or like.dtype, device=like.device)


@contextmanager
def launches() -> Iterator[list[Launch]]:
    """What is launched inside, in order; with tensors on the `meta` device nothing runs."""
    before, _Watch.told = _Watch.told, []
    try:
        yield _Watch.told
    finally:
        _Watch.told = before
