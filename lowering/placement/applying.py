"""One use on local dims, its operands brought where the choice needs them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ...dsl.program import Node
from ..graph import op_of, renamed_attrs
from .exchanging import Exchanging
from .growing import Growing, View
from .types import N, V, everywhere
from .uses import slots
from .values import Chosen


class Applying(Exchanging):
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
            met = tuple(a for a in self.order if a in chosen.cuts and chosen.cuts[a].kind in ("own", "met")
                        or chosen.letters.get(a) == V)  # fmt: skip
            attrs = (*attrs, ("axes", met))
            attrs = (*attrs, *self._how(node, met))
        bindings = tuple((f, tuple(self._bound(f, d, chosen, node) for d in ds)) for f, ds in node.bindings)
        self._add(replace(node, operands=tuple(operands), attrs=attrs, bindings=bindings), result_places)
        if chosen.moved:
            self.s.moved |= {self.mesh.axis(a) for a in chosen.moved}
            self.moved.update(dict.fromkeys((r.name for r in node.results), chosen.why))

    def _how(self, node: Node, met: tuple[str, ...]) -> tuple[tuple[str, Any], ...]:
        """What the layout says of how ranks meet, for an op that can be told."""
        way = self.told.get(node.name)
        if way is None or op_of(node).setting("order") is None:
            return ()
        axes = ", ".join(dict.fromkeys(map(self.mesh.axis, met)))
        why = f"{axes}: ranks keep their keys and are told those of one other at a time, as the layout says"
        return ("why", why), *([("order", way.order)] if way.order is not None else [])

    def _dims_of(self, node: Node) -> set[str]:
        have = {d for r in node.results for d in r.type.dims} | {d for _, ds in node.bindings for d in ds}
        return have | {d for o in node.operands if o is not None for d in self.values[o].type.dims}

    def _cut_atoms(self, dim: str, chosen: Chosen) -> tuple[str, ...]:
        return tuple(a for a in self._inwards(chosen) if a in chosen.cuts and dim in chosen.cuts[a].dims)

    def _cut_name(self, dim: str, chosen: Chosen) -> str:
        return self.local(dim, self._cut_atoms(dim, chosen))

    def _bound(self, formal: str, dim: str, chosen: Chosen, node: Node) -> str:
        role = op_of(node).signature.role(formal.rstrip("0123456789"))
        atoms = self._cut_atoms(dim, chosen)
        if role == "attend" and any(d == dim for c in chosen.cuts.values() for _, d in c.whole):
            atoms = ()
        return self.local(dim, atoms)

    def _operand(self, i: int, name: str, slot: Any, chosen: Chosen, node: Node) -> str:
        if name in self.weights and self.loose:
            self._noted(i, name, slot, chosen, node)
            return name
        return self.bring(name, self._wanted(i, name, slot, chosen, node), node.spans, chosen.why)

    def _noted(self, i: int, name: str, slot: Any, chosen: Chosen, node: Node) -> None:
        """Where a use would have a weight, which is then stored so that it suits all."""
        if not self.weights[name].trained:
            return
        for atom in self.order:
            if not isinstance(self.places[name].on(atom), int):
                target = self._target(i, name, slot, chosen, node, atom)
                noted = self.s.wants.setdefault(self.graph.name, {}).setdefault(name, {}).setdefault(atom, set())
                noted.add("S" if isinstance(target, int) else target)
