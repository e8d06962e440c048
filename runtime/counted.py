"""What the programs of a launch really do, without a GPU: bytes that they load and store, and operations of products.

The kernel's own code runs in Triton's interpreter, for some of its programs, on tensors that have shapes and no numbers
but for whole ones; what these do stands for all. So a tile that is read again, a mask that leaves one out, and a value
that is made a second time all count as the code has them.
"""

from __future__ import annotations

import inspect
import statistics
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import count as count_up
from itertools import product
from math import prod
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .interpreted import repair, without_numbers
from .lib import kernels
from .lib.gemms import Gemm
from .lib.kernels import Launch
from .plan.hollow import Hollow

PROGRAMS, SOME, FEW = 48, 8, 3
"""How many programs of a launch are run: at most, where what they do is known to 1 %, and where all do the same."""
PROCESSORS = 132
"""Of the GPU that other packages take themselves to be on (an H100's), where they start as many programs as it has."""
_SPREAD = (0.8191725134, 0.6710436067, 0.5497004779)
"""Steps of the sequence that chooses them, one for each axis of the grid (Roberts 2018: the three-dimensional R
sequence), so that few places are spread evenly along each axis, and over all together."""


@dataclass(frozen=True)
class Counted:
    """Of one launch: `requested` bytes of its loads and stores, `moved` those of them that memory must move at least
    (what is read again is read once), `flops` of products, a multiply-add being two."""

    kernel: str
    programs: int
    requested: float
    moved: float
    flops: float


_LIBDEVICE = "triton.language.extra.libdevice"
aten = torch.ops.aten
_UNTOUCHED = (
    aten.empty.memory_format, aten.empty_like.default, aten.empty_strided.default, aten.new_empty.default,
    aten.new_empty_strided.default,
)  # fmt: skip


