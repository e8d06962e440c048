"""One use on local dims, its operands brought where the choice needs them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ...dsl.program import Node, Value
from ..graph import op_of, renamed_attrs
from .choosing import Choosing
from .growing import Growing, View
from .types import I, M, N, P, Place, R, V, everywhere
from .uses import slots
from .values import Chosen


class Applying(Choosing):
    """Adds uses of ops."""

    def _op(self, node: Node) -> None:
        if node.name in self.after:  # behind the step all sums are made
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
        graph = Growing(self)
        last = lift(node, graph)
        assert last == node.name

    def _apply(self, node: Node, chosen: Chosen) -> None:
        """Bring the operands where they are needed, and add the node on local dims."""
        view = View(self)
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

    def _cut_atoms(self, dim: str, chosen: Chosen) -> tuple[str, ...]:
        atoms = (a for a, c in chosen.cuts.items() if dim in c.dims)
        return tuple(sorted(atoms, key=self.order.index))

    def _cut_name(self, dim: str, chosen: Chosen) -> str:
        return self.local(dim, self._cut_atoms(dim, chosen))

    def _bound(self, formal: str, dim: str, chosen: Chosen, node: Node) -> str:
        role = op_of(node).signature.role(formal.rstrip("0123456789"))
        atoms = self._cut_atoms(dim, chosen)
        if role == "attend" and any(d == dim for c in chosen.cuts.values() for _, d in c.whole):
            atoms = ()
        return self.local(dim, atoms)

    def _operand(self, i: int, name: str, slot: Any, chosen: Chosen, node: Node) -> str:
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

    def _result(self, r: Value, chosen: Chosen, node: Node) -> Place:
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
