"""What rounding explains: Monte Carlo arithmetic (Parker 1997, "Monte Carlo Arithmetic: exploiting randomness in
floating-point arithmetic"), in fp64, of arithmetic that is less precise.

Every operation of PyTorch has its result moved at random by as much as one rounding may move it, and one that sums what
it is given has its terms moved by as much as the sum's roundings may. Several runs differ by what rounding does to a
result, forward and backward, whatever the operations are; no bound is written by hand for any op.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import log2
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

WIDE = torch.float64


@dataclass(frozen=True)
class Arithmetic:
    """`dtype` is that in which results are stored, `sums` that in which terms are added up."""

    dtype: torch.dtype
    sums: torch.dtype

    @property
    def roundoff(self) -> float:
        """Half the distance of 1 to the next number: what one rounding may lose, relative to the value."""
        return roundoff(self.dtype)

    @property
    def least(self) -> float:
        """The smallest number above 0."""
        return float(torch.finfo(self.dtype).smallest_normal * torch.finfo(self.dtype).eps)


def roundoff(dtype: torch.dtype) -> float:
    """Half the distance of 1 to the next number of a dtype."""
    return float(torch.finfo(dtype).eps) / 2


def arithmetic(dtype: torch.dtype, is_split: bool) -> Arithmetic:
    """That of a run in `dtype`: sums are made in fp32 at least, but where ranks add up parts that were stored."""
    return Arithmetic(dtype, dtype if is_split else torch.promote_types(dtype, torch.float32))


def rounded(x: Tensor, dtypes: Sequence[torch.dtype]) -> Tensor:
    """The value in fp64 that all of the dtypes hold, nearly `x`: what is too large is the largest that they hold."""
    if not x.is_floating_point():
        return x
    x, most = x.detach().to(WIDE), largest(dtypes)
    x = torch.where(x.isfinite(), x.clamp(-most, most), x)
    for dtype in (*dtypes, *dtypes):  # what the second of two rounds to is one of the first's, or is after another turn
        x = x.to(dtype).to(WIDE)
    return x


def largest(dtypes: Sequence[torch.dtype]) -> float:
    """The largest number that all of the dtypes hold."""
    most = torch.tensor(min(torch.finfo(dtype).max for dtype in dtypes), dtype=WIDE)
    for dtype in dtypes:
        near = most.to(dtype).to(WIDE)
        most = near if near <= most else near * (1 - roundoff(dtype))  # near is a power of two
    return float(most)


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# What gives numbers that it was given: nothing is rounded.
_EXACT = _words(
    """_to_copy abs alias amax amin arange argmax argmin as_strided cat clamp clamp_max clamp_min clone constant_pad_nd
    contiguous copy copy_ detach diagonal diagonal_backward embedding empty empty_like empty_strided expand fill fill_
    flip full full_like gather index index_select lift_fresh lift_fresh_copy masked_fill masked_fill_ max maximum min
    minimum nan_to_num neg neg_ new_empty new_empty_strided new_full new_ones new_zeros ones ones_like permute relu
    repeat reshape roll scalar_tensor scatter scatter_ select select_backward select_scatter sign slice slice_backward
    slice_scatter sort split split_with_sizes squeeze stack t threshold_backward topk transpose tril triu unbind unfold
    unsqueeze view where zero_ zeros zeros_like _unsafe_view _reshape_alias"""
)
# What gives no real numbers, but asks about them.
_ASKED = _words(
    """eq ne lt le gt ge equal allclose isclose isnan isinf isfinite isposinf isneginf logical_not logical_and
    logical_or any all nonzero argsort searchsorted bucketize item _local_scalar_dense is_nonzero count_nonzero
    bitwise_not bitwise_and bitwise_or signbit"""
)
# Of one number at a place: no sum. The second kind takes several steps, or multiplies what its argument lost.
_POINTWISE = _words(
    """add add_ sub sub_ rsub mul mul_ div div_ reciprocal rsqrt sqrt sigmoid sigmoid_backward tanh tanh_backward log
    log1p log2 lerp addcmul addcdiv square leaky_relu leaky_relu_backward"""
)
_STEEP = _words(
    """exp exp_ exp2 expm1 sin cos tan pow pow_ erf silu silu_ silu_backward gelu gelu_backward softplus
    softplus_backward elu elu_backward"""
)
# Sums that PyTorch makes in the dtype of what is summed.
_STORED = _words("index_add index_add_ index_put index_put_ scatter_add scatter_add_ embedding_dense_backward")


class MonteCarlo(TorchDispatchMode):
    """Inside, what is computed in fp64 has the errors of `arithmetic`, drawn from `seed`."""

    def __init__(self, arithmetic: Arithmetic, seed: int) -> None:
        super().__init__()
        self.arithmetic, self.source = arithmetic, torch.Generator().manual_seed(seed)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.partition("::")[2]
        if name in _EXACT or name in _ASKED:
            return func(*args, **kwargs)
        if name not in _POINTWISE:
            args = self._terms(name, args)
        made = func(*args, **kwargs)
        results = made if isinstance(made, (tuple, list)) else (made,)
        for x in results:
            if isinstance(x, Tensor) and x.dtype == WIDE and not func.is_view:
                x.add_(self._signs(x) * (x != 0) * (2 * self.arithmetic.roundoff * x.abs() + self.arithmetic.least))
        return made

    def _terms(self, name: str, args: Any) -> Any:
        """The arguments, moved as the roundings of a sum over their longest dim would move it."""
        inputs = [x for x in _tensors(args) if x.dtype == WIDE]
        longest = max((n for x in inputs for n in x.shape), default=1)
        unit = roundoff(self.arithmetic.dtype if name in _STORED else self.arithmetic.sums)
        share = unit if name in _STEEP else (log2(max(1, longest)) + 3) * unit
        writes = name.endswith("_")  # what it writes to must stay what it is

        def moved(x: Any, first: bool = False) -> Any:
            if isinstance(x, (tuple, list)):
                return type(x)(moved(y) for y in x)
            if not isinstance(x, Tensor) or x.dtype != WIDE or (writes and first):
                return x
            return x * (1 + share * self._signs(x))

        return tuple(moved(x, i == 0) for i, x in enumerate(args))

    def _signs(self, x: Tensor) -> Tensor:
        """1 or -1 at each place: as far as one rounding goes."""
        return (torch.randint(0, 2, x.shape, generator=self.source, dtype=WIDE) * 2 - 1).to(x.device)


def _tensors(args: Iterable[Any]) -> list[Tensor]:
    found: list[Tensor] = []
    for x in args:
        found += [x] if isinstance(x, Tensor) else _tensors(x) if isinstance(x, (tuple, list)) else []
    return found
