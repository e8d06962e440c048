"""Move what depends on coordinates and constants only out of the blocks, so that a run computes it once."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import replace

from ...dsl.program import Dim, Node, Value
from ..graph import STRUCTURE, Graph, GraphProgram, op_of, renamed_attrs
from . import lowering_pass


@lowering_pass(requires={"live"}, ensures={"hoisted"})
def hoist(program: GraphProgram) -> GraphProgram:
    """Hand such values to a block as inputs, computed where it is called; equal ones become one at the root.

    before:  block attention: angle = outer(seq.position, speed);  qr = rotate(q, angle)
    after:   block attention: x, angle;  qr = rotate(q, angle)      # the model computes `angle`

    Why here: behind types, because dims are renamed from block to block; before fusion, which must not mix them in.
    """
    graphs = dict(program.graphs)
    moved: dict[str, _Moved] = {}
    for graph in program.callees_first():
        changed = _absorb(graphs[graph.name], moved)
        changed = _merge_equal(changed)
        if graph.name not in program.roots:
            changed, moved[graph.name] = _lift(changed)
        graphs[graph.name] = changed
    _align_loops(graphs, moved)
    return program.with_graphs(graphs)


class _Moved:
    """What left a graph: the nodes, their dims, and the values that it now takes as inputs."""

    def __init__(self, nodes: tuple[Node, ...], dims: dict[str, Dim], frontier: tuple[Value, ...]):
        self.nodes, self.dims, self.frontier = nodes, dims, frontier


def _free(graph: Graph) -> dict[str, Node]:
    """Nodes that depend on nothing but coordinates and constants."""
    found: dict[str, Node] = {}
    for node in graph.nodes:
        plain = (
            node.op not in STRUCTURE
            and not op_of(node).draws(node)
            and all(r.type.kind in ("real", "coordinate") for r in node.results)
        )
        if plain and all(o is None or o in found for o in node.operands):
            found.update((r.name, node) for r in node.results)
    return found


def _lift(graph: Graph) -> tuple[Graph, _Moved]:
    free = _free(graph)
    staying = [n for n in graph.nodes if n.name not in free]
    read = dict.fromkeys(o for n in staying for o in n.operands if o in free)
    frontier = tuple(graph.values[name] for name in read)
    nodes = tuple(n for n in graph.nodes if n.name in free)
    changed = graph.with_nodes(tuple(staying), inputs=graph.body.inputs + frontier) if nodes else graph
    return changed, _Moved(nodes if frontier else (), graph.dims, frontier)


def _absorb(graph: Graph, moved: dict[str, _Moved]) -> Graph:
    """Compute here what the called blocks now want, and pass it to them."""
    dims = dict(graph.dims)
    names = set(graph.values)
    nodes: list[Node] = []
    for node in graph.nodes:
        if node.op not in STRUCTURE:
            nodes.append(node)
            continue
        extra: list[str] = []
        for callee in graph.bodies_of(node):
            if callee in moved:  # a root computes what it needs itself
                extra.extend(_copy_in(moved[callee], dict(node.bindings), dims, names, nodes))
        nodes.append(replace(node, operands=node.operands + tuple(extra)))
    return graph.with_nodes(tuple(nodes), dims=tuple(dims.values()))


def _copy_in(
    moved: _Moved, bound: dict[str, tuple[str, ...]], dims: dict[str, Dim], names: set[str], nodes: list[Node]
) -> list[str]:
    """Append copies of moved nodes under this graph's names; gives the names of the values at the frontier."""
    swap: dict[str, str] = {name: ours[0] for name, ours in bound.items()}
    values: dict[str, str] = {}

    def dim(name: str) -> str:
        if name not in swap:
            theirs = moved.dims[name]
            fits = name in dims and _alike(dims[name], theirs)
            swap[name] = name if fits else _fresh(name, dims)
            if not fits:
                lead = tuple(dim(x) for x in theirs.lead)
                dims[swap[name]] = replace(theirs, name=swap[name], lead=lead, factors=())
        return swap[name]

    for node in moved.nodes:
        results = []
        for r in node.results:
            values[r.name] = _fresh(r.name, names)
            names.add(values[r.name])
            kind = replace(r.type, dims=tuple(dim(d) for d in r.type.dims))
            results.append(Value(values[r.name], kind))
        attrs = renamed_attrs(node, dim)
        bindings = tuple((f, tuple(dim(d) for d in ds)) for f, ds in node.bindings)
        operands = tuple(None if o is None else values[o] for o in node.operands)
        nodes.append(Node(tuple(results), node.op, operands, attrs, bindings, node.spans))
    return [values[v.name] for v in moved.frontier]


