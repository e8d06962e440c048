"""Cross entropy: sum over places of log sum_v exp(z_v) - z_target; places with target -1 do not count."""

from __future__ import annotations

import torch
from torch import Tensor

from ..softmax.reference import combine as combine_sums
from ..softmax.reference import identity as no_sum
from ..softmax.reference import lift as lift_sums

State = tuple[Tensor, Tensor, Tensor]


def cross_entropy(z: Tensor, target: Tensor) -> Tensor:
    """z[*, V], target[*] -> total[]."""
    known = target >= 0
    # Selected, not multiplied by 0: a row that does not count may hold anything.
    z = torch.where(known[..., None], z, torch.zeros_like(z))
    log_p = z - torch.log(torch.exp(z - z.amax(-1, keepdim=True)).sum(-1, keepdim=True)) - z.amax(-1, keepdim=True)
    picked = log_p.gather(-1, target.clamp(min=0)[..., None])[..., 0]
    return -(picked * known).sum()


def row_max(z: Tensor) -> Tensor:
    """z[*, V] -> m[*], a constant."""
    return z.detach().amax(-1)


def sum_exp(z: Tensor, m: Tensor) -> Tensor:
    """z[*, V], m[*] -> s[*] = sum_v exp(z_v - m)."""
    return torch.exp(z - m[..., None]).sum(-1)


def picked(z: Tensor, target: Tensor, offset: int = 0) -> Tensor:
    """z[*, V] of columns offset, offset + 1, .. -> p[*] = z_target, 0 where it is not among them."""
    here = target[..., None] == offset + torch.arange(z.shape[-1])
    return torch.where(here, z, torch.zeros_like(z)).sum(-1)


def nll(s: Tensor, target: Tensor, p: Tensor, m: Tensor) -> Tensor:
    """total[] = sum over known targets of log s + m - p."""
    return finish((m, s, p), target)


def identity(z: Tensor) -> State:
    """The state of no columns."""
    return (*no_sum(z), torch.zeros(z.shape[:-1], dtype=z.dtype))


def lift(z: Tensor, target: Tensor, offset: int) -> State:
    """(max, sum, the target's logit if it is here) of columns [offset, offset + z.shape[-1])."""
    return (*lift_sums(z), picked(z, target, offset))


def combine(a: State, b: State) -> State:
    """Both parts."""
    return (*combine_sums(a[:2], b[:2]), a[2] + b[2])


def finish(state: State, target: Tensor) -> Tensor:
    """The total."""
    top, total, picked = state
    loss = torch.log(total) + top - picked
    return torch.where(target >= 0, loss, torch.zeros_like(loss)).sum()
