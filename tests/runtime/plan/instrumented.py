"""What a step of a rank really keeps and sends: hooks on what autograd saves, and the mesh's own record."""

from __future__ import annotations

from collections import Counter
from weakref import WeakSet

import torch
from torch.autograd.graph import saved_tensors_hooks

from heddle.dsl.layout import layout_of
from heddle.dsl.load import load_text, shipped_folder
from heddle.runtime.check import program_of
from heddle.runtime.compile import DTYPES, build, module_class
from heddle.runtime.lib import Gathered
from heddle.runtime.lib.laid import global_counts
from heddle.runtime.lib.simulated import simulate
from heddle.runtime.plan.step import inputs
from heddle.runtime.train.config import TrainConfig
from heddle.runtime.train.divided import Divided
from heddle.runtime.train.rows import sum_of_parts


class Held:
    """A tensor that autograd saved, as long as it keeps it."""

    def __init__(self, tensor):
        self.tensor = tensor


def artifact(family, layout, model=None):
    """A shipped spec, built with a layout that is written behind it."""
    path = shipped_folder() / family
    file = load_text(path.read_text() + layout, folder=path.parent)
    return build(program_of(file, model), layout=layout_of(file) if layout else None)


def ranks(made, feed, precision="fp32", over=(), seed=0):
    """For each rank of the mesh: bytes saved, messages by phase, bytes of parameters, of the optimizer's state and of
    gradients."""
    kind = module_class(made.source, f"{made.name}/model.py")

    def run(mesh):
        model = kind()
        generator = torch.Generator().manual_seed(seed)
        for p in model.parameters():
            p.data = torch.randn(p.shape, generator=generator) * 0.1
        model.cast(DTYPES[precision]).train()
        model.mesh, mesh.record, model.chance = mesh, [], 5
        optimizer = Divided(model, TrainConfig(dtype=precision), over)
        tokens, document, given = inputs(model, made.lowered, feed)
        tokens = torch.randint(0, model.vocab or 2, tokens.shape, generator=generator)
        counts = model.counts(tokens, document, **given)
        marks = [("counts", len(mesh.record))]
        counts = global_counts(model, counts)
        marks.append(("sync", len(mesh.record)))
        own = {x.untyped_storage().data_ptr() for x in (*model.parameters(), *model.buffers())}
        packed, gathered = WeakSet(), Gathered()

        def pack(x):
            packed.add(held := Held(x))
            return held

        with saved_tensors_hooks(pack, lambda held: held.tensor):
            sums = model.losses(tokens, document, gathered=gathered, **given)
            shares = {n: s / counts[n].clamp(min=1) for n, s in sums.items()}
            loss = torch.stack(list(shares.values())).sum()
        marks.append(("forward", len(mesh.record)))
        storages = {s.data_ptr(): s.nbytes() for s in (held.tensor.untyped_storage() for held in packed)}
        saved = sum(size for place, size in storages.items() if place not in own)
        loss.backward()
        marks.append(("backward", len(mesh.record)))
        optimizer.gather()
        gradients = [optimizer.gradient(n) for n in optimizer.weights]
        size = sum(g.numel() * g.element_size() for g in gradients if g is not None)
        sum_of_parts(model, {n: s.detach().double() for n, s in shares.items()})
        optimizer.reduce()
        optimizer.clip(1.0)
        optimizer.step(1e-3)
        gathered.settle(mesh)
        marks.append(("sync", len(mesh.record)))
        messages, start = Counter(), 0
        for phase, end in marks:
            messages.update((phase, r.kind, r.axes, r.bytes) for r in mesh.record[start:end])
            start = end
        weights = sum(p.numel() * p.element_size() for p in model.parameters())
        slots = [x for m in optimizer.masters.values() for x in optimizer.adam.state[m].values()]
        masters = [m for n, m in optimizer.masters.items() if m is not optimizer.weights[n]]
        state = sum(x.numel() * x.element_size() for x in (*slots, *masters))
        return saved, messages, weights, state, size

    return simulate(dict(kind.axes) or {"one": 1}, run)
