"""`heddle tune`: how the kernels of a spec are cut, and which products are one kernel with what is behind them,
measured on this GPU and written to a lock.

For each kernel by itself, one constant after the other: what does not build, spills or asks for more than a program may
have is left out before it is run; what is faster must also be right, against PyTorch in fp64. What changes
the order of a sum is another numerics class, whose results differ in their last bits; `keep_bits` tries none of these.
A product is PyTorch's where its own kernel, cut at its best, is not faster; with `keep_bits` it stays PyTorch's.
Nothing is measured when a model runs.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from .. import __version__
from ..codegen.emit import Files, emit_block
from ..codegen.lock import Lock, Tuned
from ..codegen.tiles import class_of, constants_of, with_constants
from ..dsl.diagnostics import InternalError
from ..dsl.program import Program
from ..lowering.alone import Alone, kernels, products
from ..lowering.chains.plan import plan
from ..lowering.chains.tiles import numerics as numerics_of_chain
from ..lowering.chains.tiles import tuned as tuned_of_chain
from ..lowering.graph import GraphProgram
from ..lowering.ops import has_part, part
from ..lowering.pipeline import lower
from ..lowering.target import TARGETS, Target
from .ahead import build
from .compile import target_of, versions
from .errors import UserError
from .lib import gemms
from .verify import DTYPES, Draw, Expected, block_of, launched

Timer = Callable[[Callable[[], object]], float]
"""Microseconds that a call takes: a median."""
BETTER = 0.97
"""A candidate wins where it takes no more than this share of the time: less is noise."""


@dataclass(frozen=True)
class Tried:
    """One candidate: its constants, what it took, or why it was not measured or does not count."""

    constants: Mapping[str, Any]
    us: float | None
    why_not: str = ""


@dataclass(frozen=True)
class Found:
    """What tuning found of one kernel."""

    key: str
    tuned: Tuned
    tried: tuple[Tried, ...]


def tune(
    program: Program, target: str, device: torch.device, shape: tuple[int, int], dtype: torch.dtype, budget: float,
    keep_bits: bool = False, only: str | None = None, timer: Timer | None = None,
) -> Iterator[Found]:  # fmt: skip
    """Tune every kernel of a model, or the one named, for rows of `shape`, in about `budget` seconds together.

    Raises UserError `unknown-target`, `no-kernels`.
    """
    aim = target_of(target)
    if aim.capability is None:
        ours = ", ".join(t.name for t in TARGETS.values() if t.capability is not None)
        said = f"a lock is of one generation of GPU, and `{target}` is none"
        raise UserError("no-kernels", said, help=f"targets: {ours}")
    if device.type == "cuda" and not gemms.has(device, target):
        name = torch.cuda.get_device_name(device)
        raise UserError("no-kernels", f"a lock of `{target}` is measured on such a GPU, and this is a {name}")
    lowered = lower(program, target=aim)
    parts = list(_kernels(lowered))
    if dtype in gemms.DTYPES and not keep_bits:
        parts += _products(lowered)
    parts = [p for p in parts if only in (None, p.name)]
    end = time.monotonic() + budget
    for i, one in enumerate(parts):
        mine = time.monotonic() + (end - time.monotonic()) / (len(parts) - i)
        yield _Tuning(one, aim, device, shape, dtype, keep_bits, timer or _on_gpu).found(mine)


@dataclass(frozen=True)
class _Part:
    """The kernel `name` of the files of a block; `library`: the files of what PyTorch has in its place."""

    alone: Alone
    name: str
    files: Files
    library: Files | None = None


def _kernels(lowered: GraphProgram) -> Iterator[_Part]:
    for alone in kernels(lowered):
        files = emit_block(alone.name, alone.program, __version__)
        for name in files.kernels:
            yield _Part(alone, name, files)


def _products(lowered: GraphProgram) -> Iterator[_Part]:
    """Products with what is behind them, as kernels. Raises UserError `no-kernels` where there are some, and the CuTe
    DSL is not installed."""
    for alone in products(lowered):
        if not versions()["dsl"]:
            said = f"`{alone.nodes[0].op}` may be a kernel of the CuTe DSL, and `{gemms.DSL}` is not installed"
            raise UserError("no-kernels", said, help="install it (`heddle-lang[cuda]`), or tune with --keep-bits")
        library = emit_block(alone.name, alone.program, __version__)
        (name,) = library.offered.values()
        files = emit_block(alone.name, alone.program, __version__, choosing(library.offered, lowered.target.name))
        yield _Part(alone, name, files, library)


def one_of(precision: str) -> torch.dtype:
    """The type that kernels are timed in. Raises UserError `unknown-setting`."""
    if precision not in DTYPES:
        raise UserError("unknown-setting", f"kernels have no precision `{precision}`", help=f"{', '.join(DTYPES)}")
    return DTYPES[precision]


def made_with(device: torch.device, shape: tuple[int, int], precision: str) -> dict[str, Any]:
    """What a lock says of how it was made, for people."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {"device": name, "heddle": __version__, "torch": torch.__version__, "shape": list(shape), "in": precision}


def lock_of(found: list[Found], target: str, made: Mapping[str, Any]) -> Lock:
    """The lock of what was found."""
    here = versions()
    return Lock(target, here["triton"], {f.key: f.tuned for f in found}, made, here["dsl"])


def choosing(offered: Mapping[str, str], target: str) -> Lock:
    """A lock that says nothing but that all these kernels, by key, stand in place of PyTorch's products."""
    return Lock(target, versions()["triton"], {key: Tuned(name, {}) for key, name in offered.items()})


