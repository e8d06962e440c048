"""Checkpoints that several ranks write together, while the run goes on.

Each rank copies what it has to save and returns; the rest happens in a thread beside the run, over a process group of
its own. The first rank writes the manifest and gives the folder its name when all others have said that they are done,
so whatever dies in between, the folder is whole or it is not there.
"""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist
from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException

from ..errors import UserError
from .checkpoint import FILES, MANIFEST, about, put_in_place, remove_old, sync_folder, write_through
from .laying import Piece
from .pieces import save_pieces


class Together:
    """Saves of one run, one at a time. `group` is a process group of all ranks, for nothing else."""

    def __init__(self, folder: Path, keep: int, group: Any):
        self.folder, self.keep, self.group = folder, keep, group
        self.rank = dist.get_rank(group)
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def start(self, step: int, weights: dict[str, Piece], moments: dict[str, Piece], state: dict[str, Any]) -> Path:
        """Begin to write a checkpoint, as soon as the one before is there; gives the folder that will appear. Raises
        what `wait` raises."""
        self.wait()
        out = self.folder / f"step-{step:08d}"
        # A thread that waits for a dead rank must not keep the process from ending.
        self._thread = threading.Thread(target=self._run, args=(out, weights, moments, state), daemon=True)
        self._thread.start()
        return out

    def wait(self) -> None:
        """Until what was begun is there. Raises UserError `cannot-write` on all ranks; RuntimeError where one died."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    @property
    def failed(self) -> bool:
        """Whether something went wrong so far; `wait` says what."""
        return self._error is not None

    def _run(self, out: Path, weights: dict[str, Piece], moments: dict[str, Piece], state: dict[str, Any]) -> None:
        partial = out.with_name(f".{out.name}.partial")
        try:
            self._first(lambda: self._prepare(partial))
            save_pieces(partial / "model", weights, self.group)
            save_pieces(partial / "optimizer", moments, self.group)
            mine = {
                path.relative_to(partial).as_posix(): about(path)
                for path in sorted(partial.glob(f"*/shard-{self.rank + 1:05d}-*.safetensors"))
            }
            found: list[Any] = [None] * dist.get_world_size(self.group)
            dist.gather_object(mine, found if self.rank == 0 else None, group_dst=0, group=self.group)
            files = {name: entry for part in found for name, entry in (part or {}).items()}
            self._first(lambda: self._finish(partial, out, files, state))
        except CheckpointException as error:
            cause = next((e for e, _ in error.failures.values() if isinstance(e, OSError | SafetensorError)), None)
            if self.rank == 0:
                shutil.rmtree(partial, ignore_errors=True)
            first = next((e for e, _ in error.failures.values()), error)
            self._error = _cannot(out, cause) if cause is not None else RuntimeError(f"saving failed: {first}")
        except BaseException as error:
            self._error = error

    def _first(self, act: Callable[[], None]) -> None:
        """What the first rank does while the others wait; they fail where it does."""
        said: list[Any] = [None]
        if self.rank == 0:
            try:
                act()
            except OSError as error:
                said = [str(error.strerror or error)]
        dist.broadcast_object_list(said, group_src=0, group=self.group)
        if said[0] is not None:
            raise _cannot(self.folder, OSError(said[0]))

    def _prepare(self, partial: Path) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        for left in self.folder.glob(".step-*.partial"):
            shutil.rmtree(left, ignore_errors=True)
        partial.mkdir()

    def _finish(self, partial: Path, out: Path, files: dict[str, Any], state: dict[str, Any]) -> None:
        try:
            write_through(partial / FILES[2], json.dumps(state, indent=1, sort_keys=True) + "\n")
            manifest = {**files, FILES[2]: about(partial / FILES[2])}
            write_through(partial / MANIFEST, json.dumps(manifest, indent=1) + "\n")
            for folder in ("model", "optimizer", "."):
                sync_folder(partial / folder)
            put_in_place(partial, out)
            sync_folder(self.folder)
        except OSError:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        remove_old(self.folder, self.keep)


def _cannot(out: Path, error: Exception) -> UserError:
    said = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return UserError("cannot-write", f"cannot save `{out}`: {said}", help="older checkpoints are as they were")
