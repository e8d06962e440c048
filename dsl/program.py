"""The elaborated program: straight-line bodies over typed values, one for each distinct block.

A body is what one block (or one kind of loop iteration) does. Names are local to it: a dim `hidden` of a body is bound
to some dim of its caller by the call. Bodies refer to each other by name, so the size of a program does not depend on
how often a layer is repeated. Everything is immutable plain data.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from . import syntax as sx
from .selectors import START, Selector, States
from .source import NOWHERE, Span


@dataclass(frozen=True)
class Clock:
    """When the rows of a sequence come, as tokens of the stream do.

    `value` is the group that a token is in, an expression of `query.position`: it starts at 0 or below and never grows
    by more than 1. Each group from 0 on has `times` rows. If `begins`, they are there with the group's first token
    (data that its tokens read); else with its last (what is computed from all of them). `name` is the coordinate that
    says the group.
    """

    name: str
    value: sx.Expr
    times: int = 1
    begins: bool = True


TOKENS = Clock("position", sx.Member(sx.Name("query"), "position"))
"""A row a token: the stream itself."""


@dataclass(frozen=True)
class Dim:
    """A dim of a body. `size` is None where the data decide. `sequence` dims carry position and document; their
    coordinates also vary along `lead`. `factors` says of a compound dim which dims it is made of (outer first).

    `clock` says how the rows of a sequence follow the stream; None is a sequence that is there as a whole. `axes` are
    the mesh axes that it is split over (outer first): it is one rank's part of the dim `whole`."""

    name: str
    size: int | None
    sequence: bool = False
    lead: tuple[str, ...] = ()
    factors: tuple[str, ...] = ()
    clock: Clock | None = None
    axes: tuple[str, ...] = ()
    whole: str | None = None


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
    which (for a layer of experts, which expert). One that is not `owned` is shared: a body around this one owns it, and
    lends it; one without `bodies` is another model, which an objective is lent. `lends` are the names of the shared
    instances that this one must be lent.
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
    """What one block does. `block` is the name of its declaration, `name` is unique in the program.

    The last `asked` outputs are variables that callers ask for (`f(x).final`) though the block does not return them.
    """

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
    asked: int = 0
    span: Span = field(default=NOWHERE, compare=False, repr=False)
    doc: str = field(default="", compare=False, repr=False)

    @property
    def is_around(self) -> bool:
        """Whether this was built by a `with:` rule around something that owns weights."""
        return any(w.name.startswith(f"{WRAPPED}.") for w in self.weights) or any(
            i.name == WRAPPED for i in self.instances
        )

    def dim(self, name: str) -> Dim:
        return next(d for d in self.dims if d.name == name)

    def values(self) -> dict[str, Value]:
        """Every value by name, weights included."""
        found = {v.name: v for v in self.inputs}
        found.update((w.name, Value(w.name, Type("real", w.dims))) for w in self.weights)
        found.update((r.name, r) for node in self.nodes for r in node.results)
        return found


Path = tuple[str | int, ...]
Kinds = tuple[str | None, ...]

WRAPPED = "it"
"""The name of what a `with:` rule wrapped, inside what it built around it."""


