"""Kernels on a machine without a GPU: Triton's interpreter, repaired, and the loading of generated source.

The interpreter of triton 3.6 and 3.7 is wrong below fp32: a cast from fp32 to bf16 truncates, a cast to fp8 loses the
carry, and arithmetic on bf16 works on its bit patterns as whole numbers. Here casts and products go through torch's
types, and arithmetic on what numpy has no type for is an error instead of a wrong number: a kernel casts to fp32 first.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.abc import InspectLoader
from types import FunctionType, ModuleType
from typing import Any

import numpy as np
import torch

_REPAIRED = ("create_fadd", "create_fsub", "create_fmul", "create_fdiv", "create_frem", "create_precise_divf",
             "create_minimumf", "create_minnumf", "create_maximumf", "create_maxnumf", "create_fma", "create_clampf",
             *(f"create_fcmp{order}{how}" for order in "OU" for how in ("LT", "GT", "LE", "GE", "EQ", "NE")),
             "create_fabs", "create_exp", "create_exp2", "create_log", "create_log2", "create_sqrt",
             "create_precise_sqrt", "create_rsqrt", "create_sin", "create_cos", "create_erf", "create_floor",
             "create_ceil")  # fmt: skip


class _Numbers:
    """Whether anybody looks at what kernels compute."""

    matter = True


@contextmanager
def without_numbers() -> Iterator[None]:
    """For tensors that have none: arithmetic that gives wrong numbers is no error inside."""
    before, _Numbers.matter = _Numbers.matter, False
    try:
        yield
    finally:
        _Numbers.matter = before


@cache
def repair() -> None:
    """Mend the interpreter of this process; a second call does nothing."""
    import triton.language as tl
    from triton.runtime import interpreter, jit

    kinds = {
        tl.float64: torch.float64, tl.float32: torch.float32, tl.float16: torch.float16, tl.bfloat16: torch.bfloat16,
        tl.float8e5: torch.float8_e5m2, tl.float8e4nv: torch.float8_e4m3fn,
    }  # fmt: skip
    bits = {8: (np.uint8, torch.uint8), 16: (np.uint16, torch.int16), 32: (np.uint32, torch.int32)}
    bits[64] = (np.uint64, torch.int64)
    odd = (tl.bfloat16, tl.float8e5, tl.float8e4nv)

    def tensor(data: Any, kind: Any) -> torch.Tensor:
        """What an array of bits of this type holds."""
        plain, like = bits[kind.primitive_bitwidth]
        signed = np.dtype(str(np.dtype(plain)).lstrip("u")) if plain is not np.uint8 else np.dtype(plain)
        return torch.from_numpy(np.ascontiguousarray(data).view(signed)).view(like).view(kinds[kind])

    def convert(data: Any, source: Any, target: Any, rounding: Any) -> Any:
        """To the nearest, ties to even: the bits, as numpy sees them. fp8 e4m3 saturates nowhere: NaN beyond it."""
        plain, like = bits[target.primitive_bitwidth]
        found = tensor(data, source).to(torch.float32 if source != tl.float64 else torch.float64).to(kinds[target])
        return found.contiguous().view(like).numpy().view(plain).reshape(np.shape(data))

    plain_cast = interpreter.InterpreterBuilder.cast_impl

    def cast(self: Any, src: Any, kind: Any) -> Any:
        """Through a float type where one of both is odd: numpy would take its bits for a number."""
        source, target = src.dtype.scalar, kind.scalar
        if source not in odd and target not in odd:
            with np.errstate(over="ignore"):  # an infinity in fp16 is what a GPU gives too
                return plain_cast(self, src, kind)
        value = tensor(src.data, source).float() if source in odd else torch.from_numpy(np.asarray(src.data))
        if target in odd:
            value = value.float() if value.dtype != torch.float64 else value
            plain, like = bits[target.primitive_bitwidth]
            found = value.to(kinds[target]).contiguous().view(like).numpy().view(plain)
        else:
            found = value.numpy().astype(interpreter._get_np_dtype(target))
        return interpreter.TensorHandle(found.reshape(np.shape(src.data)), target)

    def dot(self: Any, a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
        """Products of what is stored, summed in the accumulator's type."""
        left, right = (
            tensor(x.data, x.dtype).to(kinds[d.dtype]).numpy() if x.dtype in kinds else x.data for x in (a, b)
        )
        return interpreter.TensorHandle(np.matmul(left, right, dtype=d.data.dtype) + d.data, d.dtype.scalar)

    def guarded(name: str) -> Any:
        plain = getattr(interpreter.InterpreterBuilder, name)

        def checked(self: Any, *args: Any, **more: Any) -> Any:
            for arg in args if _Numbers.matter else ():
                if getattr(arg, "dtype", None) is not None and getattr(arg.dtype, "scalar", None) in odd:
                    raise TypeError(f"{name} of {arg.dtype}: cast to fp32 before arithmetic")
            return plain(self, *args, **more)

        return checked

    for name in _REPAIRED:
        if hasattr(interpreter.InterpreterBuilder, name):
            setattr(interpreter.InterpreterBuilder, name, guarded(name))
    plain_tensor = interpreter.ReduceScanOpInterface.check_tensor

    def check(self: Any, args: Any) -> None:
        for arg in args if _Numbers.matter else ():
            if getattr(arg, "dtype", None) in odd:
                raise TypeError(f"a reduction of {arg.dtype}: cast to fp32 first")
        plain_tensor(self, args)

    plain_convert = interpreter._convert_float
    interpreter._convert_float = lambda data, source, target, rounding: (
        convert(data, source, target, rounding)
        if source in kinds and target in kinds and not _to_zero(rounding)
        else plain_convert(data, source, target, rounding)
    )
    # `tl.sum`, `tl.cdiv` and others are kernels' functions themselves, made when Triton was loaded, so for builds; and
    # this process may build with them too.
    functions: dict[Any, Any] = {}

    def call(self: Any, *args: Any, **more: Any) -> Any:
        if self.fn not in functions:
            functions[self.fn] = interpreter.InterpretedFunction(self.fn)
        return functions[self.fn](*args, **more)

    plain_patch = interpreter._patch_lang_tensor

    def patch(tensor: Any, scope: Any) -> None:
        plain_patch(tensor, scope)
        # Bounds of loops: numpy makes no number of an array that has a dim, as Triton 3.6 asks it to.
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch

    def bf16(self: Any, value: float) -> Any:
        return cast(self, interpreter.TensorHandle(np.array([value], np.float32), tl.float32), tl.bfloat16)

    plain_run = interpreter.GridExecutor.__call__

    # Ranks may be threads: the language is patched for a launch, and Python 3.11 makes syntax trees one at a time.
    lock = threading.RLock()
    plain_rewrite = interpreter.InterpretedFunction.rewrite

    def rewrite(self: Any) -> Any:
        with lock:
            return plain_rewrite(self)

    def run(self: Any, *args: Any, **more: Any) -> Any:
        with lock, np.errstate(all="ignore"):  # infinities and NaN are values, to a GPU too
            return plain_run(self, *args, **more)

    interpreter.InterpretedFunction.rewrite = rewrite
    interpreter.GridExecutor.__call__ = run
    jit.JITFunction.__call__ = call
    _patch_once(interpreter)
    interpreter.InterpreterBuilder.get_bf16 = bf16
    interpreter.InterpreterBuilder.cast_impl = cast
    for name in ("fp_ext", "fp_trunc", "si_to_fp", "ui_to_fp", "fp_to_si", "fp_to_ui"):
        setattr(interpreter.InterpreterBuilder, f"create_{name}", lambda self, src, kind: cast(self, src, kind))
    interpreter.InterpreterBuilder.create_dot = dot
    interpreter.ReduceScanOpInterface.check_tensor = check


