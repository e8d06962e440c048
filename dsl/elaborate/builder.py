"""A body under construction."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from .. import program as pg
from ..diagnostics import Label, fail
from ..source import NOWHERE, Span
from .values import Dim, Tensor

Layout = tuple[tuple[Dim, ...], ...]
"""The axes of a weight in published checkpoints, each the dims that it is made of."""


@dataclass(eq=False)
class Builder:
    """Collects the nodes, weights and instances of one body. `parent` is set for the body of a loop, which may use
    the values around it: they become inputs."""

    block: str
    parent: Builder | None = None
    span: Span = NOWHERE
    doc: str = ""
    inputs: list[Tensor] = field(default_factory=list)
    weights: list[tuple[str, tuple[Dim, ...], pg.Init, str, bool, Layout, bool, Span]] = field(default_factory=list)
    weight_tensors: dict[str, Tensor] = field(default_factory=dict)
    buffers: dict[str, Tensor] = field(default_factory=dict)
    instances: list[pg.Instance] = field(default_factory=list)
    nodes: list[dict[str, Any]] = field(default_factory=list)
    emits: list[tuple[str, str, Tensor]] = field(default_factory=list)
    rules: list[pg.Rule] = field(default_factory=list)
    captured: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    owners: dict[str, Span] = field(default_factory=dict)
    shared: dict[str, Any] = field(default_factory=dict)
    aliases: dict[int, str] = field(default_factory=dict)
    borrowed: dict[str, str] = field(default_factory=dict)
    op_dims: dict[str, dict[Any, Dim]] = field(default_factory=dict)
    coordinates: dict[tuple[int, str], Tensor] = field(default_factory=dict)
    common: dict[tuple[str, int], Dim] = field(default_factory=dict)
    _spelled: list[Dim] = field(default_factory=list)
    _dims: dict[int, Dim] = field(default_factory=dict)
    _dim_names: dict[str, int] = field(default_factory=dict)
    _names: set[str] = field(default_factory=set)

    # --- names ------------------------------------------------------------------------------------

    def fresh(self, base: str) -> str:
        """A name for a value that no other value here has."""
        name, n = base, 1
        while name in self._names:
            n += 1
            name = f"{base}_{n}"
        self._names.add(name)
        return name

    def dim_name(self, dim: Dim) -> str:
        """This body's name for a dim."""
        if id(dim) not in self._dims:
            base = self.aliases.get(id(dim), dim.name)
            if self.parent is not None and self.parent.knows(dim):
                base = self.parent.dim_name(dim)
            name, n = base, 1
            while name in self._dim_names:
                n += 1
                name = f"{base}_{n}"
            self._dims[id(dim)] = dim
            self._dim_names[name] = id(dim)
            self.aliases[id(dim)] = name
            for part in (*dim.lead, *dim.factors):
                self.dim_name(part)
        return self.aliases[id(dim)]

    def call_dim(self, dim: Dim, name: str) -> None:
        """Say how this body spells a dim, if it has no name for it yet."""
        self._spelled.append(dim)  # keeps it alive: spellings are kept by identity
        self.aliases.setdefault(id(dim), name)

    def knows(self, dim: Dim) -> bool:
        """Whether this body, or one around it, has a name for a dim."""
        return id(dim) in self._dims or (self.parent is not None and self.parent.knows(dim))

    def names_of(self, dims: tuple[Dim, ...]) -> tuple[str, ...]:
        return tuple(self.dim_name(d) for d in dims)

    def own(self, name: str, span: Span) -> None:
        """Take a name for something that owns weights. Raises `same-name-twice`."""
        if name in self.owners:
            raise fail(
                "same-name-twice",
                f"two calls own weights under the name `{name}`",
                span,
                "the second",
                [Label(self.owners[name], "the first")],
                help=f"bind each to a variable of its own (`{name}1 = ...`, `{name}2 = ...`), or put one into "
                f"a loop; `shared {name} = ...` makes both one",
            )
        self.owners[name] = span

    def borrow(self, name: str, body: str) -> None:
        """Have a shared block that a body around this one owns."""
        self.borrowed[name] = body
        self.instances.append(pg.Instance(name, (body,), owned=False))

    # --- values -----------------------------------------------------------------------------------

    def add_input(self, name: str, kind: str, dims: tuple[Dim, ...], span: Span = NOWHERE) -> Tensor:
        tensor = Tensor(self.fresh(name), kind, dims, self, span=span)
        self.inputs.append(tensor)
        return tensor

    def add_weight(
        self, name: str, dims: tuple[Dim, ...], init: pg.Init, op: str, keep: bool, layout: Layout, span: Span,
        trained: bool = True,
    ) -> Tensor:  # fmt: skip
        self._names.add(name)
        self.weights.append((name, dims, init, op, keep, layout, trained, span))
        tensor = Tensor(name, "real", dims, self, span=span)
        self.weight_tensors[name] = tensor
        return tensor

    def local(self, tensor: Tensor) -> Tensor:
        """The tensor as this body knows it: its own, or an input made of a value around it."""
        if tensor.builder is self:
            return tensor
        if self.parent is None:
            raise fail(
                "out-of-reach",
                f"`{self.block}` uses `{tensor.name}`, a tensor of `{tensor.builder.block}`",
                tensor.span,
                f"`{self.block}` cannot see it",
                help="what is `shared` is called in the block that declares it, or in its loops",
            )
        outer = self.parent.local(tensor)
        if id(outer) not in self.captured:
            inner = Tensor(self.fresh(outer.name.replace(".", "_")), outer.kind, outer.dims, self, span=outer.span)
            self.captured[id(outer)] = (outer, inner)
        return self.captured[id(outer)][1]

    def add_node(
        self,
        op: str,
        operands: tuple[Tensor | None, ...],
        results: tuple[tuple[str, str, tuple[Dim, ...]], ...],
        attrs: dict[str, Any],
        bindings: dict[str, tuple[Dim, ...]],
        span: Span,
    ) -> tuple[Tensor, ...]:
        """Append a node; `results` are (base name, kind, dims)."""
        made = tuple(Tensor(self.fresh(name), kind, dims, self, span=span) for name, kind, dims in results)
        known = tuple(None if t is None else self.local(t) for t in operands)
        self.nodes.append(
            {"results": made, "op": op, "operands": known, "attrs": attrs, "bindings": bindings, "span": span}
        )
        return made

    # --- the finished body ------------------------------------------------------------------------

    def owns_anything(self) -> bool:
        return bool(self.weights or self.instances)

    def finish(self, name: str, inputs: list[Tensor], outputs: list[Tensor], asked: int = 0) -> pg.Body:
        """The immutable body. `inputs` are in the order in which calls pass them; the last `asked` outputs it does not
        return itself."""
        made_inputs = tuple(self._value(t) for t in inputs)
        nodes = tuple(self._node(n) for n in self.nodes)
        weights = tuple(
            pg.Weight(
                w, self.names_of(dims), init, op, keep, tuple(self.names_of(axis) for axis in layout), trained, span
            )
            for w, dims, init, op, keep, layout, trained, span in self.weights
        )
        outs = tuple(self.local(t).name for t in outputs)
        emits = tuple((keyword, label, self.local(t).name) for keyword, label, t in self.emits)
        dims = tuple(
            pg.Dim(self.aliases[i], d.size, d.sequence, self.names_of(d.lead), self.names_of(d.factors), d.clock)
            for i, d in list(self._dims.items())
        )
        return pg.Body(
            name, self.block, dims, made_inputs, weights, tuple(self.instances), nodes, outs, emits,
            tuple(self.rules), asked, self.span, self.doc,
        )  # fmt: skip

    def _value(self, tensor: Tensor) -> pg.Value:
        return pg.Value(tensor.name, pg.Type(tensor.kind, self.names_of(tensor.dims)))

    def _node(self, node: dict[str, Any]) -> pg.Node:
        attrs = tuple((k, self._attr(v)) for k, v in node["attrs"].items())
        bindings = tuple((f, self.names_of(dims)) for f, dims in node["bindings"].items())
        return pg.Node(
            tuple(self._value(t) for t in node["results"]),
            node["op"],
            tuple(None if t is None else t.name for t in node["operands"]),
            attrs,
            bindings,
            (node["span"],),
        )

    def _attr(self, value: Any) -> Any:
        if isinstance(value, Dim):
            return self.dim_name(value)
        if isinstance(value, tuple):
            return tuple(self._attr(v) for v in value)
        return value
