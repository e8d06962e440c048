"""Runs of a model that are looked on: with values free, or held; on one device, or on ranks that are simulated."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...dsl.program import TOKENS
from ...lowering.graph import GraphProgram
from ...lowering.placement.types import Place
from ..compile import Artifact, class_of
from ..lib import Gathered, Model
from ..lib.buffers import STATELESS
from ..lib.laid import entry, part
from ..lib.mesh import Mesh
from ..lib.simulated import simulate
from ..place import place
from .places import dual, is_known, share, together
from .watching import Border, Hold, Key, Watch, listen, watched


@dataclass(frozen=True)
class Feed:
    """What both sides read: tokens int64[batch, seq], documents of the same shape or None, other inputs by name."""

    tokens: Tensor
    document: Tensor | None = None
    more: Mapping[str, Tensor] = field(default_factory=dict)

    def to(self, device: torch.device) -> Feed:
        """The same there."""
        document = None if self.document is None else self.document.to(device)
        return Feed(self.tokens.to(device), document, {name: x.to(device) for name, x in self.more.items()})

    def rows(self, axes: tuple[str, ...], mesh: Mesh) -> Feed:
        """A rank's rows of the batch."""

        def mine(x: Tensor) -> Tensor:
            return part(x, [axes, *[()] * (x.dim() - 1)], mesh)

        document = None if self.document is None else mine(self.document)
        return Feed(mine(self.tokens), document, {name: mine(x) for name, x in self.more.items()})


@dataclass(frozen=True)
class Unit:
    """What is looked at backward as one: values that one use of an op gives, and held values that they are made of."""

    results: tuple[Key, ...]
    sources: tuple[Key, ...]
    weights: frozenset[str] = frozenset()


RESULT, LOSS = "the result", "the loss "
"""What a whole run returns."""
Name = Key | str
"""What has a gradient: a value, or a weight by its path."""


@dataclass
class Record:
    """One rank's run: what uses gave, and of each unit the gradients."""

    values: dict[Key, Tensor]
    units: list[tuple[Unit, dict[Name, Tensor]]]


class Run:
    """A run of a module, alive, so that it can be asked for gradients."""

    def __init__(self, kind: type[Model], program: GraphProgram, weights: Mapping[str, Tensor], dtype: torch.dtype,
                 device: torch.device, mesh: Mesh | None, hold: Hold, flows: Border) -> None:  # fmt: skip
        self.model: Any = kind()
        self.model.mesh, self.model.chance = mesh, 0
        self.program, self.mesh = program, mesh
        with torch.no_grad():
            for path, _, view in self.model.named_logical_parameters():
                splits = entry(self.model.stored, path)[0] if mesh is not None else ()
                view.copy_(part(weights[path], splits, mesh) if mesh is not None else weights[path])
            for name, buffer in self.model.named_buffers():
                if name in weights:
                    buffer.copy_(weights[name])
        self.model.cast(dtype).train().to(device)
        self.watch = Watch(program, hold, flows)
        self.watch.follow(self.model)
        self.paths: dict[int, list[tuple[str, Tensor]]] = {}
        for path, holder, view in self.model.named_logical_parameters():
            self.paths.setdefault(id(holder), []).append((path, view))

    def forward(self, feed: Feed) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """{loss: sum}, {loss: number of places}; of a model that nothing trains, its result for a loss."""
        model = self.model
        feed = (feed if self.mesh is None else feed.rows(model.rows, self.mesh)).to(model.device)
        at = model._rows(feed.tokens, None, feed.document, None)
        rest = model._more(feed.more, at, model.scored)
        counts = model.counts_of(feed.tokens, *rest, at) if self.program.program.objectives else {}
        at.gathered = Gathered()
        with watched(self.watch):
            ran: tuple[Any, ...] = ()
            for stage in range(len(model.pipe.owns) if model.pipe is not None else 0):
                ran = getattr(model, f"stage_{stage}")(feed.tokens, *rest, *ran, at)
                ran = ran if isinstance(ran, tuple) else (ran,)
            if not self.program.program.objectives:
                root = self.program.model
                result = ran[0] if ran else model.run(feed.tokens, *rest, at, STATELESS)
                return {"": self.watch.returned(root.name, root.body.outputs[0], RESULT, result)}, counts
            losses = model.losses_of(feed.tokens, *rest, at, *ran[-1:])
            stated = self._stated()
            return {n: self.watch.returned(*stated[n], f"{LOSS}{n}", x) for n, x in losses.items()}, counts

    def _stated(self) -> dict[str, tuple[str, str]]:
        """The graph that states each loss, and its value there."""
        graphs = self.program.graphs.values()
        return {label: (g.name, value) for g in graphs for kind, label, value in g.body.emits if kind == "loss"}

    def gradients(self, unit: Unit, arrives: Mapping[Key, Tensor], border: Border) -> dict[Name, Tensor]:
        """The gradients of a unit's sources and of the weights between; `arrives` at its results."""
        _, holders = self.watch.region(unit.results, border)
        values, of_holders = self.watch.gradients(arrives, unit.sources, holders)
        found: dict[Name, Tensor] = {name: grad for name, grad in values.items()}  # noqa: C416
        for holder in (h for h in holders if id(h) in of_holders):
            grad = of_holders[id(holder)].contiguous()  # as the weight lies, maybe inside of something larger
            for path, view in self.paths[id(holder)]:
                offset = view.storage_offset() - holder.storage_offset()
                found[path] = torch.as_strided(grad, view.size(), view.stride(), grad.storage_offset() + offset)
        return found

    def weights_of(self, keys: Iterable[Key], border: Border) -> frozenset[str]:
        """The paths of the weights that values are computed of, from a border on."""
        return frozenset(path for w in self.watch.region(keys, border)[1] for path, _ in self.paths[id(w)])


