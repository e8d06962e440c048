"""Hold a layout to what it expects of itself."""

from __future__ import annotations

from collections.abc import Iterator

from ...dsl.diagnostics import Collector, Label, did_you_mean, fail
from ...dsl.layout import Expectation
from ...dsl.program import Node
from ..graph import STRUCTURE, Graph, GraphProgram, op_of
from . import lowering_pass


@lowering_pass(requires={"placed"}, ensures={"kept"})
def keep_contracts(program: GraphProgram) -> GraphProgram:
    """Changes nothing: it counts collectives of a forward pass, each block's own and those that its result needs.

    before:  expect all_reduce per attention <= 1

    Why here: behind placement, when all collectives are there. Raises `SpecError`: contract-broken, selects-nothing.
    """
    if program.layout is None or not program.layout.expects:
        return program
    errors = Collector()
    for expected in program.layout.expects:
        with errors.collecting():
            _hold(program, expected)
    errors.finish()
    return program


def _hold(program: GraphProgram, expected: Expectation) -> None:
    blocks = {g.body.block for g in program.graphs.values()}
    if expected.per is not None and expected.per not in blocks:
        raise fail("selects-nothing", f"no block of `{program.program.name}` is named `{expected.per}`", expected.span,
                   "this expects nothing", help=did_you_mean(expected.per, blocks, "a block"))  # fmt: skip
    for what, nodes in _counted(program, expected):
        if expected.holds(len(nodes)):
            continue
        labels = [Label(n.spans[0], f"`{expected.what}`") for n in nodes if n.spans]
        unique = list({label.span: label for label in labels}.values())[:3]
        raise fail("contract-broken", f"{what} makes {len(nodes)} `{expected.what}`, and the layout expects "
                   f"{expected.comparison} {expected.bound}", expected.span, "this does not hold", unique)  # fmt: skip


def _counted(program: GraphProgram, expected: Expectation) -> Iterator[tuple[str, list[Node]]]:
    """What is counted, as a message calls it, and the collectives of that kind."""
    if expected.per is None:
        yield f"`{program.program.name}`", list(_inside(program, program.model, expected.what))
        return
    for graph in program.graphs.values():
        for node in (n for n in graph.nodes if n.op in STRUCTURE):
            for name in graph.bodies_of(node):
                if program.graphs[name].body.block == expected.per:
                    found = list(_inside(program, program.graphs[name], expected.what))
                    results = {r.name for r in node.results}
                    found += [n for n in graph.nodes if _is(n, expected.what) and results & set(n.operands)]
                    yield f"`{expected.per}`", found


def _is(node: Node, what: str) -> bool:
    if node.op == "convert":
        return bool(node.attr("kind") == what)
    return node.op not in STRUCTURE and op_of(node).meets == what


def _inside(program: GraphProgram, graph: Graph, what: str) -> Iterator[Node]:
    """The collectives of a run of a graph, those of what it calls as often as it is called."""
    for node in graph.nodes:
        if node.op not in STRUCTURE:
            if _is(node, what):
                yield node
            continue
        instance = graph.instance(node.attr("instance"))
        for which in graph.schedule_of(node):
            yield from _inside(program, program.graphs[instance.bodies[which]], what)
