"""Conversions between what a tensor means on the ranks of a group, with the gradients that follow from the meanings.

Along a group a tensor is of one type. Let x_k be what rank k has, and X the value that is meant:

    R     replicated    X = x_k for every k; its gradient is P, for each rank goes on with X in a way of its own
    I     invariant     X = x_k for every k; its gradient is I, for all ranks go on with X in the same way
    P     partial       X = sum_k x_k;       its gradient is R
    V     varying       X = stack_k x_k;     its gradient is V
    S(d)  shard         X = x_k joined along dim d, by k; its gradient is S(d)

Every conversion here is linear and keeps X (but for `reinterpret`, which keeps x_k), so its gradient is its transpose:

    all_reduce      P -> R      the sum                     gradient: the sum
                    P -> I      the sum                               as it is
    all_gather      S(d) -> R   join                                  reduce and scatter; of weights in fp32 at least
                    S(d) -> I   join                                  own part
    reduce_scatter  P -> S(d)   the sum's own part                    join
    all_to_all      S(i) -> S(j)                                      S(j) -> S(i)
    convert         I -> R      as it is                              the sum
                    R -> I      as it is                              zero on all ranks but the first
                    R -> S(d)   own part                              own part, zero elsewhere
                    I -> S(d)   own part                              join
                    S(d) -> P   own part, zero elsewhere              own part
                    R -> P      zero on all ranks but the first       the same
                    I -> P      zero on all ranks but the first       as it is
    reinterpret     V -> P, R -> V, R -> P   as it is                 as it is
                    I -> V, I -> P           as it is                 the sum

V stands wherever S(d) does, and then the part of a rank is a row of the first dim. Names, types and meanings are those
of the package spmd_types (Meta, 0.3); it can check a program that is written with these.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

from .mesh import Group, named
from .regather import note_gathered

__all__ = ["I", "P", "R", "S", "V", "all_gather", "all_max", "all_reduce", "all_to_all", "convert", "reduce_scatter"]
__all__ += ["reinterpret"]


class Type(Enum):
    """What a tensor means along a group, where no dim is split."""

    R = "R"
    I = "I"  # noqa: E741
    P = "P"
    V = "V"

    def __repr__(self) -> str:
        return self.value


@dataclass(frozen=True)
class S:
    """Split along `dim`; a negative one counts from the end."""

    dim: int

    def __repr__(self) -> str:
        return f"S({self.dim})"


R, I, P, V = Type.R, Type.I, Type.P, Type.V  # noqa: E741
Placement = Type | S


def all_reduce(x: Tensor, group: Group, *, src: Placement = P, dst: Placement) -> Tensor:
    """The sum over the ranks: P -> R or I."""
    return _convert("all_reduce", x, group, src, dst)


def all_gather(x: Tensor, group: Group, *, src: Placement = V, dst: Placement) -> Tensor:
    """The whole: S(d) -> R or I joins along d; V -> R or I makes a first dim, [...] -> [ranks, ...]."""
    return _convert("all_gather", x, group, src, dst)


def reduce_scatter(x: Tensor, group: Group, *, src: Placement = P, dst: Placement = V) -> Tensor:
    """A part of the sum over the ranks: P -> S(d), or P -> V, [ranks, ...] -> [...]."""
    return _convert("reduce_scatter", x, group, src, dst)


def all_to_all(x: Tensor, group: Group, *, src: Placement = V, dst: Placement = V) -> Tensor:
    """Split along another dim: S(i) -> S(j). V -> V transposes ranks and rows, [ranks, ...] -> [ranks, ...]."""
    return _convert("all_to_all", x, group, src, dst)


def convert(x: Tensor, group: Group, *, src: Placement, dst: Placement) -> Tensor:
    """The same value, without talking in forward: from R and I to any, and S(d) or V -> P."""
    return _convert("convert", x, group, src, dst)


def reinterpret(x: Tensor, group: Group, *, src: Placement, dst: Placement) -> Tensor:
    """The same tensor on every rank, of another type, and so another value: V -> P is the sum of what varies."""
    return _convert("reinterpret", x, group, src, dst)


def all_max(x: Tensor, group: Group) -> Tensor:
    """The maximum over the ranks, element by element, R or I. It has no gradient."""
    return group.all_reduce(x.detach(), "max")


# What a rank does to a tensor along a group. A dim that is None is the first one, and comes or goes (V).
Map = Callable[[Tensor, Group, int | None, int | None], Tensor]


def _same(x: Tensor, group: Group, _i: int | None, _j: int | None) -> Tensor:
    return x.view_as(x)


def _sum(x: Tensor, group: Group, _i: int | None, _j: int | None) -> Tensor:
    return group.all_reduce(x)


def _first(x: Tensor, group: Group, _i: int | None, _j: int | None) -> Tensor:
    return torch.zeros_like(x) if group.rank else x.clone()


def _join(x: Tensor, group: Group, i: int | None, _j: int | None) -> Tensor:
    return group.all_gather(x) if i is None else group.all_gather_into(x, i)


def _sum_part(x: Tensor, group: Group, i: int | None, _j: int | None) -> Tensor:
    return group.reduce_scatter(x, 0)[0] if i is None else group.reduce_scatter(x, i)


def _sum_part_wide(x: Tensor, group: Group, i: int | None, j: int | None) -> Tensor:
    """Summed in fp32 at least; autograd rounds the sum to the dtype of the weight."""
    return _sum_part(x.to(torch.promote_types(x.dtype, torch.float32)), group, i, j)


def _part(x: Tensor, group: Group, i: int | None, _j: int | None) -> Tensor:
    return x[group.rank].clone() if i is None else group.parts(x, i)[group.rank].clone()


def _padded(x: Tensor, group: Group, i: int | None, _j: int | None) -> Tensor:
    row, i = (x[None], 0) if i is None else (x, i)
    size = row.shape[i]
    whole = row.new_zeros([*row.shape[:i], group.size * size, *row.shape[i + 1 :]])
    whole.narrow(i, group.rank * size, size).copy_(row)
    return whole


def _exchange(x: Tensor, group: Group, i: int | None, j: int | None) -> Tensor:
    """Joins what was split along i, splits along j."""
    return group.all_to_all(x, split_dim=j or 0, join_dim=i or 0)


# function -> types -> what a rank does, and its transpose. "S" is S(d) or V; `reinterpret` has no dims and says "V".
LEGAL: dict[str, dict[str, tuple[Map, Map]]] = {
    "all_reduce": {"P -> R": (_sum, _sum), "P -> I": (_sum, _same)},
    "all_gather": {"S -> R": (_join, _sum_part), "S -> I": (_join, _part)},
    "reduce_scatter": {"P -> S": (_sum_part, _join)},
    "all_to_all": {"S -> S": (_exchange, _exchange)},
    "convert": {
        "I -> R": (_same, _sum),
        "R -> I": (_same, _first),
        "R -> S": (_part, _padded),
        "I -> S": (_part, _join),
        "S -> P": (_padded, _part),
        "R -> P": (_first, _first),
        "I -> P": (_first, _same),
    },
    "reinterpret": {
        "V -> P": (_same, _same),
        "R -> V": (_same, _same),
        "R -> P": (_same, _same),
        "I -> V": (_same, _sum),
        "I -> P": (_same, _sum),
    },
}


class _Linear(torch.autograd.Function):
    """A linear map of the tensors of all ranks. Its gradient is the transposed map, which is linear as well."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, there: Map, back: Map, i: int | None, j: int | None) -> Tensor:
        ctx.group, ctx.there, ctx.back, ctx.i, ctx.j = group, there, back, i, j
        return there(x, group, i, j)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _Linear.apply(grad, ctx.group, ctx.back, ctx.there, ctx.j, ctx.i), None, None, None, None, None


