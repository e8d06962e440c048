"""One tensor of theirs into weights of ours, and back: reshapes and splits, no arithmetic, so bytes stay."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import prod

import torch
from torch import Tensor

from ...dsl.checkpoint import Entry, Piece


def take_apart(entry: Entry, tensor: Tensor) -> Iterator[tuple[Piece, Tensor]]:
    """Ours, piece by piece, from a tensor of theirs of `entry.shape` (axes of length one aside)."""
    tensor = tensor.reshape(entry.shape)
    if entry.order:
        yield from zip(entry.pieces, _from_axes(entry, tensor), strict=True)
    elif len(entry.pieces) == 1:
        yield entry.pieces[0], tensor.reshape(entry.pieces[0].shape)
    else:
        parts = tensor.split([p.stored[entry.axis] for p in entry.pieces], entry.axis)
        for piece, part in zip(entry.pieces, parts, strict=True):
            yield piece, part.reshape(piece.shape)


def put_together(entry: Entry, get: Callable[[Piece], Tensor]) -> Tensor:
    """Theirs from ours."""
    ours = [get(p) for p in entry.pieces]
    if entry.order:
        return _to_axes(entry, ours)
    parts = [t.reshape(p.stored) for p, t in zip(entry.pieces, ours, strict=True)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, entry.axis)


def _from_axes(entry: Entry, tensor: Tensor) -> list[Tensor]:
    names = [n for n, _ in entry.dims]
    sizes = dict(entry.dims) | {"parts": len(entry.pieces)}
    full = tensor.reshape([sizes[n] for n in entry.order])
    pieces = full.unbind(entry.order.index("parts")) if "parts" in entry.order else (full,)
    rest = [n for n in entry.order if n != "parts"]
    return [part.permute([rest.index(n) for n in names]) for part in pieces]


def _to_axes(entry: Entry, ours: list[Tensor]) -> Tensor:
    names = [n for n, _ in entry.dims]
    rest = [n for n in entry.order if n != "parts"]
    parts = [t.permute([names.index(n) for n in rest]) for t in ours]
    full = torch.stack(parts, entry.order.index("parts")) if "parts" in entry.order else parts[0]
    return full.reshape(entry.shape)


def fits(entry: Entry, shape: tuple[int, ...]) -> bool:
    """Whether a shape is theirs; axes of length one never matter."""
    return [s for s in shape if s != 1] == [s for s in entry.shape if s != 1] and prod(shape) == prod(entry.shape)
