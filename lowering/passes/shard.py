"""Place every value on the mesh of a layout, and make every change of place an explicit conversion."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from ...dsl.diagnostics import InternalError
from ...dsl.program import Dim, Node, Type, Value
from ..afterwards import parts
from ..graph import Graph, GraphProgram, op_of, renamed_attrs
from ..placement.assign import Assignment, assign, local_size
from ..placement.laid import Laid, Stored
from ..placement.types import I, M, Mesh, N, P, Place, R, Step, V, everywhere, steps
from ..placement.uses import Cut, cut_of, slots
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
    first = _Sharder(program, assignment, {})
    first.run()
    second = _Sharder(program, assignment, first.decided())
    return second.run()


@dataclass
class _Signature:
    """The places of a graph's inputs and outputs."""

    inputs: tuple[Place, ...]
    outputs: tuple[Place, ...] = ()


class _Sharder:
    """One walk over all graphs. The first finds out what is wanted of weights; `stored` is what was decided."""

    def __init__(self, program: GraphProgram, assignment: Assignment, stored: dict[str, dict[str, Stored]]):
        self.program, self.assignment, self.stored = program, assignment, stored
        self.mesh: Mesh = assignment.mesh
        self.order = self.mesh.names()
        self.signatures: dict[str, _Signature] = {}
        self.graphs: dict[str, Graph] = {}
        self.laid = Laid(self.mesh, whole=program.graphs)
        self.wants: dict[str, dict[str, dict[str, set[str]]]] = {}
        self._splitting: dict[str, frozenset[str]] = {}

    def run(self) -> GraphProgram:
        for root in reversed(self.program.roots):  # objectives call the model
            self.graph(root, None)
        graphs = {name: self.graphs.get(name, g) for name, g in self.program.graphs.items()}
        return self.program.with_graphs(graphs, laid=self.laid)

    def decided(self) -> dict[str, dict[str, Stored]]:
        """How each weight is stored: split where its dims are, R with a deferred sum where any use wants that."""
        found: dict[str, dict[str, Stored]] = {}
        for graph in self.program.graphs.values():
            own = found[graph.name] = {}
            for weight in graph.body.weights:
                splits = tuple(self.assignment.atoms(graph.name, d) for d in weight.dims)
                held = {a for atoms in splits for a in atoms}
                wanted = self.wants.get(graph.name, {}).get(weight.name, {})
                sync = tuple(a for a in self.order if a not in held and wanted.get(a, set()) & {R, P, "S"})
                stored = Stored(_distinct(splits), sync if weight.trained else ())
                sizes = tuple(graph.size(d) or 0 for d in weight.dims)
                own[weight.name] = self._spread(stored, sizes) if weight.trained else stored
        return found

    def _spread(self, stored: Stored, sizes: tuple[int, ...]) -> Stored:
        """Full sharding: over the axes that split parameters where they are stored, the first dim that they divide
        is split, one that is whole if there is one, else further inside. A weight with no such dim stays whole, with a gradient that is a sum."""
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

    def graph(self, name: str, given: tuple[Place, ...] | None) -> _Signature:
        """Shard one graph; the first caller decides where its inputs are."""
        if name not in self.signatures:
            graph = self.program.graphs[name]
            inputs = given if given is not None else tuple(self._start(graph, v) for v in graph.body.inputs)
            self.signatures[name] = _Signature(inputs)
            walk = _Walk(self, graph, inputs)
            self.graphs[name], self.signatures[name].outputs = walk.run()
        return self.signatures[name]

    def _start(self, graph: Graph, value: Value) -> Place:
        """Inputs of a model: the rows of a batch are split, all else is whole."""
        place = everywhere(len(value.type.dims), N, self.order)
        if value.type.dims:
            for atom in self.assignment.atoms(graph.name, value.type.dims[0]):
                place = place.put(atom, 0, self.order)
        return place


def _distinct(splits: tuple[tuple[str, ...], ...]) -> tuple[tuple[str, ...], ...]:
    """A factor splits one dim of a weight, the first that wants it."""
    seen: set[str] = set()
    found = []
    for atoms in splits:
        found.append(tuple(a for a in atoms if a not in seen))
        seen |= set(atoms)
    return tuple(found)


