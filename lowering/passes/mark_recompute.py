"""Mark what is computed again in the backward pass in place of being kept."""

from __future__ import annotations

from dataclasses import replace

from ...dsl.diagnostics import Collector, did_you_mean, fail
from ...dsl.program import Node
from ...dsl.selectors import START, Selector, States
from ..graph import STRUCTURE, GraphProgram, op_of
from . import lowering_pass

BLOCKS = "blocks"
"""The name of all iterations of the model's loops."""


@lowering_pass(requires={"placed", "staged"}, ensures={"recomputed"})
def mark_recompute(program: GraphProgram) -> GraphProgram:
    """Give calls, loops and ops that `recompute` selects the attribute `recompute`.

    before:  o = attend(qr, kr, v)          # recompute attend
    after:   o = attend(qr, kr, v)          # recompute = true

    Why here: behind placement, so that a collective inside is made again with what reads it; before the plan, which
    counts what is kept. Raises `SpecError`: selects-nothing, not-built-yet.
    """
    layout = program.layout
    if layout is None or not layout.recompute:
        return program
    marked: dict[str, dict[str, set[bool]]] = {}
    hits: set[Selector] = set()
    walked: set[tuple[str, tuple[States, ...]]] = set()

    def visit(name: str, states: tuple[States, ...]) -> None:
        if (name, states) in walked:
            return
        walked.add((name, states))
        graph, own = program.graphs[name], marked.setdefault(name, {})
        for node in graph.nodes:
            names = _names(node)
            if node.op not in STRUCTURE:
                each = zip(layout.recompute, states, strict=True)
                chosen = [s for s, now in each if s.accepts(s.advance(now, names))]
                hits.update(chosen)
                own.setdefault(node.name, set()).add(bool(chosen))
                continue
            instance = graph.instance(node.attr("instance"))
            bodies = [program.graphs[b] for b in graph.bodies_of(node)]
            every = [s for s in layout.recompute if node.op == "loop" and [x.name for x in s.steps] == [BLOCKS]]
            hits.update(every)
            count = len(instance.schedule) if instance.schedule is not None else 0
            for body in bodies:
                after, taken = [], bool(every)
                for s, now in zip(layout.recompute, states, strict=True):
                    known = (instance.name, body.body.block)
                    ends = {s.advance(now, known, (i, count) if count else None) for i in range(max(1, count))}
                    if len(ends) != 1:
                        raise fail("not-built-yet", "recomputing some iterations of one block is not built yet",
                                   layout.span, help=f"`recompute {s.steps[-1].name}` recomputes all")  # fmt: skip
                    after.append(ends.pop())
                    if s.accepts(after[-1]):
                        hits.add(s)
                        taken = True
                own.setdefault(node.name, set()).add(taken)
                visit(body.name, tuple(after))

    for root in program.roots:
        visit(root, (START,) * len(layout.recompute))
    _check(program, hits)
    graphs = {}
    for graph in program.graphs.values():
        chosen = marked.get(graph.name, {})
        if any(len(found) > 1 for found in chosen.values()):
            raise fail("not-built-yet", f"recomputing some uses of `{graph.body.block}` is not built yet", layout.span)
        nodes = tuple(
            replace(n, attrs=(*n.attrs, ("recompute", True))) if True in chosen.get(n.name, ()) else n
            for n in graph.nodes
        )
        graphs[graph.name] = graph.with_nodes(nodes)
    return program.with_graphs(graphs)


def _names(node: Node) -> tuple[str, ...]:
    """What an op's use is called: its variable, and its op, or the op that it is a part of."""
    return (node.name, node.op if node.op in STRUCTURE else op_of(node).part_of or node.op)


def _check(program: GraphProgram, hits: set[Selector]) -> None:
    assert program.layout is not None
    errors = Collector()
    for selector in program.layout.recompute:
        if selector in hits or selector.optional:
            continue
        known = {n for g in program.graphs.values() for node in g.nodes for n in _names(node)}
        known |= {g.body.block for g in program.graphs.values()}
        with errors.collecting():
            raise fail("selects-nothing", f"nothing of `{program.program.name}` is named `{selector}`",
                       program.layout.span, "in this layout",
                       help=did_you_mean(selector.steps[-1].name, known, "something"))  # fmt: skip
    errors.finish()
