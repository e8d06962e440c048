"""`heddle bench SPEC --target T`: each kernel that a spec needs, forward and backward, by itself, against its peers.

A row says its time, the bytes that have to be moved (what comes in or goes out, each tensor once forward and once
backward), the operations that its op counts, and both as shares of what this device reaches: copying, and a product of
large matrices in the same type, measured in the same run. Peers are timed in turn with it: PyTorch as it stands
(eager), that compiled by `torch.compile`, and what other packages have for the same use, where they are installed.
What a peer gives is first compared with the same in fp64; one that is wrong is named, and not timed.

Without a GPU nothing is timed: `kernel_estimate.py` says what the work would take.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from .. import __version__
from ..codegen.emit import emit_block
from ..codegen.lock import Lock
from ..dsl.program import Program
from ..lowering.alone import Alone
from ..lowering.cost import node_flops
from ..lowering.pipeline import lower
from ..lowering.target import TARGETS
from .compile import target_of
from .counted import Watched, launches_of_others
from .errors import UserError, said
from .lib import kernels as lib_kernels
from .lib.kernels import Launch
from .peers import NotServed, Offer, offers
from .place import place
from .plan.devices import device as device_named
from .plan.hollow import Ledger
from .plan.uncompiled import uncompiled
from .timing import Timer, cache_bytes, in_turn, peak_memory, rotated
from .verify import Draw, Expected, block_of, files_of

COPIED, SIDE = 1 << 30, 8192
CHECKED = 300
"""Tokens of the row on which results are compared: in fp64 all that is between is kept."""
WRONG = 16.0
"""A peer is wrong where its error is more than this many times what verifying allows ours: packages that round what
they sum are a few times less exact than PyTorch, a formula that is another one is off by thousands."""


@dataclass
class Measured:
    """One kernel: `seconds` is the median of its runs, `low` and `high` the quartiles; by the name of a peer the ratio
    of its median to ours, its version or why it was not timed (`notes`), its error as a share of what verifying allows
    ours (`errors`), and the most memory of each side beside its inputs. What was not measured is None.

    `given`: bytes of what its launches are given, each tensor once a launch; `bytes`: what has to be moved.
    """

    kernel: str
    ops: tuple[str, ...]
    bytes: int
    given: int
    flops: float
    launches: int
    seconds: float
    low: float | None = None
    high: float | None = None
    copy_share: float | None = None
    matmul_share: float | None = None
    peers: dict[str, float] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    memory: dict[str, int | None] = field(default_factory=dict)
    estimated: bool = False


@dataclass(frozen=True)
class Case:
    """One kernel as it is measured: on one row of so many tokens in `documents`, or on `shape` where these are None."""

    alone: Alone
    kind: type[nn.Module]
    dtype: torch.dtype
    shape: tuple[int, int]
    documents: tuple[int, ...] | None = None

    def numbered(self, shape: tuple[int, int] | None = None) -> Tensor | None:
        """The document of each token, as many of them as `shape` has."""
        if self.documents is None:
            return None
        rows, seq = shape or self.shape
        number = torch.repeat_interleave(torch.arange(len(self.documents)), torch.tensor(self.documents))
        return number[:seq].expand(rows, seq).contiguous()

    def draw(self, device: torch.device, shape: tuple[int, int] | None = None) -> Draw:
        """Inputs, weights and cotangents; in a stretch of the row where `shape` is less."""
        document = self.numbered(shape)
        document = None if document is None else document.to(device)
        return Draw(self.alone, self.kind, self.dtype, random.Random(0), device, shape or self.shape, document)

    def plain(self, name: str = "plain", heads: bool = True) -> type[nn.Module]:
        """The block in PyTorch's math, in a module of its own; `heads`: a loss makes the logits that it reads."""
        target = replace(self.alone.program, target=TARGETS["cpu"], fused={})
        files = emit_block(self.alone.name, target if heads else replace(target, heads={}), __version__)
        return block_of(f"{self.alone.name}-{name}", files)

    def offers(self) -> list[Offer]:
        """What other packages have for this use."""
        return offers(self.alone, self.plain)