class Watched(Hollow):
    """Tensors without numbers, on which the functions of kernels run as they are, so that `launches()` is told of the
    tensors that each is given. Nothing is launched, and memory that is only asked for is no work."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        body = kernels.body_of(func._schema.name)
        if body is None:
            if func is aten.equal.default:
                return False  # numbers that are not there are not those that somebody looks for
            if func in _UNTOUCHED:
                with self.section("", ""):
                    return super().__torch_dispatch__(func, types, args, kwargs)
            return super().__torch_dispatch__(func, types, args, kwargs)
        with self, kernels.unlaunched():
            return body(*args, **(kwargs or {}))


@contextmanager
def launches_of_others() -> Iterator[list[list[Launch]]]:
    """What other packages launch inside, by themselves: it is written down, and does not run. Each has several forms
    where a GPU would choose between them by timing them."""
    from triton.runtime import driver
    from triton.runtime.autotuner import Autotuner
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    told: list[list[Launch]] = []

    def run(self: Any, *args: Any, grid: Any, warmup: bool = False, **how: Any) -> None:
        given = dict(zip(self.arg_names, args, strict=False)) | how
        shape = tuple(int(n) for n in (grid(given) if callable(grid) else grid))
        told.append([Launch(self, shape, args, how)])

    def every(self: Any, *args: Any, **how: Any) -> None:
        """Ways to cut a kernel; how many warps run it changes nothing of what it does."""
        cuts = {str(config.kwargs): config for config in self.configs}
        first = len(told)
        for self.best_config in cuts.values():
            self.fn.run(*args, **how, **self.best_config.all_kwargs())
        told[first:] = [[form for one in told[first:] for form in one]]

    properties = SimpleNamespace(multi_processor_count=PROCESSORS)
    utils = SimpleNamespace(get_device_properties=lambda device: {"multiprocessor_count": PROCESSORS})
    instead = [
        (Autotuner, "run", every), (InterpretedFunction, "run", run), (JITFunction, "run", run),
        # They ask the GPU that their tensors are on, which are on none.
        (torch.cuda, "device", lambda device: nullcontext()),
        (torch.cuda, "get_device_properties", lambda device: properties),
        (type(driver), "active", SimpleNamespace(utils=utils)),
    ]  # fmt: skip
    before = [(owner, name, vars(owner)[name]) for owner, name, _ in instead]
    try:
        for owner, name, made in instead:
            setattr(owner, name, made)
        yield told
    finally:
        for owner, name, was in before:
            setattr(owner, name, was)


class _Meter:
    """What is loaded and stored, by the tensor that it is of."""

    def __init__(self, args: tuple[Any, ...]) -> None:
        held = sorted((a.data_ptr(), _bytes(a)) for a in args if isinstance(a, Tensor) and a.numel())
        self.starts, self.sizes = [h[0] for h in held], [h[1] for h in held]
        self.loaded: Counter[int] = Counter()
        self.stored: Counter[int] = Counter()
        self.flops = 0.0

    def add(self, into: Counter[int], pointers: Any, mask: Any, width: int) -> None:
        places = np.asarray(pointers)[np.asarray(mask, bool)]
        if places.size:
            into[bisect_right(self.starts, int(places.flat[0])) - 1] += places.size * width

    @property
    def asked(self) -> int:
        """Bytes of all loads and stores."""
        return sum(self.loaded.values()) + sum(self.stored.values())

    def moved(self, into: Counter[int], times: float) -> float:
        """Bytes of memory: of a tensor that is asked for again and again as much as there is; of all others what is
        asked for, since what some programs ask too much of one of them, others ask of the next."""
        asked = ((n * times, self.sizes[i]) for i, n in into.items())
        return sum(size if n >= 2 * size else n for n, size in asked)


def _bytes(x: Tensor) -> int:
    return (1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))) * x.element_size()


def count(launch: Launch) -> Counted:
    """What a launch does, by some of its programs: as many as it takes to know it, up to `PROGRAMS`."""
    from triton.runtime import interpreter

    if isinstance(launch.kernel, Gemm):
        return _product(launch)
    repair()
    meter, total = _Meter((*launch.args, *launch.how.values())), prod(launch.grid)
    function = launch.kernel
    if not isinstance(function, interpreter.InterpretedFunction):
        function = interpreter.InterpretedFunction(function.fn)
    if not total:
        return Counted(function.fn.__name__, 0, 0.0, 0.0, 0.0)
    each: list[tuple[int, float]] = []
    with _metered(meter), without_numbers():
        for _ in _programs(function, launch):
            each.append((meter.asked - sum(e[0] for e in each), meter.flops - sum(e[1] for e in each)))
            if _is_known(each):
                break
    times = total / len(each)
    moved = meter.moved(meter.loaded, times) + meter.moved(meter.stored, times)
    return Counted(function.fn.__name__, total, times * meter.asked, moved, times * meter.flops)


def _product(launch: Launch) -> Counted:
    """What a product of the CuTe DSL does, whose programs no interpreter runs: all that it is given is moved once."""
    x, weight = launch.args[:2]
    size = float(sum(a.numel() * a.element_size() for a in launch.args if isinstance(a, Tensor)))
    return Counted(launch.kernel.function.__name__, prod(launch.grid), size, size, 2.0 * x.numel() * len(weight))


def _is_known(each: list[tuple[int, float]]) -> bool:
    """Whether more programs would change the mean by little, as far as these tell."""
    if len(each) < FEW:
        return False
    if len(set(each)) == 1:
        return True
    columns = [[float(x) for x in column] for column in zip(*each, strict=True)]
    errors = (statistics.stdev(c) / len(c) ** 0.5 for c in columns)
    return len(each) >= SOME and all(e <= 0.01 * statistics.mean(c) for e, c in zip(errors, columns, strict=True))


def _programs(function: Any, launch: Launch) -> Iterator[None]:
    """Run programs of a launch, one each time."""
    from triton.runtime import interpreter

    code = function.rewrite()
    how = {k: v for k, v in launch.how.items() if k in function.arg_names}
    given = inspect.getcallargs(code, *launch.args, **how)
    constants = interpreter.GridExecutor(code, function.arg_names, launch.grid, []).constexprs
    # Functions of CUDA's library are not there without it; here only what they take and give counts.
    beside = {n: lambda x, *rest: x for n, f in code.__globals__.items() if getattr(f, "__module__", "") == _LIBDEVICE}
    there = {name: code.__globals__[name] for name in beside}
    scope = interpreter._patch_lang(code)
    try:
        code.__globals__.update(beside)
        args = {n: a if n in constants else _argument(a) for n, a in given.items()}
        interpreter.interpreter_builder.set_grid_dim(*(*launch.grid, 1, 1)[:3])
        for program in _chosen(launch.grid):
            interpreter.interpreter_builder.set_grid_idx(*program)
            with np.errstate(all="ignore"):
                code(**args)
            yield
    finally:
        code.__globals__.update(there)
        scope.restore()


def _argument(a: Any) -> Any:
    """As a kernel has it. A number with a fraction is fp32, which the interpreter leaves as it is."""
    import triton.language as tl
    from triton.runtime import interpreter

    if isinstance(a, float):
        return tl.tensor(interpreter.TensorHandle(np.array([a], np.float32), tl.float32), tl.float32)
    return interpreter._implicit_cvt(a)


def _chosen(grid: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    whole = (*grid, 1, 1)[:3]
    if prod(whole) <= PROGRAMS:
        yield from product(*map(range, whole))
        return
    seen: set[tuple[int, ...]] = set()
    for i in count_up():
        place = tuple(int((0.5 + i * step) % 1.0 * n) for n, step in zip(whole, _SPREAD, strict=True))
        if place not in seen:
            seen.add(place)
            yield place
        if len(seen) == PROGRAMS:
            return


@contextmanager
def _metered(meter: _Meter) -> Iterator[None]:
    """The interpreter tells of loads, stores and products."""
    from triton.runtime.interpreter import InterpreterBuilder

    plain = {name: getattr(InterpreterBuilder, name) for name in
             ("create_masked_load", "create_masked_store", "create_dot")}  # fmt: skip

    def load(self: Any, ptrs: Any, mask: Any, other: Any, *rest: Any) -> Any:
        meter.add(meter.loaded, ptrs.data, mask.data, ptrs.get_element_ty().primitive_bitwidth // 8)
        return plain["create_masked_load"](self, ptrs, mask, other, *rest)

    def store(self: Any, ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
        meter.add(meter.stored, ptrs.data, mask.data, ptrs.get_element_ty().primitive_bitwidth // 8)
        return plain["create_masked_store"](self, ptrs, value, mask, *rest)

    def dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        meter.flops += 2 * a.data.size * b.data.shape[-1]
        return plain["create_dot"](self, a, b, *rest)

    try:
        for name, made in zip(plain, (load, store, dot), strict=True):
            setattr(InterpreterBuilder, name, made)
        yield
    finally:
        for name, was in plain.items():
            setattr(InterpreterBuilder, name, was)
