"""What generated CuTe DSL kernels stand on: compiled at first use, launched as Triton's are.

Only their files import the DSL (`nvidia-cutlass-dsl`, the extra `cuda`), and hand it over.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from . import kernels
from .later import waiting

DSL = "nvidia-cutlass-dsl"
DTYPES = (torch.bfloat16, torch.float16)
# TMA reads and writes units of 16 bytes at addresses that are multiples of it.
_ALIGNED = 16


class Missing(ImportError):
    """The CuTe DSL, in which a kernel is written, is not installed; the text says what to install."""


def require() -> None:
    """Raises Missing where the DSL is not installed: a kernel that was chosen is not left out in silence."""
    if find_spec("cutlass") is None:
        raise Missing(f"a kernel of this model is written in the CuTe DSL: install `{DSL}` (`heddle-lang[cuda]`)")


# --- whether a kernel is used -----------------------------------------------------------------------------------------


def on(target: str) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Say of a kernel's function for which generation of GPU it is: "sm_90"."""

    def say(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        function.target = target  # type: ignore[attr-defined]
        return function

    return say


def takes(kernel: Any, x: Tensor, weight: Tensor, *others: Tensor | None) -> bool:
    """Whether a kernel computes the product of x and a weight here and now; the library's takes all.

    It does where numbers are bf16 or fp16, all but x's of one dtype (x's are made so), on a GPU of its generation; not
    under autocast, and not where gradients of weights are put aside (`later`).
    """
    if kernel is None or weight.dtype not in DTYPES or not x.numel() or not weight.numel():
        return False
    if any(t is not None and t.dtype != weight.dtype for t in others):
        return False
    kind = x.device.type
    if kind != "meta" and torch.is_autocast_enabled(kind):
        return False
    if waiting() is not None and any(t is not None and t.requires_grad for t in (weight, *others)):
        return False
    return kernels.is_elsewhere() or has(x.device, kernel.target)


def has(device: torch.device, target: str) -> bool:
    """Whether a device is a GPU of this generation."""
    if device.type != "cuda":
        return False
    found = torch.cuda.get_device_properties(device)  # a constant where torch.compile traces it
    return (found.major, found.minor) == capability(target)


def capability(arch: str) -> tuple[int, int]:
    """(9, 0) of "sm_90" and "sm_90a"."""
    return divmod(int(arch.removeprefix("sm_").rstrip("a")), 10)


# --- how it is run ----------------------------------------------------------------------------------------------------


class Gemm:
    """A host function of the CuTe DSL: pointers (None: absent), rows, CTAs, stream. `kernels.launch` runs it.

    It is compiled once for the dtypes that it meets and for `arch` ("sm_90a"), which is the only one it runs on. `dsl`
    is the module `cutlass`, `stream` the type of streams of `cuda.bindings.driver`.
    """

    def __init__(self, function: Callable[..., Any], arch: str, dsl: Any, stream: Callable[[int], Any]) -> None:
        self.function, self.arch, self.dsl, self.stream = function, arch, dsl, stream
        self.__name__: str = getattr(function, "__name__", "gemm")
        self._known: dict[tuple[torch.dtype | None, ...], Any] = {}

    def compiled(self, dtypes: Sequence[torch.dtype | None], options: str = "") -> Any:
        """The function built for tensors of these dtypes, on any machine; `options` as `cute.compile` has them."""
        pointers = [None if d is None else self._pointer(d, _ALIGNED) for d in dtypes]
        last = (self.dsl.Int32(1), self.dsl.Int32(1), self.stream(0))
        how = f"--gpu-arch {self.arch} {options}".strip()
        return self.dsl.cute.compile(self.function, *pointers, *last, options=how)

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return partial(self._run, grid)

    def _run(self, grid: tuple[int, ...], *args: Any) -> None:
        """Tensors or None, and the number of rows. Results stand in memory of their own, which is aligned."""
        *tensors, rows = args
        device = next(t for t in tensors if t is not None).device
        _check_device(device, self.arch)
        tensors = [t if t is None or t.data_ptr() % _ALIGNED == 0 else t.clone() for t in tensors]
        dtypes = tuple(None if t is None else t.dtype for t in tensors)
        if dtypes not in self._known:
            self._known[dtypes] = self.compiled(dtypes)
        pointers = [None if t is None else self._pointer(t.dtype, t.data_ptr()) for t in tensors]
        stream = self.stream(torch.cuda.current_stream(device).cuda_stream)
        self._known[dtypes](*pointers, self.dsl.Int32(rows), self.dsl.Int32(grid[0]), stream)

    def _pointer(self, dtype: torch.dtype, address: int) -> Any:
        cute = self.dsl.cute
        of = {torch.bfloat16: self.dsl.BFloat16, torch.float16: self.dsl.Float16}[dtype]
        return cute.runtime.make_ptr(of, address, cute.AddressSpace.gmem, assumed_align=_ALIGNED)


def _check_device(device: torch.device, arch: str) -> None:
    """Raises RuntimeError where a kernel that was built for `arch` cannot run."""
    have = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    need = capability(arch)
    if have != need:
        what = f"of compute capability {have[0]}.{have[1]}" if have else "no GPU of NVIDIA"
        raise RuntimeError(f"a kernel for {arch} needs compute capability {need[0]}.{need[1]}; {device} is {what}")


def programs(like: Tensor, tiles: int, cluster: int, usual: int) -> tuple[int, ...]:
    """The grid of a persistent kernel: as many CTAs as there are SMs, in whole clusters, but no more than tiles.

    `usual`: SMs where `like` lies on no GPU. A tile is one CTA's work from its first to its last sum, so the number of
    CTAs changes no result.
    """
    sms = torch.cuda.get_device_properties(like.device).multi_processor_count if like.is_cuda else usual
    return (min(tiles, max(sms // cluster, 1)) * cluster,)


def check(*tensors: tuple[str, Tensor, Sequence[int]]) -> None:
    """Each of (name, tensor, shape) has its shape, and the dtype of the first, which is bf16 or fp16.

    Raises TypeError for dtypes, ValueError for shapes.
    """
    dtype = tensors[0][1].dtype
    for name, tensor, shape in tensors:
        if tensor.dtype != dtype or dtype not in DTYPES:
            raise TypeError(f"`{name}` is {tensor.dtype}: this product takes bf16 or fp16, all of one dtype")
        if tuple(tensor.shape) != tuple(shape):
            raise ValueError(f"`{name}` has shape {tuple(tensor.shape)}, not {tuple(shape)}")
