"""Types of tensors as the package spmd_types has them, and as our rules do."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ...lowering.placement.rules import Known, known
from ...lowering.placement.types import I, M, Mesh, N, P, Place, R, V


class Types:
    """The two ways to say where a tensor is. `axes` are spmd_types' axes of the factors of a mesh.

    spmd_types has no type of what is the largest over ranks (M), which is P there, and none for what each rank has of
    its own (V) in its global mode, which is told of no axis there.
    """

    def __init__(self, theirs: Any, mesh: Mesh, axes: dict[str, Any]) -> None:
        self.theirs, self.mesh, self.axes = theirs, mesh, axes
        self.atoms = {axis: atom for atom, axis in axes.items()}

    def letter(self, x: Tensor, atom: str) -> str | int:
        """The type of a tensor over a factor: the dim that is split, or a letter."""
        axis = self.axes[atom]
        spec = self.theirs.get_partition_spec(x)
        for dim, entry in enumerate(spec or ()):
            if entry is not None and axis in (entry if isinstance(entry, tuple) else (entry,)):
                return dim
        found = self.theirs.get_local_type(x).get(axis)
        return V if found is None else found.value

    def known(self, x: Tensor) -> Known:
        """The same as our rules have it."""
        splits: list[tuple[str, ...]] = [()] * x.dim()
        for dim, entry in enumerate(self.theirs.get_partition_spec(x) or ()):
            if entry is not None:
                splits[dim] = tuple(self.atoms[a] for a in (entry if isinstance(entry, tuple) else (entry,)))
        letters = {atom: str(self.letter(x, atom)) for atom in self.mesh.names()}
        return known(splits, letters, x.requires_grad, self.mesh)

    def stamp(self, x: Tensor, place: Place) -> Tensor:
        """A tensor with a type: itself, or a view where it has one already."""
        theirs = self.theirs
        if theirs.has_local_type(x):
            with theirs.no_typecheck():
                x = x.view_as(x)
        names = {R: theirs.R, N: theirs.R, I: theirs.I, P: theirs.P, M: theirs.P}
        types = {self.axes[a]: names[letter] for a, letter in place.letters if letter != V}
        entries = [None if not s else self.axes[s[0]] if len(s) == 1 else tuple(self.axes[a] for a in s)
                   for s in place.splits]  # fmt: skip
        types |= {self.axes[a]: theirs.V for s in place.splits for a in s}
        spec = theirs.PartitionSpec(*entries) if any(e is not None for e in entries) else None
        theirs.assert_type(x, types, partition_spec=spec)
        return x