@dataclass(frozen=True)
class Work:
    """What a forward and backward pass does: what it launches, each in one form or several, and torch's own ops beside
    that; the bytes of what comes in and goes out, each tensor once a pass, and those of all that is given to launches;
    the most memory beside what is there before it.
    """

    launches: tuple[tuple[Launch, ...], ...]
    beside: Ledger
    necessary: int
    given: int
    peak: int


def cases(
    program: Program, target: str, shape: tuple[int, int], dtype: torch.dtype, lock: Lock | None = None,
    documents: tuple[int, ...] | None = None,
) -> Iterator[Case]:  # fmt: skip
    """Every kernel of a model. Raises UserError `unknown-target`, `no-kernels`."""
    aim = target_of(target)
    if not aim.kernels:
        raise UserError("no-kernels", f"target `{target}` has no kernels of its own")
    for alone, files in files_of(lower(program, target=aim), lock):
        if files.kernels:
            yield Case(alone, block_of(alone.name, files), dtype, shape, documents)


def measure(
    program: Program, target: str, device: torch.device, shape: tuple[int, int], dtype: torch.dtype,
    lock: Lock | None = None, timer: Timer | None = None, compiled: bool = True,
) -> Iterator[Measured]:  # fmt: skip
    """Time every kernel of a model on rows of `shape`. Raises UserError `unknown-target`, `no-kernels`."""
    timer = timer or in_turn
    reached = rates(device, dtype, timer)
    for case in cases(program, target, shape, dtype, lock):
        yield measured(case, device, reached, timer, compiled)


