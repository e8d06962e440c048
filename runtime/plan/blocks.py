"""Blocks of a generated module under `Hollow`: each kind is run once, both ways, and counts for all that are alike."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from ..lib import Model
from ..lib.regather import Gone, gone, is_gathering_again
from ..lib.rows import At
from .around import Around, Name
from .hollow import Hollow, Ledger, Shape, shape_of

_SPEC = re.compile(r"^\s*# (\S+:\d+)  ")


class Saved(NamedTuple):
    """A storage that waits for the backward pass, and who keeps it."""

    block: str
    line: str
    bytes: int


class _Waiting:
    """There as long as something waits for the backward pass with a storage."""

    def __init__(self, saved: Saved) -> None:
        self.saved = saved


@dataclass(frozen=True)
class _Fresh:
    """A storage that a block makes and keeps: one of its own for each run."""

    saved: Saved


@dataclass(frozen=True)
class _Argument:
    """A storage that came with an argument."""

    place: int
    saved: Saved


@dataclass(frozen=True)
class _Result:
    """The storage of a result."""

    place: int
    saved: Saved


@dataclass(frozen=True)
class _Outer:
    """A storage that all blocks read: where the coordinates have it, and itself where it has numbers, and so is one for
    all coordinates that are alike."""

    name: tuple[int, Name]
    tensor: Tensor | None
    saved: Saved


@dataclass
class _Kind:
    """What one run of a block does: results and gradients by their shapes, what it keeps, what it costs forward `until`
    it keeps nothing more, what the `rest` costs (a run that is made again stops before), and backward."""

    block: str
    results: list[Shape | None]
    moving: list[bool]
    is_single: bool
    gradients: list[Shape | None]
    kept: list[_Fresh | _Argument | _Result | _Outer]
    until: Ledger
    rest: Ledger
    forward_peak: int
    backward: Ledger
    backward_peak: int


class Blocks:
    """Runs the blocks of a model in place of themselves. `waiting` has every storage that waits for the backward pass,
    once; weights and buffers do not count. `free` are names of classes that are run each time: what they state beside
    their results is theirs; None: all are."""

    def __init__(self, mode: Hollow, model: Model, source: str, free: frozenset[str] | None) -> None:
        self.mode, self.model, self.around = mode, model, Around(mode)
        self.waiting: WeakValueDictionary[int, _Waiting] = WeakValueDictionary()
        self.told: dict[int, Saved] = {}  # who keeps a storage, where that was found out before
        self._until = Ledger()  # what was done when the last tensor was kept
        self._file = sys.modules[type(model).__module__].__file__
        self._lines = _spec_lines(source)
        self._kinds: dict[Any, _Kind] = {}
        self._own = {x.untyped_storage().data_ptr() for x in (*model.parameters(), *model.buffers()) if x.numel()}
        for path, module in model.named_modules():
            if type(module).__module__ == type(model).__module__ and module is not model:
                runs_alone = free is None or type(module).__name__ in free
                module.forward = partial(self._pass if runs_alone else self._call, module, path)

    def waits(self, storage: torch.UntypedStorage) -> bool:
        """Whether it is there for a pass, and not of a weight or a buffer."""
        return bool(storage.nbytes()) and storage.data_ptr() not in self._own

    def where(self) -> tuple[str, str]:
        """(block, line of the spec) of the statement of the generated module that runs now."""
        frame: Any = sys._getframe(1)
        while frame is not None and frame.f_code.co_filename != self._file:
            frame = frame.f_back
        return self.mode.block, self._lines.get(frame.f_lineno, "") if frame is not None else ""

    @contextmanager
    def keeping(self) -> Iterator[dict[int, Saved]]:
        """What autograd keeps inside and still keeps at the end, by its address. What was computed beside the results,
        such as scores that only choose, takes what it kept along when it goes; its address may be another's then."""
        before, self.waiting = self.waiting, WeakValueDictionary()

        def pack(x: Tensor) -> Gone | tuple[_Waiting | None, Tensor]:
            if (found := gone(x)) is not None:
                return found
            x = x.detach()  # what is kept must not hold on to who made it, or it stays where no backward pass comes
            storage = x.untyped_storage()
            place, size = storage.data_ptr(), storage.nbytes()
            self._until = self.mode.ledger.copy()
            if not size or place in self._own:
                return None, x
            told = self.told.pop(place, None)
            waiting = self.waiting.get(place)
            if waiting is None:
                if told is None or told.bytes != size:
                    told = Saved(*self.where(), size)
                self.waiting[place] = waiting = _Waiting(told)
            return waiting, x

        found: dict[int, Saved] = {}
        try:
            with saved_tensors_hooks(pack, lambda packed: packed.again() if isinstance(packed, Gone) else packed[1]):
                yield found
            found |= {place: waiting.saved for place, waiting in self.waiting.items()}
        finally:
            self.waiting = before

    # --- running ----------------------------------------------------------------------------------

    @contextmanager
    def _inside(self, path: str) -> Iterator[None]:
        before, self.mode.block = self.mode.block, path
        try:
            yield
        finally:
            self.mode.block = before

    def _pass(self, module: nn.Module, path: str, *args: Any, **more: Any) -> Any:
        with self._inside(path):
            return type(module).forward(module, *args, **more)

    def _call(self, module: nn.Module, path: str, *args: Any, **more: Any) -> Any:
        tensors = [a for a in args if isinstance(a, Tensor)]
        lent = [a for a in args if isinstance(a, nn.Module)]
        weights = list(dict.fromkeys(p for m in (module, *lent) for p in m.parameters()))
        shapes = tuple(more.items()), tuple(map(shape_of, weights)), is_gathering_again()
        kind = None
        for _ in range(2):  # what is made once for all layers is there the second time
            key = (type(module), tuple(map(self._described, args)), *shapes)
            kind = self._kinds.get(key) or self._tried(module, path, args, more, tensors, weights)
            if kind is not None:
                break
        if kind is None:
            return self._pass(module, path, *args, **more)
        self._kinds[key] = kind
        run = _Run(self, kind, path)
        results = _Replayed.apply(run, [a for a in args if isinstance(a, At)], *tensors, *weights)
        self.mode.ledger.add(run.kind.rest, self.mode.phase, run.moved)
        return results[0] if run.kind.is_single else results

    def _tried(
        self, module: nn.Module, path: str, args: tuple[Any, ...], more: dict[str, Any], tensors: list[Tensor],
        weights: list[nn.Parameter],
    ) -> _Kind | None:  # fmt: skip
        """Run a block once, forward and backward, apart from all else; None where it changed its surroundings."""
        given = iter([t.detach().requires_grad_(t.requires_grad) for t in tensors])
        inner = [next(given) if isinstance(a, Tensor) else a for a in args]
        mine = [a for a in inner if isinstance(a, Tensor)]
        at = [a for a in args if isinstance(a, At)]
        before = self._told(at)
        around, self._until = self._until, Ledger()
        with torch.enable_grad(), self.mode.section("forward", path) as forward, self.keeping() as kept:
            out = type(module).forward(module, *inner, **more)
        until, self._until = self._until, around
        results = list(out) if isinstance(out, tuple) else [out]
        places = {_place(x): i for i, x in enumerate(mine)}
        if self._told(at) != before or any(_place(r) in places for r in results if r is not None):
            return None
        ends = [r for r in results if r is not None and r.requires_grad]
        asked = [x for x in (*mine, *weights) if x.requires_grad]
        outer = {
            _place(x): ((i, name), None if self.mode.is_hollow(x) else x)
            for i, a in enumerate(at)
            for name, x in self.around.tensors(a).items()
        }
        made = {_place(r): i for i, r in enumerate(results) if r is not None}
        # A backward pass may save what only it reads: that is none of what hooks around this run take.
        with self.mode.section("backward", path) as backward, saved_tensors_hooks(_as_it_is, _as_it_is):
            starts = [self.mode.tensor(shape_of(r)) for r in ends]
            found = iter(torch.autograd.grad(ends, asked, starts, allow_unused=True) if ends and asked else ())
            gradients = [next(found) if x.requires_grad else None for x in (*mine, *weights)]
        return _Kind(
            path, [None if r is None else shape_of(r) for r in results],
            [r is not None and r.requires_grad for r in results], not isinstance(out, tuple),
            [None if g is None else shape_of(g) for g in gradients],
            [_sort(place, s, places, made, outer) for place, s in kept.items()],
            until, forward.ledger.without(until), forward.peak, backward.ledger, backward.peak,
        )  # fmt: skip

    def _told(self, at: list[At]) -> Any:
        """What a block may have changed in the coordinates that it was given, and that is work or part of a loss.
        Whole numbers that are worked out once for all are neither."""
        return [list(a.losses) for a in at], [id(x) for a in at for x in self.around.hollow(a).values()]

    def _described(self, x: Any) -> Any:
        if isinstance(x, Tensor):
            return shape_of(x), x.requires_grad
        if isinstance(x, At):
            return self.around.described(x)
        return x if isinstance(x, (int, float, str, bool, type(None))) else id(x)


