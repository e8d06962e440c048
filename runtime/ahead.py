"""Building kernels ahead of time: for a target, on a machine without a GPU, with what they ask of it.

`kernels.launches()` around a run of a model on the `meta` device gives what is launched, with shapes and constants.
Each launch is specialised as Triton would when it is run, compiled to machine code, and read: a build that the target
cannot hold, or that lost its tensor cores on the way, is not sound although Triton says nothing.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor

from ..lowering.target import Target
from .ahead_products import Product
from .interpreted import module_of
from .lib.gemms import Gemm
from .lib.kernels import Launch
from .machine_code import Resources, resources
from .products import expected, lost, products

# Of what is kept of a build: a new number where its meaning changes.
_VERSION = 2
# What no build of a kernel that does something is below: a stub that keeps its name only.
_SMALLEST_BYTES = 2048
# Columns of tensor memory that one program may have. Source: PTX ISA, tcgen05.alloc.
_TENSOR_MEMORY = 512


@dataclass(frozen=True)
class Built:
    """One kernel, built for one target.

    `shapes`: its tensors and their sizes, `constants`: what it was specialised by, `options`: warps and stages, each in
    the order of the kernel's arguments. `shared` and `limit` are bytes of shared memory of one program. `products` are
    those written in it that tensor cores are for, counted by the instruction set that is to compute them. `seconds` is
    the time that the build took, when it was made. `problems` say why it cannot be used: none, and it is sound. Of one
    `key` there is one build.
    """

    kernel: str
    target: str
    shapes: tuple[str, ...]
    constants: tuple[tuple[str, str], ...]
    options: tuple[tuple[str, int], ...]
    key: str
    seconds: float
    shared: int = 0
    limit: int = 0
    products: tuple[tuple[str, int], ...] = ()
    code_bytes: int = 0
    resources: Resources | None = None
    problems: tuple[str, ...] = ()


@dataclass
class _Specialised:
    """A launch as Triton specialises it: one build for all launches of the same key."""

    function: Any
    signature: dict[str, str]
    constants: dict[Any, Any]
    attributes: dict[Any, Any]
    options: Any
    shapes: tuple[str, ...]
    key: str


def build(told: Iterable[Launch], target: Target, cache: Path | None = None) -> list[Built]:
    """Build what was launched for a target, each specialisation once, in the order of its first launch.

    With `cache`, a folder, what was built before from the same source, for the same target, with the same options and
    version of Triton (or of the CuTe DSL) is not built again. What cannot be built is there with its problem.
    Raises ValueError for a target that is no generation of GPU.
    """
    if target.capability is None:
        raise ValueError(f"kernels are built for a generation of GPU, and `{target.name}` is none")
    found: dict[str, _Specialised | Product] = {}
    for launch in told:
        is_product = isinstance(launch.kernel, Gemm)
        made = Product.of(launch, _VERSION) if is_product else _specialise(launch, target.capability)
        found.setdefault(made.key, made)
    return [_built(one, target, cache) for one in found.values()]


def _specialise(launch: Launch, capability: int) -> _Specialised:
    """What Triton would build for this launch: types, constants, and what is known to be a multiple of 16."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    function = _buildable(launch.kernel)
    backend = make_backend(GPUTarget("cuda", capability, 32))
    bind = create_function_from_signature(function.signature, function.params, backend)
    arguments, specialised, asked = bind(*launch.args, **launch.how)
    asked = {"debug": False, "instrumentation_mode": "", **asked}
    options, signature, constants, attributes = function._pack_args(backend, asked, arguments, specialised, asked)
    said = (
        _VERSION, triton.__version__, backend.hash(), function.cache_key, signature, sorted(constants.items()),
        sorted(attributes.items()), options.hash(),
    )  # fmt: skip
    return _Specialised(
        function, signature, constants, attributes, options, tuple(_shapes(arguments)),
        hashlib.sha256(repr(said).encode()).hexdigest(),
    )  # fmt: skip


def _shapes(arguments: dict[str, Any]) -> Iterator[str]:
    for name, value in arguments.items():
        if isinstance(value, Tensor):
            sizes = ", ".join(map(str, value.shape))
            yield f"{name.removesuffix('_ptr')} {_short(str(value.dtype))}[{sizes}]"


