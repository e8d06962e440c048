"""Hold what the shard pass made against a proof that knows nothing of how it was made."""

from __future__ import annotations

from ..graph import GraphProgram
from ..placement.prove import require_proved
from . import lowering_pass


@lowering_pass(requires={"placed"}, ensures={"proved"})
def prove_placement(program: GraphProgram) -> GraphProgram:
    """Check every place, conversion, deferred sum and loss of a sharded program. Changes nothing.

    before:  y: real[batch, seq, hidden] = silu(y_p)        # y_p partial over tensor
    after:   UnprovedLayout: `y` over `tensor`: expected partial sums in one linear group, found operands P

    Why here: passes that follow join and stream what is on one rank, which changes no place. Raises
    `UnprovedLayout`: a mistake of the passes before.
    """
    require_proved(program)
    return program
