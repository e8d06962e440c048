"""Out of memory as a diagnostic: which line of the spec asked for what a device does not have, and what needs less."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping
from types import FrameType, ModuleType
from typing import Any, NamedTuple

import torch

from ..dsl.diagnostics import Label, SpecError, fail
from ..dsl.source import Source, Span
from ..lowering.target import TARGETS
from .errors import UserError
from .interpreted import Source as Loaded

LESS = "fewer or shorter rows at once need less (`--batch`, `--accumulate`, `--seq`); so does `recompute` in a layout"
SHARED = "a layout shares weights among ranks (`shard`, `stages`)"
PLAN = "`heddle plan SPEC` shows what each op keeps, and what would fit"
OTHER = f"kernels of the target `triton` ask for at most {TARGETS['triton'].shared:,} bytes; `cpu` has PyTorch's own"
_SPEC = re.compile(r"^\s*# (\S+\.spec):(\d+)  (.*)$")
_CPU = re.compile(r"DefaultCPUAllocator.*tried to allocate (\d+) bytes", re.S)
_GPU = re.compile(r"[Tt]ried to allocate ([\d.]+ [KMGT]?i?B).*total capacity of ([\d.]+ [KMGT]?i?B)", re.S)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error is a device, or this machine, without the memory that was asked for."""
    lacks = isinstance(error, (torch.OutOfMemoryError, MemoryError)) or _CPU.search(str(error)) is not None
    return lacks or _is_too_large(error)


def _is_too_large(error: BaseException) -> bool:
    """Whether Triton refused a kernel of which one program is larger than the device allows."""
    return any(f"{c.__module__}.{c.__name__}" == "triton.runtime.errors.OutOfResources" for c in type(error).__mro__)


def diagnosed(error: BaseException) -> SpecError | UserError:
    """What to tell of such an error. The line is that of the statement in a generated file which was running; in the
    backward pass, of those that call the kernel which was. PyTorch's own backward pass does not say what it is of."""
    said, where = f"out of memory{_amounts(error)}", _where(error)
    what = OTHER if _is_too_large(error) else f"{SHARED if where is not None and where.is_weight else LESS}\n{PLAN}"
    if where is None:
        return UserError("out-of-memory", said, help=what)
    first, *more = where.spans
    labels = [Label(span, where.others) for span in more]
    label = "this weight asked for it" if where.is_weight else "this line asked for it"
    return fail("out-of-memory", said, first, label, labels, what)


class _Where(NamedTuple):
    """Lines of a spec: of what asked, and others that `others` explains; `is_weight`: as its weights were made."""

    spans: list[Span]
    others: str
    is_weight: bool = False


def _where(error: BaseException) -> _Where | None:
    running: list[Span] = []
    is_weight, kernel = False, None
    for frame, number in _frames(error):
        kernel = re.fullmatch(r"(.*)\.kernels\.(\w+)", frame.f_globals["__name__"])
        span = None if kernel else _spec_line(_text(frame.f_globals), number)
        if span is not None:
            running.insert(0, span)
            is_weight = frame.f_code.co_name == "__init__"
    if not running and kernel is not None:
        running = list(_calls(sys.modules.get(f"{kernel[1]}.model"), kernel[2]))
        return _Where(running, "or this one, by the same kernel") if running else None
    return _Where(list(dict.fromkeys(running)), "called here", is_weight) if running else None


def _amounts(error: BaseException) -> str:
    if _is_too_large(error):
        asked, there, what = (getattr(error, name) for name in ("required", "limit", "name"))
        return f": one program of a kernel asks for {asked:,} of {what}, the device has {there:,}"
    text = str(error)
    if found := _CPU.search(text):
        return f": {int(found[1]) / 2**30:,.2f} GiB more are asked for"
    if found := _GPU.search(text):
        return f": {found[1]} more are asked for, the device has {found[2]}"
    return ""


def _frames(error: BaseException) -> Iterator[tuple[FrameType, int]]:
    """The frames of generated files, the innermost last, each with its line."""
    trace = error.__traceback__
    while trace is not None:
        if isinstance(getattr(trace.tb_frame.f_globals.get("__spec__"), "loader", None), Loaded):
            yield trace.tb_frame, trace.tb_lineno
        trace = trace.tb_next


def _text(module: Mapping[str, Any]) -> str:
    return str(module["__spec__"].loader.text)


def _spec_line(text: str, number: int) -> Span | None:
    """The spec's line above line `number` of a generated file, as a place in the spec, of which this line is left."""
    for line in reversed(text.split("\n")[:number]):
        if line.strip().startswith(("def ", "class ")):
            return None
        if found := _SPEC.match(line):
            before = int(found[2]) - 1
            return Span(Source(found[1], "\n" * before + found[3]), before, before + len(found[3]))
    return None


def _calls(model: ModuleType | None, kernel: str) -> Iterator[Span]:
    """The lines of the spec whose statements call a kernel, in a model's generated module."""
    text = "" if model is None else _text(vars(model))
    numbers = [i for i, line in enumerate(text.split("\n"), 1) if re.search(rf"\bkernels\.{kernel}\b", line)]
    yield from dict.fromkeys(span for i in numbers if (span := _spec_line(text, i)) is not None)
