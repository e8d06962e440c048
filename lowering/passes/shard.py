"""Place every value on the mesh of a layout, and make every change of place an explicit conversion."""

from __future__ import annotations

from ...dsl.diagnostics import fail
from ...dsl.program import TOKENS, Value
from ..graph import Graph, GraphProgram
from ..placement.assign import Assignment, assign
from ..placement.laid import Laid, Stored
from ..placement.types import Mesh, N, Place, R, everywhere
from ..placement.values import Signature, distinct
from ..placement.walk import Walk
from . import lowering_pass


@lowering_pass(requires={"hoisted"}, ensures={"placed"})
def shard(program: GraphProgram) -> GraphProgram:
    """Split dims as the layout says. Changes nothing where there is no layout.

    before:  y: real[batch, seq, hidden] = linear(x, y.weight)          # shard ffn over tensor
    after:   y: real[batch, seq, hidden] = linear(x, y.weight)          # of `ffn/tensor`: partial sums over tensor
             y_i: real[batch, seq, hidden] = convert(y, all_reduce over tensor)

    Why here: what was hoisted is whole on every rank; products are joined only where their parts lie alike. Raises
    `SpecError`: selects-nothing, split-twice, uneven-split, not-built-yet.
    """
    if program.layout is None:
        return program
    assignment = assign(program, program.layout)
    _check_sequences(program, assignment)
    first = _Sharder(program, assignment, {})
    first.run()
    if unused := assignment.tried - first.moved:
        assignment = assign(program, program.layout, unused)
        first = _Sharder(program, assignment, {})
        first.run()
    second = _Sharder(program, assignment, first.decided())
    return second.run()


def _check_sequences(program: GraphProgram, assignment: Assignment) -> None:
    """Raises `not-built-yet` where a sequence is split of which a row of the batch has several: the coordinates of
    ranks count the rows of one."""
    assert program.layout is not None
    for graph in program.graphs.values():
        for dim in graph.dims.values():
            if dim.clock == TOKENS and len(dim.lead) > 1 and assignment.atoms(graph.name, dim.name):
                raise fail(
                    "not-built-yet",
                    f"splitting `{dim.name}`, of which each row of a batch has several, is not built yet",
                    program.layout.span,
                    f"it varies along [{', '.join(dim.lead)}]",
                )


class _Sharder:
    """One walk over all graphs. The first finds out what is wanted of weights, and which axes need their factors;
    `stored` is what was decided."""

    def __init__(self, program: GraphProgram, assignment: Assignment, stored: dict[str, dict[str, Stored]]):
        self.program, self.assignment, self.stored = program, assignment, stored
        self.mesh: Mesh = assignment.mesh
        self.order = self.mesh.names()
        self.signatures: dict[str, Signature] = {}
        self.graphs: dict[str, Graph] = {}
        self.laid = Laid(self.mesh, whole=program.graphs)
        self.wants: dict[str, dict[str, dict[str, set[str]]]] = {}
        self.moved: set[str] = set()  # axes over which something lies otherwise than what is around it
        self._splitting: dict[str, frozenset[str]] = {}

    def run(self) -> GraphProgram:
        for root in reversed(self.program.roots):  # objectives call the model
            self.graph(root, None)
        graphs = {name: self.graphs.get(name, g) for name, g in self.program.graphs.items()}
        return self.program.with_graphs(graphs, laid=self.laid)

    def decided(self) -> dict[str, dict[str, Stored]]:
        """How each weight is stored: split where its dims are, R with a deferred sum where any use wants that. One that
        is only added to partial sums is I: one rank adds it, and each has its whole gradient."""
        found: dict[str, dict[str, Stored]] = {}
        for graph in self.program.graphs.values():
            own = found[graph.name] = {}
            for weight in graph.body.weights:
                splits = tuple(self.assignment.atoms(graph.name, d) for d in weight.dims)
                held = {a for atoms in splits for a in atoms}
                wanted = self.wants.get(graph.name, {}).get(weight.name, {})
                sync = tuple(a for a in self.order if a not in held and wanted.get(a, set()) & {R, "S"})
                stored = Stored(distinct(splits), sync if weight.trained else ())
                sizes = tuple(graph.size(d) or 0 for d in weight.dims)
                own[weight.name] = self._spread(stored, sizes) if weight.trained else stored
        return found

    def _spread(self, stored: Stored, sizes: tuple[int, ...]) -> Stored:
        """Full sharding: over the axes that split parameters where they are stored, the first dim that they divide
        is split, one that is whole if there is one, else further inside. A weight with no such dim stays whole, with a
        gradient that is a sum."""
        splits, sync = list(stored.splits), stored.sync
        for axis in self.program.layout.stored_over("parameters") if self.program.layout else ():
            for atom in (a for a in self.mesh.names(axis) if a in sync):
                sizes_here = [n // self.mesh.size(held) for n, held in zip(sizes, splits, strict=True)]
                fits = [i for i, n in enumerate(sizes_here) if n and n % self.mesh.size([atom]) == 0]
                if fits:
                    at = max(fits, key=lambda i: (not splits[i], -i))
                    splits[at] = (*splits[at], atom)
                    sync = tuple(a for a in sync if a != atom)
        return Stored(tuple(splits), sync)

    def splits_on(self, name: str, atom: str) -> bool:
        """Whether a graph, or one that it calls, splits anything over a factor of the mesh."""
        if name not in self._splitting:
            graph = self.program.graphs[name]
            own = {a for atoms in self.assignment.dims.get(name, {}).values() for a in atoms}
            for instance in graph.body.instances:
                for body in instance.bodies:
                    own |= {a for a in self.order if self.splits_on(body, a)}
            self._splitting[name] = frozenset(own)
        return atom in self._splitting[name]

    def graph(self, name: str, given: tuple[Place, ...] | None, outputs: tuple[Place, ...] = ()) -> Signature:
        """Shard one graph; the first caller decides where its inputs are, and its outputs if they must be somewhere."""
        if name not in self.signatures:
            graph = self.program.graphs[name]
            inputs = given if given is not None else tuple(self._start(graph, v) for v in graph.body.inputs)
            self.signatures[name] = Signature(inputs, outputs)
            walk = Walk(self, graph, inputs)
            self.graphs[name], self.signatures[name].outputs = walk.run()
        return self.signatures[name]

    def _start(self, graph: Graph, value: Value) -> Place:
        """Inputs of a model: the rows of a batch are split, all else is whole."""
        place = everywhere(len(value.type.dims), N, self.order)
        if value.type.dims:
            for atom in self.assignment.atoms(graph.name, value.type.dims[0]):
                place = place.put(atom, 0, self.order)
        return place