class Runner:
    """Runs an artifact that was written with `named`, in a dtype, with whole weights by path."""

    def __init__(self, artifact: Artifact, dtype: torch.dtype, weights: Mapping[str, Tensor]) -> None:
        self.program, self.dtype, self.weights = artifact.lowered, dtype, weights
        self.kind = class_of(artifact)
        self.device = place("auto" if artifact.files.kernels else "cpu")  # without a GPU kernels are interpreted
        listen(self.kind)
        self.laid = artifact.lowered.laid
        self.axes = dict(self.kind.axes) if self.laid is not None else {}
        self.routed = routed(artifact.lowered)
        self.places: dict[Key, Place] = {}  # of the values that a run has named so far

    def run(self, hold: Hold, flows: Border, mesh: Mesh | None = None) -> Run:
        """One rank's run, before it begins. `flows`: which held values have a gradient, whatever they are made of."""
        return Run(self.kind, self.program, self.weights, self.dtype, self.device, mesh, hold, flows)

    def free(self, feed: Feed) -> dict[Key, list[Tensor]]:
        """What uses give where nothing is held."""
        with torch.no_grad():
            ranks = self._ranks(lambda mesh: self._record(self.run(lambda key, x: None, nowhere, mesh), feed, None))
        return self._values(ranks)

    def held(self, feed: Feed, given: Mapping[Key, Tensor], arrives: Mapping[Key, Tensor]
    ) -> tuple[dict[Key, list[Tensor]], dict[Unit, dict[Name, list[Tensor]]]]:  # fmt: skip
        """What uses give, and the gradients of their operands, where all that they are given is that of another run:
        `given` are whole values by key, `arrives` the gradients at them."""
        places = self.places

        def one(mesh: Mesh | None) -> Record:
            def hold(key: Key, x: Tensor) -> Tensor | None:
                if key not in given:
                    return None
                mine = given[key] if mesh is None else share(given[key], places[key], mesh)
                return mine if mine.shape == x.shape else None

            return self._record(self.run(hold, lambda key: self._flows(key, arrives), mesh), feed, arrives)

        ranks = self._ranks(one)
        gradients: dict[Unit, dict[Name, list[Tensor]]] = {}
        for i, (unit, first) in enumerate(ranks[0].units):
            names = [name for name in first if self.laid is None or self._gradient_place(name) is not None]
            gradients[unit] = {
                n: self._together([r.units[i][1][n] for r in ranks], self._gradient_place(n)) for n in names
            }
        return self._values(ranks), gradients

    # --- ranks ------------------------------------------------------------------------------------

    def _ranks(self, one: Callable[[Mesh | None], Record]) -> list[Record]:
        return [one(None)] if self.laid is None else simulate(self.axes, one)

    def _record(self, run: Run, feed: Feed, arrives: Mapping[Key, Tensor] | None) -> Record:
        run.forward(feed)
        watch = run.watch
        for key, (graph, value) in watch.named.items() if self.laid is not None else ():
            place = self._returned_place(key) or self.laid.places[graph].get(value)
            if place is not None and graph not in self.routed and is_known(place) and not self._is_uneven(graph, value):
                self.places[key] = place
        units = [] if arrives is None else list(self._units(run, arrives))
        return Record({k: x.detach().cpu() for k, x in watch.made.items()}, units)

    def _returned_place(self, key: Key) -> Place | None:
        """Where what a whole run returns is, as the class of the module says: it is what a training step relies on."""
        partial: Collection[str] = ()
        splits: tuple[tuple[str, ...], ...] = ()
        if key.value == RESULT:
            splits, partial = self.kind.result
        elif key.value.startswith(LOSS):
            partial = self.kind.partial.get(key.value.removeprefix(LOSS), ())
        else:
            return None
        held = {a for atoms in splits for a in atoms}
        letters = tuple((a, "P" if a in partial else "I") for a in self.laid.mesh.names() if a not in held)
        return Place(splits, letters)

    def _is_uneven(self, graph: str, value: str) -> bool:
        """Whether its rows are groups of tokens: how many a rank has follows from its own rows of the batch."""
        dims = self.program.graphs[graph].dims
        clocks = (dims[d].clock for d in self.program.graphs[graph].values[value].type.dims)
        return bool(self.kind.rows) and any(clock not in (None, TOKENS) for clock in clocks)

    def _units(self, run: Run, arrives: Mapping[Key, Tensor]) -> Iterator[tuple[Unit, dict[Name, Tensor]]]:
        """The gradients of each use, the last first; those that talk do so on all ranks in this order."""
        for keys in reversed(run.watch.uses):
            results = {k: self._arriving(arrives[k], k, run.mesh) for k in keys if self._flows(k, arrives)}
            if results:
                sources, _ = run.watch.region(results, everywhere)
                unit = Unit(tuple(results), tuple(sources), run.weights_of(results, everywhere))
                yield unit, {n: g.cpu() for n, g in run.gradients(unit, results, everywhere).items()}

    def _flows(self, key: Key, arrives: Mapping[Key, Tensor]) -> bool:
        return key in arrives and (self.laid is None or self.places[key].has_gradient)

    def _arriving(self, grad: Tensor, key: Key, mesh: Mesh | None) -> Tensor:
        if mesh is None:
            return grad
        place = dual(self.places[key])
        assert place is not None
        return share(grad, place, mesh)

    def _gradient_place(self, name: Name) -> Place | None:
        if self.laid is None:
            return None
        if isinstance(name, Key):
            return dual(self.places[name])
        splits, sync = entry(self.kind.stored, name)
        held = {a for atoms in splits for a in atoms}
        letters = tuple((a, "P" if a in sync else "I") for a in self.laid.mesh.names() if a not in held)
        return Place(tuple(map(tuple, splits)), letters)

    def _together(self, parts: list[Tensor], place: Place | None) -> list[Tensor]:
        return [parts[0].double()] if place is None else together(parts, place, self.axes)

    def _values(self, ranks: list[Record]) -> dict[Key, list[Tensor]]:
        found: dict[Key, list[Tensor]] = {}
        for key in ranks[0].values:
            if self.laid is None:
                found[key] = [ranks[0].values[key].double()]
            elif key in self.places:
                found[key] = together([r.values[key] for r in ranks], self.places[key], self.axes)
        return found


def everywhere(key: Key) -> bool:
    """Each held value is a border, or has a gradient."""
    return True


def nowhere(key: Key) -> bool:
    """None is, or has."""
    return False


def routed(program: GraphProgram) -> frozenset[str]:
    """Graphs that run on the rows that are sent to them: which rows a rank has is its own affair."""
    found: set[str] = set()
    todo = [b for g in program.graphs.values() for n in g.nodes if n.op == "route" for b in g.bodies_of(n)]
    while todo:
        name = todo.pop()
        if name not in found:
            found.add(name)
            todo += [b for i in program.graphs[name].body.instances for b in i.bodies]
    return frozenset(found)
