"""CPU code of indexes and coordinates."""

from __future__ import annotations

from typing import Any


def emit(use: Any) -> str:
    """The expression."""
    if use.op == "coordinate":
        which, (dim,) = use.attr("which"), use.bound("S")
        at = use.at(dim)
        if at == "None":
            return f"torch.{'ones' if which == 'valid' else 'zeros'}({use.graph.size(dim)}, dtype=torch.int64)" if (
                which != "position") else f"torch.arange({use.graph.size(dim)})"  # fmt: skip
        rows = f"{at}.{ {'position': 'position', 'document': 'keys().document'}.get(which, 'validity') }"
        return rows if len(use.graph.dims[dim].lead) == 1 else f"{at}.split({rows})"
    (size,) = use.sizes("D")
    if use.op == "slopes":
        return f"lib.slopes({size})"
    return f"torch.arange({size}, dtype=torch.float32)"
