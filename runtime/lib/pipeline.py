"""A step of a model in stages: micro-batches go through the ranks of an axis, and their gradients come back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .later import Later, later
from .linear import spec_path
from .regather import gathering_again
from .schedules import Action, order


class Pipe(NamedTuple):
    """Stages over an axis: rank r has stages r, r + size, ..; `owns` are the paths that each owns. A backward pass is
    run in one part, or in two: the gradients of weights later."""

    axis: str
    size: int
    chunks: int
    microbatches: int
    owns: tuple[tuple[str, ...], ...]
    parts: int = 1

    def order(self, rank: int, batches: int) -> tuple[Action, ...]:
        """What a rank runs in a step of so many micro-batches."""
        return order(rank, self.size, batches, self.chunks, self.parts)

    def of(self, rank: int) -> tuple[int, ...]:
        """The stages of a rank, by chunk."""
        return tuple(rank + c * self.size for c in range(self.chunks))

    def stages_of(self, path: str) -> tuple[int, ...]:
        """The stages that have a weight: more than one where it is tied."""
        heads = {path, *(path[:i] for i, c in enumerate(path) if c == ".")}
        return tuple(i for i, owns in enumerate(self.owns) if not heads.isdisjoint(owns))


class _Ran(NamedTuple):
    """What a forward leaves for its backward: what came in, what went out, the loss that was stated on the way, and
    where gradients of weights may wait."""

    taken: list[Tensor]
    given: list[Tensor]
    loss: Tensor | None
    later: Later | None


def keep_stages(model: Any) -> None:
    """Let go of every weight and buffer that no stage of this rank owns."""
    pipe: Pipe = model.pipe
    mine = set(pipe.of(model.mesh.place(pipe.axis)))
    named = {path: view for path, _, view in model.named_logical_parameters()}
    model.tied = {path: v.to("meta") for path, v in named.items() if len(pipe.stages_of(path)) > 1}
    for prefix, child in model.named_modules():
        for own in (child._parameters, child._buffers):
            for name, tensor in own.items():
                lasts = own is child._parameters or name not in child._non_persistent_buffers_set
                path = spec_path(model, f"{prefix}.{name}" if prefix else name)
                if tensor is not None and lasts and not mine & set(pipe.stages_of(path)):
                    own[name] = None


def pipelined(
    model: Any,
    batches: Sequence[Sequence[Any]],
    counts: Mapping[str, Tensor],
    at_of: Callable[[int], Any],
    gather: Callable[[], None] | None = None,
) -> dict[str, Tensor]:
    """Forward and backward of all micro-batches; gradients are added up.

    batches: for each micro-batch its tensors, the model's inputs in order; at_of gives its coordinates, anew each time.
    counts: what each loss is divided by, on all ranks. gather: called when a micro-batch has added to gradients, may
    take them elsewhere. -> the sums of the losses that were stated on this rank.
    """
    step = _Step(model, batches, counts, at_of)
    run = {"F": step.forward, "B": step.backward, "W": step.weights}
    for action in step.pipe.order(step.rank, len(batches)):
        run[action.kind](action)
        if action.kind != "F" and gather is not None:
            gather()
    step.on.barrier()  # what this rank sent last has arrived
    return step.sums


@torch.no_grad()
def run_through(
    model: Any, batches: Sequence[Sequence[Any]], counts: Mapping[str, Tensor], at_of: Callable[[int], Any]
) -> dict[str, Tensor]:
    """Forward alone: the sums of the losses that were stated on this rank. Arguments as of `pipelined`."""
    step = _Step(model, batches, counts, at_of)
    for batch in range(len(batches)):
        for chunk in range(step.pipe.chunks):
            step.forward(Action("F", batch, chunk))
            step.ran.clear()
    step.on.barrier()
    return step.sums


class _Step:
    def __init__(
        self, model: Any, batches: Sequence[Sequence[Any]], counts: Mapping[str, Tensor], at_of: Callable[[int], Any]
    ) -> None:
        self.model, self.batches, self.counts, self.at_of = model, batches, counts, at_of
        self.pipe: Pipe = model.pipe
        self.on, self.back = model.mesh[self.pipe.axis], model.mesh[self.pipe.axis, "back"]
        self.rank, self.last = self.on.rank, self.pipe.size * self.pipe.chunks - 1
        self.ran: dict[tuple[int, int], _Ran] = {}
        self.left: dict[tuple[int, int], Later] = {}
        self.owned = {id(p) for p in model.parameters() if p.grad is not None}
        self.sums: dict[str, Tensor] = {}

    def _stage(self, action: Action) -> int:
        return self.rank + action.chunk * self.pipe.size

    def forward(self, action: Action) -> None:
        stage, inputs = self._stage(action), list(self.batches[action.batch])
        at = self.at_of(action.batch)
        taken: list[Tensor] = []
        if stage:
            for shape in getattr(self.model, f"takes_{stage}")(at):
                like = torch.empty(shape, dtype=self.model.storage_dtype, device=inputs[0].device)
                taken.append(self.on.receive(like, (self.rank - 1) % self.pipe.size).requires_grad_())
        store = Later() if self.pipe.parts == 2 and torch.is_grad_enabled() else None
        with gathering_again(self.model.regathered), later(store):
            gave = getattr(self.model, f"stage_{stage}")(*inputs, *taken, at)
            losses = self.model.losses_of(*inputs, at, gave) if stage == self.last else at.losses
        given = [] if stage == self.last else list(gave)
        for value in given:
            self.on.send(value.detach(), (self.rank + 1) % self.pipe.size)
        total: Tensor | None = None
        for name, value in losses.items():
            self.sums[name] = self.sums.get(name, 0) + value.detach()
            share = value / self.counts[name].clamp_min(1)
            total = share if total is None else total + share
        self.ran[stage, action.batch] = _Ran(taken, given, total, store)

    def backward(self, action: Action) -> None:
        """All of it, or in two parts the first: gradients of what was taken, and of weights that no product reads."""
        stage = self._stage(action)
        taken, given, loss, store = self.ran.pop((stage, action.batch))
        roots = [(v, self.back.receive(torch.empty_like(v), (self.rank + 1) % self.pipe.size)) for v in given]
        if loss is not None:
            roots.append((loss, torch.ones_like(loss)))
        flowing = [(root, grad) for root, grad in roots if root.requires_grad]
        torch.autograd.backward([root for root, _ in flowing], [grad for _, grad in flowing])
        for value in taken:
            grad = torch.zeros_like(value) if value.grad is None else value.grad
            self.back.send(grad, (self.rank - 1) % self.pipe.size)
        if store is not None:
            self.left[stage, action.batch] = store
            self._own()

    def weights(self, action: Action) -> None:
        """The second part: gradients of the weights of products."""
        self.left.pop((self._stage(action), action.batch)).run()

    def _own(self) -> None:
        """A first gradient may be a view of one that a product keeps for later, and would be added to in place."""
        for weight in self.model.parameters():
            if weight.grad is not None and id(weight) not in self.owned:
                self.owned.add(id(weight))
                weight.grad = weight.grad.clone()
