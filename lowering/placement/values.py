"""One graph while it is placed: its values and where they are, local dims, and conversions, each made once."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from ...dsl.program import Dim, Node, Type, Value
from ..afterwards import parts
from ..graph import Graph
from .assign import local_size
from .laid import Stored
from .types import I, N, P, Place, R, Step, V, steps
from .uses import Cut


@dataclass
class Signature:
    """The places of a graph's inputs and outputs."""

    inputs: tuple[Place, ...]
    outputs: tuple[Place, ...] = ()


@dataclass
class Chosen:
    """How one use is computed on each factor of the mesh.

    `moved` are the factors that split another dim here than around it, inside of those that split it anyway; `why` is
    the reason, for who reads what is written.
    """

    cuts: dict[str, Cut] = field(default_factory=dict)
    letters: dict[str, str] = field(default_factory=dict)
    moved: tuple[str, ...] = ()
    why: str = ""


def distinct(splits: tuple[tuple[str, ...], ...]) -> tuple[tuple[str, ...], ...]:
    """A factor splits one dim of a weight, the first that wants it."""
    seen: set[str] = set()
    found = []
    for atoms in splits:
        found.append(tuple(a for a in atoms if a not in seen))
        seen |= set(atoms)
    return tuple(found)


class Values:
    """What is known of a graph on the way. `s` is the state of the whole pass: the program, the assignment, the
    signatures of graphs, and how weights are stored."""

    def __init__(self, sharder: Any, graph: Graph, inputs: tuple[Place, ...]):
        self.s, self.graph, self.mesh, self.order = sharder, graph, sharder.mesh, sharder.order
        self.mine = sharder.assignment.dims.get(graph.name, {})
        self.places: dict[str, Place] = {v.name: p for v, p in zip(graph.body.inputs, inputs, strict=True)}
        self.values: dict[str, Value] = dict(graph.values)
        self.made: list[Node] = []
        self.dims: dict[str, Dim] = {}
        self.memo: dict[tuple[str, Place], str] = {}
        self.weights = {w.name: w for w in graph.body.weights}
        self.loose = not sharder.stored  # weights are where they are wanted, and that is noted
        self.names = set(graph.values)
        self._extra: dict[str, Dim] = {}
        self.told = sharder.assignment.told.get(graph.name, {})
        self.moved: dict[str, str] = {}  # values that lie otherwise than what is around them, and why
        self.after = {n.name for n in parts(graph, sharder.program.emitting).after}
        for weight in graph.body.weights:
            self.places[weight.name] = self._stored(weight.name)

    # --- dims and values --------------------------------------------------------------------------

    def _stored(self, name: str) -> Place:
        weight = self.weights[name]
        stored = self.s.stored.get(self.graph.name, {}).get(name)
        if stored is None:
            stored = Stored(distinct(tuple(self.mine.get(d, ()) for d in weight.dims)))
        place = stored.place(self.mesh)
        if weight.trained:
            return place
        return Place(place.splits, tuple((a, N) for a, _ in place.letters))

    def whole(self, name: str) -> Dim:
        return self.graph.dims.get(name) or self._extra[name]

    def local(self, name: str, atoms: tuple[str, ...]) -> str:
        """The name of a rank's part of a dim; it becomes a dim of the new graph."""
        dim = self.whole(name)
        shown = f"{name}/{self.mesh.shown(atoms)}" if atoms else name
        if shown not in self.dims:
            lead = tuple(self.local(x, self.mine.get(x, ())) for x in dim.lead)
            factors = dim.factors if not atoms else ()
            size = local_size(dim.size, atoms, self.mesh)
            whole = dim.name if atoms else None
            self.dims[shown] = replace(dim, name=shown, size=size, lead=lead, factors=factors, axes=atoms, whole=whole)
        return shown

    def local_type(self, kind: Type, place: Place) -> Type:
        return Type(kind.kind, tuple(self.local(d, atoms) for d, atoms in zip(kind.dims, place.splits, strict=True)))

    def fresh(self, base: str) -> str:
        name, n = base, 1
        while name in self.names:
            n += 1
            name = f"{base}_{n}"
        self.names.add(name)
        return name

    # --- conversions ------------------------------------------------------------------------------

    def bring(self, name: str, want: Place, spans: tuple[Any, ...], why: str = "") -> str:
        """The name of a value in another place; conversions are made once. `why` is the reason, if it is a choice."""
        have = self.places[name]
        if have == want or not (todo := steps(have, want, self.mesh)):
            return name
        at, now = name, have
        for step in todo:
            now = self._behind_step(now, step, want)
            if (name, now) not in self.memo:
                self.memo[name, now] = self._convert(at, now, step, spans, why or self.moved.get(name, ""))
            at = self.memo[name, now]
        return at

    def _behind_step(self, have: Place, step: Step, want: Place) -> Place:
        now = have
        for atom in step.atoms:
            dst = step.dst
            if dst == R and not have.has_gradient or dst == R and want.on(atom) == N:
                dst = N
            now = now.inside(atom, dst) if isinstance(dst, int) else now.put(atom, dst, self.order)
        return now

    def _convert(self, name: str, now: Place, step: Step, spans: tuple[Any, ...], why: str) -> str:
        value = self.values[name]
        result = Value(self.fresh(self._base_name(value.name, step)), value.type)
        to = self.local_type(value.type, now).dims
        reason = [("why", why)] if why and step.communicates else []
        attrs = (("kind", step.kind), ("axes", step.atoms), ("src", step.src), ("dst", step.dst), ("to", to), *reason)
        self._add(Node((result,), "convert", (name,), attrs, (), spans), (now,))
        return result.name

    def _base_name(self, name: str, step: Step) -> str:
        plain = name.replace(".", "_")
        ending = {"all_reduce": "sum", "all_gather": "all", "reduce_scatter": "part", "all_to_all": "moved",
                  "all_max": "most", "convert": "part" if isinstance(step.dst, int) else "in"}[step.kind]  # fmt: skip
        return f"{plain}_{ending}"

    def _add(self, node: Node, places: Iterable[Place]) -> None:
        """Append a node whose results are here; its types are still those of whole dims."""
        results = []
        for r, place in zip(node.results, places, strict=True):
            self.values[r.name], self.places[r.name] = r, place
            results.append(Value(r.name, self.local_type(r.type, place)))
        self.made.append(replace(node, results=tuple(results)))

    def _carries(self, name: str) -> bool:
        """Whether a gradient may flow through a value."""
        place = self.places[name]
        return (
            self.values[name].type.kind in ("real", "loss")
            and any(x in (R, I, P, V) for _, x in place.letters)
            or self.values[name].type.kind in ("real", "loss")
            and self._all_split(name)
        )

    def _all_split(self, name: str) -> bool:
        return not self.places[name].letters
