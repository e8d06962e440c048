"""Generated modules that hold weights: how they are filled, and in which dtype they are stored."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any, Self

import torch
from torch import Tensor, nn

from .linear import named_logical_parameters


class Filled(nn.Module):
    """A generated module with initial values and a dtype: INIT says how each weight is filled, keep_fp32 names those
    that stay in fp32."""

    INIT: Mapping[str, tuple[Any, ...]] = {}
    keep_fp32: tuple[str, ...] = ()

    def named_logical_parameters(self) -> Iterator[tuple[str, nn.Parameter, Tensor]]:
        """(path in the spec, parameter that holds it, view with the spec's dims that shares its memory)."""
        return named_logical_parameters(self)

    def cast(self, dtype: torch.dtype) -> Self:
        """Store weights in `dtype`; those that `keep_fp32` names stay fp32 (or become fp64 with the others)."""
        kept = torch.promote_types(dtype, torch.float32)
        castable = set(self._castable())
        for parameter in self.parameters():
            parameter.data = parameter.data.to(dtype if parameter in castable else kept)
        for module in self.modules():
            for name, buffer in module._buffers.items():
                # State is as wide as kept weights; constants stay what they were computed as.
                if buffer is not None and buffer.is_floating_point() and name not in module._non_persistent_buffers_set:
                    buffer.data = buffer.data.to(kept)
        return self

    def _castable(self) -> list[nn.Parameter]:
        """Parameters that no pattern of keep_fp32 names; one that holds several weights must be named as a whole."""
        paths: dict[nn.Parameter, list[str]] = {}
        for path, holder, _ in self.named_logical_parameters():
            paths.setdefault(holder, []).append(path)
        castable = []
        for holder, names in paths.items():
            kept = [any(fnmatchcase(name, pattern) for pattern in self.keep_fp32) for name in names]
            if any(kept) and not all(kept):
                raise ValueError(f"cast: {names} share a parameter, but keep_fp32 names only some of them")
            if not any(kept):
                castable.append(holder)
        return castable


class Beside(Filled):
    """What an objective owns: trained with a model, and no part of it."""
