"""The run that both sides are held against: fp64, on one device; and the same with the roundings of another dtype."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ...dsl.program import Program
from ...lowering.pipeline import lower
from ..compile import emitted
from .rounding import WIDE, Arithmetic, MonteCarlo, rounded
from .running import Feed, Name, Run, Runner, Unit, everywhere, nowhere
from .watching import Key

SAMPLES = 2
MARGIN = 4.0
"""The largest of a few samples is an estimate of what rounding does: what is at most so many times it is rounding."""


class Oracle:
    """`given` are its values, each rounded to what all of `dtypes` hold before anything reads it; `made` what uses of
    ops gave before that; `arrives` the gradients of what is given, rounded."""

    def __init__(self, program: Program, feed: Feed, weights: Mapping[str, Tensor], dtypes: tuple[torch.dtype, ...]
    ) -> None:  # fmt: skip
        self.feed, self.dtypes = feed, dtypes
        self.lowered = lower(program)
        self.runner = Runner(emitted(self.lowered, named=True), WIDE, weights)
        self.keys = tuple(self.runner.free(feed))
        self.given: dict[Key, Tensor] = {}
        self.arrives: dict[Key, Tensor] = {}

    def hold(self, common: Iterable[Key]) -> None:
        """Run it, forward and backward, with each of these values rounded."""
        wanted = frozenset(common)

        def hold(key: Key, x: Tensor) -> Tensor | None:
            if key in wanted:
                self.given[key] = rounded(x, self.dtypes)
            return self.given.get(key)

        self.run = self.runner.run(hold, nowhere)
        sums, counts = self.run.forward(self.feed)
        self.made = {k: x.detach() for k, x in self.run.watch.made.items()}
        arrived: dict[Key, Tensor] = {}
        self.run.watch.arrived = arrived
        _total(sums, counts).backward(retain_graph=True)
        self.run.watch.arrived = None
        self.arrives = {k: rounded(g, self.dtypes) for k, g in arrived.items()}

    # --- gradients of the units of other runs ---------------------------------------------------------

    @cache  # noqa: B019 (it lives as long as what it is of)
    def exact(self, unit: Unit) -> dict[Name, Tensor]:
        """The gradients of a unit, those that it forgets among them."""
        return self._gradients(unit, self.run)

    def _gradients(self, unit: Unit, run: Run) -> dict[Name, Tensor]:
        whole = self._whole(unit)
        return run.gradients(whole, {k: self.arrives[k] for k in unit.results}, frozenset(whole.sources).__contains__)

    @cache  # noqa: B019
    def _whole(self, unit: Unit) -> Unit:
        """With the held values that a unit should read, and reads by no way."""
        nearest, _ = self.run.watch.region(unit.results, lambda key: key not in unit.results)
        return replace(unit, sources=(*unit.sources, *(k for k in nearest if not self._covered(k, unit))))

    def _covered(self, key: Key, unit: Unit) -> bool:
        """Whether a unit reads a value, or all that it is made of: another lowering may not have it."""
        if key in unit.sources:
            return True
        behind, _ = self.run.watch.region([key], everywhere)
        own = self.run.weights_of([key], everywhere)
        return bool(behind or own) and own <= unit.weights and all(self._covered(k, unit) for k in behind)

    # --- what rounding explains -----------------------------------------------------------------------

    def value_allowed(self, kind: Arithmetic, key: Key) -> float:
        """How far the roundings of a dtype may move a value; what is no real number not at all."""
        want = self.made[key]
        if not want.is_floating_point():
            return 0.0
        return _most(kind, want, (run.watch.made[key].detach() for _, run in self._moved(kind)))

    def gradient_allowed(self, kind: Arithmetic, unit: Unit, name: Name) -> float:
        """How far they may move a gradient; not at all where there is none."""
        want = self.exact(unit).get(name)
        if want is None:
            return 0.0
        nothing = torch.zeros_like(want)
        return _most(kind, want, (found.get(name, nothing) for found in self._moved_gradients(kind, unit)))

    @cache  # noqa: B019
    def _moved(self, kind: Arithmetic) -> list[tuple[MonteCarlo, Run]]:
        found = []
        for seed in range(SAMPLES):
            with MonteCarlo(kind, seed) as mode:
                run = self.runner.run(lambda key, x: self.given.get(key), self.arrives.__contains__)
                run.forward(self.feed)
            found.append((mode, run))
        return found

    @cache  # noqa: B019
    def _moved_gradients(self, kind: Arithmetic, unit: Unit) -> list[dict[Name, Tensor]]:
        found = []
        for mode, run in self._moved(kind):
            with mode:
                found.append(self._gradients(unit, run))
        return found


def _most(kind: Arithmetic, want: Tensor, moved: Iterable[Tensor]) -> float:
    """By what runs with drawn roundings give, and the rounding of the result itself."""
    return MARGIN * max(far(x, want) for x in moved) + kind.roundoff * size(want) + kind.least


def _total(sums: Mapping[str, Tensor], counts: Mapping[str, Any]) -> Tensor:
    """What is trained; of a model that nothing trains, its result times numbers that are drawn."""
    total = torch.zeros((), dtype=WIDE)
    for name, x in sums.items():
        if name:
            total = total + x / max(1, int(counts[name]))
        else:
            total = total + (x * torch.randn(x.shape, generator=torch.Generator().manual_seed(0), dtype=WIDE)).sum()
    return total


def far(x: Tensor, y: Tensor) -> float:
    """The largest difference; infinite where shapes differ, or one is no number and the other is, or another one."""
    x, y = x.double(), y.double()
    if x.shape != y.shape:
        return float("inf")
    if not x.numel():
        return 0.0
    same = (x == y) | (x.isnan() & y.isnan())
    apart = torch.where(same, torch.zeros_like(x), (x - y).abs())
    return float(torch.where(apart.isnan(), torch.inf, apart).max())


def size(x: Tensor) -> float:
    """The largest finite number."""
    x = x.detach().double().abs()
    return float(torch.where(x.isfinite(), x, 0.0).max()) if x.numel() else 0.0
