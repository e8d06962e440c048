"""What a step of a rank really keeps and sends: hooks on what autograd saves, and the mesh's own record."""

from __future__ import annotations

from collections import Counter

import torch
from torch.autograd.graph import saved_tensors_hooks

from heddle.dsl.layout import layout_of
from heddle.dsl.load import load_text, shipped_folder
from heddle.runtime.check import program_of
from heddle.runtime.compile import DTYPES, build, module_class
from heddle.runtime.lib import Gathered
from heddle.runtime.lib.laid import global_counts, gradient_norm, sync_gradients
from heddle.runtime.lib.simulated import simulate
from heddle.runtime.plan.step import inputs
from heddle.runtime.train.config import TrainConfig
from heddle.runtime.train.optimizer import Optimizer


def artifact(family, layout, model=None):
    """A shipped spec, built with a layout that is written behind it."""
    path = shipped_folder() / family
    file = load_text(path.read_text() + layout, folder=path.parent)
    return build(program_of(file, model), layout=layout_of(file) if layout else None)


def ranks(made, feed, precision="fp32", seed=0):
    """For each rank of the mesh: bytes saved, messages by phase, bytes of parameters and of the optimizer's state."""
    kind = module_class(made.source, f"{made.name}/model.py")

    def run(mesh):
        model = kind()
        generator = torch.Generator().manual_seed(seed)
        for p in model.parameters():
            p.data = torch.randn(p.shape, generator=generator) * 0.1
        model.cast(DTYPES[precision]).train()
        if model.axes:
            model.mesh = mesh
            mesh.record = []
        tokens, document, given = inputs(model, made.lowered, feed)
        tokens = torch.randint(0, model.vocab or 2, tokens.shape, generator=generator)
        counts = model.counts(tokens, document, **given)
        before = len(mesh.record or ())
        own = {x.untyped_storage().data_ptr() for x in (*model.parameters(), *model.buffers())}
        kept, alive = {}, []

        def pack(x):
            storage = x.untyped_storage()
            if storage.data_ptr() not in own and storage.nbytes():
                kept[storage.data_ptr()] = storage.nbytes()
                alive.append(x)
            return x

        with saved_tensors_hooks(pack, lambda x: x):
            sums = model.losses(tokens, document, gathered=Gathered(), **given)
            loss = torch.stack([s / torch.as_tensor(counts[n]).clamp(min=1) for n, s in sums.items()]).sum()
        forward = len(mesh.record or ())
        loss.backward()
        alive.clear()
        backward = len(mesh.record or ())
        if model.axes:
            global_counts(model, counts)
            sync_gradients(model)
            gradient_norm(model)
        phases = {
            "counts": (0, before),
            "forward": (before, forward),
            "backward": (forward, backward),
            "sync": (backward, None),
        }
        messages = Counter(
            (phase, r.kind, r.axes, r.bytes) for phase, (a, b) in phases.items() for r in (mesh.record or [])[a:b]
        )
        optimizer = Optimizer(model, TrainConfig(dtype=precision))
        optimizer.gather()
        gradients = sum(
            m.grad.numel() * m.grad.element_size() for m in optimizer.masters.values() if m.grad is not None
        )
        optimizer.step(1e-3)
        state = sum(t.numel() * t.element_size() for t in optimizer.state().values())
        weights = sum(p.numel() * p.element_size() for p in model.parameters())
        return sum(kept.values()), messages, weights, state, gradients

    return simulate(dict(kind.axes) or {"one": 1}, run)
