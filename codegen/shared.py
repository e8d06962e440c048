"""What all classes of one module refer to by name: masks, clocks and the functions of kernels."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field

from ..dsl.diagnostics import Diagnostic, Label, fail
from ..dsl.source import Span
from .lock import BadLock, Lock
from .tiles import NAME, Values, key_of


@dataclass
class Shared:
    """Constants and kernels of one module, each made once.

    `masks`: by their text, (name, text of the constant). `kernels`: by what they are made from, (name, text of the
    file); each is a file of its own, with one function of its name. `without`: warnings, each of a use of an op that
    might have one and does not. `lock` is how they are cut, `keys` what it knows them by. `offered`: the kernels that
    may stand in place of PyTorch's products, by key; the lock says which do.
    """

    masks: dict[str, tuple[str, str]] = field(default_factory=dict)
    kernels: dict[Hashable, tuple[str, str]] = field(default_factory=dict)
    without: list[Diagnostic] = field(default_factory=list)
    lock: Lock | None = None
    keys: dict[str, str] = field(default_factory=dict)
    offered: dict[str, str] = field(default_factory=dict)

    def offer(self, key: str, stem: str) -> bool:
        """Whether a kernel is used that may stand in place of PyTorch's product, and what is behind it."""
        self.offered[key] = stem
        return self.lock is not None and self.lock.uses(key)

    def kernel(
        self, stem: str, made_from: Hashable, text: Callable[[str], str], tuned: Callable[[str], Values], span: Span
    ) -> str:
        """A kernel's function, as statements call it: `stem`, with a number where several kernels have it.

        tuned: of a kernel's text the values that its constants may have. span: what asked for it.
        Raises `SpecError` bad-lock.
        """
        if made_from not in self.kernels:
            taken = {name for name, _ in self.kernels.values()}
            name, number = stem, 1
            while name in taken:
                number += 1
                name = f"{stem}_{number}"
            self.keys[name] = key_of(text(NAME))
            self.kernels[made_from] = (name, self._cut(self.keys[name], text(name), tuned, span))
        return f"kernels.{self.kernels[made_from][0]}"

    def _cut(self, key: str, text: str, tuned: Callable[[str], Values], span: Span) -> str:
        if self.lock is None or key not in self.lock.kernels:
            return text
        try:
            return self.lock.applied(key, text, tuned(text))
        except BadLock as error:
            raise fail("bad-lock", str(error), span, "this line asks for the kernel", help=error.help) from None

    def lacks_kernel(self, op: str, why: str, target: str, span: Span, callers: tuple[Span, ...]) -> None:
        """Note a use of an op that PyTorch computes, though there are kernels of the op."""
        said = Diagnostic(
            "without-kernel", f"this `{op}` has no kernel for target `{target}`: PyTorch computes it", Label(span, why),
            tuple(Label(caller, "called here") for caller in callers),
            help="its results are the same; `heddle explain without-kernel` lists what kernels hold",
            severity="warning",
        )  # fmt: skip
        if said not in self.without:
            self.without.append(said)

    @property
    def files(self) -> dict[str, str]:
        """The files of the kernels, by name."""
        return dict(sorted(self.kernels.values()))
