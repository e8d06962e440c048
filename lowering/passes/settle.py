"""Check what only whole bodies show: that updates and metrics can wait for the end of a step, and uses of ops."""

from __future__ import annotations

from ...dsl.diagnostics import fail
from ..afterwards import parts
from ..clocks import TOKENS, is_steady
from ..graph import STRUCTURE, GraphProgram, op_of
from . import lowering_pass


@lowering_pass(requires={"live"}, ensures={"settled"})
def settle(program: GraphProgram) -> GraphProgram:
    """Changes nothing: it proves that what stands behind a step reads sums over the data only, and what ops ask of
    their uses.

    Why here: behind dead code, before anything is fused across the border. Raises `SpecError`: not-built-yet, and what
    ops raise.
    """
    for graph in program.graphs.values():
        parts(graph, program.emitting)
        for dim in graph.dims.values():
            if dim.clock not in (None, TOKENS) and not is_steady(dim.clock):
                raise fail(
                    "no-sequence",
                    f"`{dim.clock.name}` does not number groups of neighbouring tokens",
                    graph.body.span,
                    "here",
                    help="along a document it must start at 0 or below, and stay or grow by 1 from token to token",
                )
        for node in graph.nodes:
            if node.op not in STRUCTURE and (verify := op_of(node).verify) is not None:
                verify(node, graph)
    return program
