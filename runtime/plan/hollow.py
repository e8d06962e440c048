"""Tensors without numbers: a module runs on the shapes of its tensors, and what it would cost is written down.

Under `Hollow` no op on floating-point numbers computes anything. Its results have the shapes, strides and dtypes that
PyTorch's own meta kernels say, and storages of their own (or its arguments', where it is a view) in address space that
is never touched. Whole numbers that follow from whole numbers are computed: positions, documents, offsets. So a
generated module chooses here as it would choose on the device, and keeps here what it would keep there.
"""

from __future__ import annotations

import mmap
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ..lib.product import ELSEWHERE

aten = torch.ops.aten
PAGE = 1 << 16  # below this a buffer is cheaper than a mapping
MANY = 1 << 27  # more whole numbers than this are not computed either: nobody looks at one of so many


class Work(NamedTuple):
    """Ops of one kind: `flops` of matrix products (a multiply-add is two), `bytes` read and written."""

    phase: str
    block: str
    flops: int
    bytes: int


class Message(NamedTuple):
    """One collective as a rank sees it: `bytes` is the size of what it puts in; `line` asked for it."""

    phase: str
    block: str
    line: str
    kind: str
    axes: tuple[str, ...]
    bytes: int


@dataclass
class Ledger:
    """What was done: how often each kind of work and each message."""

    work: Counter[Work] = field(default_factory=Counter)
    messages: Counter[Message] = field(default_factory=Counter)

    def copy(self) -> Ledger:
        """As it is now."""
        return Ledger(self.work.copy(), self.messages.copy())

    def without(self, part: Ledger) -> Ledger:
        """What is beside a part of it."""
        return Ledger(self.work - part.work, self.messages - part.messages)

    def add(self, other: Ledger, phase: str, moved: Callable[[str], str]) -> None:
        """The same once more, in another phase, in the block that `moved` says."""
        for work, times in other.work.items():
            self.work[work._replace(phase=phase, block=moved(work.block))] += times
        for message, times in other.messages.items():
            self.messages[message._replace(phase=phase, block=moved(message.block))] += times


