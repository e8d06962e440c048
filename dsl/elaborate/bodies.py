"""Bodies while they are elaborated, the arguments of a call, and what a call leaves behind."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from .. import syntax as sx
from ..arithmetic import kind
from ..diagnostics import did_you_mean, fail
from ..source import Span
from .builder import Builder
from .values import Dim, Picked, Sloped, Tensor, Waiting


@dataclass
class Elaborated:
    """A body under a key: its builder, what it returned, and the dims that its callers' dims take the place of.

    `asked` are variables that some run of it was asked for (`f(x).final`): it gives them behind what it returns.
    """

    name: str
    builder: Builder
    inputs: list[Tensor]
    returned: list[Any]
    formals: list[Dim]
    variables: dict[str, Any]
    asked: dict[str, Tensor] = field(default_factory=dict)
    runs: list[Run] = field(default_factory=list)

    @property
    def outputs(self) -> list[Tensor]:
        """What it gives, in order."""
        return [*(r for r in self.returned if isinstance(r, Tensor)), *self.asked.values()]

    def settle(self) -> None:
        """Let every call take all that the body gives, now that no one will ask for more."""
        for run in self.runs:
            run.node["results"] += tuple(run.asked(name) for name in self.asked)


@dataclass
class Given:
    """Arguments of one call: values by parameter, and where they stand."""

    tensors: dict[str, Any]
    settings: dict[str, Any]
    spans: dict[str, Span]


class Run:
    """One call of a body: its variables can be asked for, `f(x).final`."""

    def __init__(
        self, made: Elaborated, builder: Builder, node: dict[str, Any], tensors: Sequence[Tensor], swap: dict[int, Dim],
        common: dict[tuple[str, int], Dim] | None,
    ):  # fmt: skip
        self.made, self.builder, self.node, self.tensors, self.swap = made, builder, node, tensors, swap
        self.common = common
        self.given: dict[str, Tensor] = {}

    def __call__(self, name: str, span: Span) -> Tensor:
        made = self.made
        value = made.variables.get(name)
        if value is None:
            raise fail(
                "no-such-member",
                f"`{made.builder.block}` has no variable `{name}`",
                span,
                help=did_you_mean(name, made.variables, "a variable"),
            )
        for tensor, output in zip(self.tensors, made.outputs, strict=False):
            if output is value:
                return tensor
        if not isinstance(value, Tensor):
            raise fail(
                "wrong-type", f"`{name}` of `{made.builder.block}` is {kind(value)}, a run has tensors only", span
            )
        made.asked[name] = made.builder.local(value)
        return self.asked(name)

    def asked(self, name: str) -> Tensor:
        """A variable of this run, as its caller knows it."""
        if name not in self.given:
            inner = self.made.asked[name]
            dims = tuple(swapped(d, self.swap, self.common) for d in inner.dims)
            made = Tensor(
                self.builder.fresh(f"{self.tensors[0].name}_{name}"), inner.kind, dims, self.builder, span=inner.span
            )
            self.given[name] = made
        return self.given[name]


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors that a parameter brings along: itself, that of a score bias, or those that a waiting function was
    given."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, (Picked, Sloped)):
        return [value.tensor]
    return [t for v in value.settings.values() for t in tensors_in(v)] if isinstance(value, Waiting) else []


def inside(value: Any, name: str, builder: Builder) -> Any:
    """A parameter as a body sees it: tensors that it brings along are inputs of the body, in the same order."""
    if isinstance(value, Tensor):
        return builder.add_input(name, value.kind, value.dims, value.span)
    if isinstance(value, (Picked, Sloped)):
        return replace(value, tensor=inside(value.tensor, name, builder))
    if isinstance(value, Waiting) and tensors_in(value):
        settings = {n: inside(v, f"{name}_{n}", builder) for n, v in value.settings.items()}
        return replace(value, settings=settings)
    return value


def swapped(dim: Dim, swap: dict[int, Dim], common: dict[tuple[str, int], Dim] | None = None) -> Dim:
    """The caller's dim for one of a body: a new one, where the body made it.

    common: the dims that whole models gave their caller, by name and size. The words that teacher and student predict
    are one dim.
    """
    if id(dim) not in swap:
        lead, factors = (tuple(swapped(d, swap, common) for d in parts) for parts in (dim.lead, dim.factors))
        made = Dim(dim.name, dim.size, dim.sequence, lead, dim.span, factors, dim.clock)
        if common is not None and dim.size is not None:
            made = common.setdefault((dim.name, dim.size), made)
        swap[id(dim)] = made
    return swap[id(dim)]


def inputs_of(declaration: sx.Function) -> list[sx.Input]:
    """The input lines of a function, in order."""
    return [s for s in declaration.body if isinstance(s, sx.Input)]


def required_inputs(declaration: sx.Function) -> list[str]:
    """The names of the inputs that a call must give."""
    return [i.name for i in inputs_of(declaration) if not i.optional and i.default is None]
