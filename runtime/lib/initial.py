"""Initial values, each parameter from a generator of its own: neither order nor fusion changes a draw."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .laid import entry, part, whole_shape
from .linear import named_logical_parameters


def generator(seed: int, path: str) -> torch.Generator:
    """A CPU generator for one parameter, seeded from sha256 of the seed and the path."""
    digest = hashlib.sha256(f"{seed}/{path}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def draw(kind: str, values: tuple[float, ...], shape: torch.Size, source: torch.Generator) -> Tensor:
    """fp32 values of one parameter.

    zeros; ones; constant v; normal std; uniform a, b; uniform_fan bound: U(-bound, bound);
    log_uniform a, b: ln U(a, b); softplus_inverse_log_uniform lo, hi, floor: the inverse softplus of
    max(exp U(ln lo, ln hi), floor)
    (Mamba's dt_bias). Raises ValueError for another kind.
    """
    match kind, values:
        case "zeros", ():
            return torch.zeros(shape)
        case "ones", ():
            return torch.ones(shape)
        case "constant", (value,):
            return torch.full(shape, float(value))
        case "normal", (std,):
            return torch.randn(shape, generator=source).mul_(std)
        case "uniform", (a, b):
            return torch.rand(shape, generator=source).mul_(b - a).add_(a)
        case "uniform_fan", (bound,):
            return torch.rand(shape, generator=source).mul_(2 * bound).sub_(bound)
        case "log_uniform", (a, b):
            return torch.rand(shape, generator=source).mul_(b - a).add_(a).log_()
        case "softplus_inverse_log_uniform", (low, high, floor):
            span = math.log(high) - math.log(low)
            dt = torch.rand(shape, generator=source).double().mul_(span).add_(math.log(low)).exp_().clamp_min_(floor)
            return (dt + torch.log(-torch.expm1(-dt))).float()
    raise ValueError(f"no initial value {kind!r} of {len(values)} numbers")


@torch.no_grad()
def initialise(module: nn.Module, table: Mapping[str, tuple[Any, ...]], seed: int = 0) -> None:
    """Fill every parameter from {path: (kind, *values)}; the draws do not depend on the dtype they are stored in.

    A path may have `*` for iteration numbers; an entry without them comes first.
    Raises ValueError for paths without a parameter and parameters without an entry.
    """
    views: dict[str, Tensor] = {}
    holders: set[tuple[int, torch.Size]] = set()
    for path, _, view in named_logical_parameters(module):
        # A weight used at two paths is drawn once, by the path that the table names.
        if _entry(path, table) in table or (view.data_ptr(), view.shape) not in holders:
            views[path] = view
        holders.add((view.data_ptr(), view.shape))
    entries = {path: _entry(path, table) for path in views}
    missing = [path for path, entry in entries.items() if entry not in table]
    unknown = sorted(set(table) - set(entries.values()))
    if missing or unknown:
        raise ValueError(f"initialise: no entry for {missing}, no parameter for {unknown}")
    stored: Any = getattr(module, "stored", None)
    mesh: Any = getattr(module, "mesh", None)
    for path, view in views.items():
        kind, *values = table[entries[path]]
        if not stored:
            view.copy_(draw(kind, tuple(values), view.shape, generator(seed, path)))
            continue
        splits, _ = entry(stored, path)  # a rank draws the whole, and keeps its part: layouts do not change a draw
        drawn = draw(kind, tuple(values), torch.Size(whole_shape(view.shape, splits, mesh)), generator(seed, path))
        view.copy_(part(drawn, splits, mesh))


def _entry(path: str, table: Mapping[str, Any]) -> str:
    """The key of the table that a path falls under."""
    return path if path in table else ".".join("*" if word.isdigit() else word for word in path.split("."))
