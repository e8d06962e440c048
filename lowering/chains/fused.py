"""Which nodes of a graph are one kernel, and what that kernel computes.

A group has tiles of rows and columns: every value in it is one number a place, a row or a column, or one at all. What
is reduced is reduced over all columns, so norms and softmaxes of one width go together with what is place by place
around them. How an op is written as an expression is said by its room (`chain.py`).
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

import networkx as nx

from ...dsl.program import Node
from ..afterwards import Parts
from ..graph import STRUCTURE, Graph, op_of
from ..ops import has_part, part
from .expr import Chain, Expr, Output, View, load, loads_of, number, ordered
from .plan import can_be_named


@dataclass(frozen=True)
class Fused:
    """Nodes that are one kernel, in order; the values that it is given and gives, as the chain has them. `drawn`: what
    it is given of nodes that draw numbers, as (the name in the chain, the node)."""

    nodes: tuple[str, ...]
    given: tuple[tuple[str, str], ...]  # (its name in the chain, the value)
    outputs: tuple[str, ...]
    chain: Chain
    drawn: tuple[tuple[str, str], ...] = ()

    @property
    def inputs(self) -> tuple[str, ...]:
        """The values that it reads."""
        return tuple(self.value_of.values())

    @property
    def value_of(self) -> dict[str, str]:
        """The value by its name in the chain."""
        return dict(self.given)

    @property
    def like(self) -> str:
        """A value that has all of the tiles' rows and columns."""
        return self.value_of[next(e.name for e in loads_of(o.value for o in self.chain.outputs) if e.dims == "rc")]


@dataclass(frozen=True)
class Part:
    """One node of a group, as the room of its op sees it."""

    graph: Graph
    node: Node

    @property
    def op(self) -> str:
        return self.node.op

    def attr(self, name: str, default: Any = None) -> Any:
        return self.node.attr(name, default)

    def count(self, formal: str) -> int:
        """How many places a formal has."""
        return prod(self.graph.size(d) or 0 for d in self.node.bound(formal))

    @property
    def columns(self) -> int | None:
        """How many places it reduces as one; None where it works place by place."""
        found: int | None = part(self.op, "chain").columns(self)
        return found

    @property
    def is_slow(self) -> bool:
        """Whether PyTorch passes over it more than once, so that a kernel pays for it alone."""
        return self.columns is not None or self.op in getattr(part(self.op, "chain"), "SLOW", ())


def groups(graph: Graph, parts: Parts, apart: Container[str]) -> Iterator[tuple[Node, ...]]:
    """The nodes that go together, as many as can: a node joins the groups of what it reads, in the order of these.
    Nodes named `apart` are in none."""
    phase = {n.name: i for i, nodes in enumerate((parts.result, parts.stated, parts.after)) for n in nodes}
    group: dict[str, tuple[str, ...]] = {}
    for node in graph.nodes:
        if node.name not in phase or node.name in apart or not is_fusible(graph, node):
            continue
        group[node.name] = (node.name,)
        if is_alone(node):
            continue
        for operand in dict.fromkeys(o for o in node.operands if o is not None):
            producer = graph.producers.get(operand)
            theirs = group.get(producer.name) if producer is not None else None
            if (
                producer is None
                or theirs is None
                or is_alone(producer)
                or node.name in theirs
                or phase[theirs[0]] != phase[node.name]
            ):
                continue
            both = {*theirs, *group[node.name]}
            joined = tuple(n.name for n in graph.nodes if n.name in both)
            wider = {**group, **dict.fromkeys(joined, joined)}
            if shape_of(graph, (n for n in graph.nodes if n.name in both)) is not None and _has_order(graph, wider):
                group = wider
    for names in dict.fromkeys(group.values()):
        nodes = tuple(n for n in graph.nodes if n.name in names)
        if len(nodes) > 1 or Part(graph, nodes[0]).is_slow:
            yield nodes


def is_alone(node: Node) -> bool:
    """Whether an op is a kernel of its own, which its room says as a whole."""
    return getattr(part(node.op, "chain"), "ALONE", False)


