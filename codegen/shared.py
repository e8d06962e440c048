"""What all classes of one module refer to by name: masks, clocks and the functions of kernels."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field

from .lock import Lock
from .tiles import NAME, key_of


@dataclass
class Shared:
    """Constants and kernels of one module, each made once.

    `masks`: by their text, (name, text of the constant). `kernels`: by what they are made from, (name, text of the
    file); each is a file of its own, with one function of its name. `without`: the uses of ops that might have one and
    do not, by the line of the spec, each with the reason. `lock` is how they are cut, `keys` what it knows them by.
    """

    masks: dict[str, tuple[str, str]] = field(default_factory=dict)
    kernels: dict[Hashable, tuple[str, str]] = field(default_factory=dict)
    without: dict[str, str] = field(default_factory=dict)
    lock: Lock | None = None
    keys: dict[str, str] = field(default_factory=dict)

    def kernel(self, stem: str, made_from: Hashable, text: Callable[[str], str]) -> str:
        """A kernel's function, as statements call it: `stem`, with a number where several kernels have it."""
        if made_from not in self.kernels:
            taken = {name for name, _ in self.kernels.values()}
            name, number = stem, 1
            while name in taken:
                number += 1
                name = f"{stem}_{number}"
            self.keys[name] = key_of(text(NAME))
            own = text(name)
            self.kernels[made_from] = (name, own if self.lock is None else self.lock.applied(self.keys[name], own))
        return f"kernels.{self.kernels[made_from][0]}"

    @property
    def files(self) -> dict[str, str]:
        """The files of the kernels, by name."""
        return dict(sorted(self.kernels.values()))
