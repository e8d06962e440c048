"""The typing rules of the proof: what one use, or one conversion, makes of the places of its operands.

Each factor of the mesh is looked at alone. Shared with what chose the places are the op table and the reading of uses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...dsl.program import Dim, Node, Value
from ..graph import op_of
from .erase import Whole, axes_of, whole_dim
from .types import I, M, Mesh, N, P, Place, R, V, everywhere, legal
from .uses import Cut, cut_of, slots


class Unproved(Exception):
    """A rule does not hold: the value, the factor (or None) and what was expected and found."""

    def __init__(self, value: str, factor: str | None, expected: str, found: str):
        super().__init__(f"`{value}` over {factor}: expected {expected}, found {found}")
        self.value, self.factor, self.expected, self.found = value, factor, expected, found


@dataclass(frozen=True)
class Known:
    """Where a value is, as derived, and whether a gradient flows through it; without one R and I are N.

    `counted`, of a loss: the factors over which its places lie, so that their number is a sum over these.
    """

    place: Place
    carries: bool
    counted: frozenset[str] | None = None

    def on(self, atom: str) -> str | int:
        return self.place.on(atom)


def known(splits: Sequence[Sequence[str]], letters: Mapping[str, str], carries: bool, mesh: Mesh) -> Known:
    """With letters in the mesh's order, and without a difference that only a gradient makes."""
    held = {a for atoms in splits for a in atoms}
    found = tuple((a, N if not carries and letters[a] in (R, I) else letters[a]) for a in mesh.names() if a not in held)
    return Known(Place(tuple(map(tuple, splits)), found), carries)


def shown(what: str | int | None) -> str:
    """A type on one factor, as messages have it."""
    return "not split" if what is None else f"split along dim {what}" if isinstance(what, int) else str(what)


# --- conversions ----------------------------------------------------------------------------------


def converted(node: Node, have: Known, mesh: Mesh) -> Known:
    """What a conversion makes of a value. Raises `Unproved` where it is not that, or is no conversion."""
    kind, atoms, src, dst = (node.attr(x) for x in ("kind", "axes", "src", "dst"))
    if not atoms or len(set(atoms)) < len(atoms) or not set(atoms) <= set(mesh.names()):
        raise Unproved(node.name, None, "factors of the mesh, each once", str(atoms))
    if [*atoms] != sorted(atoms, key=mesh.names().index):
        raise Unproved(node.name, None, "factors in the order of the mesh", str(atoms))
    if legal(src, N if src == M else dst) != kind or not kind:
        raise Unproved(node.name, atoms[0], f"a conversion from {shown(src)}", f"{kind} to {shown(dst)}")
    for atom in atoms:
        at = have.on(atom)
        if at != src and not (at == N and src in (R, I)):
            raise Unproved(node.name, atom, f"a value that is {shown(src)}", shown(at))
    splits = [list(s) for s in have.place.splits]
    letters = dict(have.place.letters)
    if isinstance(src, int):
        if tuple(splits[src][-len(atoms) :]) != tuple(atoms):
            raise Unproved(node.name, atoms[0], "the innermost factors of the dim", "/".join(splits[src]))
        del splits[src][-len(atoms) :]
    if isinstance(dst, int):
        if dst >= len(splits):
            raise Unproved(node.name, atoms[0], f"a dim {dst}", f"{len(splits)} dims")
        splits[dst] += atoms
    carries = have.carries and src != M
    letters.update(dict.fromkeys(atoms, N if src == M or isinstance(dst, int) else dst))
    made = known(splits, letters, carries, mesh)
    return Known(made.place, carries, have.counted)


# --- uses -----------------------------------------------------------------------------------------


