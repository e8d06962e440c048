"""The public functions of `heddle`."""

from .check import check
from .compile import compile
from .folder import load

__all__ = ["check", "compile", "load"]