@dataclass
class _Chosen:
    """How one use is computed on each factor of the mesh."""

    cuts: dict[str, Cut] = field(default_factory=dict)
    letters: dict[str, str] = field(default_factory=dict)


class _Walk:
    """One graph, node by node: choose how to compute it, bring its operands where they are needed."""

    def __init__(self, sharder: _Sharder, graph: Graph, inputs: tuple[Place, ...]):
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
        for weight in graph.body.weights:
            self.places[weight.name] = self._stored(weight.name)

    # --- dims and values --------------------------------------------------------------------------

    def _stored(self, name: str) -> Place:
        weight = self.weights[name]
        stored = self.s.stored.get(self.graph.name, {}).get(name)
        if stored is None:
            stored = Stored(_distinct(tuple(self.mine.get(d, ()) for d in weight.dims)))
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

    def bring(self, name: str, want: Place, spans: tuple[Any, ...]) -> str:
        """The name of a value in another place; conversions are made once."""
        have = self.places[name]
        if have == want or not (todo := steps(have, want, self.mesh)):
            return name
        at, now = name, have
        for step in todo:
            now = self._behind_step(now, step, want)
            if (name, now) not in self.memo:
                self.memo[name, now] = self._convert(at, now, step, spans)
            at = self.memo[name, now]
        return at

    def _behind_step(self, have: Place, step: Step, want: Place) -> Place:
        now = have
        for atom in step.atoms:
            dst = step.dst
            if dst == R and not have.has_gradient or dst == R and want.on(atom) == N:
                dst = N
            now = now.put(atom, dst, self.order)
        return now

    def _convert(self, name: str, now: Place, step: Step, spans: tuple[Any, ...]) -> str:
        value = self.values[name]
        result = Value(self.fresh(self._base_name(value.name, step)), value.type)
        to = self.local_type(value.type, now).dims
        attrs = (("kind", step.kind), ("axes", step.atoms), ("src", step.src), ("dst", step.dst), ("to", to))
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

    # --- the walk ---------------------------------------------------------------------------------

    def run(self) -> tuple[Graph, tuple[Place, ...]]:
        for node in self.graph.nodes:
            if node.op == "call":
                self._call(node)
            elif node.op == "loop":
                self._loop(node)
            elif node.op == "route":
                self._route(node)
            else:
                self._op(node)
        outputs = self._outputs()
        emits = self._emits()
        return self._finish(outputs, emits), tuple(self.places[o] for o in outputs)

    def _outputs(self) -> tuple[str, ...]:
        """A result is split along dims that callers know, or whole."""
        bound = {d for v in self.graph.body.inputs for d in v.type.dims}
        iterates = self.s.signatures[self.graph.name].outputs
        found = []
        for i, name in enumerate(self.graph.body.outputs):
            place = want = self.places[name]
            if iterates:
                want = iterates[i]
            else:
                for j, d in enumerate(self.values[name].type.dims):
                    if d not in bound and self.graph.name not in self.s.program.roots:
                        for atom in place.splits[j]:
                            want = want.put(atom, R if place.has_gradient else N, self.order)
            found.append(self.bring(name, want, self._spans(name)))
        return tuple(found)

    def _spans(self, name: str) -> tuple[Any, ...]:
        node = self.graph.producers.get(name)
        return node.spans if node is not None else ()

    def _finish(self, outputs: tuple[str, ...], emits: tuple[tuple[str, str, str], ...]) -> Graph:
        body = self.graph.body
        inputs = tuple(Value(v.name, self.local_type(v.type, self.places[v.name])) for v in body.inputs)
        weights = tuple(
            replace(w, dims=tuple(self.local(d, a) for d, a in zip(w.dims, self.places[w.name].splits, strict=True)))
            for w in body.weights
        )
        used = {d for n in self.made for r in n.results for d in r.type.dims}
        used |= {d for n in self.made for _, ds in n.bindings for d in ds}
        for d in body.dims:  # dims that only size something
            if d.name not in used:
                self.local(d.name, ())
        layouts = tuple(
            replace(w, layout=tuple(tuple(self._layout_dim(w.dims, old.dims, d) for d in axis) for axis in old.layout))
            for w, old in zip(weights, body.weights, strict=True)
        )
        self.s.laid.places[self.graph.name] = dict(self.places)
        self.s.laid.weights[self.graph.name] = {
            w.name: self.s.stored.get(self.graph.name, {}).get(w.name) or Stored(self.places[w.name].splits)
            for w in body.weights
        }
        made = replace(
            body, dims=tuple(self.dims.values()), inputs=inputs, weights=layouts, nodes=tuple(self.made),
            outputs=outputs, emits=emits,
        )  # fmt: skip
        return Graph(made)

    def _layout_dim(self, new: tuple[str, ...], old: tuple[str, ...], dim: str) -> str:
        return new[old.index(dim)] if dim in old else dim

    def _emits(self) -> tuple[tuple[str, str, str], ...]:
        """Losses end P or I, so that their gradient is counted once; sums are P until the end of the step."""
        found = []
        split = parts(self.graph, self.s.program.emitting)
        sums = self.s.laid.sums.setdefault(self.graph.name, {})
        for keyword, label, name in self.graph.body.emits:
            place = want = self.places[name]
            if keyword == "loss":
                for atom in self.order:
                    if place.letter(atom) == R:
                        want = want.put(atom, I, self.order)
                name = self.bring(name, want, self._spans(name))
                sums[f"loss:{label}"] = tuple(a for a in self.order if want.letter(a) == P)
            elif (label, name) in split.means:
                sums[f"mean:{label}"] = tuple(a for a in self.order if place.letter(a) == P)
            found.append((keyword, label, name))
        for name in split.sums:
            sums[f"sum:{name}"] = tuple(a for a in self.order if self.places[name].letter(a) == P)
        return tuple(found)

    # --- ops --------------------------------------------------------------------------------------

    def _op(self, node: Node) -> None:
        after = {n.name for n in parts(self.graph, self.s.program.emitting).after}
        if node.name in after:  # behind the step all sums are made
            self._behind(node)
            return
        chosen = self._choose(node)
        if any(c.kind == "lift" for c in chosen.cuts.values()):
            self._lifted(node)
            return
        self._apply(node, chosen)

    def _behind(self, node: Node) -> None:
        places = tuple(everywhere(len(r.type.dims), N, self.order) for r in node.results)
        for name in {d for r in node.results for d in r.type.dims}:
            self.local(name, ())
        self._add(node, places)

    def _lifted(self, node: Node) -> None:
        """The op's room takes its use apart; each part is then placed like any other."""
        lift = op_of(node).lift
        assert lift is not None
        graph = _Growing(self)
        last = lift(node, graph)
        assert last == node.name

    def _candidates(self, node: Node, atom: str) -> list[str]:
        """Dims that may be cut on a factor: in the layout's order, then those of operands that are cut already."""
        have = dict.fromkeys(d for o in node.operands if o is not None for d in self.values[o].type.dims)
        have.update(dict.fromkeys(d for r in node.results for d in r.type.dims))
        rules = self.s.assignment.layout.splits
        rank = {}
        for d in have:
            if atom in self.mine.get(d, ()):
                names = [i for i, s in enumerate(rules) if s.selector.steps[-1].name == d]
                rank[d] = names[0] if names else len(rules)
        found = sorted(rank, key=lambda d: (rank[d], list(have).index(d)))
        for o in node.operands:
            if o is not None and o not in self.weights and isinstance(at := self.places[o].on(atom), int):
                found.append(self.values[o].type.dims[at])
        return list(dict.fromkeys(found))

    def _choose(self, node: Node) -> _Chosen:
        chosen = _Chosen()
        operands = [o for o in node.operands if o is not None]
        op = op_of(node)
        is_free = all(not self._carries(o) for o in operands)
        for atom in self.order:
            letters = {o: self.places[o].letter(atom) for o in operands}
            if self._passes(node, atom, letters):
                chosen.letters[atom] = P
                continue
            if any(x == V for x in letters.values()) and op.meets:
                chosen.letters[atom] = V
                continue
            split_already = any(x == "S" for o, x in letters.items() if o not in self.weights)
            partial = any(x == P for x in letters.values())
            if is_free and not split_already and not partial:
                own = next((d for d in self._rows_of(node) if atom in self.mine.get(d, ())), None)
                if own is not None:
                    chosen.cuts[atom] = Cut((own,), "parallel")
                else:
                    chosen.letters[atom] = N
                continue
            for dim in self._candidates(node, atom):
                cut = cut_of(node, self._view(node), dim, lambda a, b, atom=atom: self._together(node, a, b, atom))
                if cut is not None:
                    chosen.cuts[atom] = cut
                    break
            else:
                grads = [letters[o] for o in operands if self._carries(o) and o not in self.weights]
                inside = not grads and any(o in self.weights for o in operands)
                chosen.letters[atom] = (
                    N if is_free else R if R in grads or inside and self._block_is_r(atom) else I
                )
        if op.random and any(x == P for x in chosen.letters.values()):
            raise InternalError(f"{node.name}: a random op of partial sums")
        return chosen

    def _rows_of(self, node: Node) -> tuple[str, ...]:
        """What the coordinates of a sequence vary along: a rank knows those of its rows only."""
        if not op_of(node).coordinates or any(o is not None for o in node.operands):
            return ()
        return tuple(x for r in node.results for d in r.type.dims for x in self.whole(d).lead if x in r.type.dims)

    def _block_is_r(self, atom: str) -> bool:
        """Whether values that only weights make are R here: inside a block that splits something on this factor."""
        return self.graph.name not in self.s.assignment.outside and self.s.splits_on(self.graph.name, atom)

    def _carries(self, name: str) -> bool:
        """Whether a gradient may flow through a value."""
        place = self.places[name]
        return self.values[name].type.kind in ("real", "loss") and any(
            x in (R, I, P, V) for _, x in place.letters
        ) or self.values[name].type.kind in ("real", "loss") and self._all_split(name)

    def _all_split(self, name: str) -> bool:
        return not self.places[name].letters

    def _view(self, node: Node) -> Any:
        """The graph as the reading of uses wants it: types with whole dims, also of what was added."""
        return _View(self)

    def _together(self, node: Node, first: str, other: Any, atom: str) -> str | None:
        """How grouped dims meet on a factor: both cut, or only the first since one place of the other is left."""
        mine = self.mine.get(first, ())
        if isinstance(other, tuple):  # a setting that counts runs
            _, count = other
            before = self.mesh.size(mine[: mine.index(atom)]) if atom in mine else 1
            size = self.mesh.size([atom])
            return "both" if count % (before * size) == 0 else None
        theirs = self.mine.get(other, ())
        if atom in theirs and atom in mine:
            return "both"
        if atom in mine and (self.whole(other).size or 0) == self.mesh.size(theirs):
            return "first"
        return None

    def _passes(self, node: Node, atom: str, letters: dict[str, str]) -> bool:
        """Partial sums go through what is linear in them and nothing else: pointwise, no product with weights."""
        op = op_of(node)
        have_p = {o for o, x in letters.items() if x == P}
        if not have_p or op.random or op.weights or any(
            f != "D" for o in op.signature.operands for f in [x.name for x in o.formals]
        ) or op.signature.role("D") != "parallel":  # fmt: skip
            return False
        named = [s[0] if s else None for s in slots(node, self._view(node))]
        for group in op.linear:
            inside = [o for o, name in zip(node.operands, named, strict=True) if o is not None and name in group]
            outside = [o for o, name in zip(node.operands, named, strict=True) if o is not None and name not in group]
            literal = any(node.attr(name) not in (None, 0) for name in group)  # x + 1 is not linear
            if set(inside) == have_p and not literal and all(letters[o] in (R, N) for o in outside):
                return True
        return False

    def _apply(self, node: Node, chosen: _Chosen) -> None:
        """Bring the operands where they are needed, and add the node on local dims."""
        view = self._view(node)
        named = slots(node, view)
        operands: list[str | None] = []
        for i, name in enumerate(node.operands):
            if name is None:
                operands.append(None)
                continue
            slot = named[i]
            assert slot is not None
            operands.append(self._operand(i, name, slot, chosen, node))
        result_places = tuple(self._result(r, chosen, node) for r in node.results)
        swap = {d: self._cut_name(d, chosen) for d in self._dims_of(node)}
        attrs = renamed_attrs(node, lambda d: swap.get(d, d))
        parts_of: dict[str, int] = {}
        for atom, cut in chosen.cuts.items():
            if cut.parts:
                parts_of[cut.parts] = parts_of.get(cut.parts, 1) * self.mesh.size([atom])
        attrs = tuple((k, v // parts_of[k] if k in parts_of else v) for k, v in attrs)
        if op_of(node).meets:
            met = tuple(a for a in self.order if a in chosen.cuts and chosen.cuts[a].kind == "own"
                        or chosen.letters.get(a) == V)  # fmt: skip
            attrs = (*attrs, ("axes", met))
        bindings = tuple((f, tuple(self._bound(f, d, chosen, node) for d in ds)) for f, ds in node.bindings)
        self._add(replace(node, operands=tuple(operands), attrs=attrs, bindings=bindings), result_places)

    def _dims_of(self, node: Node) -> set[str]:
        have = {d for r in node.results for d in r.type.dims} | {d for _, ds in node.bindings for d in ds}
        return have | {d for o in node.operands if o is not None for d in self.values[o].type.dims}

    def _cut_atoms(self, dim: str, chosen: _Chosen) -> tuple[str, ...]:
        atoms = (a for a, c in chosen.cuts.items() if dim in c.dims)
        return tuple(sorted(atoms, key=self.order.index))

    def _cut_name(self, dim: str, chosen: _Chosen) -> str:
        return self.local(dim, self._cut_atoms(dim, chosen))

    def _bound(self, formal: str, dim: str, chosen: _Chosen, node: Node) -> str:
        role = op_of(node).signature.role(formal.rstrip("0123456789"))
        atoms = self._cut_atoms(dim, chosen)
        if role == "attend" and any(d == dim for c in chosen.cuts.values() for _, d in c.whole):
            atoms = ()
        return self.local(dim, atoms)

    def _operand(self, i: int, name: str, slot: Any, chosen: _Chosen, node: Node) -> str:
        role, dims = slot
        here = self.places[name]
        want = here
        is_weight = name in self.weights
        carries = self._carries(name) or is_weight and self.weights[name].trained
        for atom in self.order:
            cut = chosen.cuts.get(atom)
            target: str | int
            if cut is not None:
                at = next((j for j, (d, _) in enumerate(dims) if d in cut.dims and (i, d) not in cut.whole), None)
                mate, own = role in cut.mates, role in op_of(node).handed
                target = at if at is not None else P if mate else V if own else R if carries else N
            else:
                letter = chosen.letters[atom]
                target = letter if letter != P else P if here.letter(atom) == P else R if carries else N
                if not carries and target in (R, I):
                    target = N
            if is_weight and carries and self.loose:
                noted = self.s.wants.setdefault(self.graph.name, {}).setdefault(name, {}).setdefault(atom, set())
                if not isinstance(here.on(atom), int):
                    noted.add("S" if isinstance(target, int) else target)
                    if not isinstance(target, int):
                        here = here.put(atom, target, self.order)  # taken as if it were stored so
            want = want.put(atom, target, self.order)
        if is_weight and self.loose:
            return name
        return self.bring(name, want, node.spans)

    def _result(self, r: Value, chosen: _Chosen, node: Node) -> Place:
        place = everywhere(len(r.type.dims), N, self.order)
        no_grad = r.type.kind not in ("real", "loss") or node.op == "constant" or not any(
            self._carries(o) or o in self.weights and self.weights[o].trained for o in node.operands if o is not None
        )  # fmt: skip
        for atom in self.order:
            cut = chosen.cuts.get(atom)
            if cut is None:
                letter = chosen.letters[atom]
                place = place.put(atom, N if no_grad and letter in (R, I) else letter, self.order)
                continue
            at = next((j for j, d in enumerate(r.type.dims) if d in cut.dims), None)
            letter = M if cut.kind == "most" else V if cut.kind == "own" else P
            place = place.put(atom, at if at is not None else letter, self.order)
        return place

    # --- structure --------------------------------------------------------------------------------

    def _entry(self, callee: str, value: str, dims: dict[str, str], like: Value) -> Place:
        """Where an input of a block is: split as it is, if the block can take it so; whole where the block splits
        something else."""
        place = want = self.places[value]
        theirs = self.s.program.graphs[callee]
        back = {ours: c for c, ours in dims.items()}
        is_real = self.values[value].type.kind == "real"
        for atom in self.order:
            at = place.on(atom)
            splits = self.s.splits_on(callee, atom)
            if isinstance(at, int):
                inner = back.get(self.values[value].type.dims[at])
                if not splits or inner is not None and atom in self.s.assignment.atoms(theirs.name, inner):
                    continue
                target: str | int = R
            elif at == P and not splits:
                target = self._outside_place(value, atom)
            elif at == M:
                target = N
            else:
                target = R if splits else I if at in (P, R, N) else at
            if not is_real and target in (R, I):
                target = N
            want = want.put(atom, target, self.order)
        return want

    def _outside_place(self, value: str, atom: str) -> str | int:
        """Where a value of the residual stream is on a factor: split along a dim that is, else invariant."""
        for j, d in enumerate(self.values[value].type.dims):
            if atom in self.mine.get(d, ()):
                return j
        return I

    def _bindings(self, node: Node, callee: str) -> dict[str, str]:
        """The callee's dims as ours; an expert has those of the rows that it is given."""
        if node.op == "route":
            theirs = self.s.program.graphs[callee].body.inputs[0].type.dims
            return dict(zip(theirs, self.values[node.operands[0] or ""].type.dims, strict=True))
        return {c: ours[0] for c, ours in node.bindings if ours}

    def _enter(self, node: Node, callee: str, values: list[str]) -> tuple[list[str], _Signature]:
        dims = self._bindings(node, callee)
        inputs = self.s.program.graphs[callee].body.inputs
        given = tuple(self._entry(callee, v, dims, like) for v, like in zip(values, inputs, strict=True))
        signature = self.s.graph(callee, given)
        brought = [self.bring(v, want, node.spans) for v, want in zip(values, signature.inputs, strict=True)]
        return brought, signature

    def _call(self, node: Node) -> None:
        instance = self.graph.instance(node.attr("instance"))
        values = [o for o in node.operands if o is not None]
        if not instance.bodies:
            from ...dsl.diagnostics import fail

            raise fail("not-built-yet", "an objective that asks another model is not built yet under a layout",
                       node.spans[0])  # fmt: skip
        brought, signature = self._enter(node, instance.bodies[0], values)
        self._structural(node, brought, signature.outputs)

    def _structural(self, node: Node, brought: list[str], outputs: tuple[Place, ...]) -> None:
        """Add a call: dims are bound as values are split."""
        swap: dict[str, str] = {}
        for name in brought:
            value, place = self.values[name], self.places[name]
            swap.update((d, self.local(d, a)) for d, a in zip(value.type.dims, place.splits, strict=True))
        for r, place in zip(node.results, outputs, strict=True):
            swap.update((d, self.local(d, a)) for d, a in zip(r.type.dims, place.splits, strict=True) if d not in swap)
        filled = iter(brought)
        operands = tuple(None if o is None else next(filled) for o in node.operands)
        callee = self.s.graphs.get(self.graph.instance(node.attr("instance")).bodies[0])
        bindings = node.bindings
        if callee is not None:
            known = {d.name for d in callee.body.dims}
            bindings = tuple(
                (self._their_name(c, swap.get(ours[0], ours[0]) if ours else "", known), tuple(swap.get(o, o) for o in ours))
                for c, ours in node.bindings
            )
        for _, ours in bindings:
            for o in ours:
                if o in self.graph.dims:
                    self.local(o, ())
        attrs = tuple((k, tuple(swap.get(d, d) for d in v) if k == "over" else v) for k, v in node.attrs)
        self._add(replace(node, operands=operands, bindings=bindings, attrs=attrs), outputs)

    def _their_name(self, callee_dim: str, ours: str, known: set[str]) -> str:
        """The callee's name of a part: `heads/tensor` where ours is `rows/tensor`."""
        _, slash, atoms = ours.partition("/")
        return f"{callee_dim}/{atoms}" if slash and f"{callee_dim}/{atoms}" in known else callee_dim

    def _loop(self, node: Node) -> None:
        """What is carried from iteration to iteration stays where it is; a single iteration may give something new."""
        values = [o for o in node.operands if o is not None]
        repeats = len(self.graph.schedule_of(node)) > 1
        carried = len(node.results) if repeats else 0
        start = tuple(self._carried(name, i < carried) for i, name in enumerate(values))
        brought: list[str] = []
        outputs: tuple[Place, ...] = ()
        for body in self.graph.bodies_of(node):
            if body not in self.s.signatures:
                self.s.signatures[body] = _Signature(start, start[:carried])
                walk = _Walk(self.s, self.s.program.graphs[body], start)
                self.s.graphs[body], self.s.signatures[body].outputs = walk.run()
            signature = self.s.signatures[body]
            if not brought:
                brought = [self.bring(v, want, node.spans) for v, want in zip(values, signature.inputs, strict=True)]
                outputs = signature.outputs
            if signature.inputs != start and repeats or signature.outputs != outputs:
                raise InternalError(f"{node.name}: iterations of one loop lie differently")
        self._structural(node, brought, outputs)

    def _carried(self, name: str, is_carried: bool) -> Place:
        """Where a value of the residual stream is between iterations; what all of them read stays R where it is."""
        place = want = self.places[name]
        if self.values[name].type.kind != "real":
            return place
        is_constant = not self._carries(name)
        for atom in self.order:
            at = place.on(atom)
            if is_constant and not isinstance(at, int) or at == R and not is_carried:
                continue
            if not isinstance(at, int) or atom not in self.mine.get(self.values[name].type.dims[at], ()):
                want = want.put(atom, self._outside_place(name, atom), self.order)
        return want

    def _route(self, node: Node) -> None:
        x, routing, *more = [o for o in node.operands if o is not None]
        callee = self.graph.instance(node.attr("instance")).bodies[0]
        (brought, *rest), signature = self._enter(node, callee, [x, *more])
        out = signature.outputs[0]
        want = self.places[routing]
        for atom in self.order:
            at = self.places[brought].on(atom)
            if isinstance(at, int) and self.values[brought].type.dims[at] in self.values[routing].type.dims:
                want = want.put(atom, self.values[routing].type.dims.index(self.values[brought].type.dims[at]), self.order)
            else:
                want = want.put(atom, R if out.letter(atom) in (P, R) else I, self.order)
        routed = self.bring(routing, want, node.spans)
        self._structural(node, [brought, routed, *rest], (out,))


class _View:
    """What the reading of uses asks of a graph, with values that a walk has added."""

    def __init__(self, walk: _Walk):
        self._walk = walk
        self.values = walk.values

    @property
    def dims(self) -> dict[str, Dim]:
        return {**self._walk._extra, **self._walk.graph.dims}


class _Growing:
    """What an op's `lift` adds its parts through: each is placed as soon as it is added."""

    def __init__(self, walk: _Walk):
        self._walk = walk

    def size(self, dim: str) -> int | None:
        """The size of the whole dim."""
        return self._walk.whole(dim).size

    def type_of(self, name: str) -> Type:
        """The type of an operand, on whole dims."""
        return self._walk.values[name].type

    def dim(self, base: str, size: int) -> str:
        """A new dim."""
        names = {**self._walk.graph.dims, **self._walk._extra}
        name, n = base, 1
        while name in names:
            n += 1
            name = f"{base}_{n}"
        self._walk._extra[name] = Dim(name, size)
        return name

    def split_like(self, dim: str, first: str) -> None:
        """Split a new dim over the outer factors of another that it has places for."""
        from ..placement.assign import _fitting

        walk = self._walk
        atoms = _fitting(walk.whole(dim).size, walk.mine.get(first, ()), walk.mesh)
        walk.mine = {**walk.mine, dim: atoms}

    def add(
        self, op: str, operands: tuple[str | None, ...], dims: tuple[str, ...], like: Node, kind: str = "real",
        name: str | None = None, bindings: tuple[tuple[str, tuple[str, ...]], ...] = (), **attrs: Any,
    ) -> str:  # fmt: skip
        """Add one use; gives the name of its result (`name`, or a fresh one)."""
        result = Value(self._walk.fresh(op) if name is None else name, Type(kind, dims))
        self._walk._op(Node((result,), op, operands, tuple(attrs.items()), bindings, like.spans))
        return result.name

    def add_all(
        self, op: str, operands: tuple[str | None, ...], results: dict[str, tuple[str, ...]], like: Node,
        bindings: tuple[tuple[str, tuple[str, ...]], ...] = (), **attrs: Any,
    ) -> tuple[str, ...]:  # fmt: skip
        """Add one use with several results, each with its dims."""
        made = tuple(Value(self._walk.fresh(n), Type("real", dims)) for n, dims in results.items())
        self._walk._op(Node(made, op, operands, tuple(attrs.items()), bindings, like.spans))
        return tuple(v.name for v in made)
