"""CPU code of dropout: the library's, in the mode of the module."""

from __future__ import annotations

from typing import Any


def emit(use: Any) -> str:
    """The call, or its input where nothing is ever dropped."""
    (x,), rate = use.args, use.attr("rate")
    return f"F.dropout({x}, {rate!r}, self.training)" if rate else x
