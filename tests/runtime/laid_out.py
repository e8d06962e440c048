"""One model on one device and the same model on ranks of a mesh, side by side in fp64."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from heddle.codegen.emit import digest
from heddle.dsl.layout import Layout
from heddle.dsl.program import Program
from heddle.runtime.compile import build, class_of, instantiate, module_class
from heddle.runtime.lib import Gathered
from heddle.runtime.lib.laid import global_counts, gradient_norm, laid_parameters, part, sync_gradients, take_whole
from heddle.runtime.lib.simulated import simulate
from heddle.runtime.lib.spmd import I, P, all_reduce


@dataclass
class Outcome:
    """Of one step: the loss, the norm, every gradient, and the weights after some steps of an optimizer."""

    loss: Tensor
    norm: Tensor
    grads: dict[str, Tensor]
    weights: dict[str, Tensor]


@dataclass
class Batch:
    """tokens [batch, seq], coordinates of the same shape or None, other inputs by name."""

    tokens: Tensor
    document: Tensor | None
    valid: Tensor | None
    more: dict[str, Tensor]

    def cut(self, axes: tuple[str, ...], mesh: Any) -> Batch:
        """A rank's rows."""

        def rows(x: Tensor | None) -> Tensor | None:
            return None if x is None or not axes else part(x, [axes] + [()] * (x.dim() - 1), mesh)

        if not axes:
            return self
        return Batch(
            rows(self.tokens), rows(self.document), rows(self.valid), {k: rows(v) for k, v in self.more.items()}
        )


def start(program: Program, seed: int = 0) -> Any:
    """The model on one device, weights of size one, so that nothing vanishes."""
    model = instantiate(build(program), seed=seed).double().eval()
    source = torch.Generator().manual_seed(seed)
    for weight in model.parameters():
        if weight.dim() > 1:
            weight.data.copy_(torch.randn(weight.shape, generator=source, dtype=torch.float64) * 0.3)
    return model


def losses(model: Any, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Any]]:
    gathered = Gathered()
    given = {"document": batch.document, "valid": batch.valid, **batch.more}
    return model.losses(batch.tokens, gathered=gathered, **given), model.counts(batch.tokens, **given)


def alone(model: Any, batch: Batch, steps: int = 1) -> Outcome:
    """One device."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    first: tuple[Tensor, Tensor, dict[str, Tensor]] | None = None
    for _ in range(steps):
        optimizer.zero_grad()
        sums, counts = losses(model, batch)
        total = sum(sums[k] / max(1, int(counts[k])) for k in sums)
        total.backward()
        norm = torch.sqrt(sum((p.grad**2).sum() for p in model.parameters() if p.grad is not None))
        if first is None:
            first = total.detach(), norm, {path: g.clone() for path, g in logical_gradients(model).items()}
        optimizer.step()
    assert first is not None
    return Outcome(*first, {k: v.clone() for k, v in model.state_dict().items()})


def logical_gradients(model: Any) -> dict[str, Tensor]:
    """The gradient of each weight by its path, in the spec's dims."""
    found = {}
    for path, holder, view in model.named_logical_parameters():
        if holder.grad is None:
            found[path] = torch.zeros_like(view)
            continue
        offset = view.storage_offset() - holder.storage_offset()
        found[path] = holder.grad.as_strided(view.size(), view.stride(), holder.grad.storage_offset() + offset)
    return found


def on_mesh(program: Program, layout: Layout, state: dict[str, Tensor], batch: Batch, source: str | None = None,
            steps: int = 1, chance: int | None = None, target: str = "cpu", dtype: torch.dtype = torch.float64,
            ) -> tuple[list[Any], Any]:  # fmt: skip
    """What each rank has after its steps, for `difference`, and the class of the module. With `chance` random numbers
    are drawn, as in training."""
    if source is None:
        kind = class_of(build(program, target, layout))
    else:
        kind = module_class(source, f"laid-{digest(source)}/model.py")

    def rank(mesh: Any) -> Any:
        model = kind().to(dtype).train(chance is not None)
        model.mesh, model.chance = mesh, chance
        take_whole(model, state)
        mine = batch.cut(model.rows, mesh)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        first = None
        for _ in range(steps):
            optimizer.zero_grad()
            sums, counts = losses(model, mine)
            known = global_counts(model, counts)
            total = sum(sums[k] / known[k].clamp_min(1) for k in sums)
            total.backward()
            sync_gradients(model)
            if first is None:
                shown = sum(
                    all_reduce(sums[k].detach(), mesh[model.partial[k]], src=P, dst=I) / known[k].clamp_min(1)
                    if model.partial[k] else sums[k].detach() / known[k].clamp_min(1)
                    for k in sums
                )  # fmt: skip
                grads = {p.path: (p.splits, torch.zeros_like(p.view) if p.holder.grad is None else p.holder.grad.clone())
                         for p in laid_parameters(model)}  # fmt: skip
                first = shown, gradient_norm(model), grads
            optimizer.step()
        weights = {p.path: (p.splits, p.view.clone()) for p in laid_parameters(model)}
        return mesh, first, weights

    return simulate(dict(kind.axes), rank), kind


def difference(one: Outcome, ranks: list[Any]) -> dict[str, float]:
    """The largest difference of each thing over all ranks, relative to its size or to one."""

    def far(a: Tensor, b: Tensor) -> float:
        return float((a - b).abs().max() / (1 + b.abs().max())) if a.numel() else 0.0

    found: dict[str, float] = {"loss": 0.0, "norm": 0.0}
    for mesh, (loss, norm, grads), weights in ranks:
        found["loss"] = max(found["loss"], far(loss, one.loss))
        found["norm"] = max(found["norm"], far(norm, one.norm))
        for path, (splits, grad) in grads.items():
            key = f"gradient of {path}"
            found[key] = max(found.get(key, 0.0), far(grad, part(one.grads[path], splits, mesh)))
        for path, (splits, weight) in weights.items():
            key = f"{path} after steps"
            found[key] = max(found.get(key, 0.0), far(weight, part(one.weights[path], splits, mesh)))
    return found
