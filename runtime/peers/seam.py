"""Where another package's function takes the place of ours: in the class of a kernel's block by itself."""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from ...dsl.program import Node
from ...lowering.alone import Alone
from ...lowering.graph import op_of
from ..counted import Counted

Plain = Callable[[], Any]
"""Gives the class of a block in PyTorch's math, in a module of its own each time."""


class NotServed(Exception):
    """Why a peer does not compute a use that has the ops of others that it does."""


@dataclass(frozen=True)
class Peer:
    """What one package has for uses of `ops` (those of one kernel, in order).

    package: as it is installed; None: what comes with torch. make(alone, plain): the class of the block with the
    package's function in it; raises `NotServed`, and ImportError where the package cannot be loaded.
    counts(plain, forward): what it does where that cannot be watched without a GPU, by its algorithm; forward(kind)
    runs the forward pass of a class on tensors without numbers.
    """

    name: str
    package: str | None
    ops: tuple[tuple[str, ...], ...]
    make: Callable[[Alone, Plain], type[nn.Module]]
    counts: Callable[[Plain, Callable[[Any], object]], list[Counted]] | None = None


class _Library:
    """The library that generated code calls, but for some of its functions."""

    def __init__(self, plain: Any, functions: dict[str, Any]) -> None:
        self.__dict__.update(functions)
        self._plain = plain

    def __getattr__(self, name: str) -> Any:
        return getattr(self._plain, name)


def calling(kind: Any, **functions: Callable[..., Any]) -> type[nn.Module]:
    """The class of a module of its own, whose code calls these in place of the library's functions of their names."""
    scope = kind.forward.__globals__
    scope["lib"] = _Library(scope["lib"], functions)
    made: type[nn.Module] = kind
    return made


def computing(kind: Any, alone: Alone, forward: Callable[[Any, dict[str, Tensor], Any], dict[str, Tensor]]) -> Any:
    """The class with another forward pass: of the block, its inputs by name and their coordinates, results by name."""
    names = [v.name for v in alone.graph.body.inputs]

    def run(self: Any, *given: Any) -> Any:
        *inputs, at, _ = given
        found = forward(self, dict(zip(names, inputs, strict=True)), at)
        results = tuple(found[name] for name in alone.graph.results)
        return results if len(results) > 1 else results[0]

    return type(kind.__name__, (kind,), {"forward": run})


def setting(node: Node, name: str) -> Any:
    """What a use says of a setting, or its default."""
    stated = op_of(node).setting(name)
    return node.attr(name, None if stated is None else stated.default)


def without_parent(package: str, module: str) -> ModuleType:
    """A module of a package whose own `__init__` loads extensions that have to be built; the module needs none."""
    if package not in sys.modules:
        found = importlib.util.find_spec(package)
        if found is None:
            raise ImportError(f"no module named {package!r}")
        spec = importlib.machinery.ModuleSpec(package, None, is_package=True)
        spec.submodule_search_locations = found.submodule_search_locations
        sys.modules[package] = importlib.util.module_from_spec(spec)
    return importlib.import_module(f"{package}.{module}")
