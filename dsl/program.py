"""The elaborated program: straight-line bodies over typed values, one for each distinct block.

A body is what one block (or one kind of loop iteration) does. Names are local to it: a dim `hidden` of a body is bound
to some dim of its caller by the call. Bodies refer to each other by name, so the size of a program does not depend on
how often a layer is repeated. Everything is immutable plain data.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from .source import NOWHERE, Span


@dataclass(frozen=True)
class Dim:
    """A dim of a body. `size` is None where the data decide. `sequence` dims carry position and document; their
    coordinates also vary along `lead`. `factors` says of a compound dim which dims it is made of (outer first)."""

    name: str
    size: int | None
    sequence: bool = False
    lead: tuple[str, ...] = ()
    factors: tuple[str, ...] = ()


@dataclass(frozen=True)
class Type:
    """What a value is: `kind` is real, token, index, mask or coordinate; `dims` are names of dims of the body."""

    kind: str
    dims: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.kind}[{', '.join(self.dims)}]"


@dataclass(frozen=True)
class Value:
    """A named value of a body."""

    name: str
    type: Type


@dataclass(frozen=True)
class Init:
    """How a weight is filled: `kind` names a distribution of the language, `values` are its numbers."""

    kind: str
    values: tuple[float, ...] = ()

    def __str__(self) -> str:
        return f"{self.kind}({', '.join(f'{v:g}' for v in self.values)})" if self.values else self.kind


@dataclass(frozen=True)
class Weight:
    """A parameter that a body owns: `name` is `<instance>.<part>` or the name of a bare `param`.

    `op` is the op whose room made it, `keep` is true where low precision would hurt (the room says so). `layout` groups
    its dims into the axes that published checkpoints store (an empty group is an axis of length one).
    """

    name: str
    dims: tuple[str, ...]
    init: Init
    op: str
    keep: bool = False
    layout: tuple[tuple[str, ...], ...] = ()
    span: Span = field(default=NOWHERE, compare=False, repr=False)


@dataclass(frozen=True)
class Instance:
    """A use of another body that owns weights of its own: `name` is its segment in paths.

    `bodies` has one name, or for a loop the names of its distinct iterations; then `schedule` says which iteration is
    which. `kinds` are the blocks that they stand for.
    """

    name: str
    bodies: tuple[str, ...]
    schedule: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Node:
    """One use of an op. `operands` are names of values of the body (None for an absent optional one).

    `bindings` say which dims the formals of the op's signature stand for. For `call` and `loop` the attribute
    `instance` names the instance and `bindings` map the callee's dims to ours.
    """

    results: tuple[Value, ...]
    op: str
    operands: tuple[str | None, ...]
    attrs: tuple[tuple[str, Any], ...] = ()
    bindings: tuple[tuple[str, tuple[str, ...]], ...] = ()
    spans: tuple[Span, ...] = field(default=(), compare=False, repr=False)

    @property
    def name(self) -> str:
        return self.results[0].name

    def attr(self, name: str, default: Any = None) -> Any:
        return dict(self.attrs).get(name, default)

    def bound(self, formal: str) -> tuple[str, ...]:
        return dict(self.bindings)[formal]


@dataclass(frozen=True)
class Rule:
    """An `init` rule of a body: dotted selectors of weights' owners in it and below, and how they are filled."""

    selectors: tuple[tuple[str, ...], ...]
    init: Init
    span: Span = field(default=NOWHERE, compare=False, repr=False)


@dataclass(frozen=True)
class Body:
    """What one block does. `block` is the name of its declaration, `name` is unique in the program."""

    name: str
    block: str
    dims: tuple[Dim, ...]
    inputs: tuple[Value, ...]
    weights: tuple[Weight, ...]
    instances: tuple[Instance, ...]
    nodes: tuple[Node, ...]
    outputs: tuple[str, ...]
    emits: tuple[tuple[str, str, str], ...] = ()
    rules: tuple[Rule, ...] = ()
    span: Span = field(default=NOWHERE, compare=False, repr=False)
    doc: str = field(default="", compare=False, repr=False)

    def dim(self, name: str) -> Dim:
        return next(d for d in self.dims if d.name == name)

    def values(self) -> dict[str, Value]:
        """Every value by name, weights included."""
        found = {v.name: v for v in self.inputs}
        found.update((w.name, Value(w.name, Type("real", w.dims))) for w in self.weights)
        found.update((r.name, r) for node in self.nodes for r in node.results)
        return found