class Shape(NamedTuple):
    """What there is to say about a tensor without numbers."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


def shape_of(x: Tensor) -> Shape:
    """Its shape, strides and dtype."""
    return Shape(tuple(x.shape), tuple(x.stride()), x.dtype)


class Unknown(RuntimeError):
    """A number was asked for that only a real run has."""


class Hollow(TorchDispatchMode):
    """A mode for `with`. `live` are the bytes that hollow tensors take now, `peak` the most there were; `ledger` gets
    what is done, under `phase` and `block`.

    `share` is how many of a hollow tensor's places count as other than 0, where an op asks which are: a module that
    sends rows where its numbers say runs as if they were sent evenly. `unknown` is what stands for one number where it
    decides nothing, such as a metric; as long as it is None, asking for one raises `Unknown`.
    """

    def __init__(self, share: float = 1.0) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.share = share
        self.ledger = Ledger()
        self.phase, self.block = "forward", ""
        self.unknown: float | None = None
        self._hollow: set[int] = set()
        self._kept: list[Tensor] = []
        self._ways: dict[Any, _Way] = {}
        self._calls: dict[Any, _Call] = {}
        self._flops: dict[Any, int] = {}
        self._beside: dict[Any, tuple[Shape, ...]] = {}

    def __enter__(self) -> Hollow:
        ELSEWHERE.depth += 1  # this processor is not the one that is planned for
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        ELSEWHERE.depth -= 1

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing is compiled under this mode; to skip the compiler would load all of it."""
        return False

    # --- tensors ----------------------------------------------------------------------------------

    def tensor(self, shape: Shape) -> Tensor:
        """A new one."""
        count = 1 + sum((n - 1) * s for n, s in zip(shape.size, shape.stride, strict=True)) if prod(shape.size) else 0
        if not count:
            return torch.empty_strided(shape.size, shape.stride, dtype=shape.dtype)
        size = count * shape.dtype.itemsize
        room = _Buffer(size) if size < PAGE else _Mapping(-1, size, flags=_FLAGS)
        flat = torch.frombuffer(room, dtype=shape.dtype, count=count)
        room.owner, room.taken, room.place = self, size, flat.data_ptr()
        self._hollow.add(flat.data_ptr())
        self.live += size
        self.peak = max(self.peak, self.live)
        return flat.as_strided(shape.size, shape.stride)

    def freed(self, place: int, size: int) -> None:
        """A storage went."""
        self._hollow.discard(place)
        self.live -= size

    def settle(self, x: Tensor | None) -> None:
        """A tensor stays, and is counted elsewhere."""
        if x is not None:
            self.live -= x.numel() * x.element_size()

    def is_hollow(self, x: Tensor) -> bool:
        """Whether its numbers are not there."""
        return x.dtype.is_floating_point or x.untyped_storage().data_ptr() in self._hollow

    @contextmanager
    def section(self, phase: str, block: str) -> Iterator[_Section]:
        """What is done inside is written into a ledger of its own."""
        before = self.ledger, self.phase, self.block, self.peak
        found = _Section()
        self.ledger, self.phase, self.block, self.peak = found.ledger, phase, block, self.live
        start = self.live
        try:
            yield found
        finally:
            found.peak = self.peak - start
            self.ledger, self.phase, self.block, self.peak = before

    # --- ops --------------------------------------------------------------------------------------

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        found = self._ways.get(func)
        if found is None:
            found = self._ways[func] = _way(func)
        if found.is_whole:
            with self:
                return func.decompose(*args, **kwargs)
        if found.is_view:
            return func(*args, **kwargs)
        inputs = _tensors(args) + _tensors(tuple(kwargs.values())) if kwargs else _tensors(args)
        hollow = any(x.dtype.is_floating_point or x.untyped_storage().data_ptr() in self._hollow for x in inputs)
        if not hollow and (made := self._whole(func, found, args, kwargs, inputs)) is not None:
            return made
        if found.written:
            return self._write(func, found, args, kwargs, inputs)
        if func is aten._local_scalar_dense.default:
            if self.unknown is None:
                raise Unknown("a number that only a real run has")
            return self.unknown if inputs[0].dtype.is_floating_point else int(self.unknown)
        if func is aten.nonzero.default:
            rows = max(1, round(self.share * inputs[0].numel()))
            return torch.zeros(rows, inputs[0].dim(), dtype=torch.int64)
        known = self._known_call(func, args, kwargs, inputs)
        if not inputs and not any(isinstance(s, Shape) and s.dtype.is_floating_point for s in known.results):
            return func(*args, **kwargs)
        self.ledger.work[Work(self.phase, self.block, known.flops, known.bytes)] += 1
        results = [self.tensor(s) if isinstance(s, Shape) else s for s in known.results]
        return results[0] if known.kind is None else known.kind(results)

    def _whole(self, func: Any, way: _Way, args: Any, kwargs: Any, inputs: list[Tensor]) -> Any:
        """What whole numbers give, worked out; None where that is too much, or where there are none to begin with."""
        if not inputs:
            return None
        if prod(x.numel() for x in inputs) > MANY and not way.written:
            return None
        made = func(*args, **kwargs)
        return made if way.written or not any(x.dtype.is_floating_point for x in _tensors(made)) else None

    def _write(self, func: Any, way: _Way, args: Any, kwargs: Any, inputs: list[Tensor]) -> Any:
        """In place, or into `out`: numbers are lost where something without numbers is written. Raises what PyTorch
        raises for shapes that do not fit."""
        targets = [x for w in way.written for x in _tensors(kwargs.get(w) if isinstance(w, str) else args[w])]
        for x in targets:
            if not self.is_hollow(x):
                self._kept.append(x)
                self._hollow.add(x.untyped_storage().data_ptr())
        key = (func, _key(args), _key(kwargs.get("out")))
        if key not in self._flops:
            out = func(*_as_meta(args), **{k: _as_meta(v) for k, v in kwargs.items()})
            self._flops[key] = _flops(func, args, kwargs, targets)
            self._beside[key] = tuple(shape_of(x) for x in _tensors(out)) if way.is_beside else ()
        moved = sum(x.numel() * x.element_size() for x in inputs)
        self.ledger.work[Work(self.phase, self.block, self._flops[key], moved)] += 1
        if way.is_beside:
            targets = [self.tensor(shape) for shape in self._beside[key]]
        return None if not way.results else targets[0] if way.results == 1 else tuple(targets)

    def _known_call(self, func: Any, args: Any, kwargs: Any, inputs: list[Tensor]) -> _Call:
        """What a call gives, as PyTorch works it out without numbers; asked once for each kind of call."""
        key = (func, _key(args), _key(tuple(kwargs.items())) if kwargs else None)
        known = self._calls.get(key)
        if known is None:
            on_meta = {k: _as_meta(v) for k, v in kwargs.items()}
            if self._ways[func].takes_device:
                on_meta["device"] = "meta"
            out = _PLAIN.get(func, func)(*_as_meta(args), **on_meta)
            kind = type(out) if isinstance(out, (tuple, list)) else None
            results = tuple(shape_of(x) if isinstance(x, Tensor) else x for x in (out if kind else (out,)))
            moved = sum(x.numel() * x.element_size() for x in (*inputs, *_tensors(out)))
            known = self._calls[key] = _Call(results, kind, _flops(func, args, kwargs, _tensors(out)), moved)
        return known


