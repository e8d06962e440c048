"""CPU code of embeddings."""

from __future__ import annotations

from typing import Any


def construct(use: Any) -> str:
    """The module that owns the table."""
    (rows,) = use.sizes("V")
    return f"lib.Embed({rows}, {use.sizes('N')})"


def emit(use: Any) -> str:
    """The call; of a part of the rows, those that are not here are 0."""
    if use.is_cut("V"):
        return f"lib.embed_part({use.args[0]}, {use.args[1]}, {use.start('V')}{use.kernel})"
    given = use.args[0] if use.own else f"{use.args[0]}, {use.args[1]}"
    return f"{use.own or 'lib.embed'}({given}{use.kernel})"
