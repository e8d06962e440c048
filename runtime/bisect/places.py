"""Values on a mesh: what one rank has of a value that all are to have, and the value that ranks have together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ...lowering.placement.types import I, M, N, P, Place, R
from ..lib.laid import part
from ..lib.mesh import Mesh

DUAL = {R: P, I: I, P: R}
"""What the gradient of a value is, over an axis along which the value is that."""


def dual(place: Place) -> Place | None:
    """Where the gradient of a value is; None where it has none."""
    if not place.has_gradient:
        return None
    return Place(place.splits, tuple((a, DUAL[letter]) for a, letter in place.letters))


def is_known(place: Place) -> bool:
    """Whether ranks have one value together: not where each has one of its own."""
    return all(letter in (R, I, P, M, N) for _, letter in place.letters)


def share(x: Tensor, place: Place, mesh: Mesh) -> Tensor:
    """This rank's part of a value; of a sum over ranks, the first brings all."""
    mine = part(x, place.splits, mesh)
    rest = any(mesh.place(a) for a, letter in place.letters if letter == P)
    return torch.zeros_like(mine) if rest else mine


def together(parts: Sequence[Tensor], place: Place, axes: Mapping[str, int]) -> list[Tensor]:
    """The whole value, fp64, as the ranks have it: once for each set of ranks that have all of it. `parts` by rank."""
    letters = dict(place.letters)
    joined = {a for atoms in place.splits for a in atoms} | {a for a, letter in letters.items() if letter in (P, M)}
    largest = any(letter == M for letter in letters.values())
    found: dict[tuple[int, ...], Tensor] = {}
    for rank, x in enumerate(parts):
        mesh = Mesh(dict(axes), rank)
        group = tuple(at for axis, at in mesh.coordinates.items() if axis not in joined)
        if group not in found:
            sizes = [n * mesh.size(*atoms) for n, atoms in zip(x.shape, place.splits, strict=True)]
            found[group] = torch.full(sizes, float("-inf") if largest else 0.0, dtype=torch.float64)
        here = part(found[group], place.splits, mesh)
        if largest:
            torch.maximum(here, x.double(), out=here)
        else:
            here += x.double()
    return list(found.values())
