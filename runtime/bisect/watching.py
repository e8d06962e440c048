"""A run that is looked on: the values that uses of ops give, by where they stand in the spec; what is held to be
others; and the gradients of a use by what it was given.

A value that is *held* goes on as another one, so that all that reads it, here and in another run, is given the same.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...dsl.diagnostics import InternalError
from ...dsl.program import Node
from ...lowering.graph import GraphProgram
from ...lowering.ops import table
from .. import lib
from ..lib import spmd
from ..lib.linear import spec_path


class Key(NamedTuple):
    """A value of a run, in the `call`-th run of the block at `path` ("" is the model); `root` is the graph there, of a
    model or of what trains it, and "" in a block, of which a lowering may have several forms."""

    path: str
    call: int
    root: str
    value: str

    def __str__(self) -> str:
        place = f"{self.path}.{self.value}" if self.path else self.value
        return f"{place} ({self.call + 1}. call)" if self.call else place


Hold = Callable[[Key, Tensor], Tensor | None]
"""What a value goes on as, None for itself."""
Border = Callable[[Key], bool]
"""Which held values are looked behind no further."""


class Watch:
    """Looks on at one run of a module of `program`, as one rank of it."""

    def __init__(self, program: GraphProgram, hold: Hold, flows: Callable[[Key], bool] = lambda key: False) -> None:
        self.program, self.hold, self.flows = program, hold, flows
        self.made: dict[Key, Tensor] = {}  # as the uses gave them
        self.held: dict[Key, Tensor] = {}  # what went on in their place
        self.named: dict[Key, tuple[str, str]] = {}  # graph and value that a key is of
        self.uses: list[tuple[Key, ...]] = []
        self.arrived: dict[Key, Tensor] | None = None  # gradients of what is held, where they are wanted
        self.stops: frozenset[Key] = frozenset()
        self._anchor = torch.zeros((), requires_grad=True)
        self._blocks: list[tuple[str, int]] = [("", 0)]
        self._calls: Counter[str] = Counter()

    def use(self, graph: str, names: Sequence[str], run: Callable[[], Any]) -> Any:
        """One use of an op, or of several at once, that gives these values."""
        producers = self.program.graphs[graph].producers
        path, call = self._blocks[-1]
        try:
            made = run()
        except Exception as error:
            span = next(iter(producers[names[0]].spans), None)
            line = "" if span is None else f", {span.source.name}:{span.line}"
            error.add_note(f"in `{path or graph}`, {', '.join(names)}{line}")
            raise
        several = isinstance(made, (tuple, list))
        root = "" if path else graph
        given = {
            Key(path, call, root, called(producers[name], name)): (x, (graph, name))
            for x, name in zip(made if several else (made,), names, strict=True)
        }
        goes = self._go_on(given)
        return goes if several else goes[0]

    def returned(self, graph: str, value: str, label: str, x: Tensor) -> Tensor:
        """What the whole run returns, under a name of its own: something may have become of the value on its way."""
        return self._go_on({Key("", 0, graph, label): (x, (graph, value))})[0]

    def _go_on(self, given: Mapping[Key, tuple[Tensor, tuple[str, str]]]) -> tuple[Tensor, ...]:
        """What goes on in place of the values of one use."""
        for key, (x, named) in given.items():
            if key in self.made:
                raise InternalError(f"`{key}` is computed twice in one run")
            self.made[key], self.named[key] = x, named
            wanted = self.hold(key, x)
            if wanted is not None:
                anchor = self._anchor if self.flows(key) else None  # it has a gradient, whatever it was made of
                is_real = x.is_floating_point()
                self.held[key] = _Held.apply(x, wanted, key, self, anchor) if is_real else wanted.to(x)
        if keys := tuple(key for key in given if key in self.held):
            self.uses.append(keys)
        return tuple(self.held.get(key, x) for key, (x, _) in given.items())

    def follow(self, model: nn.Module) -> None:
        """Know which block runs: hooks on all of a model's."""
        for name, module in model.named_modules():
            if module is not model:
                path = spec_path(model, name)
                module.register_forward_pre_hook(lambda *_, path=path: self._enter(path))
                module.register_forward_hook(lambda *_: self._leave(), always_call=True)

    def _enter(self, path: str) -> None:
        self._blocks.append((path, self._calls[path]))
        self._calls[path] += 1

    def _leave(self) -> None:
        self._blocks.pop()

    # --- gradients --------------------------------------------------------------------------------

    def gradients(self, results: Mapping[Key, Tensor], sources: Sequence[Key], weights: Sequence[nn.Parameter]
    ) -> tuple[dict[Key, Tensor], dict[int, Tensor]]:  # fmt: skip
        """The gradients that flow from uses to what they were given: `results` are what arrives at their results,
        `sources` are held values, none of them looked behind. Weights are named by `id`."""
        outs = [k for k in results if self.made[k].requires_grad]
        wanted = [self.held[k] for k in sources if self.held[k].requires_grad]
        if not outs or not (wanted or weights):
            return {}, {}
        self.stops = frozenset(sources)
        try:
            found = torch.autograd.grad(
                [self.made[k] for k in outs], [*wanted, *weights], [results[k].to(self.made[k]) for k in outs],
                retain_graph=True, allow_unused=True,
            )  # fmt: skip
        finally:
            self.stops = frozenset()
        named = [k for k in sources if self.held[k].requires_grad]
        values = {k: g.detach() for k, g in zip(named, found, strict=False) if g is not None}
        of_weights = zip(weights, found[len(named) :], strict=True)
        return values, {id(w): g.detach() for w, g in of_weights if g is not None}

    def region(self, keys: Iterable[Key], is_border: Border) -> tuple[list[Key], list[nn.Parameter]]:
        """What values were computed of: the nearest held ones that are a border, and the weights before these."""
        seen: set[Any] = set()
        sources: dict[Key, None] = {}
        weights: dict[int, nn.Parameter] = {}
        todo = [fn for k in keys if (fn := self.made[k].grad_fn) is not None]
        while todo:
            fn = todo.pop()
            if fn in seen:
                continue
            seen.add(fn)
            key, variable = getattr(fn, "key", None), getattr(fn, "variable", None)
            if isinstance(key, Key) and is_border(key):
                sources[key] = None
            elif isinstance(variable, nn.Parameter):
                weights[id(variable)] = variable
            else:
                todo += [next_fn for next_fn, _ in fn.next_functions if next_fn is not None]
        return sorted(sources), list(weights.values())


