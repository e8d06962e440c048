"""What a step of a rank really keeps and sends: hooks on what autograd saves, and the mesh's own record."""

from __future__ import annotations

import threading
from collections import Counter
from functools import partial
from weakref import WeakSet

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.weak import WeakTensorKeyDictionary

from heddle.dsl.layout import layout_of
from heddle.dsl.load import load_text, shipped_folder
from heddle.runtime.check import program_of
from heddle.runtime.compile import DTYPES, build, module_class
from heddle.runtime.data import Batch
from heddle.runtime.lib import Gathered
from heddle.runtime.lib.laid import global_counts
from heddle.runtime.lib.later import Later
from heddle.runtime.lib.pipeline import keep_stages
from heddle.runtime.lib.simulated import simulate
from heddle.runtime.plan.step import inputs
from heddle.runtime.train.config import TrainConfig
from heddle.runtime.train.divided import Divided
from heddle.runtime.train.piped import metrics_of, through_stages
from heddle.runtime.train.rows import sum_of_parts


class Held:
    """A tensor that autograd saved, as long as it keeps it."""

    def __init__(self, tensor):
        self.tensor = tensor.detach()  # or an output that is kept would keep whatever made it


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
        return saved, messages, weights, _state(optimizer), size

    return simulate(dict(kind.axes) or {"one": 1}, run)


def _state(optimizer):
    slots = [x for m in optimizer.masters.values() for x in optimizer.adam.state[m].values()]
    masters = [m for n, m in optimizer.masters.items() if m is not optimizer.weights[n]]
    return sum(x.numel() * x.element_size() for x in (*slots, *masters))


# --- pipelines ------------------------------------------------------------------------------------


class Meter:
    """Of one rank in a pipeline: the most bytes that wait for backward passes at once. A storage waits as long as
    autograd holds it, or the pipeline holds what came into a stage or went out of it."""

    def __init__(self, model):
        self.own = {x.untyped_storage().data_ptr() for x in (*model.parameters(), *model.buffers())}
        self.packed, self.border, self.most = WeakSet(), WeakTensorKeyDictionary(), 0
        for name in [n for n in dir(type(model)) if n.startswith("stage_")]:
            setattr(model, name, partial(self._stage, getattr(model, name), len(model.scored or model.inputs)))

    def _stage(self, run, inputs, *given):
        gave = run(*given)
        taken = given[inputs:-1]  # behind the model's inputs, before the coordinates
        self.wait(*taken, *(gave if isinstance(gave, tuple) else ()))
        return gave

    def wait(self, *tensors):
        """They are kept for a later pass."""
        self.border.update(dict.fromkeys(tensors))

    def look(self):
        """Called between passes: when one is over, or the next begins."""
        held = [h.tensor for h in self.packed] + list(self.border.keys())
        sizes = {s.data_ptr(): s.nbytes() for s in (x.untyped_storage() for x in held)}
        self.most = max(self.most, sum(size for place, size in sizes.items() if place not in self.own))

    def pack(self, x):
        self.packed.add(held := Held(x))
        return held

    def unpack(self, held):
        return held.tensor


class _Book(list):
    """Records with the phase that they are of: backward while autograd runs, and for what goes back."""

    def __init__(self):
        self.is_back = False

    def append(self, record):
        is_back = self.is_back or "back" in record.axes
        super().append(("backward" if is_back else "forward", record))


def piped_ranks(made, feed, precision="fp32", over=(), seed=0):
    """As `ranks`, for a layout with stages; a step has as many micro-batches as the layout says."""
    kind = module_class(made.source, f"{made.name}/model.py")
    books = threading.local()
    plain, put_there, run_there = torch.autograd.backward, Later.put, Later.run

    def marked(*args, **more):
        books.meter.look()
        books.own.is_back = True
        try:
            return plain(*args, **more)
        finally:
            books.own.is_back = False

    def put(store, weight, make, *kept):
        books.meter.wait(*kept)
        put_there(store, weight, make, *kept)

    def ran(store):
        # The second part of a backward pass is one, too, and the last moment at which all waits.
        books.meter.look()
        books.own.is_back = True
        try:
            return run_there(store)
        finally:
            books.own.is_back = False

    def run(mesh):
        model = kind()
        generator = torch.Generator().manual_seed(seed)
        for p in model.parameters():
            p.data = torch.randn(p.shape, generator=generator) * 0.1
        model.cast(DTYPES[precision]).train()
        model.mesh, model.chance, model.artifact = mesh, 5, made
        keep_stages(model)
        optimizer = Divided(model, TrainConfig(dtype=precision), over)
        batches, more, counts = [], [], {}
        for _ in range(model.pipe.microbatches):
            tokens, document, given = inputs(model, made.lowered, feed)
            tokens = torch.randint(0, model.vocab or 2, tokens.shape, generator=generator)
            batches.append(Batch(tokens, document, ()))
            more.append(given)
        messages = Counter()
        mesh.record = []
        for batch, given in zip(batches, more, strict=True):
            for name, n in model.counts(batch.tokens, batch.document, **given).items():
                counts[name] = counts.get(name, 0) + n
        messages.update(("counts", r.kind, r.axes, r.bytes) for r in mesh.record)
        mesh.record = []
        counts = global_counts(model, counts)
        messages.update(("sync", r.kind, r.axes, r.bytes) for r in mesh.record)
        meter, gathered, rows = Meter(model), Gathered(), model._rows
        books.meter = meter
        books.own = mesh.record = _Book()

        def looking(*args):
            meter.look()  # the pass before is over
            return rows(*args)

        model._rows = looking
        with saved_tensors_hooks(meter.pack, meter.unpack):
            through_stages(model, batches, more, counts, gathered, optimizer.gather)
        meter.look()
        end = next(i for i, (_, r) in enumerate(mesh.record) if r.kind == "barrier")
        for i, (phase, r) in enumerate(mesh.record):
            messages["sync" if i >= end else phase, r.kind, r.axes, r.bytes] += 1
        mesh.record = []
        gradients = [optimizer.gradient(n) for n in optimizer.weights]
        size = sum(g.numel() * g.element_size() for g in gradients if g is not None)
        optimizer.reduce()
        optimizer.clip(1.0)
        optimizer.step(1e-3)
        gathered.settle(mesh, (model.pipe.axis, metrics_of(model)))
        messages.update(("sync", r.kind, r.axes, r.bytes) for r in mesh.record)
        weights = sum(p.numel() * p.element_size() for p in model.parameters())
        return meter.most, messages, weights, _state(optimizer), size

    torch.autograd.backward, Later.put, Later.run = marked, put, ran
    try:
        return simulate(dict(kind.axes), run)
    finally:
        torch.autograd.backward, Later.put, Later.run = plain, put_there, run_there
