"""One tensor of theirs into weights of ours, and back: reshapes and splits, no arithmetic, so bytes stay."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from ...dsl.checkpoint import Entry


def take_apart(entry: Entry, tensor: Tensor) -> dict[str, Tensor]:
    """Ours by name from a tensor of theirs of `entry.shape` (axes of length one aside)."""
    tensor = tensor.reshape(entry.shape)
    if entry.order:
        return _from_axes(entry, tensor)
    if len(entry.pieces) == 1:
        (piece,) = entry.pieces
        return {piece.name: tensor.reshape(piece.shape)}
    sizes = [p.stored[entry.axis] for p in entry.pieces]
    parts = tensor.split(sizes, entry.axis)
    return {p.name: part.reshape(p.shape) for p, part in zip(entry.pieces, parts, strict=True)}


def put_together(entry: Entry, ours: dict[str, Tensor]) -> Tensor:
    """Theirs from ours."""
    if entry.order:
        return _to_axes(entry, ours)
    parts = [ours[p.name].reshape(p.stored) for p in entry.pieces]
    return parts[0] if len(parts) == 1 else torch.cat(parts, entry.axis)


def _from_axes(entry: Entry, tensor: Tensor) -> dict[str, Tensor]:
    names = [n for n, _ in entry.dims]
    sizes = dict(entry.dims) | {"parts": len(entry.pieces)}
    full = tensor.reshape([sizes[n] for n in entry.order])
    if "parts" in entry.order:
        pieces = full.unbind(entry.order.index("parts"))
    else:
        pieces = (full,)
    rest = [n for n in entry.order if n != "parts"]
    return {p.name: part.permute([rest.index(n) for n in names]) for p, part in zip(entry.pieces, pieces, strict=True)}


def _to_axes(entry: Entry, ours: dict[str, Tensor]) -> Tensor:
    names = [n for n, _ in entry.dims]
    rest = [n for n in entry.order if n != "parts"]
    parts = [ours[p.name].permute([names.index(n) for n in rest]) for p in entry.pieces]
    full = torch.stack(parts, entry.order.index("parts")) if "parts" in entry.order else parts[0]
    return full.reshape(entry.shape)


def fits(entry: Entry, shape: tuple[int, ...]) -> bool:
    """Whether a shape is theirs; axes of length one never matter."""
    return [s for s in shape if s != 1] == [s for s in entry.shape if s != 1] and prod(shape) == prod(entry.shape)
