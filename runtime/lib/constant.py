"""What torch.compile may take for a constant."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

F = TypeVar("F", bound=Callable[..., object])


def constant(function: F) -> F:
    """Say of a function that its result does not change, so that torch.compile calls it once and does not look inside.

    It is the mark of `torch.compiler.assume_constant_result`, which loads all of the compiler to set it: over a second
    of each command, most of which compile nothing.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
