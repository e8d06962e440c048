"""The training loop."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from rich.console import Console
from torch import Tensor

from ..data import Batch, Cursor, Packed
from ..errors import UserError
from ..lib import Gathered, Model
from ..lib.laid import global_counts
from ..lib.mesh import Mesh
from . import checkpoint
from .config import TrainConfig
from .held_out import evaluate
from .optimizer import Optimizer
from .piped import check_pipe, metrics_of, through_stages, total_of
from .progress import Bar, Board, Log, Nothing
from .rows import Ranks, another_model, check_length, check_rows, mine, moved, sum_of_parts
from .signals import Stop

if TYPE_CHECKING:
    from .shared import Shared

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}


@dataclass(frozen=True)
class Report:
    """How a run ended: its last step, whether it was stopped before its end, the last checkpoint, the held-out loss in
    nats a token (None without held-out data)."""

    step: int
    stopped: bool
    checkpoint: Path
    held_out: float | None
    seconds: float


def train(
    model: Model, data: Packed, config: TrainConfig, out: Path, held_out: Packed | None = None,
    resume: bool | Literal["auto"] = False, console: Console | None = None, judge: Model | None = None,
    about: Mapping[str, Any] | None = None, ranks: Ranks | None = None,
) -> Report:  # fmt: skip
    """Train a model in place. `out` gets `log.jsonl`, `board/` and `checkpoints/`.

    `judge` is what the held-out loss is of, if not the model itself: one with the same tensors and another objective.
    `about` is what else must be the same for a run to be resumed.

    `resume` goes on from the newest whole checkpoint, bit for bit: weights, moments, data position; "auto" begins
    where there is none. Ctrl-C and SIGTERM save first. A model that is one rank's part of another is trained by all
    ranks together, which see the same rows as one process would; `ranks` says how they save. Raises UserError:
    already-there, nothing-to-resume, other-run, not-finite, cannot-write, uneven-batch.
    """
    run = _Run(model, data, config, out, held_out, console, judge, about, ranks)
    run.open(resume)
    with Stop() as stop:
        try:
            return run.go(stop)
        finally:
            run.close()


class _Run:
    def __init__(
        self, model: Model, data: Packed, config: TrainConfig, out: Path, held_out: Packed | None,
        console: Console | None, judge: Model | None = None, about: Mapping[str, Any] | None = None,
        ranks: Ranks | None = None,
    ):  # fmt: skip
        self.model, self.data, self.config, self.out, self.held_out = model, data, config, out, held_out
        self.console, self.about = console, dict(about or {})
        self.folder = out / "checkpoints"
        self.step, self.cursor = 0, Cursor()
        self.log: Log | Nothing
        self.board: Board | Nothing
        self.bar: Bar | Nothing
        model.cast(DTYPES[config.dtype])
        self.mesh = model.mesh or Mesh({})
        self.everyone = self.mesh[tuple(self.mesh.axes)]
        self.is_first = self.everyone.rank == 0
        self.shared = _shared(model, config, self.folder, ranks)
        self.optimizer = Optimizer(model, config) if self.shared is None else self.shared.optimizer
        self.judge = judge or model
        if judge is not None:
            judge.to(model.device).load_state_dict(model.state_dict(), assign=True)

    # --- beginning and end ------------------------------------------------------------------------

    def open(self, resume: bool | Literal["auto"]) -> None:
        check_rows(self.model, self.config)
        check_length(self.model, self.data)
        check_pipe(self.model, self.config)
        try:
            self.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError("cannot-write", f"cannot write to `{self.out}`: {error.strerror}") from None
        found = checkpoint.latest(self.folder)
        if resume == "auto":
            resume = found is not None
        if resume:
            if found is None:
                raise UserError(
                    "nothing-to-resume", f"`{self.folder}` has no checkpoint", help="start without --resume"
                )
            self._take_up(found)
        elif found is not None:
            raise UserError(
                "already-there",
                f"`{self.out}` has a run already",
                help="go on with --resume, or choose another folder with -o",
            )
        self.everyone.barrier()  # all have seen the checkpoint before anyone writes another
        if not self.is_first:
            self.log = self.board = self.bar = Nothing()
            return
        try:
            self.log = Log(self.out / "log.jsonl", self.step)
        except OSError as error:
            raise UserError("cannot-write", f"cannot write to `{self.out}`: {error.strerror}") from None
        self.board = Board(self.out / "board", self.step)
        self.bar = Bar(self.config.steps, self.step, self.console)

    def close(self) -> None:
        self.bar.close()
        self.board.close()
        self.log.close()

    def _take_up(self, path: Path) -> None:
        if self.shared is not None:
            self.shared.verify(path)
            state = checkpoint.state_of(path)
            self._check_run(path, state)
            self.shared.take_up(path)
            self.step, self.cursor = state["step"], Cursor(state["row"])
            return
        weights, moments, state = checkpoint.load(path)
        self._check_run(path, state)
        shapes = {name: t.shape for name, t in self.model.state_dict().items()}
        if {name: t.shape for name, t in weights.items()} != shapes:
            raise another_model(path)
        self.model.load_state_dict(weights)
        try:
            self.optimizer.load(lambda key, _: moments.get(key))
        except KeyError as error:
            raise UserError("damaged-weights", f"`{path}` lacks {error} for the optimizer") from None
        self.step, self.cursor = state["step"], Cursor(state["row"])

    def _check_run(self, path: Path, state: dict[str, Any]) -> None:
        differing = [k for k, v in self._identity().items() if state["run"].get(k) != v]
        if differing:
            raise UserError(
                "other-run",
                f"`{path}` is of a run with another {' and '.join(differing)}",
                help="resume with the settings that it was started with",
            )

    def _identity(self) -> dict[str, Any]:
        """What must agree for a run to go on as if it had never stopped."""
        c = self.config
        tokens = hashlib.sha256(self.data.corpus.tokens.tobytes()).hexdigest()
        given = {name: source.identity for name, source in self.data.given.items()}
        run = {"data": tokens, "batch": c.batch * c.accumulate, "seq": c.seq, "seed": c.seed, "dtype": c.dtype}
        return {**run, **({"inputs": given} if given else {}), **self.about}

    def save(self) -> Path:
        """Write a checkpoint; ranks that save together go on before it is there."""
        state = {"step": self.step, "row": self.cursor.row, "run": self._identity(), "config": self.config.model_dump()}
        if self.shared is not None:
            return self.shared.save(self.step, state)
        weights = self.model.state_dict()
        return checkpoint.save(self.folder, self.step, weights, self.optimizer.state(), state, self.config.keep)

    def _is_asked(self, stop: Stop) -> bool:
        """Whether any rank was told to stop. Where a save failed on any, all raise what was wrong."""
        failed = self.shared is not None and self.shared.saves.failed
        told = self.everyone.all_reduce(torch.tensor([int(stop.asked), int(failed)]), "max")
        if self.shared is not None and told[1]:
            self.shared.saves.wait()
        return bool(told[0])

    # --- steps ------------------------------------------------------------------------------------

    def go(self, stop: Stop) -> Report:
        begun = time.perf_counter()
        saved: Path | None = None
        self.model.train()
        while self.step < self.config.steps and not self._is_asked(stop):
            self._one_step()
            saved = None
            if self.config.eval_every and self.step % self.config.eval_every == 0 and self.step < self.config.steps:
                self._evaluate()
            if self.step % self.config.save_every == 0:
                saved = self.save()
        saved = saved or self.save()
        if self.shared is not None:
            self.shared.saves.wait()
        stopped = self.step < self.config.steps
        loss = None if stopped else self._evaluate()
        if stopped:
            self.bar.say(f"stopped behind step {self.step} and saved; --resume goes on from there")
        return Report(self.step, stopped, saved, loss, time.perf_counter() - begun)

    def _one_step(self) -> None:
        begun = time.perf_counter()
        batches = []
        for _ in range(self.config.accumulate):
            batch, self.cursor = self.data.batch(self.cursor, self.config.batch)
            batches.append(batch)
        gathered = Gathered()
        with torch.random.fork_rng(devices=[d for d in (self.model.device,) if d.type == "cuda"]):
            # What is drawn in a step depends on the seed and the step alone, so a resumed run draws the same.
            self.model.chance = self.config.seed + 1_000_003 * (self.step + 1)
            torch.manual_seed(self.model.chance)
            total = self._gradient(batches, gathered)
            self.model.chance = None
        self.optimizer.reduce()
        norm = float(self.optimizer.clip(self.config.clip))
        self.step += 1
        loss = float(total)
        if not math.isfinite(loss) or not math.isfinite(norm):
            raise UserError(
                "not-finite",
                f"the loss of step {self.step} is {loss}, its gradient's norm {norm}",
                help="the last checkpoint is from before; a smaller --lr or more --warmup may cure it",
            )
        rate = self.config.learning_rate(self.step)
        self.optimizer.step(rate)
        pipe = self.model.pipe
        stages = (pipe.axis, metrics_of(self.model)) if pipe is not None else None
        metrics = gathered.settle(self.model.mesh, stages)
        record = {
            "step": self.step,
            "loss": loss,
            "norm": norm,
            "lr": rate,
            "tokens": self.step * self.config.batch * self.config.accumulate * self.config.seq,
            **metrics,
        }
        self.log.write(record)
        self.board.write(record)
        tokens = self.config.batch * self.config.accumulate * self.config.seq
        self.bar.show(self.step, loss, norm, rate, tokens / (time.perf_counter() - begun))

    def _gradient(self, batches: list[Batch], gathered: Gathered | None = None) -> Tensor:
        """Losses over all micro-batches, each sum divided by the count of all: as if they were one batch. On a mesh
        a rank takes its rows; the loss is that of all ranks, its gradient still to be summed."""
        counts: dict[str, Any] = {}
        batches = [mine(batch, self.model) for batch in batches]
        device = self.model.device
        inputs: list[Any] = [{n: x.to(device) for n, x in self.data.inputs(b).items()} for b in batches]
        batches = [moved(batch, self.model) for batch in batches]
        for batch, more in zip(batches, inputs, strict=True):
            for name, count in self.model.counts(batch.tokens, batch.document, **more).items():
                counts[name] = counts.get(name, torch.zeros((), dtype=torch.int64, device=device)) + count
        if self.model.mesh is not None:
            counts = global_counts(self.model, counts)
        if self.model.pipe is not None:
            sums = through_stages(self.model, batches, inputs, counts, gathered, self.optimizer.gather)
            return total_of(sums, counts)
        total = torch.zeros((), dtype=torch.float64, device=device)
        parts: dict[str, Tensor] = {}
        for i, (batch, more) in enumerate(zip(batches, inputs, strict=True)):
            self.model.before = i * self.config.batch
            sums = self.model.losses(batch.tokens, batch.document, gathered=gathered, **more)
            shares = [s / counts[n].clamp(min=1) for n, s in sums.items()]
            loss = torch.stack(shares).sum()
            loss.backward()
            self.optimizer.gather()
            total += loss.detach().double()
            for name, share in zip(sums, shares, strict=True):
                parts[name] = parts.get(name, 0) + share.detach().double()
        self.model.before = 0
        return total if self.model.mesh is None else sum_of_parts(self.model, parts)

    def _evaluate(self) -> float | None:
        if self.held_out is None:
            return None
        loss = evaluate(self.judge, self.held_out, self.config.batch, self.config.eval_rows)
        record = {"step": self.step, "held_out": loss}
        self.log.write(record)
        self.board.write(record)
        self.bar.say(f"held-out loss {loss:.4f} nats a token, {loss / math.log(2):.4f} bits")
        return loss


def _shared(model: Model, config: TrainConfig, folder: Path, ranks: Ranks | None) -> Shared | None:
    """What several ranks need, and one does not even load."""
    if ranks is None:
        return None
    from .shared import Shared

    return Shared(model, config, folder, ranks)
