"""Placement types: on each axis of a mesh a value is split along a dim, or one of six letters.

    R  replicated: each rank has the value; the gradient of each is a part of the whole gradient (P)
    I  invariant: each rank has the value, and each has the whole gradient
    P  partial: the value is the sum over ranks; each rank has the whole gradient (R)
    M  partial: the value is the largest over ranks; no gradient
    V  varying: each rank has a value of its own, which others may be told (the state that a scan hands over)
    N  replicated, and no gradient flows

R, I, P and V, and what becomes of their gradients, are those of `spmd_types` (Meta, 2026).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, takewhile

from ...dsl.diagnostics import InternalError

R, I, P, M, V, N = "R", "I", "P", "M", "V", "N"  # noqa: E741 (the letters of the literature)
LETTERS = (R, I, P, M, V, N)


@dataclass(frozen=True)
class Atom:
    """A factor of an axis of the mesh: `tensor.0` of `tensor`, or the whole axis under its own name."""

    name: str
    axis: str
    size: int


@dataclass(frozen=True)
class Mesh:
    """The factors of all axes with more than one rank, the outermost first."""

    atoms: tuple[Atom, ...]

    def names(self, axis: str | None = None) -> tuple[str, ...]:
        """The factors of an axis, or of all."""
        return tuple(a.name for a in self.atoms if axis in (None, a.axis))

    def axis(self, atom: str) -> str:
        """The axis that a factor is of."""
        return next(a.axis for a in self.atoms if a.name == atom)

    def size(self, atoms: Iterable[str]) -> int:
        """How many ranks some factors have together."""
        total, sizes = 1, {a.name: a.size for a in self.atoms}
        for atom in atoms:
            total *= sizes[atom]
        return total

    def shown(self, atoms: Sequence[str]) -> str:
        """Factors as a user knows them: a whole axis by its name."""
        if len({self.axis(a) for a in atoms}) == 1 and tuple(atoms) == self.names(self.axis(atoms[0])):
            return self.axis(atoms[0])
        return "/".join(atoms)


@dataclass(frozen=True)
class Place:
    """Where a value is: for each of its dims the factors that split it (outer first), a letter for every other
    factor of the mesh."""

    splits: tuple[tuple[str, ...], ...]
    letters: tuple[tuple[str, str], ...] = ()

    def on(self, atom: str) -> str | int:
        """The place of the dim that a factor splits, else its letter."""
        for i, atoms in enumerate(self.splits):
            if atom in atoms:
                return i
        return dict(self.letters)[atom]

    def letter(self, atom: str) -> str:
        """S, or the letter."""
        found = self.on(atom)
        return "S" if isinstance(found, int) else found

    def put(self, atom: str, what: str | int, order: Sequence[str]) -> Place:
        """The same, but on one factor; `order` is that of the mesh."""
        splits = [tuple(a for a in atoms if a != atom) for atoms in self.splits]
        letters = {a: x for a, x in self.letters if a != atom}
        if isinstance(what, int):
            splits[what] = tuple(sorted((*splits[what], atom), key=order.index))
        else:
            letters[atom] = what
        return Place(tuple(splits), tuple(sorted(letters.items(), key=lambda item: order.index(item[0]))))

    def inside(self, atom: str, dim: int) -> Place:
        """The same, but split along a dim inside of all that splits it already."""
        splits = [tuple(a for a in atoms if a != atom) for atoms in self.splits]
        splits[dim] = (*splits[dim], atom)
        return Place(tuple(splits), tuple((a, x) for a, x in self.letters if a != atom))

    @property
    def has_gradient(self) -> bool:
        return all(x not in (N, M) for _, x in self.letters)


def everywhere(ndim: int, letter: str, atoms: Iterable[str]) -> Place:
    """The place of a value that is one letter on all factors."""
    return Place(((),) * ndim, tuple((a, letter) for a in atoms))


@dataclass(frozen=True)
class Step:
    """One conversion over some factors of one axis: a collective, or something a rank does alone (`convert`).

    src, dst: a letter, or the place of the dim that is split.
    """

    kind: str
    atoms: tuple[str, ...]
    src: str | int
    dst: str | int

    @property
    def communicates(self) -> bool:
        """Whether it sends anything, forward or backward."""
        return self.kind != "convert" or (self.src, self.dst) == (I, R) or (self.src == I and isinstance(self.dst, int))


_KINDS = {
    (I, R): "convert", (P, I): "all_reduce", (P, R): "all_reduce", (P, N): "all_reduce", (P, "S"): "reduce_scatter",
    ("S", R): "all_gather", ("S", I): "all_gather", ("S", N): "all_gather", (I, "S"): "convert", (R, "S"): "convert",
    (N, "S"): "convert", (R, I): "convert", (R, P): "convert", (I, P): "convert", (N, P): "convert",
    ("S", "S"): "all_to_all", (M, N): "all_max",
}  # fmt: skip
FREE = {(N, R), (N, I), (R, N), (I, N)}
"""Changes of name only: a value without gradient is as well replicated as invariant."""


def legal(src: str | int, dst: str | int) -> str | None:
    """The kind of the conversion between two types, "" for one of name only, None where there is none."""
    key = tuple("S" if isinstance(x, int) else x for x in (src, dst))
    return "" if key in FREE or (key[0] == key[1] and src == dst) else _KINDS.get((key[0], key[1]))


def steps(have: Place, want: Place, mesh: Mesh) -> tuple[Step, ...]:
    """How one place becomes another: gathers from the inside out, then sums, then splits from the outside in.

    Factors of one axis that change alike are one collective. Raises InternalError where there is no way.
    """
    order = mesh.names()
    made: list[Step] = []
    now, back = have, want
    for i, atoms in enumerate(want.splits):
        before = have.splits[i] if i < len(have.splits) else ()
        stay = len([*takewhile(lambda pair: pair[0] == pair[1], zip(before, atoms, strict=False))])
        again = [a for a in atoms[stay:] if a in before]
        moved = [a for a in atoms[stay:] if a not in before and isinstance(have.on(a), int)]
        added = [a for a in atoms[stay:] if a not in before]
        alike = moved == added and len({(mesh.axis(a), have.on(a)) for a in moved}) == 1
        # What is split inside of what comes later is whole first, then all in order.
        if again or moved and not (alike and stay == len(before)):
            for atom in added:
                back = back.put(atom, have.on(atom), order)
            for atom in (*again, *moved):
                back = back.put(atom, R if have.has_gradient else N, order)
    gathered = [a for atoms in have.splits for a in reversed(atoms) if now.on(a) != back.on(a)]
    inwards = _inwards(order, want)
    other = [a for a in inwards if not isinstance(now.on(a), int) and now.on(a) != back.on(a)]
    for target, todo in ((back, [*gathered, *other]), (want, inwards)):
        for atom in todo:
            src, dst = now.on(atom), target.on(atom)
            if src == dst:
                continue
            if src == M and dst != N:
                made.append(Step("all_max", (atom,), M, N))
                now, src = now.put(atom, N, order), N
            kind = legal(src, dst)
            if kind is None:
                raise InternalError(f"no conversion from {src} to {dst} on {atom}")
            if kind:
                made.append(Step(kind, (atom,), R if src == N else src, R if dst == N else dst))
            now = now.put(atom, dst, order)
    return tuple(_merged(made, mesh))


def _inwards(order: Sequence[str], want: Place) -> list[str]:
    """The factors as the mesh has them, but of those that split one dim the outer ones first."""
    found = list(order)
    for atoms in want.splits:
        for place, atom in zip(sorted(map(found.index, atoms)), atoms, strict=True):
            found[place] = atom
    return found


def _merged(found: list[Step], mesh: Mesh) -> Iterator[Step]:
    """Neighbouring steps of one kind on factors of one axis are one."""
    for (kind, src, dst, _), group in groupby(found, key=lambda s: (s.kind, s.src, s.dst, mesh.axis(s.atoms[0]))):
        atoms = tuple(sorted((a for s in group for a in s.atoms), key=mesh.names().index))
        yield Step(kind, atoms, src, dst)