def _fresh(base: str, taken: Container[str]) -> str:
    name, n = base, 1
    while name in taken:
        n += 1
        name = f"{base}_{n}"
    return name


def _merge_equal(graph: Graph) -> Graph:
    """One of each: free nodes with the same op, operands and attributes."""
    graph = _merge_index_dims(graph)
    swap: dict[str, str] = {}
    seen: dict[object, Node] = {}
    free = _free(graph)
    nodes = []
    for node in graph.nodes:
        node = replace(node, operands=tuple(swap.get(o, o) if o else o for o in node.operands))
        key = (node.op, node.operands, node.attrs, tuple(r.type for r in node.results))
        if node.name in free and key in seen:
            swap.update((a.name, b.name) for a, b in zip(node.results, seen[key].results, strict=True))
            continue
        if node.name in free:
            seen[key] = node
        nodes.append(node)
    return graph.with_nodes(tuple(nodes))


def _merge_index_dims(graph: Graph) -> Graph:
    """Dims that only number things (`index`) are one where their sizes agree: `pairs` of two rotations. Two that stand
    in one value stay two, whatever their sizes."""
    beside: dict[str, set[str]] = {}
    for value in graph.values.values():
        for d in value.type.dims:
            beside.setdefault(d, set()).update(value.type.dims)
    rigid = {d for v in graph.body.inputs for d in v.type.dims} | {d for w in graph.body.weights for d in w.dims}
    first: dict[int | None, str] = {}
    swap: dict[str, str] = {}
    for node in graph.nodes:
        if node.op == "index":
            (dim,) = node.attr("dim")
            like = first.setdefault(graph.size(dim), dim)
            together = {swap.get(d, d) for d in beside[dim]} | {d for d, to in swap.items() if to in beside[dim]}
            if dim not in rigid and like != dim and like not in together:
                swap[dim] = like
                beside[like] |= beside[dim]
    return rename_dims(graph, swap) if swap else graph


def rename_dims(graph: Graph, swap: dict[str, str]) -> Graph:
    """The graph with dims replaced by others of their size."""

    def dims(names: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(swap.get(d, d) for d in names)

    nodes = []
    for node in graph.nodes:
        results = tuple(Value(r.name, replace(r.type, dims=dims(r.type.dims))) for r in node.results)
        if node.op in STRUCTURE:
            attrs = tuple((k, dims(v) if k == "over" else v) for k, v in node.attrs)
        else:
            attrs = renamed_attrs(node, lambda d: swap.get(d, d))
        bindings = tuple((f, dims(ds)) for f, ds in node.bindings)
        nodes.append(replace(node, results=results, attrs=attrs, bindings=bindings))
    kept = tuple(d for d in graph.body.dims if d.name not in swap)
    return graph.with_nodes(tuple(nodes), dims=kept)


def _align_loops(graphs: dict[str, Graph], moved: dict[str, _Moved]) -> None:
    """Give every iteration of a loop the inputs that any of them wants, so that all are called alike."""
    for graph in graphs.values():
        for node in graph.nodes:
            if node.op != "loop":
                continue
            bodies = graph.bodies_of(node)
            wanted = [v for b in bodies for v in moved[b].frontier]
            sizes = [{d.name: d for d in graphs[b].body.dims} for b in bodies for _ in moved[b].frontier]
            if not wanted:
                continue
            common = len(graphs[bodies[0]].body.inputs) - len(moved[bodies[0]].frontier)
            start = 0
            for b in bodies:
                body = graphs[b].body
                mine = body.inputs[common:]
                names = set(graphs[b].values)
                dims = {d.name: d for d in body.dims}
                fill = []
                for i, value in enumerate(wanted):
                    if start <= i < start + len(mine):
                        fill.append(mine[i - start])
                    else:
                        kind = replace(value.type, dims=tuple(_dim_like(sizes[i][d], dims) for d in value.type.dims))
                        fill.append(Value(_fresh(value.name, names), kind))
                        names.add(fill[-1].name)
                graphs[b] = Graph(replace(body, inputs=body.inputs[:common] + tuple(fill), dims=tuple(dims.values())))
                start += len(mine)


def _alike(a: Dim, b: Dim) -> bool:
    return (a.size, a.sequence, a.clock) == (b.size, b.sequence, b.clock)


def _dim_like(dim: Dim, dims: dict[str, Dim]) -> str:
    """The name of a dim like another body's: its own name, or a new one where that is a dim of another size here."""
    known = dims.get(dim.name)
    if known is not None and _alike(known, dim):
        return dim.name
    name = _fresh(dim.name, dims)
    dims[name] = replace(dim, name=name)
    return name
