"""Passes: pure functions from a program of graphs to one, a file each, named for what they do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..graph import Graph, GraphProgram


@dataclass(frozen=True)
class Pass:
    """A pass with the facts that it needs and those that it establishes."""

    name: str
    run: Callable[[GraphProgram], GraphProgram]
    requires: frozenset[str]
    ensures: frozenset[str]
    doc: str

    def __call__(self, program: GraphProgram) -> GraphProgram:
        return self.run(program)


def lowering_pass(requires: set[str], ensures: set[str]) -> Callable[[Callable[[GraphProgram], GraphProgram]], Pass]:
    """Declare a function as a pass: what must hold before it and what holds behind it."""

    def declare(function: Callable[[GraphProgram], GraphProgram]) -> Pass:
        return Pass(function.__name__, function, frozenset(requires), frozenset(ensures), function.__doc__ or "")

    return declare


def each_graph(program: GraphProgram, change: Callable[[Graph], Graph]) -> GraphProgram:
    """Apply a change of one graph to all."""
    return program.with_graphs({name: change(graph) for name, graph in program.graphs.items()})
