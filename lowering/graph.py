"""Graphs: bodies with their topology, verified; and a program of them.

A node's operands are on the node, in order; networkx holds only the topology (its edges would merge those of `x * x`).
Everything is immutable: a pass makes a new graph. A repeated block is one graph, called as often as needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import networkx as nx

from ..dsl.diagnostics import InternalError
from ..dsl.layout import Layout
from ..dsl.program import Body, Clock, Dim, Instance, Node, Program, Value
from ..dsl.source import Span
from .op import Op
from .ops import table
from .target import TARGETS, Target

STRUCTURE = ("call", "loop", "route")
"""Nodes that run other graphs: once, one after the other, or each on the rows that are routed to it."""


@dataclass(frozen=True)
class Graph:
    """One distinct block. Wraps the elaborated body; `topology` has an edge from each producer to each user."""

    body: Body

    @property
    def name(self) -> str:
        return self.body.name

    @property
    def nodes(self) -> tuple[Node, ...]:
        return self.body.nodes

    @cached_property
    def values(self) -> dict[str, Value]:
        return self.body.values()

    @cached_property
    def producers(self) -> dict[str, Node]:
        """The node that makes a value; inputs and weights have none."""
        return {r.name: node for node in self.nodes for r in node.results}

    @cached_property
    def users(self) -> dict[str, tuple[Node, ...]]:
        """The nodes that read a value."""
        found: dict[str, list[Node]] = {}
        for node in self.nodes:
            for operand in dict.fromkeys(o for o in node.operands if o is not None):
                found.setdefault(operand, []).append(node)
        return {name: tuple(nodes) for name, nodes in found.items()}

    @cached_property
    def results(self) -> tuple[str, ...]:
        """Values that leave the graph: what it returns and what it emits."""
        return self.body.outputs + tuple(value for _, _, value in self.body.emits)

    @cached_property
    def topology(self) -> nx.DiGraph:
        graph: nx.DiGraph = nx.DiGraph()
        graph.add_nodes_from(node.name for node in self.nodes)
        for node in self.nodes:
            for operand in node.operands:
                if operand in self.producers:
                    graph.add_edge(self.producers[operand].name, node.name)
        return graph

    @cached_property
    def dims(self) -> dict[str, Dim]:
        return {d.name: d for d in self.body.dims}

    def size(self, dim: str) -> int | None:
        return self.dims[dim].size

    def instance(self, name: str) -> Instance:
        return next(i for i in self.body.instances if i.name == name)

    def bodies_of(self, node: Node) -> tuple[str, ...]:
        """The distinct blocks that a structural node runs, in order of first use."""
        instance = self.instance(node.attr("instance"))
        if node.attr("part") is None:
            return instance.bodies
        return tuple(dict.fromkeys(instance.bodies[i] for i in self.schedule_of(node)))

    def schedule_of(self, node: Node) -> tuple[int, ...]:
        """Which of its instance's blocks a structural node runs, one after the other: of a loop in parts, a part."""
        instance = self.instance(node.attr("instance"))
        if instance.schedule is None:
            return (0,)
        first, last = node.attr("part", (0, len(instance.schedule)))
        return instance.schedule[first:last] if node.op == "loop" else tuple(range(len(instance.bodies)))

    def with_nodes(self, nodes: tuple[Node, ...], **changes: Any) -> Graph:
        """The same block with other nodes (and other fields of its body)."""
        return Graph(replace(self.body, nodes=tuple(nodes), **changes))

    def verify(self) -> None:
        """Every value is defined once, before it is used; dims, weights and instances exist. Raises `InternalError`."""
        known = {v.name for v in self.body.inputs} | {w.name for w in self.body.weights}
        for node in self.nodes:
            for operand in node.operands:
                if operand is not None and operand not in known:
                    raise InternalError(f"{self.name}: `{node.name}` reads `{operand}`, which is not defined before it")
            for result in node.results:
                if result.name in known:
                    raise InternalError(f"{self.name}: `{result.name}` is defined twice")
                known.add(result.name)
                missing = [d for d in result.type.dims if d not in self.dims]
                if missing:
                    raise InternalError(f"{self.name}: `{result.name}` has an unknown dim `{missing[0]}`")
        for name in self.results:
            if name not in known:
                raise InternalError(f"{self.name}: the result `{name}` is not defined")
        if not nx.is_directed_acyclic_graph(self.topology):
            raise InternalError(f"{self.name}: the graph has a cycle")


