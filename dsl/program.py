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

from .selectors import START, Selector, States
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
    its dims into the axes that published checkpoints store (an empty group is an axis of length one). One that is not
    `trained` is a `buffer`: state without gradient.
    """

    name: str
    dims: tuple[str, ...]
    init: Init
    op: str
    keep: bool = False
    layout: tuple[tuple[str, ...], ...] = ()
    trained: bool = True
    span: Span = field(default=NOWHERE, compare=False, repr=False)


@dataclass(frozen=True)
class Instance:
    """A use of another body that owns weights of its own: `name` is its segment in paths.

    `bodies` has one name, or for a loop the names of its distinct iterations; then `schedule` says which iteration is
    which (for a layer of experts, which expert). One that is not `owned` is shared: a body around this one owns it, and lends it. `lends` are the names of the
    shared instances that this one must be lent.
    """

    name: str
    bodies: tuple[str, ...]
    schedule: tuple[int, ...] | None = None
    owned: bool = True
    lends: tuple[str, ...] = ()


@dataclass(frozen=True)
class Node:
    """One use of an op. `operands` are names of values of the body (None for an absent optional one).

    `bindings` say which dims the formals of the op's signature stand for. For `call`, `loop` and `route` the attribute
    `instance` names the instance, and for `call` `bindings` map the callee's dims to ours.
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
    """An `init` rule of a body: selectors of the owners of weights in it and below, and how these are filled."""

    selectors: tuple[Selector, ...]
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

    def tensors(self) -> tuple[Parameter, ...]:
        """Every weight and buffer of the model in order of declaration, initial values decided."""
        return tuple(self._parameters(self.model, (), (), _Selecting()))

    def parameters(self) -> tuple[Parameter, ...]:
        """Every weight of the model: what training changes by gradient."""
        return tuple(p for p in self.tensors() if p.weight.trained)

    def _parameters(self, body: Body, path: tuple, kinds: tuple, above: _Selecting) -> Iterator[Parameter]:
        selecting = above.into(body.rules)
        sizes = {d.name: d.size for d in body.dims}
        for weight in body.weights:
            segments = tuple(weight.name.split("."))
            owner = segments[0] if len(segments) == 2 else None
            init = weight.init
            if init.kind == "free":
                init = (selecting.behind(owner, weight.op) if owner else selecting).chosen
            dims = tuple((d, sizes[d]) for d in weight.dims)
            owner_kinds = (weight.op, None) if owner else (None,)
            yield Parameter(path + segments, dims, kinds + owner_kinds, init, weight)
        for instance in (i for i in body.instances if i.owned):
            if instance.schedule is None:
                callee = self.bodies[instance.bodies[0]]
                inner = selecting.behind(instance.name, callee.block)
                yield from self._parameters(callee, (*path, instance.name), (*kinds, callee.block), inner)
            else:
                for i, which in enumerate(instance.schedule):
                    callee = self.bodies[instance.bodies[which]]
                    inner = selecting.behind(instance.name, callee.block, (i, len(instance.schedule)))
                    yield from self._parameters(callee, (*path, instance.name, i), (*kinds, callee.block, None), inner)

    def selected(self) -> set[tuple[int, Selector]]:
        """(id of the rule, selector) for each selector of an `init` rule that selects a weight of the model."""
        found: set[tuple[int, Selector]] = set()
        for body in self.bodies.values():
            if body.rules:
                found |= self._selected(body, _Selecting().into(body.rules))
        return found

    def _selected(self, body: Body, selecting: _Selecting) -> set[tuple[int, Selector]]:
        found = {hit for w in body.weights if "." in w.name
                 for hit in selecting.behind(w.name.split(".")[0], w.op).hits()}
        for instance in (i for i in body.instances if i.owned):
            schedule = (0,) if instance.schedule is None else instance.schedule
            for i, which in enumerate(schedule):
                callee = self.bodies[instance.bodies[which]]
                index = None if instance.schedule is None else (i, len(schedule))
                found |= self._selected(callee, selecting.behind(instance.name, callee.block, index))
        return found

    def num_parameters(self) -> int:
        return sum(p.count for p in self.parameters())


WRAPPED = "it"
"""The segment of what a `with:` rule wrapped: it and what stands around it are one place to a selector."""


@dataclass(frozen=True)
class _Selecting:
    """The `init` rules in force somewhere in a model: each selector with its states before and behind the last segment."""

    rules: tuple[tuple[Rule, tuple[tuple[Selector, States, States], ...]], ...] = ()

    def into(self, rules: tuple[Rule, ...]) -> _Selecting:
        """With the rules of a body; they come behind those of the bodies around it, so they win."""
        return _Selecting(self.rules + tuple((r, tuple((s, START, START) for s in r.selectors)) for r in rules))

    def behind(self, name: str, kind: str | None, index: tuple[int, int] | None = None) -> _Selecting:
        """One segment further down."""
        found = []
        for rule, selectors in self.rules:
            moved = []
            for selector, before, now in selectors:
                if name == WRAPPED:
                    moved.append((selector, before, now | selector.advance(before, (kind,), index)))
                else:
                    moved.append((selector, now, selector.advance(now, (name, kind), index)))
            found.append((rule, tuple(moved)))
        return _Selecting(tuple(found))

    def hits(self) -> Iterator[tuple[int, Selector]]:
        """(id of the rule, selector) for each that selects this place."""
        return ((id(r), s) for r, selectors in self.rules for s, _, now in selectors if s.accepts(now))

    @property
    def chosen(self) -> Init:
        """The last rule that selects this place fills it."""
        found = Init("normal", (0.02,))
        for rule, selectors in self.rules:
            if any(selector.accepts(now) for selector, _, now in selectors):
                found = rule.init
        return found