class _Way(NamedTuple):
    """What the schema of an op says: whether it gives a view, which arguments it writes to, how many results it has.
    `is_whole`: it is made of others, and comes so where no gradients are kept account of (`torch.inference_mode`).
    `is_beside`: what it gives is not what it writes to."""

    is_whole: bool
    is_view: bool
    written: tuple[int | str, ...]
    results: int
    takes_device: bool
    is_beside: bool


class _Call(NamedTuple):
    """Results by their shapes, `kind` what holds them (None: there is one); operations, and bytes read and written."""

    results: tuple[Any, ...]
    kind: Any
    flops: int
    bytes: int


# Of the same shape, and PyTorch knows it without loading its compiler.
_PLAIN = {
    aten.zeros_like.default: aten.empty_like.default,
    aten.ones_like.default: aten.empty_like.default,
    aten.zeros.default: aten.empty.memory_format,
    aten.ones.default: aten.empty.memory_format,
}


def _way(func: Any) -> _Way:
    schema = func._schema
    written: list[int | str] = [
        a.name if a.kwarg_only else i
        for i, a in enumerate(schema.arguments)
        if a.alias_info is not None and a.alias_info.is_write
    ]
    aliased = any(r.alias_info is not None for r in schema.returns) and not written
    is_view = aliased or func is aten._unsafe_view.default  # the one whose schema does not say so
    takes_device = any(a.name == "device" for a in schema.arguments)
    is_beside = bool(written) and all(r.alias_info is None for r in schema.returns)
    is_whole = torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")
    return _Way(is_whole, is_view, tuple(written), len(schema.returns), takes_device, is_beside)


@dataclass
class _Section:
    """A ledger, and how much more than before was there at most."""

    ledger: Ledger = field(default_factory=Ledger)
    peak: int = 0


class _Room:
    """Bytes that say when nobody needs them any more."""

    owner: Hollow
    taken: int
    place: int

    def __del__(self) -> None:
        self.owner.freed(self.place, self.taken)


class _Buffer(_Room, bytearray):
    pass


class _Mapping(_Room, mmap.mmap):
    pass


# Address space only: no page of it is ever touched, so none is asked for.
_FLAGS = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)


def _tensors(x: Any) -> list[Tensor]:
    """Those of an argument, or of arguments."""
    if isinstance(x, Tensor):
        return [x]
    return [y for item in x for y in _tensors(item)] if isinstance(x, (tuple, list)) else []


def _key(x: Any) -> Any:
    if isinstance(x, Tensor):
        return (tuple(x.shape), tuple(x.stride()), x.dtype)
    return tuple(_key(item) for item in x) if isinstance(x, (tuple, list)) else (type(x), x)


def _as_meta(x: Any) -> Any:
    if isinstance(x, Tensor):
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")
    return type(x)(_as_meta(item) for item in x) if isinstance(x, (tuple, list)) else x


def _flops(func: Any, args: Any, kwargs: Any, made: list[Tensor]) -> int:
    """Those of products, by PyTorch's own table; an op in place counts as the one that is not."""
    from torch.utils.flop_counter import flop_registry

    packet = func._overloadpacket
    if packet not in flop_registry:
        plain = getattr(aten, packet.__name__.rstrip("_"), None)
        packet = plain if plain in flop_registry else None
    if packet is None:
        return 0
    out = made[0] if len(made) == 1 else tuple(made)
    found: int = flop_registry[packet](*args, **{k: v for k, v in kwargs.items() if k != "out"}, out_val=out)
    return found
