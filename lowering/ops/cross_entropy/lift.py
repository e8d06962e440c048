"""Cross entropy over a vocabulary that is cut: the largest, the sum of exponentials and the target's logit meet across
ranks."""

from __future__ import annotations

from typing import Any


def lift(node: Any, graph: Any) -> str:
    """before: loss = cross_entropy(z, t)

    after: m = row_max(z);  s = sum_exp(z, m);  p = picked(z, t);  loss = nll(s, t, p, m)
    """
    z, target = node.operands
    *lead, _ = graph.type_of(z).dims
    lead, bound = tuple(lead), (("V", node.bound("V")),)
    top = graph.add("row_max", (z,), lead, node, bindings=bound)
    total = graph.add("sum_exp", (z, top), lead, node, bindings=bound)
    found = graph.add("picked", (z, target), lead, node, bindings=bound)
    return graph.add("nll", (total, target, found, top), (), node, kind="loss", name=node.name)
