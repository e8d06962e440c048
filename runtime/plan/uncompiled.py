"""PyTorch without its compiler, which takes longer to load than a plan takes to make."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch

NAME, MARK = "torch._dynamo", "__dynamo_disable"


class _Nothing(ModuleType):
    """Stands for the compiler where nothing is compiled. PyTorch asks it to leave functions alone, and remembers the
    answer on the function; for anything else the compiler is loaded after all."""

    def __init__(self) -> None:
        super().__init__(NAME)
        self.left: list[Any] = []

    def disable(self, fn: Any = None, recursive: bool = True, **_: Any) -> Callable[..., Any]:
        """The function as it is."""
        self.left.append(fn)
        return fn

    def graph_break(self, *_: Any, **__: Any) -> None:
        """Between two graphs of the compiler; here there are none."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        _forget(self)
        return getattr(importlib.import_module(NAME), name)


@contextmanager
def uncompiled() -> Iterator[None]:
    """Functions that are not to be compiled run without loading the compiler, inside; behind it all is as before."""
    if NAME in sys.modules:
        yield
        return
    nothing = sys.modules[NAME] = _Nothing()
    torch._dynamo = nothing
    try:
        yield
    finally:
        _forget(nothing)


def _forget(nothing: _Nothing) -> None:
    if sys.modules.get(NAME) is nothing:
        del sys.modules[NAME]
        del torch._dynamo
    for fn in nothing.left:
        if getattr(fn, MARK, None) is fn:
            delattr(fn, MARK)
    nothing.left.clear()
