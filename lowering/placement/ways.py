"""Which uses of ops a layout tells how to be computed where their sequence is split (`attend: ring`)."""

from __future__ import annotations

from collections.abc import Iterator

from ...dsl.diagnostics import Collector, did_you_mean, fail
from ...dsl.layout import Layout
from ...dsl.program import Node
from ...dsl.selectors import START, States
from ...dsl.ways import Way
from ..graph import STRUCTURE, Graph, GraphProgram
from .exchanges import attends, exchangeable

Told = dict[str, dict[str, Way]]
"""By graph and name of a use; of several ways that select it the last."""


def told(program: GraphProgram, layout: Layout) -> Told:
    """What is selected: a use by its variable or op, or all uses inside a block or an instance of one.

    Raises `SpecError`: selects-nothing, not-built-yet.
    """
    found: dict[str, dict[str, set[Way | None]]] = {}
    hits: dict[Way, list[Node]] = {}
    walked: set[tuple[str, tuple[States, ...], frozenset[Way]]] = set()

    def visit(name: str, states: tuple[States, ...], inside: frozenset[Way]) -> None:
        if (name, states, inside) in walked:
            return
        walked.add((name, states, inside))
        graph, own = program.graphs[name], found.setdefault(name, {})
        for node in graph.nodes:
            if node.op not in STRUCTURE:
                each = zip(layout.ways, states, strict=True)
                here = [w for w, now in each if w in inside
                        or w.selector.accepts(w.selector.advance(now, (node.name, node.op)))]  # fmt: skip
                for way in here:
                    hits.setdefault(way, []).append(node)
                own.setdefault(node.name, set()).add(here[-1] if here else None)
                continue
            instance = graph.instance(node.attr("instance"))
            count = len(instance.schedule) if instance.schedule is not None else 0
            for which, body in enumerate(instance.bodies):
                places = [i for i, b in enumerate(instance.schedule or (0,)) if b == which]
                after, taken = [], set(inside)
                for way, now in zip(layout.ways, states, strict=True):
                    known = (instance.name, program.graphs[body].body.block)
                    ends = {way.selector.advance(now, known, (i, count) if count else None) for i in places}
                    if len(ends) != 1:
                        raise fail("not-built-yet", "a way for some iterations of one block is not built yet", way.span,
                                   help="name it without iterations")  # fmt: skip
                    after.append(ends.pop())
                    if way.selector.accepts(after[-1]):
                        hits.setdefault(way, [])
                        taken.add(way)
                visit(body, tuple(after), frozenset(taken))

    for root in program.roots:
        visit(root, (START,) * len(layout.ways), frozenset())
    errors = Collector()
    for way in layout.ways:
        with errors.collecting():
            _check(program, way, hits)
    errors.finish()
    return {graph: dict(_one(program.graphs[graph], uses)) for graph, uses in found.items()}


def _one(graph: Graph, uses: dict[str, set[Way | None]]) -> Iterator[tuple[str, Way]]:
    """The way of each use. Raises `not-built-yet` where a block is called in places that are told different ones."""
    for name, ways in uses.items():
        if len(ways) > 1:
            first = next(w for w in ways if w is not None)
            raise fail("not-built-yet", f"a way for some uses of `{graph.body.block}` is not built yet", first.span)
        (way,) = ways
        if way is not None:
            yield name, way


def _check(program: GraphProgram, way: Way, hits: dict[Way, list[Node]]) -> None:
    """Raises `selects-nothing` for a way of nothing, and for dims of an exchange that nothing of it has."""
    if way.selector.optional:
        return
    if way not in hits:
        known = {n for g in program.graphs.values() for node in g.nodes for n in (node.name, node.op)}
        known |= {g.body.block for g in program.graphs.values()}
        raise fail("selects-nothing", f"nothing of `{program.program.name}` is named `{way.selector}`", way.span,
                   "in this layout", help=did_you_mean(way.selector.steps[-1].name, known, "something"))  # fmt: skip
    if way.kind != "exchange" and not any(map(attends, hits[way])):
        raise fail("selects-nothing", f"`{way.selector}` reads no keys, which `{way.kind}` is about", way.span,
                   "this changes nothing", help="`exchange(DIM)` is for all that runs along a sequence")  # fmt: skip
    for dim in way.dims:
        dims = {d for node in hits[way] for d in exchangeable(node)}
        if dim not in dims:
            raise fail("selects-nothing", f"`{way.selector}` has no dim `{dim}` that can be split for a sequence",
                       way.span, "this exchanges nothing", help=did_you_mean(dim, dims, "a dim"))  # fmt: skip
