"""`heddle bench SPEC --target T`: each kernel that a spec needs, forward and backward, by itself, against PyTorch.

A row says its time, the bytes that its launches are given (each tensor once a launch), the operations that its op
counts, and both as shares of what this device reaches: copying, and a product of large matrices in the same type,
measured in the same run. Peers are timed in turn with it: PyTorch as it stands (eager), and that compiled by
`torch.compile`.

Without a GPU nothing is timed: `estimate` gives the time that a kernel would take that reaches the device's rates. It
says how large the work is, not how good the kernel.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from .. import __version__
from ..codegen.emit import emit_block
from ..codegen.lock import Lock
from ..dsl.program import Program
from ..lowering.alone import Alone, kernels
from ..lowering.cost import node_flops
from ..lowering.pipeline import lower
from ..lowering.target import TARGETS
from .compile import target_of
from .errors import UserError
from .lib.kernels import Launch
from .place import place
from .plan.devices import Device
from .plan.devices import device as device_named
from .verify import Draw, block_of, launched

Timer = Callable[[list[Callable[[], object]]], list[list[float]]]
"""Seconds of each of several calls, each several times, in turn."""
COPIED, SIDE = 1 << 30, 8192


@dataclass
class Measured:
    """One kernel: `seconds` is the median of its runs, `low` and `high` their range; by the name of a peer the ratio of
    its median to ours. What was not measured is None."""

    kernel: str
    ops: tuple[str, ...]
    bytes: int
    flops: float
    launches: int
    seconds: float
    low: float | None = None
    high: float | None = None
    copy_share: float | None = None
    matmul_share: float | None = None
    peers: dict[str, float] = field(default_factory=dict)
    estimated: bool = False


def measure(
    program: Program, target: str, device: torch.device, shape: tuple[int, int], dtype: torch.dtype,
    lock: Lock | None = None, timer: Timer | None = None, compiled: bool = True,
) -> Iterator[Measured]:  # fmt: skip
    """Time every kernel of a model on rows of `shape`. Raises UserError `unknown-target`, `no-kernels`."""
    timer = timer or in_turn
    copied, multiplied = rates(device, dtype, timer)
    for alone, told, kind in _parts(program, target, shape, dtype, lock):
        draw = Draw(alone, kind, dtype, random.Random(0), device, shape)
        plain = replace(alone, program=replace(alone.program, target=TARGETS["cpu"], fused={}))
        eager = block_of(plain.name, emit_block(plain.name, plain.program, __version__))
        runs = {"ours": draw.ready(kind, dtype), "eager": draw.ready(eager, dtype)}
        if compiled:
            runs["compiled"] = draw.ready(eager, dtype, compiled=True)
        times = dict(zip(runs, timer(list(runs.values())), strict=True))
        ours = statistics.median(times["ours"])
        row = _row(alone, told, shape, ours)
        row.low, row.high = min(times["ours"]), max(times["ours"])
        row.copy_share, row.matmul_share = row.bytes / ours / copied, row.flops / ours / multiplied
        row.peers = {n: statistics.median(t) / ours for n, t in times.items() if n != "ours"}
        yield row


def estimate(
    program: Program, target: str, on: Device, shape: tuple[int, int], dtype: torch.dtype, lock: Lock | None = None
) -> Iterator[Measured]:
    """The time that every kernel of a model would take at a device's rates: a statement about the work alone."""
    peak = on.flops["fp32" if dtype == torch.float32 else "bf16"] * on.reached[0]
    for alone, told, _ in _parts(program, target, shape, dtype, lock):
        row = _row(alone, told, shape, 0.0)
        row.seconds = max(row.bytes / (on.memory_rate * on.reached[1]), row.flops / peak) + row.launches * on.launch_s
        row.estimated = True
        yield row


def _parts(
    program: Program, target: str, shape: tuple[int, int], dtype: torch.dtype, lock: Lock | None
) -> Iterator[tuple[Alone, list[Launch], type[nn.Module]]]:
    """Every kernel of a model: as a block by itself, what that launches, and its class."""
    aim = target_of(target)
    if not aim.kernels:
        raise UserError("no-kernels", f"target `{target}` has no kernels of its own")
    for alone in kernels(lower(program, target=aim)):
        files = emit_block(alone.name, alone.program, __version__, lock)
        if not files.kernels:
            continue
        kind = block_of(alone.name, files)
        yield alone, launched(alone, kind, dtype, shape), kind


def _row(alone: Alone, told: list[Launch], shape: tuple[int, int], seconds: float) -> Measured:
    given = [{id(a): a for a in launch.args if isinstance(a, Tensor)}.values() for launch in told]
    moved = sum(a.numel() * a.element_size() for tensors in given for a in tensors)
    # A backward pass makes two products for each of the forward pass.
    flops = 3 * shape[0] * shape[1] * sum(node_flops(alone.graph, n, shape[1]) for n in alone.nodes)
    return Measured(alone.name, tuple(n.op for n in alone.nodes), moved, flops, len(told), seconds)


def rates(device: torch.device, dtype: torch.dtype, timer: Timer) -> tuple[float, float]:
    """Bytes a second that a copy moves (read and written), and operations a second of a large product."""
    a = torch.empty(COPIED, dtype=torch.uint8, device=device)
    b = torch.empty_like(a)
    x, y = (torch.randn(SIDE, SIDE, device=device).to(dtype) for _ in range(2))
    copy, product = (statistics.median(t) for t in timer([lambda: b.copy_(a), lambda: x @ y]))
    return 2 * COPIED / copy, 2 * SIDE**3 / product


def in_turn(runs: list[Callable[[], object]], rounds: int = 5) -> list[list[float]]:
    """Times on a GPU, one call after the other in each round; the second-level cache is emptied before each."""
    from triton.testing import do_bench

    found: list[list[float]] = [[] for _ in runs]
    for _ in range(rounds):
        for i, run in enumerate(runs):
            found[i].append(do_bench(run, warmup=5, rep=20, return_mode="median") * 1e-3)
    return found


def bench_spec(program: Program, target: str, shape: tuple[int, int], on: str | None) -> list[Measured]:
    """Kernels in bf16, timed on this GPU, or estimated for a device by its name. Raises UserError `unknown-device`."""
    if on is None:
        return list(measure(program, target, place("cuda"), shape, torch.bfloat16))
    return list(estimate(program, target, device_named(on), shape, torch.bfloat16))
