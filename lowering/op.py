"""What an op is: a signature with roles, settings, weights, and what follows from them.

A room (`lowering/ops/<op>/`) states an `Op`. Type inference, diagnostics, roles for streaming and sharding, weights and
cost come from the signature; only what a signature cannot say (how several dims are bound to one formal) is a function.
Loads neither torch nor networkx: the reference math of a room is in its `reference.py`, its CPU code in `cpu.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

from ..dsl.diagnostics import Label, fail
from ..dsl.program import TOKENS, Clock, Init
from ..dsl.signature import Operand, Signature
from ..dsl.source import Span


class DimLike(Protocol):
    """A dim while a program is elaborated: equality is identity."""

    name: str
    size: int | None
    sequence: bool
    clock: Clock | None


class TensorLike(Protocol):
    """A value with dims. `span` is where it was made."""

    kind: str
    dims: tuple[Any, ...]


REQUIRED = object()


@dataclass(frozen=True)
class Setting:
    """A parameter of an op. `kind` says how its argument is read:

    map (`hidden -> ffn`), split (a map that makes or undoes compound dims), join (of dims as long as both together),
    dims, whole, number, flag, text, names, mask, coordinate (of a sequence: the dim, and the clock of its groups),
    weight (a tensor that is used instead of an own one).
    """

    name: str
    kind: str
    default: Any = REQUIRED
    meaning: str = ""
    least: int = 1


@dataclass(frozen=True)
class WeightRule:
    """An operand of the signature that the op owns. It exists if `when` is not a setting or that setting is true.

    `init` kind `free` is decided by the program's `init` rules. `keep`: stays in fp32 under a low compute dtype. `axes`
    are the axes of published checkpoints, one a formal if not given; "" is an axis of length one.
    """

    operand: str
    init: Init | Callable[[OpCall], Init]
    when: str | None = None
    keep: bool = False
    axes: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Monoid:
    """How partial results along a marked dim combine (`reference.py` of the room has the functions of this name).

    `state` says what one partial holds, `receiver_free` whether `lift` is the same for every receiver; `peers` who
    contributes: all, earlier, neighbours or masked.
    """

    formal: str
    state: tuple[str, ...]
    peers: str
    receiver_free: bool


@dataclass
class OpCall:
    """One use of an op as the elaborator sees it."""

    op: Op
    tensors: dict[str, Any]
    settings: dict[str, Any]
    span: Span
    spans: Mapping[str, Span] = field(default_factory=dict)
    make_dim: Callable[..., Any] | None = None

    def new_dim(self, name: str, size: int) -> Any:
        """A dim that this use makes."""
        assert self.make_dim is not None
        return self.make_dim(name, size)

    def new_sequence(self, along: Any, clock: Clock) -> Any:
        """A slower sequence that this use makes of one: a row, or some, for each group of its rows."""
        assert self.make_dim is not None
        return self.make_dim(clock.name, None, along, clock)

    def span_of(self, name: str) -> Span:
        return self.spans.get(name, self.span)

    def known(self, dim: Any, name: str) -> int:
        """The size of a dim that an op must know. Raises `size-unknown`."""
        if dim.size is None:
            raise fail(
                "size-unknown",
                f"`{self.op.name}` must know the size of `{dim.name}`, which the data decide",
                self.span_of(name),
                f"this is {shown(first_of(self.tensors[name]))}",
            )
        return dim.size

    def sequence(self, name: str) -> int:
        """Position of the innermost sequence dim of an operand. Raises `no-sequence`."""
        dims = self.tensors[name].dims
        for i in reversed(range(len(dims))):
            if dims[i].sequence:
                return i
        raise fail(
            "no-sequence",
            f"`{self.op.name}` runs along a sequence, and none of the dims of its input is one",
            self.span_of(name),
            f"this is {shown(self.tensors[name])}",
        )


@dataclass(frozen=True)
class OwnedWeight:
    """A weight that this use creates."""

    part: str
    dims: tuple[Any, ...]
    init: Init
    keep: bool
    layout: tuple[tuple[Any, ...], ...]


@dataclass(frozen=True)
class Typing:
    """What inference found: the dims of every formal, the operands in order, and the types of the results.

    `sequences` are, for each mask among the settings, the dims that `query` and `key` of it stand for."""

    bindings: dict[str, tuple[Any, ...]]
    operands: tuple[Any, ...]
    results: tuple[tuple[str, tuple[Any, ...]], ...]
    sequences: tuple[tuple[Any, Any], ...] = ()


@dataclass(frozen=True)
class Op:
    """An op. See the module's text.

    `linear` are the groups of operands that it is jointly linear in; `index` formals whose global index it reads;
    `per_weight` are the operations a row for each element of its weights, where that is all an op does;
    `coordinates` is true if it reads position and document of its sequence. `stacked` names the op that does several
    of these side by side, `epilogues` are pointwise ops that it can apply to its result.
    `absorbs` is an operand, and the op whose result it need not be: given what that op reads instead, this one makes it
    a few rows at a time.
    `random` names the rate at which an op drops something while it trains: a use of a rate draws anew each time, so
    equal ones are not one. Through `detached` ones no gradient flows.

    What a cut of a dim must know: `grouped` are pairs of a formal and what divides it into equal runs (another formal
    of one dim, or a setting), each run with something of its own; `coupled` formals of which places belong together in
    a way that a choice of places breaks; `scored` the operand by which the dims of its formals are ranked, if not by
    what is contracted with a weight.

    What a cut over ranks must know: `rigid` formals are needed whole; `offset` those of `index` that can be told where
    a rank's part begins; `lift(node, graph)` takes a use with a statistic, a window or a scan apart into uses that can
    be cut. Of those: `hands_over` says that the result is each rank's own, `handed` names operands that are each rank's
    own, `meets` by which collective ranks tell each other something in it, if they do. `part_of` is the op that is so
    taken apart.

    `verify(node, graph)` raises `SpecError` for a use that only the whole body shows to be wrong.
    """

    name: str
    text: str
    meaning: str
    settings: tuple[Setting, ...] = ()
    weights: tuple[WeightRule, ...] = ()
    bind: Callable[[OpCall], dict[str, tuple[Any, ...]]] | None = None
    result_kind: str | Callable[[OpCall], str] = "real"
    operand_kinds: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    linear: tuple[tuple[str, ...], ...] = ()
    index: tuple[str, ...] = ()
    coordinates: bool = False
    monoid: Monoid | None = None
    flops: Callable[[Mapping[str, int], Mapping[str, Any]], float] | None = None
    source: str = ""
    per_weight: float = 0.0
    stacked: str | None = None
    epilogues: tuple[str, ...] = ()
    absorbs: tuple[str, str] = ("", "")
    random: str = ""
    detached: bool = False
    grouped: tuple[tuple[str, str], ...] = ()
    coupled: tuple[str, ...] = ()
    scored: str | None = None
    rigid: tuple[str, ...] = ()
    offset: tuple[str, ...] = ()
    lift: Callable[[Any, Any], str] | None = None
    hands_over: bool = False
    handed: tuple[str, ...] = ()
    meets: str = ""
    part_of: str = ""
    verify: Callable[[Any, Any], None] | None = None
    infer_with: Callable[[OpCall], Typing] | None = None

    @cached_property
    def signature(self) -> Signature:
        return Signature.parse(self.text)

    @cached_property
    def inputs(self) -> tuple[Operand, ...]:
        """The operands that a caller gives."""
        owned = {w.operand for w in self.weights}
        return tuple(o for o in self.signature.operands if o.name not in owned)

    def draws(self, node: Any) -> bool:
        """Whether a use, a node with attributes, draws random numbers."""
        return bool(self.random and node.attr(self.random))

    def setting(self, name: str) -> Setting | None:
        return next((s for s in self.settings if s.name == name), None)

    def infer(self, call: OpCall) -> Typing:
        """Dims of formals, operands and result types. Raises `dim-mismatch`, `too-few-dims`, `wrong-kind`."""
        if self.infer_with:
            return self.infer_with(call)
        self._check_kinds(call)
        bindings = dict(self.bind(call)) if self.bind else {}
        leading: tuple[Any, ...] | None = None
        for operand in self.inputs:
            for tensor in tensors_of(call.tensors.get(operand.name)):
                own = _match(call, operand, tensor, bindings)
                leading = own if leading is None else join_leading(leading, own, call) if operand.leading else leading
        leading = leading or ()
        if self.coordinates and "S" in bindings:
            alone_along(call, leading, bindings["S"][0])
            _with_the_stream(call, bindings["S"][0])
        operands: list[Any] = []
        for operand in self.signature.operands:
            rule = next((w for w in self.weights if w.operand == operand.name), None)
            if rule is None:
                operands.append(call.tensors.get(operand.name))
            else:
                operands.append(_weight(call, operand, rule, bindings))
        kind = self.result_kind if isinstance(self.result_kind, str) else self.result_kind(call)
        results = tuple(
            (kind, (leading if r.leading else ()) + tuple(d for f in r.formals for d in bindings[f.name]))
            for r in self.signature.results
        )
        return Typing(bindings, tuple(operands), results)

    def _check_kinds(self, call: OpCall) -> None:
        for operand in self.inputs:
            allowed = self.operand_kinds.get(operand.name, ("real",))
            for tensor in tensors_of(call.tensors.get(operand.name)):
                if tensor.kind not in allowed:
                    raise fail(
                        "wrong-kind",
                        f"`{operand.name}` of `{self.name}` must be {' or '.join(allowed)}",
                        call.span_of(operand.name),
                        f"this is {shown(tensor)}",
                    )

    def cost(self, sizes: Mapping[str, int], attrs: Mapping[str, Any]) -> float:
        """Multiply-adds count two. `sizes` are products of the dims of each formal; leading dims are not in it."""
        if self.flops:
            return self.flops(sizes, attrs)
        formals = self.signature.formals()
        total = math.prod(sizes[f] for f in formals)
        return 2.0 * total if any(self.signature.role(f) == "contract" for f in formals) else float(total)


def check_rate(call: OpCall) -> None:
    """Raises `out-of-range` for a use that would drop everything, or less than nothing."""
    name = call.op.random
    rate = call.settings[name]
    if not 0 <= rate < 1:
        what = "the rate" if name == "rate" else f"`{name}`"
        raise fail(
            "out-of-range",
            f"{what} of `{call.op.name}` is {rate:g}, it must be at least 0 and less than 1",
            call.span_of(name),
        )


def shown(tensor: TensorLike) -> str:
    """`real[batch, seq, hidden = 4096]`, as messages show it."""
    dims = (d.name if d.size is None else f"{d.name} = {d.size}" for d in tensor.dims)
    return f"{tensor.kind}[{', '.join(dims)}]"


def first_of(value: Any) -> Any:
    return value[0] if isinstance(value, (list, tuple)) else value


def tensors_of(value: Any) -> list[Any]:
    if value is None:
        return []
    return [v for v in value if v is not None] if isinstance(value, (list, tuple)) else [value]


def join_leading(a: Sequence[Any], b: Sequence[Any], call: OpCall) -> tuple[Any, ...]:
    """The leading dims that two operands share. Raises `dim-mismatch` where they have different ones."""
    if len(a) == len(b) and all(x is y for x, y in zip(a, b, strict=True)):
        return tuple(a)
    names = [", ".join(d.name for d in dims) for dims in (a, b)]
    raise fail(
        "dim-mismatch",
        f"the operands of `{call.op.name}` have different leading dims",
        call.span,
        f"[{names[0]}] and [{names[1]}]",
    )


def check_leading(every: Sequence[Any], some: Sequence[Any], call: OpCall) -> None:
    """Raises `dim-mismatch` where an operand has a leading dim that the one with every leading dim has not."""
    if not all(any(d is e for e in every) for d in some):
        join_leading(every, some, call)


def alone_along(call: OpCall, leading: Sequence[Any], sequence: Any) -> None:
    """Raises `not-built-yet` where something runs beside a sequence that its positions do not vary along."""
    if sequence.clock is not None and tuple(leading) != tuple(sequence.lead):
        have, want = (", ".join(d.name for d in dims) for dims in (leading, sequence.lead))
        raise fail(
            "not-built-yet",
            f"`{call.op.name}` along `{sequence.name}` for each of [{have}] is not built yet",
            call.span,
            f"positions vary along [{want}]",
        )


def _with_the_stream(call: OpCall, sequence: Any) -> None:
    """Raises `not-built-yet` where an op that runs along tokens is given another sequence."""
    if sequence.clock != TOKENS:
        raise fail(
            "not-built-yet",
            f"`{call.op.name}` along `{sequence.name}` is not built yet",
            call.span,
            "it runs along the tokens of the model's first input",
        )


def _match(call: OpCall, operand: Operand, tensor: TensorLike, bindings: dict[str, tuple[Any, ...]]) -> tuple[Any, ...]:
    """Bind an operand's formals from the right; gives its leading dims."""
    dims = list(tensor.dims)
    for formal in reversed(operand.formals):
        bound = bindings.get(formal.name)
        width = 1 if bound is None else len(bound)
        if len(dims) < width:
            wanted = ", ".join(f.name.lower() for f in operand.formals)
            raise fail(
                "too-few-dims",
                f"`{operand.name}` of `{call.op.name}` needs the dims [{wanted}]",
                call.span_of(operand.name),
                f"this is {shown(tensor)}",
            )
        have = tuple(dims[len(dims) - width :])
        del dims[len(dims) - width :]
        if bound is None:
            bindings[formal.name] = have
        elif any(a is not b for a, b in zip(have, bound, strict=True)):
            raise mismatch(call, operand.name, have, bound)
    if dims and not operand.leading:
        wanted = ", ".join(f.name.lower() for f in operand.formals)
        raise fail(
            "dim-mismatch",
            f"`{operand.name}` of `{call.op.name}` takes the dims [{wanted}] and no more",
            call.span_of(operand.name),
            f"this is {shown(tensor)}",
        )
    return tuple(dims)