class _Run(NamedTuple):
    """One run of a block of a known kind, at a path."""

    blocks: Blocks
    kind: _Kind
    path: str

    def moved(self, block: str) -> str:
        return self.path + block[len(self.kind.block) :]

    def at(self, saved: Saved) -> Saved:
        return saved._replace(block=self.moved(saved.block))

    def outer(self, kept: _Outer, given: list[At]) -> Tensor:
        """The tensor of the coordinates that this run is given."""
        place, name = kept.name
        return self.blocks.around.tensors(given[place])[name] if kept.tensor is None else kept.tensor


class _Replayed(torch.autograd.Function):
    """A run of a block by what is known of its kind."""

    @staticmethod
    def forward(ctx: Any, run: _Run, given: list[At], *tensors: Tensor) -> tuple[Tensor | None, ...]:
        mode, kind = run.blocks.mode, run.kind
        mode.peak = max(mode.peak, mode.live + kind.forward_peak)
        mode.ledger.add(kind.until, mode.phase, run.moved)
        results = [None if s is None else mode.tensor(s) for s in kind.results]
        rooms = []
        for kept in kind.kept:
            match kept:
                case _Fresh(saved):
                    rooms.append(mode.tensor(Shape((saved.bytes,), (1,), torch.uint8)))
                case _Argument(i, saved):
                    rooms.append(tensors[i].detach())
                case _Result(i, saved):
                    result = results[i]
                    assert result is not None
                    rooms.append(result.detach())
                case _Outer(saved=saved):
                    rooms.append(run.outer(kept, given))
            run.blocks.told[_place(rooms[-1])] = run.at(saved)
        ctx.run = run
        ctx.save_for_backward(*rooms)  # autograd asks whoever keeps what is saved, here as in a real run
        still = [r for r, moving in zip(results, kind.moving, strict=True) if r is not None and not moving]
        ctx.mark_non_differentiable(*still)
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        mode, kind = ctx.run.blocks.mode, ctx.run.kind
        kept = ctx.saved_tensors  # where nothing was kept, this is when it is made again
        mode.peak = max(mode.peak, mode.live + kind.backward_peak)
        mode.ledger.add(kind.backward, mode.phase, ctx.run.moved)
        del kept
        return None, None, *(None if s is None else mode.tensor(s) for s in kind.gradients)


def _sort(
    place: int, saved: Saved, arguments: dict[int, int], results: dict[int, int],
    outer: dict[int, tuple[tuple[int, Name], Tensor | None]],
) -> _Fresh | _Argument | _Result | _Outer:  # fmt: skip
    if place in arguments:
        return _Argument(arguments[place], saved)
    if place in results:
        return _Result(results[place], saved)
    return _Outer(*outer[place], saved) if place in outer else _Fresh(saved)


def _as_it_is(x: Tensor) -> Tensor:
    return x


def _place(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()


def _spec_lines(source: str) -> dict[int, str]:
    """The line of the spec that each line of a generated module stands under."""
    found: dict[int, str] = {}
    now: Callable[[str], str] | str = ""
    for number, line in enumerate(source.split("\n"), 1):
        if match := _SPEC.match(line):
            now = match[1]
        elif line.lstrip().startswith(("def ", "class ")):
            now = ""
        elif now:
            found[number] = str(now)
    return found
