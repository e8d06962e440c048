"""`heddle bench`: forward, training step and decoding of one model on this machine."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..dsl.program import Program
from ..lowering.cost import flops_per_token
from .compile import build, instantiate
from .lib import Model
from .train import TrainConfig
from .train.optimizer import Optimizer

ROUNDS = 5


def measure(program: Program, batch: int, seq: int) -> list[dict[str, Any]]:
    """Rows of (job, median, min and max seconds, tokens a second, operations a second). Random tokens and weights."""
    artifact = build(program)
    model = instantiate(artifact)
    vocab = int(program.arguments.get("vocab") or 2)
    shape = (batch, *(size or 1 for size in model.shape[1:-1]), seq)
    tokens = torch.randint(0, vocab, shape, generator=torch.Generator().manual_seed(0))
    flops = flops_per_token(artifact.lowered, seq) * tokens.numel()

    def forward() -> None:
        with torch.inference_mode():
            model(tokens)

    new = 32
    prompt = tokens[:1, : min(seq, 16)]
    rows = [_row("forward", forward, tokens.numel(), flops)]
    if program.objectives:
        rows.append(_row("train step", training_step(model, tokens, TrainConfig()), tokens.numel(), 3 * flops))
    if not getattr(model, "late", None):
        each = flops_per_token(artifact.lowered, prompt.shape[1] + new)
        rows.append(_row("greedy decode", lambda: model.generate(prompt, new), new, each * new))
    return rows


def training_step(model: Model, tokens: Tensor, config: TrainConfig) -> Callable[[], None]:
    """A step on tokens int64[batch, seq], as `heddle train` takes it: losses, gradients, the optimizer."""
    optimizer = Optimizer(model, config)

    def step() -> None:
        counts = model.counts(tokens)
        torch.stack([s / counts[n] for n, s in model.losses(tokens).items()]).sum().backward()
        optimizer.gather()
        optimizer.clip(1.0)
        optimizer.step(1e-4)

    return step


def _row(job: str, run: Callable[[], object], tokens: int, flops: float) -> dict[str, Any]:
    run()
    times = []
    for _ in range(ROUNDS):
        begun = time.perf_counter()
        run()
        times.append(time.perf_counter() - begun)
    median = statistics.median(times)
    return {
        "job": job,
        "median_s": median,
        "min_s": min(times),
        "max_s": max(times),
        "tokens_per_s": tokens / median,
        "flops_per_s": flops / median,
    }


def print_measurements(rows: list[dict[str, Any]]) -> None:
    """A line a job."""
    from .tables import amount

    print(f"{'job':16}{'median':>10}{'min':>10}{'max':>10}{'tokens/s':>12}{'FLOP/s':>12}")
    for r in rows:
        print(
            f"{r['job']:16}{r['median_s']:>9.4f}s{r['min_s']:>9.4f}s{r['max_s']:>9.4f}s{r['tokens_per_s']:>12,.0f}"
            f"{amount(r['flops_per_s']):>12}"
        )
