"""Scores: how much each place of a dim, and each layer of a loop, matters; measured once, kept in a file."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError

HOW = ("mean", "l2", "var")
FORMAT = "heddle-scores-1"


@dataclass(frozen=True)
class Site:
    """What was measured at one activation: `values` fp64, one axis for each of `dims` (keys of the model's dims)."""

    name: str
    dims: tuple[str, ...]
    values: Tensor


@dataclass(frozen=True)
class Scores:
    """Importance of the places of a model's dims. `scores["hidden"]` is fp64 [hidden]; larger is more important.

    A dim's score is summed over the sites that have it; at a site with several dims it is the length (L2) over the
    others. `layers` has for each loop one fp64 number an iteration. `about` says how they were made.
    """

    sites: tuple[Site, ...] = ()
    layers: Mapping[str, Tensor] = field(default_factory=dict)
    about: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, dims: Mapping[str, Any], layers: Mapping[str, Any] | None = None) -> Scores:
        """Scores that are known: one vector a dim, and one a loop."""
        sites = tuple(Site(key, (key,), torch.as_tensor(v, dtype=torch.float64)) for key, v in dims.items())
        return cls(sites, {k: torch.as_tensor(v, dtype=torch.float64) for k, v in (layers or {}).items()})

    @property
    def dims(self) -> tuple[str, ...]:
        """Keys of the dims that have scores."""
        return tuple(dict.fromkeys(d for site in self.sites for d in site.dims))

    def __contains__(self, key: str) -> bool:
        return any(key in site.dims for site in self.sites)

    def __getitem__(self, key: str) -> Tensor:
        return self.within(key, {})

    def within(self, key: str, kept: Mapping[str, Tensor]) -> Tensor:
        """The score of a dim where only the places `kept` of other dims count. Raises KeyError."""
        total: Tensor | None = None
        for site in (s for s in self.sites if key in s.dims):
            values = site.values
            for axis, dim in enumerate(site.dims):
                if dim != key and dim in kept:
                    values = values.index_select(axis, kept[dim])
            others = tuple(i for i, dim in enumerate(site.dims) if dim != key)
            one = torch.linalg.vector_norm(values, 2, others) if others else values
            total = one if total is None else total + one
        if total is None:
            raise KeyError(key)
        return total

    def with_layers(self, layers: Mapping[str, Tensor]) -> Scores:
        """These, and scores of the iterations of loops."""
        return replace(self, layers={**self.layers, **layers})

    def save(self, path: str | Path) -> Path:
        """Write one safetensors file; it appears whole or not at all. Raises UserError `cannot-write`."""
        from safetensors.torch import save

        path = Path(path)
        tensors = {f"site.{i}": s.values.contiguous() for i, s in enumerate(self.sites)}
        tensors |= {f"layers.{name}": v.contiguous() for name, v in self.layers.items()}
        sites = [{"name": s.name, "dims": list(s.dims)} for s in self.sites]
        # One entry: several are written in any order.
        about = {FORMAT: json.dumps({"sites": sites, "about": dict(self.about)}, sort_keys=True)}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, partial = tempfile.mkstemp(prefix=".partial-", dir=path.parent)
            with os.fdopen(handle, "wb") as file:
                file.write(save(tensors, about))
            os.replace(partial, path)
        except OSError as error:
            raise UserError("cannot-write", f"cannot write `{path}`: {error.strerror}") from None
        return path

    @classmethod
    def load(cls, path: str | Path) -> Scores:
        """Read what `save` wrote. Raises UserError: no-such-file, damaged-weights."""
        from safetensors import SafetensorError, safe_open

        if not Path(path).is_file():
            raise UserError("no-such-file", f"there is no file `{path}`")
        try:
            with safe_open(str(path), "pt") as file:
                about = file.metadata() or {}
                tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118 (it is no mapping)
            if FORMAT not in about:
                raise UserError("damaged-weights", f"`{path}` holds no scores")
            known = json.loads(about[FORMAT])
            sites = tuple(Site(s["name"], tuple(s["dims"]), tensors[f"site.{i}"]) for i, s in enumerate(known["sites"]))
            layers = {k.removeprefix("layers."): v for k, v in tensors.items() if k.startswith("layers.")}
            return cls(sites, layers, known["about"])
        except (SafetensorError, OSError, KeyError, ValueError, TypeError) as error:
            raise UserError("damaged-weights", f"`{path}` cannot be read: {error}") from None


class Running:
    """A score of channels from micro-batches: over places first, then over samples, in fp64 and in one pass.

    `mean` is the mean of absolute values, `l2` the root of the sum of squares, `var` the mean squared deviation.
    Source: Muralidharan et al. 2024, section 2.2.
    """

    def __init__(self, batch: str = "l2", seq: str = "mean") -> None:
        for name, how in (("batch", batch), ("seq", seq)):
            if how not in HOW:
                raise UserError(
                    "unknown-setting", f"`{name}` is `{how}`, expected one of {', '.join(f'`{h}`' for h in HOW)}"
                )
        self.batch, self.seq = batch, seq
        self.samples = 0
        self.absolute: Tensor | float = 0.0
        self.squares: Tensor | float = 0.0
        self.middle: Tensor | float = 0.0
        self.spread: Tensor | float = 0.0

    def add(self, x: Tensor, counts: Tensor | None = None) -> None:
        """x [batch, seq, *dims]; counts bool [batch, seq]: places that count. A sample without any is left out."""
        x = x.double()
        if counts is None:
            for sample in self._over_seq(x, x.shape[1]):
                self._add_sample(sample)
            return
        for row, mask in zip(x, counts, strict=True):
            if bool(mask.any()):
                picked = row[mask][None]
                self._add_sample(self._over_seq(picked, picked.shape[1])[0])

    def _over_seq(self, x: Tensor, places: int) -> Tensor:
        if self.seq == "mean":
            return x.abs().sum(1) / places
        if self.seq == "l2":
            return x.square().sum(1).sqrt()
        return (x - x.mean(1, keepdim=True)).square().sum(1) / places

    def _add_sample(self, a: Tensor) -> None:
        self.samples += 1
        self.absolute = self.absolute + a.abs()
        self.squares = self.squares + a.square()
        step = a - self.middle
        self.middle = self.middle + step / self.samples
        self.spread = self.spread + step * (a - self.middle)

    def finish(self) -> Tensor:
        """fp64 [*dims]. Raises ValueError where nothing was added."""
        if not self.samples:
            raise ValueError("no sample was added")
        found = {"mean": self.absolute, "l2": self.squares, "var": self.spread}[self.batch]
        assert isinstance(found, Tensor)
        return found.sqrt() if self.batch == "l2" else found / self.samples


def is_finite(values: Tensor) -> bool:
    return math.isfinite(float(values.sum()))
