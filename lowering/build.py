"""From an elaborated program to graphs."""

from __future__ import annotations

from ..dsl.program import Program
from .graph import Graph, GraphProgram


def build(program: Program) -> GraphProgram:
    """One graph for each distinct body. Only bodies that the model or an objective reaches are kept."""
    roots = (program.root, *program.objectives.values())
    reached: dict[str, Graph] = {}
    waiting = list(roots)
    while waiting:
        name = waiting.pop()
        if name not in reached:
            body = program.bodies[name]
            reached[name] = Graph(body)
            waiting.extend(callee for i in body.instances for callee in i.bodies)
    order = [name for name in program.bodies if name in reached]
    return GraphProgram(program, {name: reached[name] for name in order}, frozenset({"built"}), roots=roots)
