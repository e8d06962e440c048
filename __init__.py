"""Heddle: a language for models and its compiler. The public API, and nothing else; each name loads on first use."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .dsl.diagnostics import SpecError
    from .runtime.api import compile, load
    from .runtime.check import check

__version__ = "0.1.0"
__all__ = ["SpecError", "__version__", "check", "compile", "load"]

# Lazy (PEP 562): `import heddle`, `import heddle.dsl` and even `heddle.check` load no torch.
_HOME = {
    "SpecError": ".dsl.diagnostics",
    "check": ".runtime.check",
    "compile": ".runtime.api",
    "load": ".runtime.api",
}


def __getattr__(name: str) -> Any:
    """A public name, from the module that defines it. Raises AttributeError where there is no such name."""
    if name not in _HOME:
        raise AttributeError(f"module `{__name__}` has no attribute `{name}`")
    return getattr(import_module(_HOME[name], __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
