"""Lock files: which sizes the kernels of a spec are cut by for one target, as they were measured once.

A lock is committed beside the spec (`my.sm_90.lock`). Compiling reads it and measures nothing, so every rank and every
machine has the same kernels. A kernel is known by its untuned text: one whose text has changed since is not in the lock
any more, and is cut as untuned.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .tiles import Values, constants_of, with_constants

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
    """The kernels of a target, by key. `made` says with what, for people: device, versions, sizes; `path`: the file."""

    target: str
    triton: str
    kernels: Mapping[str, Tuned] = field(default_factory=dict)
    made: Mapping[str, Any] = field(default_factory=dict)
    path: str = field(default="", compare=False)

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

    def applied(self, key: str, text: str, tuned: Values) -> str:
        """The file of one of the lock's kernels, cut as it says.

        Raises BadLock for what tuning does not change, and for a value that it does not try: another one may be no size
        of a tile at all, and would fail inside Triton.
        """
        found, there = self.kernels[key], constants_of(text)
        for name, value in found.constants.items():
            what = f"`{name}` of `{found.kernel}` in the lock"
            if name not in tuned or name not in there:
                known = ", ".join(n for n in tuned if n in there)
                raise BadLock(f"{what} is nothing that tuning changes", f"it changes {known}; tune it again")
            values = sorted({there[name], *tuned[name]})
            if type(value) is not type(there[name]) or value not in values:
                raise BadLock(f"{what} is {value!r}, a size that it cannot have", f"it is one of {_listed(values)}")
        return with_constants(text, found.constants)

    def unknown(self, keys: Iterable[str]) -> list[str]:
        """The names of its kernels that are none of those with these keys."""
        return sorted(t.kernel for key, t in self.kernels.items() if key not in set(keys))


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
        lock = Lock(data["target"], data["triton"], kernels, data["made"], str(path))
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


def _listed(values: Iterable[Any]) -> str:
    return ", ".join(map(repr, values))


def _minor(version: str) -> tuple[str, ...]:
    return tuple(version.split(".")[:2])