class _Held(torch.autograd.Function):
    """Another value, in its place; the gradient passes, or stops where it is told to."""

    @staticmethod
    def forward(ctx: Any, made: Tensor, wanted: Tensor, key: Key, watch: Watch, anchor: Tensor | None) -> Tensor:
        ctx.key, ctx.watch = key, watch
        return wanted.to(made, copy=True)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        watch = ctx.watch
        if watch.arrived is not None:
            watch.arrived[ctx.key] = grad.detach()
        return None if ctx.key in watch.stops else grad, None, None, None, None


def called(node: Node, value: str) -> str:
    """The name under which a value is known in every lowering: what an op may apply to its own result is the same
    value, whether it does or another node."""
    if act := node.attr("act"):
        return f"{act}({value})"
    return f"{node.op}({node.operands[0]})" if node.op in _applied() else value


def _applied() -> frozenset[str]:
    return frozenset(name for op in table().values() for name in op.epilogues)


# --- threads: each rank is one ------------------------------------------------------------------------


class _Here(threading.local):
    watch: Watch | None = None


_here = _Here()


@contextmanager
def watched(watch: Watch) -> Iterator[None]:
    """Uses in this thread are told to `watch`."""
    before, _here.watch = _here.watch, watch
    try:
        yield
    finally:
        _here.watch = before


def _use(graph: str, name: str, run: Callable[[], Any], operands: Callable[[], Any]) -> Any:
    watch = _here.watch
    if watch is None:
        return run()
    return watch.use(graph, [r.name for r in watch.program.graphs[graph].producers[name].results], run)


def _use_chain(graph: str, values: tuple[str, ...], run: Callable[[], Any]) -> Any:
    return run() if _here.watch is None else _here.watch.use(graph, values, run)


def listen(kind: Any) -> None:
    """Have a module, written with `named`, tell of its uses. Nothing is made again in its backward pass."""
    plain = SimpleNamespace(**{**vars(lib), "recompute": lambda run, at, *given: run(*given)})
    kind.run.__globals__.update(lib=plain, spmd=SimpleNamespace(**{**vars(spmd), "use": _use, "use_chain": _use_chain}))