def is_fusible(graph: Graph, node: Node) -> bool:
    """Whether a node can be part of a kernel of rows: real numbers, of sizes that are known but for how many rows."""
    if node.op in STRUCTURE or not has_part(node.op, "chain") or node.attr("recompute"):
        return False
    values = [graph.values[o].type for o in node.operands if o is not None] + [r.type for r in node.results]
    if not values or any(t.kind != "real" for t in values) or not any(t.dims for t in values):
        return False
    # What has no rows of data is small, and some of it is computed but once a step.
    if not any(graph.size(d) is None for r in node.results for d in r.type.dims):
        return False
    return part(node.op, "chain").holds(Part(graph, node)) and (is_alone(node) or shape_of(graph, [node]) is not None)


@dataclass(frozen=True)
class Shape:
    """The dims of a group's tiles, and how many of their places are one row."""

    dims: tuple[str, ...]
    columns: int


def shape_of(graph: Graph, nodes: Iterable[Node]) -> Shape | None:
    """The tiles of some nodes, or None where their values do not fit into one kind of tile."""
    nodes = list(nodes)
    values = {o: graph.values[o].type.dims for n in nodes for o in (*n.operands, *(r.name for r in n.results)) if o}
    dims = max(values.values(), key=len)
    wanted = {c for n in nodes if (c := Part(graph, n).columns) is not None}
    # A number that is drawn is that of a place of the tile.
    if len(wanted) > 1 or any(op_of(n).random and n.results[0].type.dims != dims for n in nodes):
        return None
    for columns in wanted or _widths(graph, dims):
        if all(_lies(graph, Shape(dims, columns), own) is not None for own in values.values()):
            return Shape(dims, columns)
    return None


def _widths(graph: Graph, dims: tuple[str, ...]) -> list[int]:
    """How wide rows can be where nothing is reduced: all dims from one on whose sizes are known, the most first."""
    found: list[int] = []
    for dim in reversed(dims):
        size = graph.size(dim)
        if size is None:
            break
        found.append(size * (found[-1] if found else 1))
    return found[::-1]