def mismatch(call: OpCall, operand: str, have: Sequence[Any], want: Sequence[Any]) -> Exception:
    """The `dim-mismatch` of two bindings, each with its place where one is known."""
    pairs = [(a, b) for a, b in zip(have, want, strict=True) if a is not b]
    first, second = pairs[0]
    help = None
    if first.name == second.name and first.size == second.size:
        text = f"`{call.op.name}` needs one dim here, its operands have two that are both {_dim(first)}"
        help = "a number makes a new dim each time; name the dim once (`[heads, head_dim = 64]`), and use the name"
    elif first.name == second.name:
        text = f"`{first.name}` is {second.size} in one operand of `{call.op.name}`, but {first.size} in another"
    else:
        text = f"`{call.op.name}` wants {_dim(second)} where this has {_dim(first)}"
    labels = [Label(d.span, f"{_dim(d)} was bound here") for d in (second, first) if getattr(d, "span", None)]
    return fail(
        "dim-mismatch", text, call.span_of(operand), f"this has [{', '.join(_dim(d) for d in have)}]", labels, help
    )


def _dim(dim: DimLike) -> str:
    return f"`{dim.name}`" if dim.size is None else f"`{dim.name}` = {dim.size}"


def _weight(call: OpCall, operand: Operand, rule: WeightRule, bindings: dict[str, tuple[Any, ...]]) -> Any:
    if rule.when is not None and not call.settings.get(rule.when):
        return None
    dims = tuple(d for f in operand.formals for d in bindings[f.name])
    setting = call.op.setting(operand.name)
    given = call.settings.get(operand.name) if setting is not None and setting.kind == "weight" else None
    if given is not None:
        if tuple(given.dims) != dims:
            raise fail(
                "dim-mismatch",
                f"the tensor given as `{operand.name}` of `{call.op.name}` has other dims",
                call.span_of(operand.name),
                f"this is {shown(given)}, wanted [{', '.join(map(_dim, dims))}]",
            )
        return given
    for dim in dims:
        if dim.size is None:
            raise fail(
                "weight-of-unknown-size",
                f"a weight of `{call.op.name}` would have the size of `{dim.name}`, which the data decide",
                call.span,
                "weights may depend on parameters only",
            )
    init = rule.init(call) if callable(rule.init) else rule.init
    axes = tuple(f.name for f in operand.formals) if rule.axes is None else rule.axes
    layout = tuple(tuple(bindings[a]) if a else () for a in axes)
    return OwnedWeight(operand.name, dims, init, rule.keep, layout)
