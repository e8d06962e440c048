"""The rule of error, for tests of kernels, `heddle verify` and `heddle tune` alike: by how much a result may be wrong.

    |found - want| <= 2 max|eager - want| + floor

`want` is fp64; `eager` the same math by plain PyTorch in the storage dtype, left out where it is not finite. The floor
is what rounding costs whatever computes it: of the store, and of the math itself, which is bounded by a derivation
(`bounds`, a test of a room) or measured (`moved`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .bisect.rounding import Arithmetic, MonteCarlo, roundoff

SAMPLES, MARGIN = 3, 4.0
"""The largest of a few samples is an estimate of what rounding does: what is at most so many times it is rounding."""


def floor(want: Tensor, dtype: torch.dtype, steps: int, own: float | Tensor = 0.0, each: bool = False) -> Tensor:
    """What the rounding of a result may cost: a tensor like `want`, fp64.

    The store in `dtype`, `u_out max|want|`; `steps` additions in fp32 one after another, `u steps (1 + max|want|)`;
    what is known of the math, `own`; and the smallest subnormal of `dtype`. `each`: by the size of each element instead
    of the largest, for results that span decades.
    """
    want = want.double()
    finite = torch.where(want.isfinite(), want.abs(), torch.zeros_like(want))
    size = finite if each or not want.numel() else torch.full_like(want, finite.max().item())
    stored = torch.finfo(dtype)
    counted = roundoff(torch.float32) * steps * (1.0 + size)
    return roundoff(dtype) * size + counted + own + stored.smallest_normal * stored.eps


def moved(run: Callable[[], Mapping[str, Tensor]], exact: Mapping[str, Tensor]) -> dict[str, float]:
    """How far roundings in fp32 may move each result of `run`, which computes in fp64: it runs again with them drawn.

    This knows what no count of steps does: the exponential of a sum is as wrong as the sum is large (strong decays of a
    scan), and a difference of large numbers as wrong as these.
    """
    found = dict.fromkeys(exact, 0.0)
    for seed in range(SAMPLES):
        with MonteCarlo(Arithmetic(torch.float32, torch.float32), seed):
            again = run()
        for name, want in exact.items():
            if want.numel():
                found[name] = max(found[name], MARGIN * (again[name] - want).abs().max().item())
    return found


@dataclass(frozen=True)
class Judged:
    """`share`: of the error allowed, at each place; more than 1 is wrong, NaN and infinities that `want` has not are
    infinite. `error` and `eager`: the largest ones."""

    share: Tensor
    error: float
    eager: float

    @property
    def worst(self) -> float:
        """The largest share."""
        return self.share.max().item() if self.share.numel() else 0.0


def judged(
    found: Tensor, want: Tensor, eager: Tensor | None, floor: Tensor | float, each: bool = False
) -> Judged:  # fmt: skip
    """A result by the rule; `each` compares with eager's error at each element instead of its largest."""
    want, found = want.double(), found.detach().double()
    real = want.isfinite()
    is_same = (found == want) | (found.isnan() & want.isnan())
    error = torch.where(is_same, 0.0, torch.where(real & found.isfinite(), (found - want).abs(), torch.inf))
    allowed, theirs = torch.zeros_like(want) + floor, torch.nan
    if eager is not None and want.numel():
        lost = torch.where(real, (eager.detach().double() - want).abs(), torch.zeros_like(want))
        theirs = lost.max().item()
        if lost.isfinite().all():
            allowed = allowed + 2 * (lost if each else theirs)
    share = torch.where(error == 0, 0.0, error / allowed)
    return Judged(share, error.max().item() if want.numel() else 0.0, theirs)