@dataclass(frozen=True)
class Parameter:
    """A weight of the whole model, with its path from the root.

    `path` has names and iteration numbers; `kinds` says for each segment what it stands for (a block, an op or None);
    `dims` are (name, size) as the owning body knows them.
    """

    path: tuple[str | int, ...]
    dims: tuple[tuple[str, int], ...]
    kinds: tuple[str | None, ...]
    init: Init
    weight: Weight

    @property
    def name(self) -> str:
        """`layer.3.attention.q.weight`: the key in a state dict."""
        return ".".join(str(segment) for segment in self.path)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(size for _, size in self.dims)

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Its shape in published checkpoints: the axes of its layout."""
        sizes = dict(self.dims)
        return tuple(math.prod(sizes[d] for d in axis) for axis in self.weight.layout)

    @property
    def count(self) -> int:
        total = 1
        for size in self.shape:
            total *= size
        return total


@dataclass(frozen=True)
class Program:
    """A model, elaborated. `root` names the model's body; `objectives` the bodies that train it, by name.

    `arguments` are the values of the model's parameters, `family` the declaration that they are parameters of.
    """

    name: str
    family: str
    root: str
    bodies: dict[str, Body]
    objectives: dict[str, str]
    arguments: dict[str, Any]
    span: Span = field(default=NOWHERE, compare=False, repr=False)

    @property
    def model(self) -> Body:
        return self.bodies[self.root]

    def parameters(self) -> tuple[Parameter, ...]:
        """Every weight of the model in order of declaration, initial values decided."""
        return tuple(self._parameters(self.model, (), (), ()))

    def _parameters(self, body: Body, path: tuple, kinds: tuple, rules: tuple) -> Iterator[Parameter]:
        rules = rules + tuple((len(path), rule) for rule in body.rules)
        sizes = {d.name: d.size for d in body.dims}
        for weight in body.weights:
            segments = tuple(weight.name.split("."))
            full = path + segments
            full_kinds = kinds + ((weight.op, None) if len(segments) == 2 else (None,))
            dims = tuple((d, sizes[d]) for d in weight.dims)
            yield Parameter(full, dims, full_kinds, _decide(weight, full, full_kinds, rules), weight)
        for instance in body.instances:
            if instance.schedule is None:
                callee = self.bodies[instance.bodies[0]]
                yield from self._parameters(callee, (*path, instance.name), (*kinds, callee.block), rules)
            else:
                for i, which in enumerate(instance.schedule):
                    callee = self.bodies[instance.bodies[which]]
                    yield from self._parameters(callee, (*path, instance.name, i), (*kinds, None, None), rules)

    def num_parameters(self) -> int:
        return sum(p.count for p in self.parameters())


def _decide(weight: Weight, path: tuple, kinds: tuple, rules: tuple) -> Init:
    """The last rule that selects a weight fills it: rules of an outer body come first, so the inner one wins."""
    if weight.init.kind != "free":
        return weight.init
    chosen = Init("normal", (0.02,))
    for depth, rule in rules:
        if any(selects(s, path[depth:-1], kinds[depth:-1]) for s in rule.selectors):
            chosen = rule.init
    return chosen


def selects(selector: tuple[str, ...], path: tuple, kinds: tuple) -> bool:
    """Whether a dotted selector names this weight's owner: its names are the last segments (iterations skipped),
    each by the segment's own name or by the block or op that it stands for."""
    named = [(s, k) for s, k in zip(path, kinds, strict=True) if isinstance(s, str)]
    tail = named[len(named) - len(selector) :] if len(named) >= len(selector) else []
    return bool(tail) and all(want in (name, kind) for want, (name, kind) in zip(selector, tail, strict=True))
