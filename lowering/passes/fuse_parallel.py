"""One product for linear maps of one input, and one op for equal ops on parts that stand side by side."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ...dsl.program import Dim, Node, Type, Value
from ..graph import STRUCTURE, Graph, GraphProgram, op_of
from ..ops import table
from . import each_graph, lowering_pass

Attrs = tuple[tuple[str, Any], ...]


@lowering_pass(requires={"placed", "recomputed"}, ensures={"stacked"})
def fuse_parallel(program: GraphProgram) -> GraphProgram:
    """Replace parallel linears by one product, then equal channelwise ops on its parts by one op.

    before:  q = linear(x, q.weight, hidden -> heads);  k = linear(x, k.weight, hidden -> kv_heads)
    after:   q, k = parallel_linear(x, q.weight, k.weight)

    Why here: behind dead code (a part that nobody reads would be computed), before state is derived (one state for the
    parts of one op). Only weights that this block owns and uses once: a tied weight must stay a tensor of its own.
    """
    if program.layout is not None:  # parts that lie on the mesh alike or not are products of their own
        return program
    return each_graph(program, lambda g: _fuse_epilogues(_stack_channelwise(_fuse_linears(g))))


def _own_once(graph: Graph, name: str | None) -> bool:
    owned = {w.name for w in graph.body.weights}
    return name is None or (name in owned and len(graph.users.get(name, ())) == 1)


def _owner(node: Node) -> str:
    return next(o for o in node.operands[1:] if o is not None).rsplit(".", 1)[0]


def _fuse_linears(graph: Graph) -> Graph:
    groups: dict[tuple[str, object], list[Node]] = {}
    for node in graph.nodes:
        stacks = node.op not in STRUCTURE and op_of(node).stacked and op_of(node).linear and node.attr("map")
        if stacks and all(_own_once(graph, o) for o in node.operands[1:]):
            groups.setdefault((node.operands[0] or "", node.attr("map")[0]), []).append(node)
    for members in groups.values():
        if len(members) > 1:
            graph = _one_product(graph, members)
    return graph


def _one_product(graph: Graph, members: list[Node]) -> Graph:
    first = members[0]
    parts = tuple(_owner(m) for m in members)
    operands = (first.operands[0], *(o for m in members for o in (m.operands[1], m.operands[2])))
    attrs = (("ins", first.attr("map")[0]), ("parts", parts), ("give", tuple((p,) for p in parts)))
    made = Node(
        tuple(m.results[0] for m in members),
        op_of(first).stacked or "",
        operands,
        attrs,
        (("K", first.attr("map")[0]),),
        tuple(s for m in members for s in m.spans),
    )
    return _replaced(graph, members, made)


def _replaced(graph: Graph, members: list[Node], made: Node, **changes: object) -> Graph:
    """`made` stands where the first member stood; the others go."""
    gone = {m.name for m in members[1:]}
    nodes = tuple(made if n.name == members[0].name else n for n in graph.nodes if n.name not in gone)
    return graph.with_nodes(nodes, **changes)


def _stack_channelwise(graph: Graph) -> Graph:
    """Ops of one kind, each the only reader of one part of one product, become one op on the parts side by side."""
    for product in [n for n in graph.nodes if n.op == "parallel_linear"]:
        readers: dict[object, list[Node]] = {}
        for result in product.results:
            users = graph.users.get(result.name, ())
            if len(users) == 1 and result.name not in graph.results and _stackable(graph, users[0], result.name):
                user = users[0]
                readers.setdefault((user.op, user.attrs), []).append(user)
        for members in readers.values():
            if len(members) > 1:
                graph = _side_by_side(graph, product, members)
                product = graph.producers.get(product.results[0].name, product)
    return graph


def _stackable(graph: Graph, node: Node, operand: str) -> bool:
    if node.op in STRUCTURE or node.operands[0] != operand:
        return False
    op = op_of(node)
    return bool(op.stacked) and op.name in _channelwise() and all(_own_once(graph, o) for o in node.operands[1:])


def _channelwise() -> set[str]:
    """Ops that compute each channel by itself along a sequence: their channel formal is parallel in every operand."""
    return {
        op.name
        for op in table().values()
        if op.stacked and op.signature.role("C" if "C" in op.signature.formals() else "") == "parallel"
        and "C" in op.signature.formals()
    }  # fmt: skip


def _side_by_side(graph: Graph, product: Node, members: list[Node]) -> Graph:
    order = [r.name for r in product.results]
    members = sorted(members, key=lambda m: order.index(m.operands[0] or ""))
    parts = dict(zip(order, product.attr("parts"), strict=True))
    group = tuple(parts[m.operands[0] or ""] for m in members)
    name = "_".join(group)
    by_name = dict(zip(product.attr("parts"), product.results, strict=True))
    lead = by_name[group[0]].type.dims[: -len(_channels(graph, members[0]))]
    size = sum(_count(graph, m) for m in members)
    dims = (*graph.body.dims, Dim(name, size))
    joined = Value(name, Type("real", (*lead, name)))
    give: list[tuple[str, ...]] = []
    results, placed = [], False
    for part in product.attr("parts"):
        if part not in group:
            give.append((part,))
            results.append(by_name[part])
        elif not placed:
            give.append(group)
            results.append(joined)
            placed = True
    attrs = tuple((k, tuple(give) if k == "give" else v) for k, v in product.attrs)
    attrs += (("joined", (name,)),)
    reordered = _order_parts(product, give)
    changed = replace(product, results=tuple(results), attrs=_with(attrs, "parts", reordered[0]), operands=reordered[1])
    first = members[0]
    stacked = Node(
        tuple(m.results[0] for m in members),
        op_of(first).stacked or "",
        (name, *(o for m in members for o in (m.operands[1], m.operands[2]))),
        (("taps", first.attr("taps")), ("parts", tuple(_owner(m) for m in members))),
        (("S", (lead[-1],)), ("C", (name,))),
        tuple(s for m in members for s in m.spans),
    )
    graph = graph.with_nodes(tuple(changed if n.name == product.name else n for n in graph.nodes), dims=dims)
    return _replaced(graph, sorted(members, key=lambda m: graph.nodes.index(m)), stacked)


def _order_parts(product: Node, give: list[tuple[str, ...]]) -> tuple[tuple[str, ...], tuple[str | None, ...]]:
    """Parts in the order of the groups, so that a group is contiguous in the rows of the product."""
    pairs = dict(
        zip(product.attr("parts"), zip(product.operands[1::2], product.operands[2::2], strict=True), strict=True)
    )
    parts = tuple(p for group in give for p in group)
    return parts, (product.operands[0], *(o for p in parts for o in pairs[p]))


def _with(attrs: Attrs, name: str, value: object) -> Attrs:
    return tuple((k, value if k == name else v) for k, v in attrs)


def _channels(graph: Graph, node: Node) -> tuple[str, ...]:
    return node.bound("C")


def _count(graph: Graph, node: Node) -> int:
    total = 1
    for d in _channels(graph, node):
        total *= graph.size(d) or 0
    return total


def _fuse_epilogues(graph: Graph) -> Graph:
    """A pointwise op that is the only reader of every result of an op that can apply it becomes a part of it."""
    for node in graph.nodes:
        if node.op in STRUCTURE or not op_of(node).epilogues or node.attr("act"):
            continue
        users = [graph.users.get(r.name, ()) for r in node.results]
        if any(len(u) != 1 for u in users) or any(r.name in graph.results for r in node.results):
            continue
        acts = {u[0].op for u in users}
        if len(acts) != 1 or not acts <= set(op_of(node).epilogues):
            continue
        renamed = {u[0].name: r.name for u, r in zip(users, node.results, strict=True)}
        if any(name in graph.results for name in renamed):
            continue
        made = replace(
            node,
            attrs=(*node.attrs, ("act", acts.pop())),
            spans=node.spans + tuple(s for u in users for s in u[0].spans),
        )
        nodes = tuple(
            replace(
                made if n.name == node.name else n, operands=tuple(renamed.get(o, o) if o else o for o in n.operands)
            )
            for n in graph.nodes
            if n.name not in renamed
        )
        graph = graph.with_nodes(nodes)
    return graph
