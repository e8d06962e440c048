"""The proof of a layout: every place is derived anew, and every use, conversion, sync and sum is held against it.

Nothing that chose the places is trusted: inputs and weights lie as they are stored, the rest follows by the rules of
`rules.py`, which look at one factor of the mesh at a time (a published calculus: spmd_types, Meta, 2026). What a graph
computes is held against the whole one by `erase.py`. What cannot be derived is a finding.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

from ...dsl.diagnostics import InternalError
from ...dsl.program import Node, Value
from ...dsl.source import NOWHERE, Span
from ..afterwards import Parts, parts
from ..graph import STRUCTURE, Graph, GraphProgram
from .erase import Mismatch, Whole, axes_of, erased, span_of
from .laid import Laid, Stored
from .rules import Known, Unproved, Use, converted, known, nothing, shown
from .types import I, M, N, P, R


@dataclass(frozen=True)
class Finding:
    """What could not be proved: of which value of which graph, over which factor of the mesh (None: of no one)."""

    graph: str
    value: str
    factor: str | None
    expected: str
    found: str
    span: Span = field(default=NOWHERE, compare=False, repr=False)

    def __str__(self) -> str:
        over = f" over `{self.factor}`" if self.factor is not None else ""
        where = "" if self.span is NOWHERE else f" ({self.span.source.name}:{self.span.line})"
        return f"`{self.value}` of `{self.graph}`{where}{over}: expected {self.expected}, found {self.found}"

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        where = None if self.span is NOWHERE else f"{self.span.source.name}:{self.span.line}"
        return {"graph": self.graph, "value": self.value, "spec": where, "factor": self.factor,
                "expected": self.expected, "found": self.found}  # fmt: skip


class UnprovedLayout(InternalError):
    """The shard pass made something that cannot be proved: a mistake of the compiler, whatever the spec says."""

    def __init__(self, findings: Sequence[Finding]):
        self.findings = tuple(findings)
        super().__init__("\n".join(["prove_placement: this layout is not proved", *map(str, findings)]))


def prove(program: GraphProgram) -> tuple[Finding, ...]:
    """What cannot be proved of a sharded program: nothing, if it computes what the whole one does, and its gradients,
    their norm and its losses are those of one device."""
    return _Proof(program).run() if program.laid is not None else ()


def require_proved(program: GraphProgram) -> None:
    """Raises `UnprovedLayout`, an `InternalError` that names each value, where it is asked for, and the factor."""
    found = prove(program)
    if found:
        raise UnprovedLayout(found)


class _Proof:
    """One walk over all graphs, each once for every way in which its inputs lie."""

    def __init__(self, program: GraphProgram):
        self.program, self.laid = program, program.laid
        assert isinstance(self.laid, Laid)
        self.mesh = self.laid.mesh
        self.found: dict[Finding, None] = {}
        self.wholes: dict[str, Whole | None] = {}
        self.walked: dict[tuple[str, tuple[Known, ...]], tuple[Known, ...] | None] = {}
        first = program.model.body.inputs
        self.rows = program.model.dims[first[0].type.dims[0]].axes if first and first[0].type.dims else ()

    def run(self) -> tuple[Finding, ...]:
        self._mesh()
        for name, graph in self.program.graphs.items():
            self._storage(name, graph)
        for root in self.program.roots:
            graph = self.program.graphs[root]
            self.graph(root, tuple(self._input(graph, v) for v in graph.body.inputs))
        return tuple(self.found)

    def note(self, graph: str, value: str, factor: str | None, expected: str, found: str, span: Span = NOWHERE) -> None:
        where = self.program.graphs[graph].body.span if span is NOWHERE else span
        self.found[Finding(graph, value, factor, expected, found, where)] = None

    def _mesh(self) -> None:
        """The factors of an axis have its ranks together."""
        layout = self.program.layout
        if layout is None:
            return
        for axis, size in layout.mesh:
            if layout.stages is not None and axis == layout.stages.axis:
                continue  # the ranks of a pipeline run other layers, not other parts
            ranks = prod(a.size for a in self.mesh.atoms if a.axis == axis)
            if ranks != size:
                self.note(self.program.program.root, axis, axis, f"factors of {size} ranks", f"{ranks} ranks")
        for name, n in Counter(a.name for a in self.mesh.atoms).items():
            if n > 1:
                self.note(self.program.program.root, name, name, "one factor of this name", str(n))

    def _storage(self, name: str, graph: Graph) -> None:
        """Each weight is stored as its dims say, the axes of its square sum are those; what is owed is owed once."""
        table = self.laid.weights.get(name, {})
        if set(table) - {w.name for w in graph.body.weights}:
            self.note(name, name, None, "its weights", "others")
        for weight in graph.body.weights:
            stored = table.get(weight.name)
            if stored is None:
                if name in self.laid.places:  # a graph that something calls
                    self.note(name, weight.name, None, "where it is stored", "nothing", weight.span)
                continue
            axes = tuple(graph.dims[d].axes for d in weight.dims)
            if axes != stored.splits:
                self.note(name, weight.name, None, f"stored as its dims are, {axes}", str(stored.splits), weight.span)
            held = [a for atoms in axes for a in atoms]
            for atom, n in Counter([*held, *stored.sync]).items():
                if atom not in self.mesh.names() or n > 1:
                    what = "split, or summed once" if atom in self.mesh.names() else "a factor of the mesh"
                    self.note(name, weight.name, atom, what, f"{held} and sums over {list(stored.sync)}", weight.span)

    def _input(self, graph: Graph, value: Value) -> Known:
        """Inputs of a model: each rank has its rows, and all else whole."""
        for i, atoms in enumerate(axes_of(value, graph.dims)):
            if atoms != (self.rows if i == 0 else ()):
                self.note(graph.name, value.name, next(iter(atoms), None), "rows split as those of all inputs",
                          f"dim {i} split over {atoms or 'nothing'}")  # fmt: skip
        axes = axes_of(value, graph.dims)
        return known(axes, dict.fromkeys(self.mesh.names(), N), False, self.mesh)

    # --- graphs -----------------------------------------------------------------------------------

    def whole(self, name: str) -> Whole | None:
        """The graph on whole dims that a sharded one is of, None (and a finding) where it is not that."""
        if name not in self.wholes:
            graph, of = self.program.graphs[name], self.laid.whole.get(name)
            self.wholes[name] = None
            if of is None:
                self.note(name, name, None, "a graph of the program", "another")
                return None
            try:
                self.wholes[name] = erased(graph, of, self.mesh)
            except Mismatch as wrong:
                self.note(name, wrong.value, None, str(wrong.expected), str(wrong.found), wrong.span)
        return self.wholes[name]

    def graph(self, name: str, inputs: tuple[Known, ...]) -> tuple[Known, ...] | None:
        """Where the outputs of a graph are; None where a finding keeps that from being known."""
        key = (name, inputs)
        if key not in self.walked:
            self.walked[key] = None
            whole = self.whole(name)
            if whole is not None:
                self.walked[key] = _Walk(self, self.program.graphs[name], whole, inputs).run()
        return self.walked[key]


class _Walk:
    """One graph, its inputs where they are. A value that a finding is about is unknown, and so is what follows."""

    def __init__(self, proof: _Proof, graph: Graph, whole: Whole, inputs: Sequence[Known]):
        self.proof, self.graph, self.whole, self.mesh = proof, graph, whole, proof.mesh
        self.places: dict[str, Known | None] = {}
        for value, have in zip(graph.body.inputs, inputs, strict=True):
            self.places[value.name] = self._as_typed(value, have)
        table = proof.laid.weights.get(graph.name, {})
        for weight in graph.body.weights:
            stored: Stored | None = table.get(weight.name)
            letters = {a: R if stored is not None and a in stored.sync else I for a in self.mesh.names()}
            axes = tuple(graph.dims[d].axes for d in weight.dims)
            self.places[weight.name] = None if stored is None else known(axes, letters, weight.trained, self.mesh)

    def run(self) -> tuple[Known, ...] | None:
        split = parts(self.graph, self.proof.program.emitting)
        self.sums = set(split.sums)
        after = {n.name for n in split.after}
        for node in self.graph.nodes:
            have = [None if o is None else self.places[o] for o in node.operands]
            if any(o is not None and k is None for o, k in zip(node.operands, have, strict=True)):
                found: list[Known | None] = [None] * len(node.results)
            else:
                try:
                    found = self._behind(node, have) if node.name in after else self._node(node, have)
                except Unproved as wrong:
                    self._note(wrong, span_of(node))
                    found = [None] * len(node.results)
            for r, k in zip(node.results, found, strict=True):
                self.places[r.name] = k
        self._stated(split)
        outputs = [self.places[o] for o in self.graph.body.outputs]
        return tuple(k for k in outputs if k is not None) if all(k is not None for k in outputs) else None

    def _note(self, wrong: Unproved, span: Span) -> None:
        self.proof.note(self.graph.name, wrong.value, wrong.factor, wrong.expected, wrong.found, span)

    def _as_typed(self, value: Value, have: Known) -> Known | None:
        """What a value is, if its type says the same."""
        axes = axes_of(value, self.graph.dims)
        if axes == have.place.splits:
            return have
        node = self.graph.producers.get(value.name)
        wrong = Unproved(value.name, None, f"split as it comes, {have.place.splits}", f"a type split {axes}")
        self._note(wrong, NOWHERE if node is None else span_of(node))
        return None

    def _node(self, node: Node, have: list[Known | None]) -> list[Known | None]:
        given = [k for k in have if k is not None]
        if node.op == "convert":
            return [self._as_typed(node.results[0], converted(node, given[0], self.mesh))]
        if node.op in STRUCTURE:
            made = {"call": self._call, "loop": self._loop, "route": self._route}[node.op](node, given)
            return [None] * len(node.results) if made is None else [
                self._as_typed(r, k) for r, k in zip(node.results, made, strict=True)
            ]  # fmt: skip
        whole = self.whole.nodes[node.name]
        use = Use(node, whole, self.whole, self.graph.dims, self.mesh, have, self.graph.values)
        return [self._as_typed(r, k) for r, k in zip(node.results, use.results(self.proof.rows), strict=True)]

    def _behind(self, node: Node, have: list[Known | None]) -> list[Known | None]:
        """Behind the step all sums are made, and everything is whole on every rank: nothing is left to be told."""
        if node.op == "convert":
            raise Unproved(node.name, None, "no conversion behind the step", str(node.attr("kind")))
        for name, k in zip(node.operands, have, strict=True):
            for atom in self.mesh.names() if k is not None and name not in self.sums else ():
                if k is not None and k.on(atom) not in (N, R, I):
                    raise Unproved(node.name, atom, f"`{name}` whole", shown(k.on(atom)))
        return [self._as_typed(r, nothing(len(r.type.dims), self.mesh)) for r in node.results]

    # --- structure --------------------------------------------------------------------------------

    def _call(self, node: Node, given: list[Known]) -> tuple[Known, ...] | None:
        bodies = self.graph.instance(node.attr("instance")).bodies
        if not bodies:
            raise Unproved(node.name, None, "a block of this program", "a model that is lent")
        callee = self.proof.program.graphs[bodies[0]]
        for theirs, ours in node.bindings:
            axes = callee.dims[theirs].axes if theirs in callee.dims else ()
            if axes and any(self.graph.dims[d].axes != axes for d in ours):
                raise Unproved(node.name, axes[0], f"`{theirs}` bound to a dim split so", ", ".join(ours))
        return self.proof.graph(bodies[0], tuple(given))

    def _loop(self, node: Node, given: list[Known]) -> tuple[Known, ...] | None:
        """Each iteration takes what the one before gives."""
        bodies = self.graph.instance(node.attr("instance")).bodies
        values: tuple[Known, ...] = tuple(given)
        made: tuple[Known, ...] | None = values
        for which in self.graph.schedule_of(node):
            made = self.proof.graph(bodies[which], values)
            if made is None:
                return None
            values = (*made, *values[len(made) :])
        return made

    def _route(self, node: Node, given: list[Known]) -> tuple[Known, ...] | None:
        """Rows go to some of several blocks, and come back in a sum with weights: linear in what these give."""
        x, routing, *more = given
        values = [self.graph.values[o].type.dims for o in node.operands if o is not None]
        made = None
        for body in self.graph.bodies_of(node):
            again = self.proof.graph(body, (x, *more))
            if again is None:
                return None
            if made is not None and made != again:
                raise Unproved(node.name, None, "blocks whose results lie alike", "others")
            made = again
        assert made is not None
        for atom in self.mesh.names():
            at, out = x.on(atom), made[0].on(atom)
            letter = out if not isinstance(out, int) else None
            want: str | int = R if letter in (P, R) else I if letter == I else N
            if isinstance(at, int) and values[0][at] in values[1]:
                want = values[1].index(values[0][at])
                if out != at:
                    raise Unproved(node.name, atom, f"its rows {shown(at)}", shown(out))
            elif isinstance(at, int) or letter in (None, M):
                raise Unproved(node.name, atom, "rows that are routed, or whole", shown(out))
            have = routing.on(atom)
            if have != want and not (have == N and not routing.carries and want in (R, I)):
                raise Unproved(node.name, atom, f"`{node.operands[1]}` to be {shown(want)}", shown(have))
        carries = routing.carries or made[0].carries
        return (known(made[0].place.splits, dict(made[0].place.letters), carries, self.mesh), *made[1:])

    # --- what a block states ----------------------------------------------------------------------

    def _stated(self, split: Parts) -> None:
        """Losses are P or I, and what is still a sum over ranks, and their counts, is one over exactly those noted."""
        sums = dict(self.proof.laid.sums.get(self.graph.name, {}))
        for label, name in split.losses:
            self._loss(label, name, sums.pop(f"loss:{label}", None), (P, I, N))
        for label, name in split.means:
            self._loss(label, name, sums.pop(f"mean:{label}", None), (P, I, N, R))
        for name in split.sums:
            self._summed(name, name, sums.pop(f"sum:{name}", None), (P, I, N, R))
        for rest, axes in sums.items():
            self._note(Unproved(rest, next(iter(axes), None), "something that the block states", "nothing"), NOWHERE)

    def _loss(self, label: str, name: str, noted: tuple[str, ...] | None, allowed: tuple[str, ...]) -> None:
        place = self._summed(label, name, noted, allowed)
        counted = place.counted if place is not None else None
        for atom in self.mesh.names() if place is not None else ():
            is_sum, is_counted = place is not None and place.on(atom) == P, counted is not None and atom in counted
            if is_sum != is_counted:
                places = "those of one rank" if is_counted else "those of all ranks"
                wrong = Unproved(label, atom, "divided by the number of the places that it is over", places)
                self._note(wrong, self._span(name))

    def _summed(self, label: str, name: str, noted: tuple[str, ...] | None, allowed: tuple[str, ...]) -> Known | None:
        place = self.places[name]
        if place is None:
            return None
        for atom in self.mesh.names():
            if place.on(atom) not in allowed:
                self._note(Unproved(label, atom, " or ".join(allowed), shown(place.on(atom))), self._span(name))
        want = tuple(a for a in self.mesh.names() if place.on(a) == P)
        if noted != want:
            wrong = Unproved(label, next(iter(set(want) ^ set(noted or ())), None), f"a sum over {list(want)}",
                             f"one over {list(noted or ())}")  # fmt: skip
            self._note(wrong, self._span(name))
        return place

    def _span(self, name: str) -> Span:
        node = self.graph.producers.get(name)
        return NOWHERE if node is None else span_of(node)
