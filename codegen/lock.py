"""Lock files: which sizes the kernels of a spec are cut by for one target, as they were measured once.

A lock is committed beside the spec (`my.sm_90.lock`). Compiling reads it and measures nothing, so every rank and every
machine has the same kernels. A kernel is known by its untuned text: one whose text has changed since is not in the lock
any more, and is cut as untuned.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .tiles import constants_of, with_constants

VERSION = 1


class BadLock(ValueError):
    """A file that is no lock, or one of another version; the text says what is wrong, `help` what to do."""

    def __init__(self, text: str, help: str = "") -> None:
        super().__init__(text)
        self.help = help


@dataclass(frozen=True)
class Tuned:
    """One kernel: its constants where they are not as untuned, and what was measured: microseconds, a median."""

    kernel: str
    constants: Mapping[str, Any]
    us: float | None = None
    untuned_us: float | None = None


@dataclass(frozen=True)
class Lock:
    """The kernels of a target, by key. `made` says with what, for people: device, versions, sizes."""

    target: str
    triton: str
    kernels: Mapping[str, Tuned] = field(default_factory=dict)
    made: Mapping[str, Any] = field(default_factory=dict)

    def text(self) -> str:
        """The file: JSON, sorted, constants as Python writes them."""
        kernels = {
            key: {
                "kernel": t.kernel, "constants": {n: repr(v) for n, v in sorted(t.constants.items())}, "us": t.us,
                "untuned_us": t.untuned_us,
            }
            for key, t in sorted(self.kernels.items())
        }  # fmt: skip
        said = {"lock": VERSION, "target": self.target, "triton": self.triton, "made": dict(self.made)}
        return json.dumps({**said, "kernels": kernels}, indent=1) + "\n"

    def applied(self, key: str, text: str) -> str:
        """A kernel's file as the lock has it. Raises BadLock for constants that the file does not have."""
        found = self.kernels.get(key)
        if found is None:
            return text
        there = constants_of(text)
        for name, value in found.constants.items():
            if name not in there or type(value) is not type(there[name]):
                raise BadLock(f"`{name}` of `{found.kernel}` is no constant of its file", "tune it again")
        return with_constants(text, found.constants)


def read(path: Path, target: str, triton: str) -> Lock:
    """A lock file, for this target and this version of Triton (major and minor: another compiler needs other sizes).

    Raises BadLock.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        version = data["lock"]
        kernels = {
            key: Tuned(
                t["kernel"], {n: ast.literal_eval(v) for n, v in t["constants"].items()}, t["us"], t["untuned_us"]
            )
            for key, t in data["kernels"].items()
        }
        lock = Lock(data["target"], data["triton"], kernels, data["made"])
    except (OSError, UnicodeDecodeError) as error:
        raise BadLock(f"cannot read `{path}`: {error}") from None
    except (ValueError, KeyError, TypeError, AttributeError, SyntaxError) as error:
        raise BadLock(f"`{path}` is no lock: {error}", "`heddle tune` writes one") from None
    if version != VERSION:
        raise BadLock(f"`{path}` is a lock of version {version}, this is version {VERSION}", "tune it again")
    if lock.target != target:
        raise BadLock(f"`{path}` is a lock of target `{lock.target}`, not of `{target}`", f"--target {lock.target}")
    if _minor(lock.triton) != _minor(triton):
        raise BadLock(
            f"`{path}` was tuned with triton {lock.triton}, this is {triton}",
            "tune it again, or remove it: untuned sizes work with every version",
        )
    return lock


def _minor(version: str) -> tuple[str, ...]:
    return tuple(version.split(".")[:2])
