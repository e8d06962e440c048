"""What a model costs: operations a token and bytes of state, from the signatures."""

from __future__ import annotations

from math import prod

from ..dsl.program import Node
from ..dsl.syntax import Expr
from .graph import STRUCTURE, Graph, GraphProgram, op_of
from .masks import hull


def flops_per_token(program: GraphProgram, length: int) -> float:
    """Operations (a multiply-add is two) of a forward pass over `length` tokens, divided by `length`."""
    return _graph_flops(program, program.model, length, {})


def active_parameters(program: GraphProgram) -> int:
    """Weights that work on one token: of a layer of experts those that the token is routed to."""
    return _active(program, program.model)


def _active(program: GraphProgram, graph: Graph) -> int:
    total = sum(prod(graph.size(d) or 1 for d in w.dims) for w in graph.body.weights if w.trained)
    routed = {n.attr("instance"): _at_most(program, graph, n.operands[1] or "") for n in graph.nodes if n.op == "route"}
    for instance in (i for i in graph.body.instances if i.owned):
        schedule = (0,) if instance.schedule is None else instance.schedule
        each = [_active(program, program.graphs[body]) for body in instance.bodies]
        most = routed.get(instance.name)
        total += sum(each[which] for which in (schedule if most is None else schedule[:most]))
    return total


def _graph_flops(program: GraphProgram, graph: Graph, length: int, known: dict[str, float]) -> float:
    if graph.name in known:
        return known[graph.name]
    total = 0.0
    for node in graph.nodes:
        if node.op in STRUCTURE:
            instance = graph.instance(node.attr("instance"))
            each = [_graph_flops(program, program.graphs[b], length, known) for b in instance.bodies]
            if node.op == "route":
                active = _at_most(program, graph, node.operands[1] or "")
                total += each[0] * (len(instance.schedule or ()) if active is None else active)
                continue
            total += sum(each[i] for i in graph.schedule_of(node))
        elif _has_rows(graph, node.results[0].type.dims):
            total += node_flops(graph, node, length)
    known[graph.name] = total
    return total


def _at_most(program: GraphProgram, graph: Graph, value: str) -> int | None:
    """How many places of a value can be other than 0, by the `top_k` that it was masked with; None if any can."""
    node = graph.producers.get(value)
    if node is None:
        return None
    if node.op == "top_k":
        return int(node.attr("k"))
    if node.op == "call":
        callee = program.graphs[graph.instance(node.attr("instance")).bodies[0]]
        return _at_most(program, callee, callee.body.outputs[[r.name for r in node.results].index(value)])
    if node.op == "convert":  # the same value in another place
        return _at_most(program, graph, node.operands[0] or "")
    if node.op == "where":  # where(chosen, score, 0)
        return _at_most(program, graph, node.operands[0] or "") if node.attr("y") == 0 else None
    if node.op in ("mul", "div"):
        bounds = [_at_most(program, graph, o) for o in node.operands[: 2 if node.op == "mul" else 1] if o is not None]
        return min((b for b in bounds if b is not None), default=None)
    return None


def _has_rows(graph: Graph, dims: tuple[str, ...]) -> bool:
    return any(graph.dims[d].sequence for d in dims)


def node_flops(graph: Graph, node: Node, length: int) -> float:
    """Operations of one use of an op for each row of its sequence of `length`, forward."""
    op = op_of(node)
    if op.per_weight:
        weights = (o for o in node.operands[1:] if o is not None and graph.values[o].type.kind == "real")
        return op.per_weight * sum(prod(graph.size(d) or 1 for d in graph.values[w].type.dims) for w in weights)
    sizes = {formal: prod(graph.size(d) or 1 for d in dims) for formal, dims in node.bindings}
    attrs = {s.name: node.attr(s.name, s.default) for s in op.settings}
    cost = op.cost(sizes, attrs)
    if op.monoid is not None and op.monoid.peers == "masked":
        cost *= sum(_keys_seen(mask, length) for mask in node.attr("masks"))
    return cost


def _keys_seen(mask: Expr, length: int) -> float:
    """The mean number of keys that a query sees, by the hull of its mask."""
    bounds = hull(mask)
    behind = length if bounds.behind is None else bounds.behind
    ahead = length if bounds.ahead is None else bounds.ahead
    return sum(min(p, behind) + 1 + min(length - 1 - p, ahead) for p in range(length)) / length


def active_share(program: GraphProgram) -> float:
    """The least share of experts that a row is routed to, of all layers of experts; 1 where rows go to all, or there
    are none."""
    shares = [1.0]
    for graph in program.graphs.values():
        for node in (n for n in graph.nodes if n.op == "route"):
            most = _at_most(program, graph, node.operands[1] or "")
            experts = len(graph.instance(node.attr("instance")).schedule or (0,))
            shares.append(1.0 if most is None else most / experts)
    return min(shares)