def _short(dtype: str) -> str:
    name = dtype.removeprefix("torch.")
    return {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16", "float64": "fp64"}.get(name, name)


def _buildable(kernel: Any) -> Any:
    """The kernel for Triton's compiler: where its file was loaded for the interpreter, that of the file loaded anew."""
    from triton.runtime.jit import JITFunction

    if isinstance(kernel, JITFunction):
        return kernel
    module = sys.modules[kernel.fn.__module__]
    return getattr(_for_building(module), kernel.fn.__name__)


def _for_building(module: ModuleType) -> ModuleType:
    text, file = inspect.getsource(module), module.__file__ or f"{module.__name__}.py"
    return module_of(text, f"{module.__name__}__built", file, interpret=False)


def _built(made: _Specialised | Product, target: Target, cache: Path | None) -> Built:
    """From the cache, or built now."""
    name = made.gemm.__name__ if isinstance(made, Product) else made.function.__name__
    kept = cache and cache / f"{name}-{target.name}-{made.key[:32]}.json"
    figures = _read(kept) if kept else None
    if figures is None:
        figures = made.figures(target) if isinstance(made, Product) else _figures(made, target)
        if kept:
            _write(kept, figures)
    if isinstance(made, Product):
        return Built(name, target.name, made.shapes, (), (), made.key, limit=target.shared, **figures)
    names = list(made.signature)
    constants = tuple((names[place[0]], str(value)) for place, value in sorted(made.constants.items()))
    options = tuple((name, getattr(made.options, name)) for name in ("num_warps", "num_stages"))
    return Built(
        name, target.name, made.shapes, constants, options, made.key, limit=target.shared, **figures
    )


def _read(kept: Path) -> dict[str, Any] | None:
    """What was kept of a build; None where there is nothing, or no longer anything that can be read."""
    try:
        figures: dict[str, Any] = json.loads(kept.read_text(encoding="utf-8"))
        found = figures["resources"]
        if found is not None:
            cores = tuple((kind, count) for kind, count in found.pop("tensor_cores"))
            figures["resources"] = Resources(**found, tensor_cores=cores)
        wanted = tuple((kind, count) for kind, count in figures["products"])
        return {**figures, "products": wanted, "problems": tuple(figures["problems"])}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write(kept: Path, figures: dict[str, Any]) -> None:
    plain = {**figures, "resources": figures["resources"] and asdict(figures["resources"])}
    kept.parent.mkdir(parents=True, exist_ok=True)
    partial = kept.with_name(f".{kept.name}.{os.getpid()}")
    partial.write_text(json.dumps(plain, indent=1) + "\n", encoding="utf-8")
    partial.replace(kept)


def _figures(made: _Specialised, target: Target) -> dict[str, Any]:
    """Compile, and read what came out."""
    import triton
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    source = ASTSource(made.function, made.signature, made.constants, made.attributes)
    begun = time.perf_counter()
    said: list[str] = []
    try:
        with tempfile.TemporaryDirectory() as own, knobs.cache.scope(), _silence(said):
            knobs.cache.dir = own
            binary = triton.compile(
                source, target=GPUTarget("cuda", target.capability, 32), options=dict(made.options.__dict__)
            )
    except Exception as error:
        return {
            "seconds": round(time.perf_counter() - begun, 2), "resources": None,
            "problems": (f"Triton {triton.__version__} does not build it: {_first_line(error, said)}",),
        }  # fmt: skip
    seconds = time.perf_counter() - begun
    read = resources(binary.kernel)
    wanted = expected(products(binary.asm["ttir"]), target.capability or 0, made.options.num_warps)
    return {
        "seconds": round(seconds, 2), "shared": binary.metadata.shared, "products": wanted,
        "code_bytes": len(binary.kernel), "resources": read,
        "problems": tuple(_problems(binary.metadata, read, wanted, len(binary.kernel), target)),
    }  # fmt: skip


def _problems(
    metadata: Any, read: Resources, wanted: tuple[tuple[str, int], ...], code_bytes: int, target: Target
) -> Iterator[str]:
    """Why a build that Triton gave cannot be used."""
    if metadata.shared > target.shared:
        yield f"{metadata.shared:,} bytes of shared memory, and a program on {target.name} has {target.shared:,}"
    columns = getattr(metadata, "tmem_size", None) or 0
    if columns > _TENSOR_MEMORY:
        yield f"{columns} columns of tensor memory, and a program on {target.name} has {_TENSOR_MEMORY}"
    yield from lost(read.tensor_cores, wanted)
    if code_bytes < _SMALLEST_BYTES:
        yield f"{code_bytes} bytes of code: nothing is left of it"


def _first_line(error: Exception, said: list[str]) -> str:
    """What an error says; a failed pass of the compiler says it on the standard error only."""
    told = [line.strip() for line in f"{error}\n{''.join(said)}".splitlines()]
    wanted = [line for line in told if "error:" in line] or [line for line in told if line]
    return (wanted[0] if wanted else type(error).__name__)[:200]


@contextmanager
def _silence(said: list[str]) -> Iterator[None]:
    """Keep what the compiler, which is no Python, prints; a pass that fails prints the whole program."""
    with tempfile.TemporaryFile() as file:
        sys.stdout.flush()
        sys.stderr.flush()
        before = [os.dup(number) for number in (1, 2)]
        for number in (1, 2):
            os.dup2(file.fileno(), number)
        try:
            yield
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for number, old in zip((1, 2), before, strict=True):
                os.dup2(old, number)
                os.close(old)
            file.seek(0)
            said.append(file.read().decode(errors="replace"))
