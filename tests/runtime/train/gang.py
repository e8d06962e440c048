"""Several ranks of `heddle train` as processes, which start from a server that has torch loaded already."""

from __future__ import annotations

import io
import multiprocessing
import os
import shutil
import signal
import socket
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

# A process that starts imports this module by its name.
ROOT = str(Path(__file__).resolve().parents[3])
if ROOT not in sys.path:
    sys.path.append(ROOT)
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload([
    "heddle.runtime.cli", "heddle.runtime.running", "heddle.runtime.train.shared", "heddle.runtime.distributed"])  # fmt: skip

TEXT = [f"the warp is held on the loom, and the weft is drawn through over and under {i}. " * (9 + i) for i in range(4)]
# Where a process ends at once, counted as it comes by, and on which ranks it comes: functions of `train/together.py`
# and one of the loop.
MOMENTS = {"step": (0, 1), "start": (0, 1), "save_pieces": (0, 1), "about": (0, 1), "_prepare": (0,), "write_through": (0,),
           "put_in_place": (0,), "remove_old": (0,)}  # fmt: skip


def write_project(folder: Path, spec: str) -> list[str]:
    """A spec and texts; gives the words that all runs share."""
    (folder / "texts").mkdir(parents=True, exist_ok=True)
    (folder / "m.spec").write_text(spec)
    for i, text in enumerate(TEXT):
        (folder / "texts" / f"{i}.txt").write_text(text)
    return ["train", str(folder / "m.spec"), "--data", str(folder / "texts"), "--seq", "16", "--batch", "4",
            "--dtype", "fp64", "--lr", "0.01", "--warmup", "1", "--schedule", "constant", "--held-out", "0.2"]  # fmt: skip


@dataclass
class Ended:
    """How a command ended on one rank; code is negative for a signal, None where the rank did not get so far."""

    code: int | None = None
    said: str = ""


@dataclass
class Gang:
    """Ranks that run commands in order; the first that fails is the last."""

    jobs: list[list[str]]
    size: int
    kill: dict[int, tuple[str, int]] = field(default_factory=dict)
    processes: list[Any] = field(default_factory=list)

    def start(self) -> Gang:
        ports = [free_port() for _ in self.jobs]
        self.results = [CONTEXT.Queue() for _ in range(self.size)]
        for rank in range(self.size):
            given = (rank, self.size, self.jobs, ports, self.kill.get(rank), self.results[rank])
            self.processes.append(CONTEXT.Process(target=run_jobs, args=given, daemon=True))
            self.processes[-1].start()
        return self

    def wait(self, timeout: float = 120.0) -> list[list[Ended]]:
        """How each command ended, by rank. AssertionError where a rank hangs."""
        end = time.monotonic() + timeout
        found = []
        for rank, process in enumerate(self.processes):
            ended = []
            while len(ended) < len(self.jobs):
                try:
                    ended.append(self.results[rank].get(timeout=0.05))
                except Exception:
                    if not process.is_alive() and self.results[rank].empty():
                        break
                    if time.monotonic() > end:
                        self.stop()
                        raise AssertionError(f"rank {rank} hangs") from None
            process.join(max(0.0, end - time.monotonic()))
            if process.is_alive():
                self.stop()
                raise AssertionError(f"rank {rank} does not end")
            found.append([Ended(*e) for e in ended] + [Ended(process.exitcode)] * (len(ended) < len(self.jobs)))
        return found

    def stop(self) -> None:
        for process in self.processes:
            process.kill()


# Below those that the system gives to connections, which would take one before its job begins; apart for each process.
_ports = (20_000 + (os.getpid() * 97 + i) % 12_000 for i in count())


def free_port() -> int:
    """A port that nobody listens at, and that is given once."""
    for port in _ports:
        with socket.socket() as s:
            try:
                s.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise AssertionError("ports do not end")


def run_jobs(rank: int, size: int, jobs: list[list[str]], ports: list[int], kill: Any, results: Any) -> None:
    """One rank: `copy A B`, or words of `heddle`, as torchrun would start them."""
    import torch

    from heddle.runtime.cli import app

    torch.set_num_threads(1)
    if kill is not None:
        die_at(*kill)
    for words, port in zip(jobs, ports, strict=True):
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1",
                          MASTER_PORT=str(port))  # fmt: skip
        if words[0] == "copy":
            if rank == 0:
                shutil.copytree(words[1], words[2])
            results.put((0, ""))
            continue
        said = io.StringIO()
        code = 0
        with redirect_stdout(said), redirect_stderr(said):
            try:
                app(words)
            except SystemExit as end:
                code = int(end.code or 0)
            except BaseException as error:
                code = 1
                said.write(f"{type(error).__name__}: {error} {getattr(error, '__notes__', '')}")
        results.put((code, said.getvalue()))
        if code:
            break
    results.close()
    results.join_thread()
    sys.stdout.flush()
    os._exit(0)


def die_at(moment: str, count: int) -> None:
    """SIGKILL this process when it comes to a moment for the `count`th time."""
    from heddle.runtime.train import loop, together

    owner, name = {"step": (loop._Run, "_one_step"), "start": (together.Together, "start"),
                   "_prepare": (together.Together, "_prepare")}.get(moment, (together, moment))  # fmt: skip
    real, left = getattr(owner, name), [count]

    def counted(*args: Any, **kwargs: Any) -> Any:
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)

    setattr(owner, name, counted)