def grid_of(alone: Alone, text: str) -> tuple[dict[str, tuple[Any, ...]], tuple[str, ...]]:
    """The values that each constant of a kernel may have, and those constants that make the numerics class."""
    if alone.program.epilogues:
        room = part(alone.nodes[0].op, "cute")
        return {name: room.TUNED[name] for name in constants_of(text) if name in room.TUNED}, room.NUMERICS
    last = alone.nodes[-1].op
    if not alone.program.fused and has_part(last, "triton"):
        room = part(last, "triton")
        return dict(getattr(room, "TUNED", {})), tuple(getattr(room, "NUMERICS", ()))
    ((fused,),) = alone.program.fused.values()
    made = plan(fused.chain)
    summing = [k.name for k in (made.forward, *made.backward) if k.is_summing]
    return tuned_of_chain(constants_of(text)), numerics_of_chain(constants_of(text), summing)


class _Tuning:
    """One kernel, while its candidates are tried."""

    def __init__(
        self, one: _Part, target: Target, device: torch.device, shape: tuple[int, int], dtype: torch.dtype,
        keep_bits: bool, timer: Timer,
    ) -> None:  # fmt: skip
        self.alone, self.name, self.files, self.library = one.alone, one.name, one.files, one.library
        self.text = self.files.kernels[self.name]
        self.target, self.keep_bits, self.timer = target, keep_bits, timer
        self.device, self.shape, self.dtype = device, shape, dtype
        self.grid, self.numerics = grid_of(self.alone, self.text)
        self.plain = constants_of(self.text)
        self.tried: list[Tried] = []
        self.spilled, problems = self._built({})
        if problems:
            raise InternalError(f"{self.name} as it is untuned: {problems[0]}")

    def found(self, until: float) -> Found:
        """The best constants, one after the other, until time is up."""
        untuned = best_us = self._time({})
        best: dict[str, Any] = {}
        for name, values in self.grid.items():
            for value in (v for v in values if v != {**self.plain, **best}.get(name)):
                if time.monotonic() > until:
                    break
                candidate = {**best, name: value}
                us = self._try(candidate, best_us)
                if us is not None and us <= BETTER * best_us:
                    best, best_us = candidate, us
        best = {n: v for n, v in best.items() if v != self.plain[n]}
        tuned = Tuned(self.name, best, best_us, untuned)
        if self.library is not None:
            tuned = self._against(self.library, tuned)
        return Found(self.files.keys[self.name], tuned, tuple(self.tried))

    def _against(self, library: Files, tuned: Tuned) -> Tuned:
        """Whether a product's kernel is used: where it is faster than PyTorch, and right."""
        us = self._time_of(block_of(self.alone.name, library))
        assert tuned.us is not None
        why = "PyTorch is as fast" if tuned.us > BETTER * us else self._wrong(dict(tuned.constants))
        if why:
            self.tried.append(Tried(tuned.constants, tuned.us, why))
        return replace(tuned, library_us=us, is_used=not why)

    def _try(self, candidate: dict[str, Any], best_us: float) -> float | None:
        """The time of a candidate that may win, None for one that may not."""
        why = self._refused(candidate)
        us = None if why else self._time(candidate)
        if us is not None and us <= BETTER * best_us:
            why = self._wrong(candidate)
        self.tried.append(Tried(candidate, us, why))
        return None if why else us

    def _refused(self, candidate: dict[str, Any]) -> str:
        if self.keep_bits and not self._is_same_class(candidate):
            return "another numerics class"
        spills, problems = self._built(candidate)
        if problems:
            return problems[0]
        return f"{spills} spills in place of {self.spilled}" if spills > self.spilled else ""

    def _is_same_class(self, candidate: dict[str, Any]) -> bool:
        return class_of({**self.plain, **candidate}, self.numerics) == class_of(self.plain, self.numerics)

    def _built(self, candidate: dict[str, Any]) -> tuple[int, list[str]]:
        """Loads and stores of registers that did not fit, of all its launches; and why one is not sound."""
        kind = self._kind(candidate)
        built = build(launched(self.alone, kind, self.dtype, self.shape), self.target)
        asked = [b.resources for b in built if b.resources is not None]
        return sum(r.spill_loads + r.spill_stores for r in asked), [p for b in built for p in b.problems]

    def _kind(self, candidate: dict[str, Any]) -> type[nn.Module]:
        text = with_constants(self.text, candidate)
        return block_of(self.alone.name, replace(self.files, kernels={**self.files.kernels, self.name: text}))

    def _time(self, candidate: dict[str, Any]) -> float:
        return self._time_of(self._kind(candidate))

    def _time_of(self, kind: type[nn.Module]) -> float:
        draw = Draw(self.alone, kind, self.dtype, random.Random(0), self.device, self.shape)
        return self.timer(draw.ready(kind, self.dtype))

    def _wrong(self, candidate: dict[str, Any]) -> str:
        """Why a candidate does not compute what it should; "" where it does, by the rule of `verify`."""
        plain = replace(self.alone, program=replace(self.alone.program, target=TARGETS["cpu"], fused={}, heads={}))
        torchs = block_of(plain.name, emit_block(plain.name, plain.program, __version__))
        mine, untuned = self._kind(candidate), self._kind({})
        same = self._is_same_class(candidate)
        for seed in range(3):
            draw = Draw(self.alone, mine, self.dtype, random.Random(seed), self.device)
            found = draw.run(mine, self.dtype)
            if same and any(not torch.equal(found[n], x) for n, x in draw.run(untuned, self.dtype).items()):
                return "other bits in the same numerics class"
            for name, one in Expected.of(draw, torchs).judged(found).items():
                if not one.worst <= 1:
                    return f"{name} is wrong: {draw.shapes}"
        return ""


def _on_gpu(run: Callable[[], object]) -> float:
    from triton.testing import do_bench

    return statistics.median(do_bench(run, warmup=10, rep=40, return_mode="all")) * 1e3