@dataclass(frozen=True)
class Parameter:
    """A weight of the whole model, with its path from the root.

    `path` has names and iteration numbers; `kinds` says for each segment what it stands for (a block, an op or None);
    `dims` are (name, size) as the owning body, whose name is `body`, knows them.
    """

    path: tuple[str | int, ...]
    dims: tuple[tuple[str, int], ...]
    kinds: tuple[str | None, ...]
    init: Init
    weight: Weight
    body: str = ""

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
    `is_changed` says that rules of a `with:` built something else around parts of it. `lent` are models that an
    objective runs beside it, by the names of its parameters: no part of this one.
    """

    name: str
    family: str
    root: str
    bodies: dict[str, Body]
    objectives: dict[str, str]
    arguments: dict[str, Any]
    is_changed: bool = False
    lent: dict[str, Program] = field(default_factory=dict)
    span: Span = field(default=NOWHERE, compare=False, repr=False)

    @property
    def model(self) -> Body:
        return self.bodies[self.root]

    @cached_property
    def _walked(self) -> tuple[tuple[Parameter, ...], tuple[Parameter, ...], set[tuple[int, Selector]]]:
        hits: set[tuple[int, Selector]] = set()
        own = tuple(self._tensors(self.model, (), (), _Place(hits=hits)))
        objectives = [self.bodies[name] for name in self.objectives.values()]
        return own, tuple(p for body in objectives for p in self._tensors(body, (), (), _Place(hits=hits))), hits

    def tensors(self) -> tuple[Parameter, ...]:
        """Every weight and buffer of the model in order of declaration, initial values decided."""
        return self._walked[0]

    def parameters(self) -> tuple[Parameter, ...]:
        """Every weight of the model: what training changes by gradient."""
        return tuple(p for p in self.tensors() if p.weight.trained)

    def beside(self) -> tuple[Parameter, ...]:
        """Every weight that the objective owns, with its path in it: trained with the model, and no part of it."""
        return self._walked[1]

    def _tensors(self, body: Body, path: Path, kinds: Kinds, place: _Place) -> Iterator[Parameter]:
        """Those of a body at a path. What a rule wrapped keeps its path; what is around it has a segment of its own."""
        around, names, classes = place.of(body), path, kinds
        if body.is_around:
            around, names, classes = around.at(body.block, body.block), (*path, body.block), (*kinds, body.block)
        selecting = around.into(body.rules)
        sizes = {d.name: d.size or 0 for d in body.dims}  # a weight has no dim of unknown size
        for weight in body.weights:
            owner, _, part = weight.name.rpartition(".")
            dims = tuple((d, sizes[d]) for d in weight.dims)
            if owner == WRAPPED:
                init = place.as_kind(weight.op).init(weight)
                yield Parameter((*path, part), dims, (*kinds[:-1], weight.op, None), init, weight, body.name)
            elif owner:
                init = selecting.at(owner, weight.op).init(weight)
                yield Parameter((*names, owner, part), dims, (*classes, weight.op, None), init, weight, body.name)
            else:
                yield Parameter((*names, part), dims, (*classes, None), selecting.init(weight), weight, body.name)
        for instance in (i for i in body.instances if i.owned and self.root not in i.bodies):
            for i, which in enumerate((0,) if instance.schedule is None else instance.schedule):
                callee = self.bodies[instance.bodies[which]]
                if instance.name == WRAPPED:
                    yield from self._tensors(callee, path, (*kinds[:-1], callee.block), place)
                elif instance.schedule is None:
                    inner = selecting.at(instance.name, callee.block)
                    yield from self._tensors(callee, (*names, instance.name), (*classes, callee.block), inner)
                else:
                    inner = selecting.at(instance.name, callee.block, (i, len(instance.schedule)))
                    yield from self._tensors(callee, (*names, instance.name, i), (*classes, callee.block, None), inner)

    def selected(self) -> set[tuple[int, Selector]]:
        """(id of the rule, selector) for each selector of an `init` rule that selects a weight of the model, or of its
        objective."""
        return self._walked[2]

    @property
    def gives(self) -> tuple[str, ...]:
        """The variables that the model is asked for beside what it returns."""
        return self.model.outputs[len(self.model.outputs) - self.model.asked :]

    def num_parameters(self) -> int:
        return sum(p.count for p in self.parameters())


@dataclass(frozen=True)
class _Place:
    """The `init` rules in force at a place of a model: each selector with its states before and behind the last
    segment.

    `segment` is that segment; a `with:` rule may have wrapped what stands there, which then is selected in its place.
    """

    rules: tuple[tuple[Rule, tuple[tuple[Selector, States, States], ...]], ...] = ()
    segment: tuple[str | None, tuple[int, int] | None] = (None, None)
    hits: set[tuple[int, Selector]] | None = None

    def into(self, rules: tuple[Rule, ...]) -> _Place:
        """With the rules of a body; they come behind those of the bodies around it, so they win."""
        added = tuple((r, tuple((s, START, START) for s in r.selectors)) for r in rules)
        return replace(self, rules=self.rules + added) if added else self

    def at(self, name: str, kind: str | None, index: tuple[int, int] | None = None) -> _Place:
        """One segment further down."""
        moved = tuple(
            (rule, tuple((s, now, s.advance(now, (name, kind), index)) for s, _, now in selectors))
            for rule, selectors in self.rules
        )
        return replace(self, rules=moved, segment=(name, index))

    def as_kind(self, kind: str) -> _Place:
        """The same place, as that of a wrapped block or op of this kind."""
        name, index = self.segment
        moved = tuple(
            (rule, tuple((s, before, s.advance(before, (name, kind), index)) for s, before, _ in selectors))
            for rule, selectors in self.rules
        )
        return replace(self, rules=moved)

    def of(self, body: Body) -> _Place:
        """The place as that of a body that stands at it."""
        return self if self.segment[0] is None or not self.rules else self.as_kind(body.block)

    def init(self, weight: Weight) -> Init:
        """How a weight here is filled: by the last rule that selects it, if its op leaves that open."""
        found = Init("normal", (0.02,))
        for rule, selectors in self.rules:
            for selector, _, now in selectors:
                if selector.accepts(now):
                    found = rule.init
                    if self.hits is not None:
                        self.hits.add((id(rule), selector))
        return found if weight.init.kind == "free" else weight.init
