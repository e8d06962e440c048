"""Attention to keys that ranks share: each keeps its own, and is told those of the others."""

from __future__ import annotations

from typing import Any


def lift(node: Any, graph: Any) -> str:
    """before: o = attend(q, k, v);  after: o = attend_ring(q, k, v)."""
    dims = graph.type_of(node.name).dims
    return str(graph.add("attend_ring", node.operands, dims, node, name=node.name, bindings=node.bindings,
                         **dict(node.attrs)))  # fmt: skip