def renamed_attrs(node: Node, name: Callable[[str], str]) -> tuple[tuple[str, Any], ...]:
    """The attributes of an op's node with other names for dims."""

    def renamed(kind: str, value: Any) -> Any:
        if value is None or kind not in ("dims", "map", "split", "join", "coordinate"):
            return value
        if kind == "coordinate":
            return name(value[0]), value[1]
        return tuple(name(d) for d in value) if kind == "dims" else tuple(tuple(name(d) for d in s) for s in value)

    settings = {s.name: s.kind for s in op_of(node).settings}
    return tuple((k, renamed(settings.get(k, ""), v)) for k, v in node.attrs)


def op_of(node: Node) -> Op:
    """The op of a node that is no call or loop."""
    return table()[node.op]


@dataclass(frozen=True)
class State:
    """What a node keeps between steps of a stream.

    `kind` is `window` (the last `keep` rows), `cache` (rows that later queries may see; all of them if `keep` is None),
    `open` (the rows of the group that has not ended) or `fold` (one state for all earlier rows). `rows` are the element
    counts of a row or of the folded state, by name; they are rows of `clock`, of tokens if it is None.
    """

    node: str
    kind: str
    keep: int | None
    rows: tuple[tuple[str, tuple[int, ...]], ...]
    why: str
    clock: Clock | None = None


@dataclass(frozen=True)
class GraphProgram:
    """Graphs of all distinct blocks of a program. `facts` are what passes have established so far.

    `layout` says how it is to lie on a mesh, if on more than one device; `laid` (a `placement.laid.Laid`) how it does.
    `named`: what is written of it says of each use of an op, as it runs, which it is. `target`: what it is written for;
    `fused` (of `chains.fused.Fused`, by graph) are the nodes that are one kernel there;
    `epilogues` (of `passes.find_epilogues.Epilogue`, by graph) what products may end with;
    `heads` (a `passes.join_heads.Head`, by objective) what a loss makes by itself.
    """

    program: Program
    graphs: dict[str, Graph]
    facts: frozenset[str] = frozenset()
    states: dict[str, tuple[State, ...]] = field(default_factory=dict)
    roots: tuple[str, ...] = ()
    history: tuple[tuple[str, int], ...] = ()
    layout: Layout | None = None
    laid: Any = None
    named: bool = False
    target: Target = TARGETS["cpu"]
    fused: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    epilogues: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    heads: dict[str, Any] = field(default_factory=dict)

    @property
    def model(self) -> Graph:
        return self.graphs[self.program.root]

    @cached_property
    def emitting(self) -> frozenset[str]:
        """Names of the graphs that state a loss, a metric or an update, or call one that does."""
        found: set[str] = set()
        for graph in self.callees_first():
            if graph.body.emits or any(b in found for i in graph.body.instances for b in i.bodies):
                found.add(graph.name)
        return frozenset(found)

    def callees_first(self) -> Iterator[Graph]:
        """Every graph behind those that it calls, in a fixed order."""
        calls: nx.DiGraph = nx.DiGraph()
        calls.add_nodes_from(self.graphs)
        for graph in self.graphs.values():
            calls.add_edges_from((callee, graph.name) for i in graph.body.instances for callee in i.bodies)
        place = {name: i for i, name in enumerate(self.graphs)}
        for name in nx.lexicographical_topological_sort(calls, key=place.__getitem__):
            yield self.graphs[name]

    def callers_of(self, name: str) -> tuple[Span, ...]:
        """The calls by which the model comes to a graph: those of it, then those of the graphs that they stand in."""
        found: dict[Span, None] = {}
        wanted, seen = [name], {name, self.program.root}  # what trains a model calls it, and says nothing of it
        for callee in (n for n in wanted if n != self.program.root):
            for graph in self.graphs.values():
                nodes = [n for n in graph.nodes if n.op in STRUCTURE and callee in graph.bodies_of(n)]
                found.update((span, None) for n in nodes if n.op == "call" for span in n.spans[:1] if span.source.text)
                if nodes and graph.name not in seen:
                    seen.add(graph.name)
                    wanted.append(graph.name)
        return tuple(found)

    def with_graphs(self, graphs: dict[str, Graph], **changes: Any) -> GraphProgram:
        return replace(self, graphs=graphs, **changes)