def _patch_once(interpreter: Any) -> None:
    """The language's functions are put in place once a launch, and taken back behind it. As it is, each call of a
    function from a kernel puts them in place again, which is most of its time, and never takes them back: what is built
    in this process later would be built of them."""
    import triton.language as tl

    plain = interpreter._patch_lang
    # What a kernel's functions may call: what they name as `tl`, and what Triton's own functions do as `core`.
    every = FunctionType((lambda: None).__code__, {"tl": tl, "core": tl.core})
    running: list[Any] = []

    class Scope:
        def restore(self) -> None:
            running.pop().restore()

    class Inside:
        def restore(self) -> None:
            """What was there before is put back behind the launch."""

    def patch(fn: Any) -> Any:
        if running:
            return Inside()
        running.append(plain(every))
        return Scope()

    interpreter._patch_lang = patch


def _to_zero(rounding: Any) -> bool:
    return rounding is not None and "RTZ" in str(rounding)


class Source(InspectLoader):
    """The loader of a module from its text; tracebacks and Triton read the text from here."""

    def __init__(self, text: str, path: str, is_package: bool = False) -> None:
        self.text, self.path, self._package = text, path, is_package

    def get_source(self, fullname: str) -> str:
        return self.text

    def get_filename(self, fullname: str) -> str:
        return self.path

    def is_package(self, fullname: str) -> bool:
        return self._package

    def exec_module(self, module: ModuleType) -> None:
        exec(compile(self.text, self.path, "exec"), module.__dict__)


def plain_module(text: str, name: str, path: str, is_package: bool = False) -> ModuleType:
    """A module from its text, under `name`; its source is found where tools look for it."""
    spec = importlib.machinery.ModuleSpec(name, Source(text, path, is_package), origin=path, is_package=is_package)
    spec.has_location = True
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        assert spec.loader is not None
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def module_of(text: str, name: str, path: str, interpret: bool | None = None) -> ModuleType:
    """The module of a file of kernels; the one that is there where it has this text already, since torch takes each op
    but once. `interpret`: whether its kernels run in the interpreter; None: where there is no GPU."""
    from triton import knobs

    there = sys.modules.get(name)
    if there is not None and getattr(getattr(there.__spec__, "loader", None), "text", None) == text:
        return there
    before = knobs.runtime.interpret
    knobs.runtime.interpret = not torch.cuda.is_available() if interpret is None else interpret
    try:
        if knobs.runtime.interpret:
            repair()
        return plain_module(text, name, path)
    finally:
        knobs.runtime.interpret = before
