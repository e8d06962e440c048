"""A loss that makes what it scores by itself."""

from __future__ import annotations

from dataclasses import dataclass

from ...dsl.program import Node
from ..graph import STRUCTURE, Graph, GraphProgram, op_of
from . import lowering_pass


@dataclass(frozen=True)
class Head:
    """`node` of the model gives what the node `loss` of an objective alone reads, and can make by itself: the model is
    run without it."""

    node: Node
    loss: str


@lowering_pass(requires={"fused"}, ensures={"joined"})
def join_heads(program: GraphProgram) -> GraphProgram:
    """Find the losses that can make what they score from what the model's last map reads, a few rows at a time.

    before:  z = linear(x, w)  # of the model;  loss = cross_entropy(z, t)  # of the objective: all of z is there
    after:   the same, and known: the objective may run the model without `z`, and give x and w to the loss

    Why here: last, when nothing more changes what is read by whom. Identity for a target without kernels, and in a
    pipeline, whose last stage gives what others score. Of a vocabulary in parts nothing is found: its parts meet in
    steps of their own; nor of a weight in parts, which is brought together in the model.
    """
    piped = program.laid is not None and program.laid.pipe is not None
    if not program.target.kernels or piped or not program.program.objectives:
        return program
    made = {name: _head(program, program.graphs[name]) for name in program.program.objectives.values()}
    return program.with_graphs(program.graphs, heads={name: head for name, head in made.items() if head is not None})


def _head(program: GraphProgram, objective: Graph) -> Head | None:
    root, model = program.program.root, program.model
    calls = [n for n in objective.nodes if n.op == "call" and root in objective.instance(n.attr("instance")).bodies]
    if len(calls) != 1 or len(calls[0].results) != 1 or len(model.body.outputs) != 1 or model.body.asked:
        return None
    (scored,), (given,) = calls[0].results, model.body.outputs
    readers, last = objective.users.get(scored.name, ()), model.producers.get(given)
    if len(readers) != 1 or scored.name in objective.results or last is None or last.op in STRUCTURE:
        return None
    (loss,) = readers
    if loss.op in STRUCTURE or last.op != op_of(loss).absorbs[1] or last.attr("recompute"):
        return None
    operands = zip(op_of(loss).signature.operands, loss.operands, strict=False)
    if [o.name for o, value in operands if value == scored.name] != [op_of(loss).absorbs[0]]:
        return None
    if not {o for o in last.operands[1:] if o is not None} <= {w.name for w in model.body.weights}:
        return None
    # What others read, or the model states beside its result, has to be there.
    stated = {value for _, _, value in model.body.emits}
    return None if model.users.get(given) or given in stated else Head(last, loss.name)
