"""Which ranks of a pipeline do the same but for the numbers of their layers."""

from __future__ import annotations

from typing import Any

from ...lowering.graph import STRUCTURE, GraphProgram
from ...lowering.placement.laid import Stage
from ..lib.pipeline import Pipe


def alike(program: GraphProgram, pipe: Pipe, place: int) -> Any:
    """Equal for ranks whose stages run the same blocks in the same order, and have weights of nothing else; None where
    a stage is not like that: the first and the last, and those that a loop of the model ends in."""
    assert program.laid.pipe is not None
    found = [_stage(program, program.laid.pipe.stages[number]) for number in pipe.of(place)]
    return None if None in found else tuple(found)


def _stage(program: GraphProgram, stage: Stage) -> Any:
    """What a stage runs, where that is iterations of one loop and what every stage may work out anew."""
    graph = program.model
    nodes = [n for n in graph.nodes if n.name in set(stage.nodes)]
    loops = [n for n in nodes if n.op in STRUCTURE]
    assert program.laid.pipe is not None
    if len(loops) != 1 or loops[0].op != "loop" or not stage.takes or stage is program.laid.pipe.stages[-1]:
        return None
    (loop,) = loops
    name = loop.attr("instance")
    if any(not path.startswith(f"{name}.") for path in stage.owns):
        return None
    results = [r.name for r in loop.results]
    given = tuple(stage.takes.index(o) if o in stage.takes else o for o in loop.operands)
    gives = tuple(
        ("made", results.index(v)) if v in results else ("taken", stage.takes.index(v)) if v in stage.takes else v
        for v in stage.gives
    )
    bodies = tuple(graph.instance(name).bodies[i] for i in graph.schedule_of(loop))
    others = tuple(n.name for n in nodes if n is not loop)
    return name, bodies, given, gives, others, tuple(str(graph.values[v].type) for v in stage.takes)
