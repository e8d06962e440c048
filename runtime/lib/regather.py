"""Weights that are stored in parts, and whole only where a pass reads them: what the backward pass would keep of a
gathered weight is its part, which is gathered again when its gradient is due (ZeRO-3: Rajbhandari et al. 2020, section
5.3; `reshard_after_forward` of PyTorch's FSDP2).

Autograd saves a weight for the gradient of what it is multiplied with. Here a hook on what it saves knows the whole
ones by their storage, and saves how to get them. Nothing else is kept or made anew; all ranks gather in the order in
which they need gradients, which is the same on all of them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

from .mesh import Axes, Group


class _Whole:
    """A gathered weight: its part (a parameter, or what was gathered of one), and how it was made."""

    def __init__(self, part: nn.Parameter | _Whole, group: Group, dim: int) -> None:
        self.part, self.group, self.dim = part, group, dim
        self.version = part._version if isinstance(part, Tensor) else 0
        self.uses = 0
        self.there: Tensor | None = None

    def again(self) -> Tensor:
        """The whole weight, gathered once for as many times as it was saved."""
        whole = self.group.all_gather_into(self._part(), self.dim) if self.there is None else self.there
        self.uses -= 1
        self.there = whole if self.uses > 0 else None
        return whole

    def _part(self) -> Tensor:
        if isinstance(self.part, _Whole):
            return self.part.again()
        if self.part._version != self.version:
            raise RuntimeError("a weight that the backward pass gathers again was changed behind the forward pass")
        return self.part.detach()


class Gone(NamedTuple):
    """What is saved of a view of a gathered weight: how to have it again."""

    whole: _Whole
    size: torch.Size
    stride: tuple[int, ...]
    offset: int

    def again(self) -> Tensor:
        """The view, on the weight gathered again."""
        with torch.no_grad():
            return self.whole.again().as_strided(self.size, self.stride, self.offset)


class _Kept(NamedTuple):
    """What hooks around these made of a tensor, and the one that gives it back."""

    value: Any
    unpack: Callable[[Any], Any]


class _Book:
    """The gathered weights of one forward pass, by their storages: an address that is remembered is not used again."""

    def __init__(self, axes: Axes) -> None:
        self.axes, self.wholes = frozenset(axes), dict[int, tuple[StorageWeakRef, _Whole]]()

    def note(self, made: Tensor, part: Tensor, group: Group, dim: int) -> None:
        source = part if isinstance(part, nn.Parameter) else self.find(part)
        if source is not None and self.axes.issuperset(group.axes):
            storage = StorageWeakRef(made.untyped_storage())
            self.wholes[storage.cdata] = storage, _Whole(source, group, dim)

    def find(self, x: Tensor) -> _Whole | None:
        """The gathered weight that a tensor is a view of."""
        return self.wholes.get(x.untyped_storage()._cdata, (None, None))[1]


_now = threading.local()


def note_gathered(made: Tensor, part: Tensor, group: Group, dim: int) -> None:
    """Remember that `made` is `part` of all ranks of a group, joined along dim, if it is a weight that goes again."""
    book: _Book | None = getattr(_now, "book", None)
    if book is not None:
        book.note(made, part, group, dim)


def gone(x: Tensor) -> Gone | None:
    """What is to be saved in place of a tensor, if it is a view of a weight that is gathered again. Hooks on saved
    tensors that are set inside of `gathering_again` ask this first."""
    book: _Book | None = getattr(_now, "book", None)
    found = None if book is None else book.find(x)
    if found is None:
        return None
    found.uses += 1
    return Gone(found, x.size(), x.stride(), int(x.storage_offset()))


def is_gathering_again() -> bool:
    """Whether `gone` may give something."""
    return getattr(_now, "book", None) is not None


@contextmanager
def gathering_as_ever() -> Iterator[None]:
    """Inside, weights are no more than other values: what is made again gathers them as it does."""
    before = getattr(_now, "book", None)
    _now.book = None
    try:
        yield
    finally:
        _now.book = before


@contextmanager
def gathering_again(axes: Axes) -> Iterator[None]:
    """Weights that are gathered along these axes inside are not saved whole; what else is saved goes to the hooks that
    were set around."""
    if not axes or not torch.is_grad_enabled():
        yield
        return
    around = torch._C._autograd._top_saved_tensors_default_hooks(True)  # no public name asks for them

    def pack(x: Tensor) -> Any:
        found = gone(x)
        if found is not None or around is None:
            return x if found is None else found
        return _Kept(around[0](x), around[1])

    def unpack(packed: Any) -> Any:
        if isinstance(packed, Gone):
            return packed.again()
        return packed.unpack(packed.value) if isinstance(packed, _Kept) else packed

    before = getattr(_now, "book", None)
    _now.book = _Book(axes)
    try:
        with saved_tensors_hooks(pack, unpack):
            yield
    finally:
        _now.book = before