@dataclass
class Use:
    """One use with its whole twin: `axes[dim]` are the factors that split a whole dim here."""

    node: Node
    whole: Node
    of: Whole
    dims: Mapping[str, Dim]
    mesh: Mesh
    operands: list[Known | None]
    values: Mapping[str, Value]

    def results(self, rows: tuple[str, ...]) -> list[Known]:
        """Where the results are. `rows` are the factors that split the rows of a batch. Raises `Unproved`."""
        self.axes = self._axes(rows)
        op = op_of(self.node)
        self.slots = slots(self.whole, self.of)
        carries = not op.detached and any(k is not None and k.carries for k in self.operands)
        if not any(k is not None for k in self.operands):
            return [self._alone(r) for r in self.node.results]
        letters: dict[str, str] = {}
        cuts: dict[str, Cut] = {}
        for atom in self.mesh.names():
            found = self._on(atom)
            if isinstance(found, Cut):
                cuts[atom] = found
            else:
                letters[atom] = found
        self._parts(cuts)
        self._met(cuts, letters)
        counted = frozenset(a for a, cut in cuts.items() if cut.kind == "sum")
        before = next((k.counted for k in self.operands if k is not None and k.counted is not None), None)
        made = []
        for r, whole in zip(self.node.results, self.whole.results, strict=True):
            flows = carries and r.type.kind in ("real", "loss")
            place = self._result(r, whole, cuts, letters, flows)
            count = None if r.type.kind != "loss" else counted if before is None else before
            made.append(Known(place.place, place.carries, count))
        return made

    def _axes(self, rows: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
        """The factors of each whole dim, the same wherever the use has it but for what is read as a whole."""
        found: dict[str, tuple[str, ...]] = {}
        attended = set()
        op = op_of(self.node)
        for (formal, names), (_, wholes) in zip(self.node.bindings, self.whole.bindings, strict=True):
            for name, dim in zip(names, wholes, strict=True):
                if op.signature.role(formal.rstrip("0123456789")) == "attend":
                    attended.add(name)
                elif found.setdefault(dim, self.dims[name].axes) != self.dims[name].axes:
                    raise Unproved(self.node.name, None, f"one way to split `{dim}`", f"`{name}` and another")
        own = [d for o in self.node.operands if o is not None for d in self.values[o].type.dims]
        for name in [*own, *(d for r in self.node.results for d in r.type.dims)]:
            dim, axes = whole_dim(self.dims[name]), self.dims[name].axes
            if found.setdefault(dim, axes) != axes and name not in attended:
                raise Unproved(self.node.name, None, f"one way to split `{dim}`", f"`{name}` and another")
        if op.coordinates:  # what a rank knows of a sequence is that of its own rows
            for lead in [self.of.dims[d].lead for d in found]:
                for i, dim in enumerate(lead):
                    if found.get(dim, rows if i == 0 else ()) != (rows if i == 0 else ()):
                        raise Unproved(self.node.name, None, f"`{dim}` split as rows are", "/".join(found[dim]))
        return found

    def _alone(self, result: Value) -> Known:
        """Without operands: whole on every rank, but for the rows whose coordinates a rank knows."""
        axes = axes_of(result, self.dims)
        for name, atoms in zip(result.type.dims, axes, strict=True):
            leads = {x for d in result.type.dims for x in self.dims[d].lead}
            if atoms and not (op_of(self.node).coordinates and name in leads):
                raise Unproved(result.name, atoms[0], "not split", f"split along `{name}`")
        return known(axes, dict.fromkeys(self.mesh.names(), N), False, self.mesh)

    def _on(self, atom: str) -> str | Cut:
        """The rule, on one factor: the letter of the result, or how the use is cut."""
        at = [None if k is None else k.on(atom) for k in self.operands]
        where = f"operands {', '.join(shown(x) for x in at if x is not None)}"
        if M in at:
            raise Unproved(self.node.name, atom, "no largest of parts, which must meet first", where)
        if any(isinstance(x, int) for x in at):
            return self._cut(atom, at, where)
        if V in at:
            if not op_of(self.node).meets or any(x != V for x in at if x is not None):
                raise Unproved(self.node.name, atom, "an op in which ranks meet, given what each has", where)
            return V
        if P in at:
            if not self._is_linear(at):
                raise Unproved(self.node.name, atom, "partial sums in one linear group, R beside them", where)
            return P
        letters = {x for x, k in zip(at, self.operands, strict=True) if k is not None and k.carries}
        letters.discard(N)
        if len(letters) > 1:
            raise Unproved(self.node.name, atom, "all R or all I", where)
        return str(letters.pop()) if letters else N

    def _cut(self, atom: str, at: list[str | int | None], where: str) -> Cut:
        """Exactly one dim is cut, and every operand lies as that asks for."""
        first, place = next((s, x) for s, x in zip(self.slots, at, strict=True) if isinstance(x, int))
        assert first is not None
        dim = first[1][place][0]
        cut = cut_of(self.whole, self.of, dim, lambda a, b: self._together(a, b, atom))
        if cut is None or cut.kind == "lift":
            raise Unproved(self.node.name, atom, f"`{dim}` whole, which `{self.node.op}` needs", where)
        for i, (k, s) in enumerate(zip(self.operands, self.slots, strict=True)):
            if k is None or s is None:
                continue
            cuts = [j for j, (d, _) in enumerate(s[1]) if d in cut.dims and (i, d) not in cut.whole]
            if len(cuts) > 1:
                raise Unproved(self.node.name, atom, "one dim split", " and ".join(shown(j) for j in cuts))
            handed = s[0] in op_of(self.node).handed
            want = cuts[0] if cuts else P if s[0] in cut.mates else V if handed else R if k.carries else N
            if k.on(atom) != want:
                value = self.node.operands[i] or ""
                raise Unproved(self.node.name, atom, f"`{value}` to be {shown(want)}", shown(k.on(atom)))
        return cut

    def _together(self, first: str, other: Any, atom: str) -> str | None:
        """How grouped dims meet on a factor, read off the parts that are here."""
        mine = self.axes.get(first, ())
        if isinstance(other, tuple):
            before = self.mesh.size(mine[: mine.index(atom)]) if atom in mine else 1
            return "both" if other[1] % (before * self.mesh.size([atom])) == 0 else None
        theirs = self.axes.get(other, ())
        if mine[: len(theirs)] != theirs or atom not in mine:
            return None
        if atom in theirs:
            return "both"
        return "first" if self.of.dims[other].size == self.mesh.size(theirs) else None

    def _is_linear(self, at: list[str | int | None]) -> bool:
        """Whether partial sums go through: all of one linear group, nothing else of it, and R beside them."""
        op = op_of(self.node)
        if op.draws(self.node):
            return False
        partial = {i for i, x in enumerate(at) if x == P}
        for group in op.linear:
            inside = {i for i, s in enumerate(self.slots) if s is not None and s[0] in group}
            named = {s[0] for s in self.slots if s is not None}
            literal = any(self.node.attr(x) not in (None, 0) for x in group if x not in named)  # x + 1 is not linear
            others = [(x, k) for i, (x, k) in enumerate(zip(at, self.operands, strict=True)) if i not in partial]
            if inside == partial and not literal and all(k is None or x == (R if k.carries else N) for x, k in others):
                return True
        return False

    def _parts(self, cuts: Mapping[str, Cut]) -> None:
        """A setting that counts groups says how many a part has."""
        op = op_of(self.node)
        for name in dict.fromkeys(other for _, other in op.grouped):
            setting = op.setting(name)
            if setting is None:
                continue
            ranks = self.mesh.size(a for a, cut in cuts.items() if cut.parts == name)
            want, have = (n.attr(name, setting.default) for n in (self.whole, self.node))
            if have * ranks != want:
                raise Unproved(self.node.name, None, f"{want // ranks} {name} in a part", str(have))

    def _met(self, cuts: Mapping[str, Cut], letters: Mapping[str, str]) -> None:
        """Ranks meet along the factors over which each has something of its own, in the order of their rows."""
        if not op_of(self.node).meets:
            return
        met = tuple(a for a in self.mesh.names() if letters.get(a) == V or a in cuts and cuts[a].kind in ("own", "met"))
        if self.node.attr("axes") != met:
            have = str(self.node.attr("axes"))
            raise Unproved(self.node.name, next(iter(met), None), f"a meeting over {list(met)}", have)
        for dim in {d for cut in cuts.values() if cut.kind in ("own", "met") for d in cut.dims}:
            if self.axes[dim] != met:
                order = f"rows in the order of {list(met)}"
                raise Unproved(self.node.name, next(iter(met), None), order, f"`{dim}` otherwise")

    def _result(self, r: Value, whole: Value, cuts: Mapping[str, Cut], letters: dict[str, str], flows: bool) -> Known:
        """Split where a cut dim comes back, partial where it does not; what the type says must be that."""
        splits: list[set[str]] = [set() for _ in whole.type.dims]
        own = dict(letters)
        for atom, cut in cuts.items():
            at = [j for j, d in enumerate(whole.type.dims) if d in cut.dims]
            if len(at) > 1:
                raise Unproved(r.name, atom, "one dim split", " and ".join(shown(j) for j in at))
            if at:
                splits[at[0]].add(atom)
            else:
                own[atom] = M if cut.kind == "most" else V if cut.kind == "own" else P
        written = axes_of(r, self.dims)
        for name, want, have in zip(r.type.dims, splits, written, strict=True):
            if want != set(have):
                atom = next(iter(sorted(want ^ set(have), key=self.mesh.names().index)))
                raise Unproved(r.name, atom, "split" if atom in want else "not split", f"its dim is `{name}`")
        return known(written, own, flows, self.mesh)


def nothing(ndim: int, mesh: Mesh) -> Known:
    """Whole everywhere, without gradient."""
    return Known(everywhere(ndim, N, mesh.names()), False)

