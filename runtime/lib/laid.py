"""A module that is one rank's part of a model: its weights as parts of whole ones, and what a step owes other ranks.

A weight's entry in `Model.stored` is (axes that split each of its dims, axes over which its gradient is still a sum).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .linear import named_logical_parameters
from .mesh import Mesh
from .spmd import I, P, all_reduce


class Laid(NamedTuple):
    """A weight by its path: what holds it, a view with the spec's dims, and how it lies on the mesh."""

    path: str
    holder: nn.Parameter
    view: Tensor
    splits: tuple[tuple[str, ...], ...]
    sync: tuple[str, ...]


def laid_parameters(model: Any) -> Iterator[Laid]:
    """Every weight of a model, each tensor once."""
    seen: set[int] = set()
    for path, holder, view in named_logical_parameters(model):
        if view.data_ptr() not in seen or not view.numel():
            seen.add(view.data_ptr())
            splits, sync = entry(model.stored, path)
            yield Laid(path, holder, view, splits, sync)


def entry(table: Mapping[str, Any], path: str) -> Any:
    """What a table says of a path: by its name, or by the pattern with `*` for numbers."""
    return table[path if path in table else ".".join("*" if p.isdigit() else p for p in path.split("."))]


def part(whole: Tensor, splits: Sequence[Sequence[str]], mesh: Mesh) -> Tensor:
    """This rank's part of a tensor, a view."""
    for dim, axes in enumerate(splits):
        if axes:
            size = whole.shape[dim] // mesh.size(*axes)
            whole = whole.narrow(dim, mesh.place(*axes) * size, size)
    return whole


def whole_shape(shape: Sequence[int], splits: Sequence[Sequence[str]], mesh: Mesh) -> tuple[int, ...]:
    """The shape of what a part is of."""
    return tuple(n * mesh.size(*axes) if axes else n for n, axes in zip(shape, splits, strict=True))


@torch.no_grad()
def whole(x: Tensor, splits: Sequence[Sequence[str]], mesh: Mesh) -> Tensor:
    """The whole tensor, on every rank."""
    for dim, axes in enumerate(splits):
        if axes:
            x = mesh[tuple(axes)].all_gather_into(x.contiguous(), dim)
    return x


@torch.no_grad()
def take_whole(model: Any, tensors: Mapping[str, Tensor]) -> None:
    """Fill every weight and buffer with its part of a whole tensor. Raises KeyError for one that is not given."""
    for laid in laid_parameters(model):
        laid.view.copy_(part(tensors[laid.path], laid.splits, model.mesh))
    own = dict(model.named_buffers())
    for name, buffer in own.items():
        if name in tensors:
            buffer.copy_(tensors[name])


@torch.no_grad()
def sync_gradients(model: Any) -> None:
    """Make the sums that gradients still are: once a step, all of the same axes in one message."""
    waiting: dict[tuple[Any, ...], list[nn.Parameter]] = {}
    for laid in laid_parameters(model):
        if laid.sync and laid.holder.grad is not None:
            waiting.setdefault((laid.sync, laid.holder.grad.dtype), []).append(laid.holder)
    if model.pipe is not None:
        _tie(model)
    for (axes, _), holders in waiting.items():
        flat = torch.cat([h.grad.reshape(-1) for h in holders if h.grad is not None])
        summed = all_reduce(flat, model.mesh[axes], src=P, dst=I)
        for holder, piece in zip(holders, summed.split([h.numel() for h in holders]), strict=True):
            assert holder.grad is not None
            holder.grad.copy_(piece.view_as(holder.grad))


def _tie(model: Any) -> None:
    """The gradient of a weight that several stages have is the sum over them; the other ranks add nothing."""
    mine = {laid.path: laid.holder for laid in laid_parameters(model)}
    for path, like in model.tied.items():
        holder = mine.get(path)
        own = torch.zeros_like(like, device=model.device) if holder is None or holder.grad is None else holder.grad
        summed = all_reduce(own, model.mesh[model.pipe.axis], src=P, dst=I)
        if holder is not None:
            holder.grad = summed


@torch.no_grad()
def gradient_norm(model: Any) -> Tensor:
    """The norm of the whole gradient, on every rank: squares of parts are summed over the axes that split them."""
    squares: dict[tuple[str, ...], list[Tensor]] = {}
    pipe = model.pipe
    for laid in laid_parameters(model):
        counts = pipe is None or pipe.stages_of(laid.path)[0] % pipe.size == model.mesh.place(pipe.axis)
        if laid.holder.grad is not None and counts:
            axes = tuple(a for a in model.axes if any(a in s for s in laid.splits))
            squares.setdefault(axes, []).append(laid.holder.grad.double().square().sum())
    total = torch.zeros((), dtype=torch.float64, device=model.device)
    for axes, found in squares.items():
        own = torch.stack(found).sum()
        total = total + (all_reduce(own, model.mesh[axes], src=P, dst=I) if axes else own)
    return (total if pipe is None else all_reduce(total, model.mesh[pipe.axis], src=P, dst=I)).sqrt()


@torch.no_grad()
def global_sums(model: Any, sums: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The sum of each loss over all ranks, 0-d fp64, on every rank: one whose stages state no loss cannot know in which
    dtype others do."""
    found = {}
    for label, axes in model.partial.items():
        nothing = torch.zeros((), dtype=torch.float64, device=model.device)
        own = sums[label].detach().double() if label in sums else nothing
        if model.pipe is not None:
            axes = (*axes, model.pipe.axis)
        for axis in axes:
            own = all_reduce(own, model.mesh[axis], src=P, dst=I)
        found[label] = own
    return found


@torch.no_grad()
def global_counts(model: Any, counts: Mapping[str, Any]) -> dict[str, Tensor]:
    """How many places each loss is a sum over, on all ranks."""
    found = {}
    for label, count in counts.items():
        axes = model.partial.get(label, ())
        own = torch.as_tensor(count, dtype=torch.int64)
        found[label] = all_reduce(own, model.mesh[axes], src=P, dst=I) if axes else own
    return found
