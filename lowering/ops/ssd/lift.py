"""A scan along a sequence that is cut: each rank hands on what its rows leave, and adds what enters."""

from __future__ import annotations

from typing import Any


def lift(node: Any, graph: Any) -> str:
    """before: y = ssd(u, dt, b, c, ..)

    after: decay, state = ssd_leave(u, dt, b, ..);  enter = ssd_before(decay, state)
           inside = ssd_inside(u, dt, b, c, ..);    y = ssd_behind(inside, dt, c, .., enter)
    """
    u, dt, b, c, a_log, _, dt_bias = node.operands
    bound = dict(node.bindings)
    dims = graph.type_of(u).dims
    lead = dims[: dims.index(bound["S"][0])]
    own = tuple((f, bound[f]) for f in "SHPGN")
    held = (*lead, *bound["H"], *bound["P"], *bound["N"])
    decay, state = graph.add_all(
        "ssd_leave", (u, dt, b, a_log, dt_bias), {"decay": (*lead, *bound["H"]), "left": held}, node, bindings=own
    )
    kept = tuple((f, bound[f]) for f in "HPN")
    enter = graph.add("ssd_before", (decay, state), held, node, bindings=kept)
    inside = graph.add("ssd_inside", node.operands, dims, node, bindings=own, chunk=node.attr("chunk", 128))
    return graph.add(
        "ssd_behind", (inside, dt, c, a_log, dt_bias, enter), dims, node, name=node.name, bindings=own
    )
