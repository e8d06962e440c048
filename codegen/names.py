"""Names in generated code: classes, variables, modules."""

from __future__ import annotations

import builtins
import keyword

RESERVED = (
    frozenset(keyword.kwlist) | frozenset(dir(builtins)) | {"self", "at", "state", "stream", "lib", "torch", "nn", "F"}
)


def class_name(graph: str) -> str:
    """`layer_mamba2` becomes `LayerMamba2`."""
    return "".join(part[:1].upper() + part[1:] for part in graph.split("_") if part)


def variable(name: str) -> str:
    """A value's name as a Python variable: dots become underscores, reserved words get one behind."""
    plain = name.replace(".", "_")
    return f"{plain}_" if plain in RESERVED else plain


def attribute(name: str) -> str:
    """The name of a submodule."""
    return f"{name}_" if keyword.iskeyword(name) or name in ("forward", "training", "slots", "run") else name
