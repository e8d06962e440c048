"""What a block does beside giving its result: losses it states, sums it gathers, and what follows when a step is over.

An update of a buffer and a metric may read sums over the data. Such a sum is gathered over micro-batches and ranks (it
is a monoid), and what is computed from it runs once, behind the step.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..dsl.diagnostics import fail
from ..dsl.program import Node
from ..dsl.source import NOWHERE
from .graph import STRUCTURE, Graph, op_of


@dataclass(frozen=True)
class Parts:
    """The nodes of a graph, each list in order, by when they run.

    `result`: always. `stated`: only where losses are asked for; they make the values of `losses`, `means` (metrics that
    are means over places) and `sums`. `after`: behind a step, from the sums: `updates` of buffers and `metrics`.
    """

    result: tuple[Node, ...]
    stated: tuple[Node, ...]
    after: tuple[Node, ...]
    losses: tuple[tuple[str, str], ...]
    means: tuple[tuple[str, str], ...]
    sums: tuple[str, ...]
    updates: tuple[tuple[str, str], ...]
    metrics: tuple[tuple[str, str], ...]


def parts(graph: Graph, emitting: frozenset[str]) -> Parts:
    """Split a graph. Raises `SpecError` `not-built-yet` for an update that needs more of the data than sums."""
    emits = graph.body.emits
    losses = tuple((label, v) for keyword, label, v in emits if keyword == "loss")
    means = tuple((label, v) for keyword, label, v in emits if keyword == "metric" and _kind(graph, v) == "loss")
    updates = tuple((label, v) for keyword, label, v in emits if keyword == "update")
    metrics = tuple((label, v) for keyword, label, v in emits if keyword == "metric" and _kind(graph, v) != "loss")
    sums: dict[str, None] = {}
    after = _behind(graph, [v for _, v in updates + metrics], sums)
    result = _needed(graph, list(graph.body.outputs))
    states = {
        n.name
        for n in graph.nodes
        if n.op in STRUCTURE and any(b in emitting for b in graph.instance(n.attr("instance")).bodies)
    }
    stated = _needed(graph, [*(v for _, v in losses + means), *sums, *(states - result)]) - result
    return Parts(
        tuple(n for n in graph.nodes if n.name in result),
        tuple(n for n in graph.nodes if n.name in stated),
        tuple(n for n in graph.nodes if n.name in after),
        losses, means, tuple(sums), updates, metrics,
    )  # fmt: skip


def _kind(graph: Graph, value: str) -> str:
    return graph.values[value].type.kind


def _needed(graph: Graph, wanted: list[str]) -> set[str]:
    """Names of the nodes that make some values."""
    found: set[str] = set()
    waiting = list(wanted)
    while waiting:
        node = graph.producers.get(waiting.pop())
        if node is not None and node.name not in found:
            found.add(node.name)
            waiting.extend(o for o in node.operands if o is not None)
    return found


def _behind(graph: Graph, wanted: list[str], sums: dict[str, None]) -> set[str]:
    """Names of the nodes between sums over the data, which are noted, and some values."""
    found: set[str] = set()
    waiting = list(wanted)
    while waiting:
        name = waiting.pop()
        node = graph.producers.get(name)
        if node is None and any(graph.size(d) is None for d in graph.values[name].type.dims):
            raise _unsummed(graph, None)
        if node is None or node.name in found:
            continue
        if _is_sum(graph, node):
            sums[name] = None
            continue
        if node.op in STRUCTURE or any(graph.size(d) is None for r in node.results for d in r.type.dims):
            raise _unsummed(graph, node)
        found.add(node.name)
        waiting.extend(o for o in node.operands if o is not None)
    return found


def _is_sum(graph: Graph, node: Node) -> bool:
    if node.op in STRUCTURE or op_of(node).monoid is None:
        return False
    monoid = op_of(node).monoid
    data = any(graph.size(d) is None for d in node.bound(monoid.formal)) if monoid is not None else False
    rest = all(graph.size(d) is not None for r in node.results for d in r.type.dims)
    return data and rest and monoid is not None and monoid.state == ("sum",)


def _unsummed(graph: Graph, node: Node | None) -> Exception:
    span = node.spans[0] if node is not None and node.spans else graph.body.span or NOWHERE
    return fail(
        "not-built-yet",
        "an update or metric that reads the data other than by `sum` and `count` over all of them is not built yet",
        span,
        "this still varies with the data",
    )