def _convert(name: str, x: Tensor, group: Group, src: Placement, dst: Placement) -> Tensor:
    legal, pair = LEGAL[name], f"{_kind(name, src)} -> {_kind(name, dst)}"
    if pair not in legal:
        raise ValueError(f"{name} does not take {src!r} -> {dst!r}, but {_listed(name)}")
    there, back = legal[pair]
    i, j = _dims(name, x, src, dst)
    if there is _part or there is _sum_part or there is _exchange:
        _check_parts(x, group, j)
    if group.size > 1:
        if not (i is not None and there is _join and _is_weight(x)):
            return _Linear.apply(x, group, there, back, i, j)
        made: Tensor = _Linear.apply(x, group, there, _sum_part_wide if back is _sum_part else back, i, j)
        if not torch.compiler.is_compiling():
            note_gathered(made, x, group, i)
        return made
    if i is None and there in (_join, _padded):
        return x[None]
    return x[0] if i is None and there in (_part, _sum_part) else x


def _is_weight(x: Tensor) -> bool:
    """Whether this is a weight of the model, or one that was gathered along other axes."""
    if isinstance(x, nn.Parameter) or torch.compiler.is_compiling():  # a traced program has no graph behind it yet
        return isinstance(x, nn.Parameter)
    return getattr(x.grad_fn, "back", None) is _sum_part_wide


def _kind(name: str, placement: Placement) -> str:
    if isinstance(placement, S):
        return "S"
    return "S" if placement is V and name != "reinterpret" else placement.value


def _listed(name: str) -> str:
    pairs = ", ".join(LEGAL[name])
    return pairs if name == "reinterpret" else f"{pairs}, where S is S(d) or V"


def _dims(name: str, x: Tensor, src: Placement, dst: Placement) -> tuple[int | None, int | None]:
    """Which dim is split before and after; both are the one where only one of the types has a dim."""
    i, j = _dim(name, x, src), _dim(name, x, dst)
    if name != "all_to_all":
        return (i, i) if isinstance(src, S) else (j, j)
    if isinstance(src, S) != isinstance(dst, S) or (i is not None and i == j):
        raise ValueError(f"all_to_all does not take {src!r} -> {dst!r}, but S(i) -> S(j), i != j, and V -> V")
    return i, j


def _dim(name: str, x: Tensor, placement: Placement) -> int | None:
    if not isinstance(placement, S):
        return None
    if not -x.dim() <= placement.dim < x.dim():
        raise ValueError(f"{name} has no dim {placement.dim} to split in a tensor of shape {[*x.shape]}")
    return placement.dim % x.dim()


def _check_parts(x: Tensor, group: Group, dim: int | None) -> None:
    """ValueError where there is no equal part for each rank."""
    size = x.shape[dim or 0] if x.dim() else 0
    if dim is None and size != group.size:
        raise ValueError(f"V is a row for each of the {group.size} ranks along {named(group.axes)}, not {size} rows")
    if size % group.size:
        over = f"the {group.size} ranks along {named(group.axes)}"
        raise ValueError(f"dim {dim} of size {size} does not divide evenly over {over}")
