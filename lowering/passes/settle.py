"""Check that every update and metric can wait for the end of a step."""

from __future__ import annotations

from ..afterwards import parts
from ..graph import GraphProgram
from . import lowering_pass


@lowering_pass(requires={"live"}, ensures={"settled"})
def settle(program: GraphProgram) -> GraphProgram:
    """Changes nothing: it proves that what stands behind a step reads sums over the data only.

    Why here: behind dead code, before anything is fused across the border. Raises `SpecError` `not-built-yet`.
    """
    for graph in program.graphs.values():
        parts(graph, program.emitting)
    return program