def measured(
    case: Case, device: torch.device, reached: tuple[float, float], timer: Timer, compiled: bool = True
) -> Measured:
    """One kernel against its peers; `reached` are `rates`."""
    row = row_of(case, work(case, case.kind))
    kinds = _peers(case, device, row) | {"eager": case.plain("eager", heads=False)}
    draw = case.draw(device)
    size = sum(x.numel() * x.element_size() for x in (*draw.inputs, *draw.weights.values()))

    def run(kind: type[nn.Module], by_torch: bool = False) -> Callable[[], object]:
        return rotated(lambda: draw.ready(kind, case.dtype, compiled=by_torch), size, cache_bytes(device))

    runs = {"ours": run(case.kind)} | {name: run(kind) for name, kind in kinds.items()}
    if compiled:
        runs["compiled"] = run(kinds["eager"], by_torch=True)
    row.memory = {name: peak_memory(one, device) for name, one in runs.items()}
    times = dict(zip(runs, timer(list(runs.values())), strict=True))
    row.seconds = statistics.median(times["ours"])
    row.low, row.high = (sorted(times["ours"])[len(times["ours"]) * part // 4] for part in (1, 3))
    row.copy_share, row.matmul_share = row.bytes / row.seconds / reached[0], row.flops / row.seconds / reached[1]
    row.peers = {name: statistics.median(t) / row.seconds for name, t in times.items() if name != "ours"}
    return row


def _peers(case: Case, device: torch.device, row: Measured) -> dict[str, type[nn.Module]]:
    """The peers that are right; the row is told of the others, and of all versions and errors."""
    shape = (1, min(CHECKED, case.shape[1]))
    draw = case.draw(device, shape)
    expected = Expected.of(draw, case.plain("eager", heads=False))

    def error(kind: type[nn.Module]) -> float:
        return max(one.worst for one in expected.judged(draw.run(kind, case.dtype)).values())

    row.errors["ours"] = error(case.kind)
    right = {}
    for offer in case.offers():
        row.notes[offer.name] = offer.note
        if offer.kind is None:
            continue
        try:
            row.errors[offer.name] = error(offer.kind)
        except NotServed as why:
            row.notes[offer.name] = str(why)
        except Exception as why:  # another package's failure is its result
            row.notes[offer.name] = f"fails: {said(why)}"
        else:
            if row.errors[offer.name] <= WRONG:  # NaN is not
                right[offer.name] = offer.kind
            else:
                row.notes[offer.name] = f"wrong: {row.errors[offer.name]:.0f} times the error that ours may have"
    return right


def work(case: Case, kind: Any) -> Work:
    """What one of the classes of a block does, run without numbers and without a GPU."""
    with uncompiled(), Watched(1.0) as mode:
        step = case.draw(torch.device("cpu")).ready(kind, case.dtype)
        with launches_of_others():
            step()  # what is made once a step for all layers, and cotangents
        ours, theirs = lib_kernels.launches(elsewhere=True), launches_of_others()
        with mode.section("", "") as section, ours as told, theirs as others:
            results = step.forward()
            first = len(told)
            found = step.backward(results)
    given, ends = (*step.inputs, *step.block.parameters()), (*step.slopes, *found.values())
    outer = {_storage(x) for x in (*given, *ends)}
    passes = [[a for one in part for a in _tensors(one)] for part in (told[:first], told[first:])]
    necessary = sum(_once(a for a in tensors if _storage(a) in outer) for tensors in passes)
    if not told or any(w.flops for w in section.ledger.work):
        # Torch's ops do it, or part of it: what comes in is read twice, what goes out is written, cotangents are read.
        necessary = 2 * _once(given) + _once(ends)
    given_bytes = sum(_once(_tensors(one)) for one in told)
    return Work((*((one,) for one in told), *map(tuple, others)), section.ledger, necessary, given_bytes, section.peak)


def forward(case: Case, kind: Any) -> object:
    """The forward pass of one of the classes of a block, without numbers."""
    with uncompiled(), Watched(1.0):
        return case.draw(torch.device("cpu")).ready(kind, case.dtype).forward()


def _once(tensors: Iterable[Tensor]) -> int:
    """Bytes of tensors, each counted once."""
    return sum({(x.data_ptr(), x.numel()): x.numel() * x.element_size() for x in tensors}.values())


def _tensors(launch: Launch) -> list[Tensor]:
    return [a for a in launch.args if isinstance(a, Tensor)]


def _storage(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()


def row_of(case: Case, done: Work) -> Measured:
    """A row without times."""
    graph, (rows, seq) = case.alone.graph, case.shape
    lengths = case.documents or (seq,)
    # A backward pass makes two products for each of the forward pass.
    flops = 3 * rows * sum(n * node_flops(graph, node, n) for n in lengths for node in case.alone.nodes)
    ops = tuple(n.op for n in case.alone.nodes)
    return Measured(case.alone.name, ops, done.necessary, done.given, flops, len(done.launches), 0.0)


def rates(device: torch.device, dtype: torch.dtype, timer: Timer) -> tuple[float, float]:
    """Bytes a second that a copy moves (read and written), and operations a second of a large product."""
    a = torch.empty(COPIED, dtype=torch.uint8, device=device)
    b = torch.empty_like(a)
    x, y = (torch.randn(SIDE, SIDE, device=device).to(dtype) for _ in range(2))
    copy, product = (statistics.median(t) for t in timer([lambda: b.copy_(a), lambda: x @ y]))
    return 2 * COPIED / copy, 2 * SIDE**3 / product


def bench_spec(
    program: Program, target: str, shape: tuple[int, int], on: str | None, lock: Lock | None = None
) -> list[Measured]:
    """Kernels in bf16, as `lock` has them, timed on this GPU, or estimated for a device by its name. Raises UserError
    `unknown-device`, `bad-lock`."""
    if on is None:
        return list(measure(program, target, place("cuda"), shape, torch.bfloat16, lock))
    from .kernel_estimate import done, estimated

    device = device_named(on)
    return [estimated(done(case), device).row for case in cases(program, target, shape, torch.bfloat16, lock)]