def _lies(graph: Graph, shape: Shape, own: tuple[str, ...]) -> tuple[str, View] | None:
    """How a value lies in the tiles of a group: the letters of its dims, and which row of it a row of theirs reads."""
    dims = shape.dims
    sizes = [graph.size(d) for d in dims]
    if own == dims:
        return ("rc", View()) if _exact(sizes, shape.columns) else None
    if not own:
        return "", View()
    if own == dims[: len(own)]:  # one number for all places behind
        behind = _product(sizes[len(own) :])
        return ("r", View(divide=behind // shape.columns)) if behind and behind % shape.columns == 0 else None
    if own == dims[len(dims) - len(own) :]:  # the same for whatever leads
        places = _product(sizes[len(dims) - len(own) :])
        if not places or places % shape.columns:
            return None
        return ("c", View()) if places == shape.columns else ("rc", View(modulo=places // shape.columns))
    return None


def _exact(sizes: list[int | None], columns: int) -> bool:
    """Whether rows of so many columns end where some dim, or an equal part of one, does."""
    width = 1
    for size in reversed(sizes):
        if width == columns:
            return True
        if size is None:
            return False
        if width * size > columns:
            return columns % width == 0 and size % (columns // width) == 0
        width *= size
    return width == columns


def _product(sizes: list[int | None]) -> int | None:
    return None if any(s is None for s in sizes) else prod(s for s in sizes if s is not None)


def _has_order(graph: Graph, group: dict[str, tuple[str, ...]]) -> bool:
    """Whether groups can run one after the other: nothing between two nodes of one waits for a third outside it."""
    whole: nx.DiGraph = nx.DiGraph()
    for a, b in graph.topology.edges:
        if group.get(a, a) != group.get(b, b):
            whole.add_edge(group.get(a, a), group.get(b, b))
    return nx.is_directed_acyclic_graph(whole)


def expressed(graph: Graph, nodes: tuple[Node, ...], lines: tuple[str, ...]) -> Fused:
    """A group as one kernel. Its values have the names of the spec's variables, its weights the last part of theirs."""
    if is_alone(nodes[0]):
        (node,) = nodes
        chain, read_in_order = part(node.op, "chain").chain(Part(graph, node), lines)
        by_name = {o.name: v for o, v in zip(op_of(node).signature.operands, node.operands, strict=True)}
        return Fused((node.name,), tuple((n, by_name[n] or "") for n in read_in_order), (node.name,), chain)
    shape = shape_of(graph, nodes)
    assert shape is not None
    made: dict[str, Expr] = {}
    read: dict[str, str] = {}  # by the name in the kernel
    spell: dict[str, str] = {}  # the names of what the nodes give
    for node in nodes:
        spell[node.name] = _free(node.name, set(spell.values()))
    taken = set(spell.values())
    named: dict[str, Expr] = {}
    drawn: dict[str, str] = {}  # by the name in the kernel

    def value_of(value: str) -> Expr:
        if value not in made:
            lies = _lies(graph, shape, graph.values[value].type.dims)
            assert lies is not None
            name = _free(value.rpartition(".")[2], {*read, *drawn, *taken})
            read[name] = value
            made[value] = load(name, *lies)
        return made[value]

    for node in nodes:
        literals = [node.attr(o.name) for o in op_of(node).signature.operands]
        given = [
            value_of(o) if o is not None else None if n is None else number(n)
            for o, n in zip(node.operands, literals, strict=True)
        ]
        if op_of(node).random:
            name = _free("drawn", {*read, *drawn, *taken})
            drawn[name] = node.name
            given.append(load(name, "r", drawn=True))
        made[node.name], inner = part(node.op, "chain").express(Part(graph, node), given)
        named.update({_free(name, {*named, *read, *drawn, *taken}): e for name, e in inner})
    inside = {n.name for n in nodes}
    outside = {o for n in graph.nodes if n.name not in inside for o in n.operands} | set(graph.results)
    given_back = tuple(n.name for n in nodes if n.name in outside)
    outputs = []
    for value in given_back:
        lies = _lies(graph, shape, graph.values[value].type.dims)
        assert lies is not None
        outputs.append(Output(spell[value], made[value], lies[0]))
    named.update({spell[n.name]: made[n.name] for n in nodes if n.name not in given_back})
    ops = "_".join(dict.fromkeys(n.op for n in nodes))
    chain = Chain(ops, shape.columns, tuple(outputs), tuple(named.items()), lines)
    names = dict.fromkeys(e.name for e in loads_of(o.value for o in outputs))
    values = tuple((n, read[n]) for n in names if n in read)
    return Fused(tuple(n.name for n in nodes), values, given_back, chain, tuple(drawn.items()))


def structure(chain: Chain) -> tuple[Any, ...]:
    """What makes two chains one kernel, whatever their values are called: equal ones are equal here."""
    order = ordered(o.value for o in chain.outputs)
    place = {e: i for i, e in enumerate(order)}
    names: dict[str, int] = {}
    found: list[Any] = [chain.columns]
    for e in order:
        attrs = {k: names.setdefault(v, len(names)) if e.op == "load" and k == "name" else v for k, v in e.attrs}
        found.append((e.op, tuple(place[a] for a in e.args), e.dims, tuple(attrs.items())))
    outputs: dict[str, int] = {}
    for o in chain.outputs:
        found.append((outputs.setdefault(o.name, len(outputs)), place[o.value], o.dims, o.view, o.grad))
    return tuple(found)


def _free(name: str, taken: set[str]) -> str:
    """A name that nothing else has, and that Python takes for one."""
    found = re.sub(r"\W", "_", name)
    found = found if found.isidentifier() and not found.startswith("d_") else f"v_{found}"
    while found in taken or not can_be_named(found):
        found += "_"
    return found
