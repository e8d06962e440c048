"""CPU code of products that are summed."""

from __future__ import annotations

from string import ascii_lowercase
from typing import Any


def emit(use: Any) -> str:
    """One letter a dim."""
    x, y, z = use.operand_dims(0), use.operand_dims(1), use.node.results[0].type.dims
    letters = dict(zip(dict.fromkeys((*x, *y)), ascii_lowercase, strict=False))
    spelled = ["".join(letters[d] for d in dims) for dims in (x, y, z)]
    return f'torch.einsum("{spelled[0]},{spelled[1]}->{spelled[2]}", {use.args[0]}, {use.args[1]})'
