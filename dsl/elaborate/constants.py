"""Values that are written outside a spec: `--set hidden=256`."""

from __future__ import annotations

from typing import Any

from .. import syntax as sx
from ..load import load_text
from ..parse import parse
from ..source import Source
from .builder import Builder
from .entry import Elaborator
from .environment import Environment


def constant(name: str, text: str) -> Any:
    """The value of an expression of numbers, strings and lists. Raises `SpecError`, with places in the text given."""
    prefix = "model x = x("
    module = parse(Source(f"--set {name}", f"{prefix}{text})\n"))
    variant = module.declarations[0]
    assert isinstance(variant, sx.Variant) and isinstance(variant.value, sx.Call)
    machine = Elaborator({}, object(), None, type(None))
    return machine.value(variant.value.arguments[0].value, Environment(load_text(""), Builder("constant")))
