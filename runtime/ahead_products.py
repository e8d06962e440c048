"""Building kernels of the CuTe DSL ahead of time: those of matrix products, for tensors of the dtypes of a launch."""

from __future__ import annotations

import hashlib
import inspect
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..lowering.target import Target
from .lib.gemms import Gemm
from .lib.kernels import Launch
from .machine_code import resources
from .products import lost

_SHORT = {torch.bfloat16: "bf16", torch.float16: "fp16"}


@dataclass(frozen=True)
class Product:
    """A launch of a product: one build for all of the same key. `dtypes`: None for a tensor that is absent."""

    gemm: Gemm
    dtypes: tuple[torch.dtype | None, ...]
    shapes: tuple[str, ...]
    key: str

    @classmethod
    def of(cls, launch: Launch, version: int) -> Product:
        """Of a launch whose kernel is a `Gemm`; `version` of what is kept of a build."""
        import cutlass

        *tensors, _ = launch.args
        names = list(inspect.signature(launch.kernel.function).parameters)
        text = inspect.getsource(sys.modules[launch.kernel.function.__module__])
        dtypes = tuple(t.dtype if isinstance(t, Tensor) else None for t in tensors)
        present = [(n, t) for n, t in zip(names, tensors, strict=False) if isinstance(t, Tensor)]
        shapes = tuple(f"{n} {_SHORT.get(t.dtype, t.dtype)}{list(t.shape)}" for n, t in present)
        said = (version, cutlass.__version__, launch.kernel.arch, text, dtypes)
        return cls(launch.kernel, dtypes, shapes, hashlib.sha256(repr(said).encode()).hexdigest())

    def figures(self, target: Target) -> dict[str, Any]:
        """Compile, and read what came out."""
        begun = time.perf_counter()
        try:
            with tempfile.TemporaryDirectory() as folder, _shared() as sizes:
                made = self.gemm.compiled(self.dtypes, f"--keep-ptx --keep-cubin --dump-dir {folder}").artifacts
        except Exception as error:
            first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
            return {
                "seconds": round(time.perf_counter() - begun, 2), "resources": None,
                "problems": (f"the CuTe DSL does not build it: {first[:200]}",),
            }  # fmt: skip
        read, shared = resources(made.CUBIN), max(sizes)
        problems = []
        if shared > target.shared:
            problems.append(f"{shared:,} bytes of shared memory, and a program on {target.name} has {target.shared:,}")
        wanted = (("tcgen05" if (target.capability or 0) >= 100 else "wgmma", 1),)
        problems += lost(read.tensor_cores, wanted)
        return {
            "seconds": round(time.perf_counter() - begun, 2), "shared": shared, "products": wanted,
            "code_bytes": len(made.CUBIN), "resources": read, "problems": tuple(problems),
        }  # fmt: skip


@contextmanager
def _shared() -> Iterator[list[int]]:
    """The bytes of shared memory that kernels ask for while they are traced: no other place has them."""
    from cutlass.memory import SmemAllocator

    plain: Any = SmemAllocator.allocate
    sizes: list[int] = []

    def told(self: Any, kind: Any, *args: Any, **how: Any) -> Any:
        sizes.append(kind.size_in_bytes())
        return plain(self, kind, *args, **how)

    of: Any = SmemAllocator
    of.allocate = told
    try:
        yield sizes
    finally:
        of.allocate = plain
