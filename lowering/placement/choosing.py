"""How one use is computed on each factor of the mesh: along which dim it is cut, or on what type it stands."""

from __future__ import annotations

from typing import Any

from ...dsl.diagnostics import InternalError
from ...dsl.program import Node
from ..graph import op_of
from .growing import View
from .placing import Placing
from .types import I, M, N, P, R, V
from .uses import Cut, cut_of, slots
from .values import Chosen


class Choosing(Placing):
    """Greedy, in the layout's order: a cost is only needed where a layout leaves a choice."""

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

    def _choose(self, node: Node) -> Chosen:
        chosen = Chosen()
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
                cut = cut_of(node, View(self), dim, lambda a, b, atom=atom: self._together(node, a, b, atom))
                if cut is not None and not (cut.kind == "sum" and self._meets_once(letters)):
                    chosen.cuts[atom] = cut
                    break
            else:
                grads = [letters[o] for o in operands if self._carries(o) and o not in self.weights]
                inside = not grads and any(o in self.weights for o in operands)
                chosen.letters[atom] = N if is_free else R if R in grads or inside and self._block_is_r(atom) else I
        if op.draws(node) and any(x == P for x in chosen.letters.values()):
            raise InternalError(f"{node.name}: a random op of partial sums")
        return chosen

    def _meets_once(self, letters: dict[str, str]) -> bool:
        """Whether a sum that ranks make of partial sums is better made of whole operands: one message for each, where
        parts of them are one forward and one back."""
        return any(x == P for x in letters.values()) and all(x in (P, I, M, N) for x in letters.values())

    def _rows_of(self, node: Node) -> tuple[str, ...]:
        """What the coordinates of a sequence vary along: a rank knows those of its rows only."""
        if not op_of(node).coordinates or any(o is not None for o in node.operands):
            return ()
        return tuple(x for r in node.results for d in r.type.dims for x in self.whole(d).lead if x in r.type.dims)

    def _block_is_r(self, atom: str) -> bool:
        """Whether values that only weights make are R here: inside a block that splits something on this factor."""
        return self.graph.name not in self.s.assignment.outside and self.s.splits_on(self.graph.name, atom)

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
        if not have_p or op.draws(node) or op.weights or any(
            f != "D" for o in op.signature.operands for f in [x.name for x in o.formals]
        ) or op.signature.role("D") != "parallel":  # fmt: skip
            return False
        named = [s[0] if s else None for s in slots(node, View(self))]
        for group in op.linear:
            inside = [o for o, name in zip(node.operands, named, strict=True) if o is not None and name in group]
            outside = [o for o, name in zip(node.operands, named, strict=True) if o is not None and name not in group]
            literal = any(node.attr(name) not in (None, 0) for name in group)  # x + 1 is not linear
            if set(inside) == have_p and not literal and all(letters[o] in (R, N) for o in outside):
                return True
        return False
