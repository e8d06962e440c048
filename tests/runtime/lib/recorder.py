"""A CUDA graph's ways on the CPU: the calls of one step, recorded with the memory that they read and write, and run
again on just that memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from heddle.runtime.lib.capture import Captured


class Recorder:
    """Captures as `cuda_graphs` does: nothing that the host knew is asked again. What the step made for itself is NaN
    before each replay, as another graph may have left it. Raises RuntimeError where the host would wait for the device."""

    count = 0
    ops: frozenset[Any] = frozenset()

    def __call__(self, run: Any) -> Captured:
        """The state of a stream after recording is that before it: a graph that is captured does not run."""
        self.count += 1
        calls: list[Any] = []
        recording = _Recording(calls)
        with recording:
            logits = run()
        recording.undo()
        self.ops = frozenset(func for func, *_ in calls)
        return Captured(lambda: _replay(calls), logits)


class _Recording(TorchDispatchMode):
    def __init__(self, calls: list[Any]) -> None:
        super().__init__()
        self.calls = calls
        self.made: set[int] = set()
        self.before: list[tuple[Tensor, Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with self:
            made = func.decompose(*args, **kwargs)
        if made is not NotImplemented:
            return made
        if asks_the_device(func, args) or func is torch.ops.aten.lift_fresh.default:
            raise RuntimeError(f"{func.name()} cannot be captured")
        for x in written(func, args, kwargs):
            if x.untyped_storage().data_ptr() not in self.made:
                self.before.append((x, x.clone()))
        made = func(*args, **kwargs)
        inputs = {x.untyped_storage().data_ptr() for x in tensors((args, kwargs))}
        own = [x for x in tensors(made) if x.untyped_storage().data_ptr() not in inputs]
        self.made |= {x.untyped_storage().data_ptr() for x in own}
        self.calls.append((func, args, kwargs, made, own))
        return made

    def undo(self) -> None:
        """What was there before the step wrote over it."""
        for x, was in reversed(self.before):
            x.copy_(was)


def _replay(calls: list[Any]) -> None:
    with torch.inference_mode():
        for *_, own in calls:
            for x in own:
                if x.is_floating_point():
                    x.fill_(torch.nan)
        for func, args, kwargs, made, own in calls:
            if not own and not list(written(func, args, kwargs)):
                continue  # a view: the memory is where it was
            again = func(*args, **kwargs)
            if "empty" in func.name():  # a graph leaves in it what is there
                continue
            for old, new in zip(tensors(made), tensors(again), strict=True):
                assert old.shape == new.shape and old.dtype == new.dtype
                if any(old is x for x in own):
                    old.copy_(new)


def asks_the_device(func: Any, args: Any) -> bool:
    """Whether the host waits for a number, or for how large a tensor is."""
    if func is torch.ops.aten.index.Tensor:
        return any(x.dtype == torch.bool for x in tensors(args[1]))
    return torch.Tag.data_dependent_output in func.tags or torch.Tag.dynamic_output_shape in func.tags


def written(func: Any, args: Any, kwargs: Any) -> Any:
    """The tensors that an op writes to."""
    for argument, x in [*zip(func._schema.arguments, args, strict=False), *((a, kwargs[a.name]) for a in func._schema.arguments if a.name in kwargs)]:  # fmt: skip
        if argument.alias_info is not None and argument.alias_info.is_write:
            yield from tensors(x)


def tensors(tree: Any) -> list[Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, Tensor)]
