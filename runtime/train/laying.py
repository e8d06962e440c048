"""Where the tensors of one rank's part of a model lie in the whole ones, and which of them it saves."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from ..lib import Model
from ..lib.laid import laid_parameters, whole_shape
from ..lib.mesh import Mesh


class Box(NamedTuple):
    """A piece of a tensor: where it begins, its shape, and the shape of the whole."""

    offsets: tuple[int, ...]
    shape: tuple[int, ...]
    whole: tuple[int, ...]


class Piece(NamedTuple):
    """What a rank saves of a tensor. It is contiguous and on the CPU."""

    tensor: Tensor
    box: Box


def is_first_of(path: str, model: Model) -> bool:
    """Whether this rank has a tensor as the first of the stages that have it: there it is counted and saved."""
    if model.pipe is None:
        return True
    assert model.mesh is not None
    return model.pipe.stages_of(path)[0] in model.pipe.of(model.mesh.place(model.pipe.axis))


class Laying:
    """Where the tensors of one rank's part of a model lie in the whole ones, by their paths in the spec."""

    def __init__(self, model: Model):
        self.model, self.mesh = model, model.mesh or Mesh({})
        laid = laid_parameters(model) if model.mesh is not None else ()
        splits = {x.view.data_ptr(): x.splits for x in laid if x.view.numel()}
        self.tensors: dict[str, Tensor] = dict(model.state_dict())
        self.splits = {n: splits.get(t.data_ptr(), ((),) * t.dim()) for n, t in self.tensors.items()}

    def box(self, path: str) -> Box:
        """The piece that is here."""
        shape, splits = tuple(self.tensors[path].shape), self.splits[path]
        offsets = tuple(self.mesh.place(*axes) * n if axes else 0 for n, axes in zip(shape, splits, strict=True))
        return Box(offsets, shape, whole_shape(shape, splits, self.mesh))

    def pieces(self, tensors: Iterable[tuple[str, str, Tensor]]) -> dict[str, Piece]:
        """Of (key, path, tensor), the same on all ranks of a stage, what this one saves. Ranks that have the same take
        turns."""
        found = {}
        staged = (self.model.pipe.axis,) if self.model.pipe is not None else ()
        for i, (key, path, tensor) in enumerate(tensors):
            held = {a for axes in self.splits[path] for a in axes} if tensor.dim() else set()
            alike = tuple(a for a in self.mesh.axes if a not in held and a not in staged)
            if is_first_of(path, self.model) and self.mesh.place(*alike) == i % self.mesh.size(*alike):
                box = self.box(path) if tensor.dim() else Box((), (), ())
                copy = tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
                found[key] = Piece(copy, box)
        return found
