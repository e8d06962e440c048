"""Where the operands of a use have to be, and where its results are, for a way to compute it that was chosen."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ...dsl.program import Node, Value
from ..graph import op_of
from .types import I, M, N, P, Place, R, V, everywhere
from .values import Chosen, Values


class Placing(Values):
    """Asks only: nothing is added to the graph."""

    def _inwards(self, chosen: Chosen) -> Iterator[str]:
        """The factors of the mesh from the outside in, as they split a dim of this use."""
        yield from (a for a in self.order if a not in chosen.moved)
        yield from (a for a in self.order if a in chosen.moved)

    def _wanted(self, i: int, name: str, slot: Any, chosen: Chosen, node: Node) -> Place:
        """Where an operand has to be. `slot` is its name in the signature, and the formal of each of its dims."""
        want = self.places[name]
        for atom in self._inwards(chosen):
            target = self._target(i, name, slot, chosen, node, atom)
            if atom in chosen.moved and isinstance(target, int):
                want = want.inside(atom, target)
            else:
                want = want.put(atom, target, self.order)
        return want

    def _target(self, i: int, name: str, slot: Any, chosen: Chosen, node: Node, atom: str) -> str | int:
        role, dims = slot
        carries = self._carries(name) or name in self.weights and self.weights[name].trained
        cut = chosen.cuts.get(atom)
        if cut is not None:
            at = next((j for j, (d, _) in enumerate(dims) if d in cut.dims and (i, d) not in cut.whole), None)
            mate, own = role in cut.mates, role in op_of(node).handed
            return at if at is not None else P if mate else V if own else R if carries else N
        letter = chosen.letters[atom]
        target = letter if letter != P else P if self.places[name].letter(atom) == P else R if carries else N
        return N if not carries and target in (R, I) else target

    def _result(self, r: Value, chosen: Chosen, node: Node) -> Place:
        """Where a result is."""
        place = everywhere(len(r.type.dims), N, self.order)
        no_grad = r.type.kind not in ("real", "loss") or node.op == "constant" or not any(
            self._carries(o) or o in self.weights and self.weights[o].trained for o in node.operands if o is not None
        )  # fmt: skip
        for atom in self._inwards(chosen):
            cut = chosen.cuts.get(atom)
            if cut is None:
                letter = chosen.letters[atom]
                place = place.put(atom, N if no_grad and letter in (R, I) else letter, self.order)
                continue
            at = next((j for j, d in enumerate(r.type.dims) if d in cut.dims), None)
            letter = M if cut.kind == "most" else V if cut.kind == "own" else P
            if at is not None and atom in chosen.moved:
                place = place.inside(atom, at)
            else:
                place = place.put(atom, at if at is not None else letter, self.order)
        return place
