"""`heddle verify`: the kernels that a spec needs, each against its meaning, on the machine that it is run on.

Each kernel is a block by itself: once as the target has it, once as PyTorch in the same numbers (eager), and once as
PyTorch in fp64. Its inputs are drawn. Its error is judged by the rule of `judging`, with what roundings in fp32 are
measured to do to the run in fp64; all memory that it is given to write to holds NaN before.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from .. import __version__
from ..codegen.emit import Files, digest, emit_block
from ..codegen.lock import Lock
from ..codegen.writer import spec_line
from ..dsl.program import Program
from ..lowering.alone import Alone, kernels, products
from ..lowering.graph import GraphProgram, op_of
from ..lowering.pipeline import lower
from ..lowering.target import TARGETS
from .compile import module_class, target_of
from .errors import UserError
from .judging import Judged, floor, judged, moved
from .lib import STATELESS, At, gemms
from .lib import kernels as lib_kernels
from .lib.kernels import Launch
from .plan.hollow import Hollow
from .plan.uncompiled import uncompiled

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SIZES = (1, 2, 3, 7, 13, 16, 17, 31, 33)
"""How many tokens a row has: one, odd, prime, and about powers of two. On a GPU also so many that each program of a
kernel has several blocks of them."""
MORE_SIZES = (127, 129, 1000, 4099, 8192)


@dataclass
class Verified:
    """What was found of one kernel: `worst` is the largest error as a share of what is allowed, in the draw that the
    other numbers are of; `why_not`, why PyTorch computes it and there is nothing to test."""

    kernel: str
    line: str
    ops: tuple[str, ...]
    launches: bool
    why_not: str = ""
    draws: int = 0
    worst: float = 0.0
    error: float = 0.0
    eager: float = 0.0
    where: str = ""
    shapes: str = ""

    @property
    def holds(self) -> bool:
        """Whether every draw was within what is allowed. NaN is not."""
        return self.worst <= 1

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        ratio = self.error / self.eager if self.eager else None
        return {**vars(self), "ops": list(self.ops), "ratio": ratio, "holds": self.holds}


def verify(
    program: Program, target: str, examples: int, seed: int, device: torch.device, lock: Lock | None = None
) -> Iterator[Verified]:
    """Test every kernel of a model, as `lock` has them, on `examples` draws. Raises UserError `unknown-target`,
    `no-kernels`; `SpecError` bad-lock."""
    aim = target_of(target)
    if not aim.kernels:
        found = ", ".join(t.name for t in TARGETS.values() if t.kernels)
        said = f"target `{target}` has no kernels of its own"
        raise UserError("no-kernels", said, help=f"targets with kernels: {found}")
    lowered = lower(program, target=aim)
    for alone, files in files_of(lowered, lock):
        yield _verified(alone, files, examples, random.Random(f"{seed} {alone.name}"), device)


def files_of(lowered: GraphProgram, lock: Lock | None) -> Iterator[tuple[Alone, Files]]:
    """The files of each kernel by itself, and of each product that the lock says is one with what is behind it. Raises
    `SpecError` bad-lock."""
    for alone in kernels(lowered):
        yield alone, emit_block(alone.name, alone.program, __version__, lock)
    for alone in products(lowered):
        files = emit_block(alone.name, alone.program, __version__, lock)
        if lock is not None and any(lock.uses(key) for key in files.offered):
            yield alone, files


def _verified(alone: Alone, files: Files, examples: int, chance: random.Random, device: torch.device) -> Verified:
    plain = replace(alone, program=replace(alone.program, target=TARGETS["cpu"], fused={}, heads={}))
    result = Verified(alone.name, spec_line(alone.nodes[-1].spans), tuple(n.op for n in alone.nodes), launches=False)
    if not files.kernels:
        result.why_not = files.without[0].primary.text if files.without else "nothing is saved by one"
        return result
    target = alone.program.target.name
    if files.offered and not gemms.has(device, target):
        result.why_not = f"`{', '.join(result.ops)}`: that kernel is for {target}, and this is {device.type}"
        return result
    kinds = [block_of(alone.name, f) for f in (files, emit_block(plain.name, plain.program, __version__))]
    for i in range(examples):
        name, dtype = list(DTYPES.items())[i % len(DTYPES)]
        draw = Draw(alone, kinds[0], dtype, chance, device)
        expected = Expected.of(draw, kinds[1])
        with lib_kernels.launches() as told, _poisoned():
            found = draw.run(kinds[0], dtype)
        result.launches |= bool(told)
        result.draws += 1
        for what, one in expected.judged(found).items():
            if not one.worst <= result.worst:
                result.worst, result.error, result.eager = one.worst, one.error, one.eager
                result.where, result.shapes = what, f"{name} {draw.shapes}"
    return result


@dataclass(frozen=True)
class Expected:
    """What a kernel should give for a draw: in fp64, as PyTorch has it in the same numbers, and how far roundings may
    move it, by the name of a result or gradient."""

    exact: dict[str, Tensor]
    eager: dict[str, Tensor]
    moved: dict[str, float]
    dtype: torch.dtype

    @classmethod
    def of(cls, draw: Draw, torchs: type[nn.Module]) -> Expected:
        """By the block `torchs`, which PyTorch computes."""
        step = draw.ready(torchs, torch.float64)
        exact = step()
        return cls(exact, draw.run(torchs, draw.dtype), moved(step, exact), draw.dtype)

    def judged(self, found: dict[str, Tensor]) -> dict[str, Judged]:
        """What a kernel gave, by the rule of error."""
        return {
            name: judged(found[name], want, self.eager[name], floor(want, self.dtype, 0, self.moved[name]))
            for name, want in self.exact.items()
        }


def block_of(name: str, files: Files) -> type[nn.Module]:
    """The class of a block by itself."""
    # Sources are found by their path, so another text has another.
    return module_class(files.model, f"{name}-{digest(files.model, *files.kernels.values())}/model.py", files.kernels)


class Draw:
    """Inputs, weights and cotangents of one run."""

    def __init__(
        self, alone: Alone, kind: Any, dtype: torch.dtype, chance: random.Random, device: torch.device,
        shape: tuple[int, int] | None = None, document: Tensor | None = None,
    ) -> None:  # fmt: skip
        """`shape`: the rows of a batch and their tokens, where these are not drawn; `document` numbers the documents of
        each, int64 of that shape, None where it is one."""
        self.dtype, self.device = dtype, device
        generator = torch.Generator().manual_seed(chance.getrandbits(40))
        rows, seq = chance.choice((1, 2, 3)), chance.choice(SIZES + MORE_SIZES * (device.type == "cuda"))
        rows, seq = shape or (rows, seq)
        if chance.random() < 0.5 and shape is None:
            document = torch.randint(0, 4, (rows, seq), generator=generator).sort(1).values
        self.at = lambda: At((rows, seq), device, document=None if document is None else document.to(device))
        scale = chance.choice((0.05, 1.0, 4.0))

        def values(shape: tuple[int, ...]) -> Tensor:
            return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(dtype).to(device)

        shapes = kind.shapes(self.at())
        self.inputs = []
        for value, shape in zip(alone.graph.body.inputs, shapes, strict=True):
            if value.type.kind == "real":
                self.inputs.append(values(shape))
            else:
                low, high = _places(alone, value.name)
                self.inputs.append(torch.randint(low, high, shape, generator=generator).to(device))
        self.wide = chance.random() < 0.3  # columns of a wider tensor: rows that are not one behind the other
        self.weights = {
            n: values(tuple(p.shape)).to(torch.float32 if n in kind.keep else dtype)
            for n, p in kind().named_parameters()
        }
        self.seed = chance.getrandbits(40)
        named = zip(alone.graph.body.inputs, shapes, strict=True)
        self.shapes = ", ".join(f"{v.name}{list(shape)}" for v, shape in named)
        self.shapes += ", documents" * (document is not None)

    def run(self, kind: type[nn.Module], dtype: torch.dtype) -> dict[str, Tensor]:
        """Results and gradients, of the same numbers in a type."""
        return self.ready(kind, dtype)()

    def ready(self, kind: type[nn.Module], dtype: torch.dtype, compiled: bool = False) -> Step:
        """A forward and backward pass, with all that it needs made before; `compiled`: by `torch.compile`."""
        block: Any = kind().to(self.device)
        with torch.no_grad():
            for name, p in block.named_parameters():
                p.data = self.weights[name].to(torch.float64 if dtype == torch.float64 else self.weights[name].dtype)
        inputs = [
            self._laid(x.to(dtype)).requires_grad_() if x.is_floating_point() else x.clone() for x in self.inputs
        ]
        return Step(self, block, inputs, torch.compile(block) if compiled else block)

    def _laid(self, x: Tensor) -> Tensor:
        if not self.wide or not x.dim():
            return x.clone()
        wider = torch.zeros(*x.shape[:-1], x.shape[-1] + 8, dtype=x.dtype, device=x.device)
        wider[..., : x.shape[-1]] = x
        return wider[..., : x.shape[-1]].detach()


class Step:
    """A forward and backward pass of a block; `slopes` are the cotangents, drawn by the first backward pass."""

    def __init__(self, draw: Draw, block: nn.Module, inputs: list[Tensor], forward: Any) -> None:
        self.draw, self.block, self.inputs, self.at = draw, block, inputs, draw.at()
        self.at.chance = draw.seed  # what is dropped is the same in each
        self._forward = forward
        self.slopes: list[Tensor] = []

    def __call__(self) -> dict[str, Tensor]:
        """Results and gradients by name."""
        return self.backward(self.forward())

    def forward(self) -> tuple[Tensor, ...]:
        """The results."""
        results = self._forward(*self.inputs, self.at, STATELESS)
        return results if isinstance(results, tuple) else (results,)

    def backward(self, results: tuple[Tensor, ...]) -> dict[str, Tensor]:
        """The results by name, and the gradients of all that has one."""
        if not self.slopes:
            generator, draw = torch.Generator().manual_seed(self.draw.seed), self.draw
            drawn = [torch.randn(r.shape, generator=generator, dtype=torch.float64) for r in results]
            self.slopes = [d.to(draw.dtype).to(draw.device, r.dtype) for d, r in zip(drawn, results, strict=True)]
        leaves = {f"input {i + 1}": x for i, x in enumerate(self.inputs) if x.requires_grad}
        leaves |= dict(self.block.named_parameters())
        # Rows that see nothing may come of no weight and no input.
        live = [i for i, r in enumerate(results) if r.requires_grad]
        told = [results[i] for i in live], list(leaves.values()), [self.slopes[i] for i in live]
        grads = torch.autograd.grad(*told, allow_unused=True) if live else [None] * len(leaves)
        found = {f"result {i + 1}": r.detach() for i, r in enumerate(results)}
        given = zip(leaves.items(), grads, strict=True)
        return found | {f"gradient of {n}": torch.zeros_like(x) if g is None else g for (n, x), g in given}


def _places(alone: Alone, value: str) -> tuple[int, int]:
    """From where to where the whole numbers of an input go: places of a dim that an op looks up; -1 where a loss does,
    which does not count those."""
    sizes, low = [1], 0
    for node in (n for n in alone.nodes if value in n.operands):
        sizes += [math.prod(alone.graph.size(d) or 1 for d in node.bound(f)) for f in op_of(node).index]
        low = min(low, -1 if node.results[0].type.kind == "loss" else 0)
    return low, max(sizes)


def launched(
    alone: Alone, kind: Any, dtype: torch.dtype, shape: tuple[int, int], document: Tensor | None = None
) -> list[Launch]:
    """What a block launches on rows of `shape`, forward and backward, run without numbers and without a GPU."""
    with uncompiled(), Hollow(1.0):
        draw = Draw(alone, kind, dtype, random.Random(0), torch.device("cpu"), shape, document)
        with lib_kernels.launches(elsewhere=True) as told:
            draw.run(kind, dtype)
    return told


@contextmanager
def _poisoned() -> Iterator[None]:
    """Memory for results holds NaN before it is written to."""
    plain = lib_kernels.empty

    def empty(*args: Any, **more: Any) -> Tensor:
        made = plain(*args, **more)
        return made.fill_(math.nan) if made.is_floating_point() and not made.is_meta else made

    lib_kernels.empty = empty
    try:
        yield
    finally:
        lib_kernels.empty = plain
