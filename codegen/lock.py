"""Lock files: which sizes the kernels of a spec are cut by for one target, as they were measured once; and which
products are a kernel of ours, for those were PyTorch's otherwise.

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

VERSION = 2


class BadLock(ValueError):
    """A file that is no lock, or one of another version; the text says what is wrong, `help` what to do."""

    def __init__(self, text: str, help: str = "") -> None:
        super().__init__(text)
        self.help = help


@dataclass(frozen=True)
class Tuned:
    """One kernel: its constants where they are not as untuned, and what was measured: microseconds, a median.

    `library_us`: what PyTorch's product and what is behind it take in place of one. Such a kernel is used where
    `is_used` says so, every other is.
    """

    kernel: str
    constants: Mapping[str, Any]
    us: float | None = None
    untuned_us: float | None = None
    library_us: float | None = None
    is_used: bool = True


@dataclass(frozen=True)
class Lock:
    """The kernels of a target, by key. `made` says with what, for people: device, versions, sizes. `dsl`: the version
    of the CuTe DSL, "" where it was not installed; `path`: the file."""

    target: str
    triton: str
    kernels: Mapping[str, Tuned] = field(default_factory=dict)
    made: Mapping[str, Any] = field(default_factory=dict)
    dsl: str = ""
    path: str = field(default="", compare=False)

    def text(self) -> str:
        """The file: JSON, sorted, constants as Python writes them."""
        kernels = {
            key: {
                "kernel": t.kernel, "constants": {n: repr(v) for n, v in sorted(t.constants.items())}, "us": t.us,
                "untuned_us": t.untuned_us, "library_us": t.library_us, "is_used": t.is_used,
            }
            for key, t in sorted(self.kernels.items())
        }  # fmt: skip
        said = {
            "lock": VERSION, "target": self.target, "triton": self.triton, "dsl": self.dsl, "made": dict(self.made),
        }  # fmt: skip
        return json.dumps({**said, "kernels": kernels}, indent=1) + "\n"

    def uses(self, key: str) -> bool:
        """Whether a kernel that may stand in place of PyTorch's product was measured, and does."""
        return key in self.kernels and self.kernels[key].is_used

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


def read(path: Path, target: str, triton: str, dsl: str = "") -> Lock:
    """A lock file, for this target and these versions of Triton and of the CuTe DSL (major and minor: another compiler
    needs other sizes). The DSL's counts where a kernel of it is used; "": it is not here, and is not asked.

    Raises BadLock.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        version = data["lock"]
        if version != VERSION:
            said = f"`{path}` is a lock of version {version}, this is version {VERSION}"
            raise BadLock(said, "tune it again")
        kernels = {key: _tuned(t) for key, t in data["kernels"].items()}
        lock = Lock(data["target"], data["triton"], kernels, data["made"], data["dsl"], str(path))
    except BadLock:
        raise
    except (OSError, UnicodeDecodeError) as error:
        raise BadLock(f"cannot read `{path}`: {error}") from None
    except (ValueError, KeyError, TypeError, AttributeError, SyntaxError) as error:
        raise BadLock(f"`{path}` is no lock: {error}", "`heddle tune` writes one") from None
    if lock.target != target:
        raise BadLock(f"`{path}` is a lock of target `{lock.target}`, not of `{target}`", f"--target {lock.target}")
    if _minor(lock.triton) != _minor(triton):
        raise BadLock(
            f"`{path}` was tuned with triton {lock.triton}, this is {triton}",
            "tune it again, or remove it: untuned sizes work with every version",
        )
    uses_dsl = any(t.is_used and t.library_us is not None for t in kernels.values())
    if dsl and uses_dsl and _minor(lock.dsl) != _minor(dsl):
        raise BadLock(
            f"`{path}` was tuned with nvidia-cutlass-dsl {lock.dsl or 'not there'}, this is {dsl}",
            "tune it again, or remove it: untuned, products are PyTorch's",
        )
    return lock


def _listed(values: Iterable[Any]) -> str:
    return ", ".join(map(repr, values))


def _tuned(said: Any) -> Tuned:
    constants = {name: ast.literal_eval(value) for name, value in said["constants"].items()}
    return Tuned(
        said["kernel"], constants, said["us"], said["untuned_us"], said["library_us"], said["is_used"]
    )  # fmt: skip


def _minor(version: str) -> tuple[str, ...]:
    return tuple(version.split(".")[:2])
