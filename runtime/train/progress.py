"""What a run shows: a progress bar where someone looks, lines where not, JSON lines and TensorBoard always."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class Log:
    """`log.jsonl`, an object a line: numbers of a step, without times, so that the same run writes the same bytes."""

    def __init__(self, path: Path, after: int):
        """Lines of steps beyond `after` (of a run that was cut off behind its checkpoint) are dropped."""
        kept = []
        if path.is_file():
            kept = [line for line in path.read_text(encoding="utf-8").splitlines() if _step_of(line) <= after]
        path.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        self._last = kept[-1] if kept else None
        self._file = path.open("a", encoding="utf-8")

    def write(self, record: dict[str, Any]) -> None:
        """A finished run that is resumed evaluates again; its last line is not written twice."""
        line = json.dumps(record)
        if line == self._last:
            return
        self._file.write(line + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return float("inf")


class Board:
    """TensorBoard, if it is installed."""

    def __init__(self, folder: Path, start: int):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            self._writer = None
        else:
            self._writer = SummaryWriter(str(folder), purge_step=start + 1)

    def write(self, record: dict[str, Any]) -> None:
        if self._writer is not None:
            for name, value in record.items():
                if name != "step" and isinstance(value, (int, float)):
                    self._writer.add_scalar(name, value, record["step"])

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


class Nothing:
    """What ranks but the first show: nothing."""

    def write(self, record: dict[str, Any]) -> None:
        pass

    def show(self, step: int, loss: float, norm: float, rate: float, speed: float) -> None:
        pass

    def say(self, text: str) -> None:
        pass

    def close(self) -> None:
        pass


class Bar:
    """The progress bar: loss, tokens a second, gradient norm, time left."""

    def __init__(self, steps: int, start: int, console: Console | None):
        self.console = console or Console(highlight=False)
        self._live = self.console.is_terminal
        self._steps = steps
        self._progress = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeRemainingColumn(),
            console=self.console,
        )
        self._task = self._progress.add_task("train", total=steps, completed=start, numbers="")
        if self._live:
            self._progress.start()

    def show(self, step: int, loss: float, norm: float, rate: float, speed: float) -> None:
        numbers = f"loss {loss:.4f}  {speed:,.0f} tokens/s  norm {norm:.2f}  lr {rate:.2e}"
        if self._live:
            self._progress.update(self._task, completed=step, numbers=numbers)
        elif step == 1 or step % 50 == 0 or step == self._steps:
            self.console.print(f"step {step}/{self._steps}  {numbers}")

    def say(self, text: str) -> None:
        self._progress.console.print(text)

    def close(self) -> None:
        if self._live:
            self._progress.stop()
