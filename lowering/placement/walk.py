"""One graph, node by node, and what leaves it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ...dsl.program import Value
from ..afterwards import parts
from ..graph import Graph
from .crossing import Crossing
from .laid import Stored
from .types import I, N, P, Place, R


class Walk(Crossing):
    """Choose how to compute each node, and bring its operands where they are needed."""

    def run(self) -> tuple[Graph, tuple[Place, ...]]:
        for node in self.graph.nodes:
            if node.op == "call":
                self._call(node)
            elif node.op == "loop":
                self._loop(node)
            elif node.op == "route":
                self._route(node)
            else:
                self._op(node)
        outputs = self._outputs()
        emits = self._emits()
        return self._finish(outputs, emits), tuple(self.places[o] for o in outputs)

    def _outputs(self) -> tuple[str, ...]:
        """A result is split along dims that callers know, or whole."""
        bound = {d for v in self.graph.body.inputs for d in v.type.dims}
        iterates = self.s.signatures[self.graph.name].outputs
        found = []
        for i, name in enumerate(self.graph.body.outputs):
            place = want = self.places[name]
            if iterates:
                want = iterates[i]
            else:
                for j, d in enumerate(self.values[name].type.dims):
                    if d not in bound and self.graph.name not in self.s.program.roots:
                        for atom in place.splits[j]:
                            want = want.put(atom, R if place.has_gradient else N, self.order)
            found.append(self.bring(name, want, self._spans(name)))
        return tuple(found)

    def _spans(self, name: str) -> tuple[Any, ...]:
        node = self.graph.producers.get(name)
        return node.spans if node is not None else ()

    def _finish(self, outputs: tuple[str, ...], emits: tuple[tuple[str, str, str], ...]) -> Graph:
        body = self.graph.body
        inputs = tuple(Value(v.name, self.local_type(v.type, self.places[v.name])) for v in body.inputs)
        weights = tuple(
            replace(w, dims=tuple(self.local(d, a) for d, a in zip(w.dims, self.places[w.name].splits, strict=True)))
            for w in body.weights
        )
        used = {d for n in self.made for r in n.results for d in r.type.dims}
        used |= {d for n in self.made for _, ds in n.bindings for d in ds}
        for d in body.dims:  # dims that only size something
            if d.name not in used:
                self.local(d.name, ())
        layouts = tuple(
            replace(w, layout=tuple(tuple(self._layout_dim(w.dims, old.dims, d) for d in axis) for axis in old.layout))
            for w, old in zip(weights, body.weights, strict=True)
        )
        self.s.laid.places[self.graph.name] = dict(self.places)
        self.s.laid.weights[self.graph.name] = {
            w.name: self.s.stored.get(self.graph.name, {}).get(w.name) or Stored(self.places[w.name].splits)
            for w in body.weights
        }
        made = replace(
            body, dims=tuple(self.dims.values()), inputs=inputs, weights=layouts, nodes=tuple(self.made),
            outputs=outputs, emits=emits,
        )  # fmt: skip
        return Graph(made)

    def _layout_dim(self, new: tuple[str, ...], old: tuple[str, ...], dim: str) -> str:
        return new[old.index(dim)] if dim in old else dim

    def _emits(self) -> tuple[tuple[str, str, str], ...]:
        """Losses end P or I, so that their gradient is counted once; sums are P until the end of the step."""
        found = []
        split = parts(self.graph, self.s.program.emitting)
        sums = self.s.laid.sums.setdefault(self.graph.name, {})
        for keyword, label, name in self.graph.body.emits:
            place = want = self.places[name]
            if keyword == "loss":
                for atom in self.order:
                    if place.letter(atom) == R:
                        want = want.put(atom, I, self.order)
                name = self.bring(name, want, self._spans(name))
                sums[f"loss:{label}"] = tuple(a for a in self.order if want.letter(a) == P)
            elif (label, name) in split.means:
                sums[f"mean:{label}"] = tuple(a for a in self.order if place.letter(a) == P)
            found.append((keyword, label, name))
        for name in split.sums:
            sums[f"sum:{name}"] = tuple(a for a in self.order if self.places[name].letter(a) == P)
        return tuple(found)
