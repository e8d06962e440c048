"""Heads for positions: a use that needs more of a sequence than a rank has may be cut along another dim instead.

Its operands, split along the sequence, are brought to be split along that dim, and its results back: one all_to_all for
each (DeepSpeed Ulysses, Jacobs et al. 2023). It is chosen where the layout says so, or where it moves fewer bytes.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from fractions import Fraction
from typing import Any

from ...dsl.diagnostics import InternalError, fail
from ...dsl.program import TOKENS, Node, Type
from ...dsl.ways import Way
from ..graph import op_of
from .choosing import Choosing
from .exchanges import exchangeable
from .growing import View
from .types import Place, Step, steps
from .uses import Cut, cut_of, runs_along, slots
from .values import Chosen

Moved = Counter[tuple[str, ...]]
"""Values that a rank is sent, by the dims of unknown size that they are counted for: 24 a (batch, seq)."""


class Exchanging(Choosing):
    """What was chosen in the layout's order, and what may take its place. What the layout says of exchanges holds for
    the axes that it splits the sequence over in this block; over others, that split it between blocks, bytes decide."""

    def _choose(self, node: Node) -> Chosen:
        chosen = self._stayed(node, super()._choose(node))
        way = self.told.get(node.name)
        for axis in dict.fromkeys(map(self.mesh.axis, self.order)):
            atoms = [a for a in self.mesh.names(axis) if a in chosen.cuts]
            atoms = [a for a in atoms if runs_along(node, View(self), chosen.cuts[a])]
            if not atoms:
                continue
            here = way if all(a in self.mine.get(d, ()) for a in atoms for d in chosen.cuts[a].dims) else None
            if way is not None and way.kind == "ring":
                chosen = self._lifting(chosen, atoms, node)
            elif here is None or here.kind == "exchange":
                chosen = self._exchanged(node, chosen, axis, atoms, here)
        return chosen

    def _lifting(self, chosen: Chosen, atoms: list[str], node: Node) -> Chosen:
        """A use that reads a sequence as a whole is taken apart, if its room says how. Raises `not-built-yet`."""
        for dim in (d for a in atoms if chosen.cuts[a].whole for d in chosen.cuts[a].dims if self.whole(d).sequence):
            if self.whole(dim).clock != TOKENS:
                raise fail("not-built-yet", f"a ring along `{dim}` is not built yet", self.told[node.name].span,
                           "only along the tokens of the model's first input", help="`all_gather` is")  # fmt: skip
        lifted = {a: replace(chosen.cuts[a], kind="lift") for a in atoms if op_of(node).lift and chosen.cuts[a].whole}
        return replace(chosen, cuts={**chosen.cuts, **lifted})

    def _stayed(self, node: Node, chosen: Chosen) -> Chosen:
        """Pointwise on what was moved is where that is: between two uses of it nothing is moved twice."""
        op = op_of(node)
        operands = [o for o in node.operands if o is not None]
        formals = {f.name for o in op.signature.operands for f in o.formals}
        if op.weights or not operands or any(o not in self.moved for o in operands):
            return chosen
        if formals != {"D"} or op.signature.role("D") != "parallel":
            return chosen
        cuts, moved = dict(chosen.cuts), []
        for atom in self.order:
            dims = {self.values[o].type.dims[at] for o in operands if isinstance(at := self.places[o].on(atom), int)}
            if len(dims) == 1 and atom not in self.mine.get(dim := dims.pop(), ()):
                cut = cut_of(node, View(self), dim, lambda a, b, atom=atom: self._together(node, a, b, atom))
                if cut is not None and cut.kind == "parallel":
                    cuts[atom] = cut
                    moved.append(atom)
        letters = {a: x for a, x in chosen.letters.items() if a not in moved}
        return replace(chosen, cuts=cuts, letters=letters, moved=tuple(moved), why=self.moved[operands[0]])

    def _exchanged(self, node: Node, chosen: Chosen, axis: str, atoms: list[str], way: Way | None) -> Chosen:
        """The best of what was chosen and an exchange along any dim, or the one that the layout names."""
        could = [d for d in exchangeable(node) if self.whole(d).size is not None]
        dims = [d for d in could if way is None or d in way.dims]
        made = [other for d in dims if (other := self._along(node, chosen, atoms, d)) is not None]
        if way is not None:
            if dims and not made:
                raise InternalError(f"{node.name}: no exchange over {axis}, which the layout was checked for")
            return replace(made[0], why=f"{axis}: heads for positions, as the layout says") if made else chosen
        best, least, why = chosen, (gathered := self._moved(node, chosen, chosen)), ""
        for other in made:
            moved = self._moved(node, other, chosen)
            if _less(moved, least):
                best, least = other, moved
                why = f"{axis}: heads for positions, {_shown(moved)} instead of {_shown(gathered)}"
            elif best is chosen and set(moved) == set(gathered):
                why = f"{axis}: {_shown(gathered)}, where heads for positions are {_shown(moved)}"
        return replace(best, why="; ".join(x for x in (chosen.why, why) if x))

    def _along(self, node: Node, chosen: Chosen, atoms: list[str], dim: str) -> Chosen | None:
        """The same use, split along a dim over some factors, inside of what splits it already."""
        axes: dict[str, tuple[str, ...]] = {}
        for atom in (a for a in self._inwards(chosen) if a in chosen.cuts and a not in atoms):
            for d in chosen.cuts[atom].dims:
                axes[d] = (*axes.get(d, ()), atom)

        def together(first: str, other: Any) -> str | None:
            mine, theirs = axes.get(first, ()), () if isinstance(other, tuple) else axes.get(other, ())
            if isinstance(other, tuple):
                return "both" if other[1] % (self.mesh.size(mine) * self.mesh.size([atom])) == 0 else None
            left = (self.whole(other).size or 0) // self.mesh.size(theirs)
            if mine == theirs and left % self.mesh.size([atom]) == 0:
                return "both"
            return "first" if left == 1 and mine[: len(theirs)] == theirs else None

        cuts: dict[str, Cut] = {}
        for atom in atoms:
            cut = cut_of(node, View(self), dim, together)
            if cut is None or cut.kind != "parallel" or cut.whole or cut.parts:
                return None
            for d in cut.dims:
                axes[d] = (*axes.get(d, ()), atom)
                if (self.whole(d).size or 0) % self.mesh.size(axes[d]):
                    return None
            cuts[atom] = cut
        return replace(chosen, cuts={**chosen.cuts, **cuts}, moved=(*chosen.moved, *atoms))

    # --- what it costs ----------------------------------------------------------------------------

    def _moved(self, node: Node, chosen: Chosen, around: Chosen) -> Moved:
        """What a rank is sent for a use, operands and results: what is around it has these where `around` says."""
        found: Moved = Counter()
        for i, (name, slot) in enumerate(zip(node.operands, slots(node, View(self)), strict=True)):
            if name is not None and name not in self.weights:
                want = self._wanted(i, name, slot, chosen, node)
                self._add_steps(found, self.values[name].type, self.places[name], want)
        for r in node.results:
            self._add_steps(found, r.type, self._result(r, chosen, node), self._result(r, around, node))
        return found

    def _add_steps(self, found: Moved, kind: Type, have: Place, want: Place) -> None:
        now = have
        for step in steps(have, want, self.mesh):
            size, unknown = Fraction(1), []
            for dim, atoms in zip(kind.dims, now.splits, strict=True):
                known = self.whole(dim).size
                unknown += [dim] if known is None else []
                size = size * (known or 1) / self.mesh.size(atoms)
            found[tuple(unknown)] += size * _share(step, self.mesh.size(step.atoms))  # type: ignore[assignment]
            now = self._behind_step(now, step, want)


def _share(step: Step, ranks: int) -> Fraction:
    """What a rank is sent of one collective, as a share of what it puts in."""
    part = Fraction(ranks - 1, ranks)
    return {"all_gather": Fraction(ranks - 1), "all_to_all": part, "reduce_scatter": part,
            "all_reduce": 2 * part}.get(step.kind, Fraction(0))  # fmt: skip


def _less(one: Moved, other: Moved) -> bool:
    """Whether it is less, whatever the sizes are that nobody knows yet."""
    return one != other and all(one[k] <= other[k] for k in {*one, *other})


def _shown(moved: Moved) -> str:
    """`24 values a (batch, seq)`."""
    return " and ".join(f"{float(n):g} values a ({', '.join(k)})" for k, n in sorted(moved.items()) if n) or "nothing"
