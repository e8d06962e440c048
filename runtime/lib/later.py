"""Gradients of weights that are worked out after those of activations: the two halves of a zero-bubble backward pass.

Qi et al. 2023, Zero Bubble Pipeline Parallelism, section 2: the pass before waits for the gradient of a stage's input
alone (B); the gradients of its weights (W) are products that nobody waits for, and may fill the time in which there is
nothing else to do. Matrix products and tables do so here: they are nearly all of that work. The graph of autograd is
not cut in two, as `torch.distributed.pipelining` does it: that runs it twice, and so keeps all that it saved until
the second time, and does what is recomputed, or gathered, again for each half. Here a product leaves what its weight's
gradient is made of, its input and the gradient of its result, and everything else is let go as ever.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge


class Weight(NamedTuple):
    """A weight that a product reads: its numbers, outside of the graph and shaped as the product takes them; where its
    gradient goes on, if it has one, and in which shape."""

    value: Tensor
    edge: GradientEdge | None
    shape: torch.Size

    @classmethod
    def of(cls, weight: Tensor, flat: tuple[int, ...]) -> Weight:
        """As the graph has it now: it may be one of the model's, or made of them (gathered, viewed)."""
        edge = get_gradient_edge(weight) if weight.requires_grad else None
        return cls(weight.detach().reshape(flat), edge, weight.shape)

    def without_value(self) -> Weight:
        """What a graph may remember where something else keeps the numbers."""
        return self._replace(value=torch.empty(0))


class _Piece(NamedTuple):
    """What one use of a weight adds to its gradient; `kept` are what it is made of, as they were."""

    make: Callable[[], Tensor]
    kept: tuple[tuple[Tensor, int], ...]


class Later:
    """What one backward pass of a stage leaves to be done. `anchor` goes into a product in place of its weight: so its
    result has a gradient even where its input has none."""

    def __init__(self) -> None:
        self.anchor = torch.empty(0, requires_grad=True)
        self._waiting: dict[tuple[Any, int], tuple[Weight, list[_Piece]]] = {}

    def __len__(self) -> int:
        """How many weights wait."""
        return len(self._waiting)

    def kept(self) -> Iterator[Tensor]:
        """What waits with them: what products read, and gradients of results."""
        for _, pieces in self._waiting.values():
            yield from (x for piece in pieces for x, _ in piece.kept)

    def put(self, weight: Weight, make: Callable[[], Tensor], *kept: Tensor) -> None:
        """make() gives, of `kept`, what one use adds to the gradient of a weight."""
        edge = weight.edge
        if edge is not None:
            pieces = self._waiting.setdefault((edge.node, edge.output_nr), (weight, []))[1]
            pieces.append(_Piece(make, tuple((x, x._version) for x in kept)))

    def run(self) -> None:
        """Work out what waits, one weight after the other, in the order in which they came; nothing waits then.

        All ranks of a group have the same order, so what the gradients send on their way (sums, parts) meets. Raises
        RuntimeError where something was written over in the meantime.
        """
        while self._waiting:
            key = next(iter(self._waiting))
            weight, pieces = self._waiting.pop(key)
            total: Tensor | None = None
            while pieces:
                make, kept = pieces.pop(0)
                if any(x._version != version for x, version in kept):
                    raise RuntimeError("what the gradient of a weight is made of was changed in place before its time")
                total = make() if total is None else total.add_(make())
                del make, kept
            assert total is not None and weight.edge is not None
            torch.autograd.backward([weight.edge], [total.view(weight.shape)])


_now = threading.local()


def waiting() -> Later | None:
    """Where gradients of weights are put now, None where they are worked out at once."""
    found: Later | None = getattr(_now, "later", None)
    return found if torch.is_grad_enabled() else None


@contextmanager
def later(store: Later | None) -> Iterator[None]:
    """Products inside put the gradients of their weights there; None: they do not."""
    before = getattr(_now, "later", None)
    _now.later = store
    try:
        yield
    finally:
        _now.later = before
