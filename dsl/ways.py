"""How a part of a model is computed where its sequence is split: `attend: exchange(heads)`, `attend: ring`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from . import syntax as sx
from .diagnostics import did_you_mean, fail, listed
from .selectors import Numbers, Selector, read
from .source import NOWHERE, Span

WAYS = {
    "exchange": "heads for positions: each rank has all positions of some heads",
    "ring": "each rank keeps its keys, and is told those of the others one after the other",
    "all_gather": "each rank has all keys",
}
ORDERS = ("zigzag",)


@dataclass(frozen=True)
class Way:
    """`SELECTOR: kind(dims, order = ..)`. `dims`, of an exchange, are those that are split in place of the sequence;
    `order`, of a ring, is the order in which ranks have the positions while they attend (None: their own)."""

    selector: Selector
    kind: str
    dims: tuple[str, ...] = ()
    order: str | None = None
    span: Span = field(default=NOWHERE, compare=False, repr=False)


def ways_of(rule: sx.Apply, numbers: Numbers) -> tuple[Way, ...]:
    """What a rule says, for each of its selectors. Raises `SpecError`: wrong-selector, wrong-type, unknown-name,
    unknown-setting, duplicate-argument, missing-argument, not-built-yet."""
    kind, arguments = _called(rule)
    read_arguments: Callable[[sx.Apply, str, tuple[sx.Argument, ...]], Way] = {
        "exchange": _exchange, "ring": _ring, "all_gather": _plain,
    }[kind]  # fmt: skip
    made = read_arguments(rule, kind, arguments)
    return tuple(Way(read(s, numbers), made.kind, made.dims, made.order, rule.span) for s in rule.selectors)


def _called(rule: sx.Apply) -> tuple[str, tuple[sx.Argument, ...]]:
    """The way's name, and what stands in its brackets."""
    call = rule.value if isinstance(rule.value, sx.Call) else None
    value = rule.value if call is None else call.function
    arguments = () if call is None else call.arguments
    name = value.id if isinstance(value, sx.Name) else None
    if name in ("ahead", "all_to_all"):
        raise fail("not-built-yet", f"`{name}` as a way of a layout is not built yet", rule.span,
                   help=f"these are: {listed(WAYS)}")  # fmt: skip
    if name not in WAYS:
        raise fail("unknown-name", "this is no way to lay something out", rule.value.span,
                   help=did_you_mean(name or "", WAYS, "a way") or f"ways are {listed(WAYS)}")  # fmt: skip
    assert name is not None
    return name, arguments


def _exchange(rule: sx.Apply, kind: str, arguments: tuple[sx.Argument, ...]) -> Way:
    dims: list[str] = []
    for argument in arguments:
        if argument.name is not None:
            raise _unknown(kind, argument, ())
        if not isinstance(argument.value, sx.Name):
            raise fail("wrong-type", "`exchange` takes names of dims", argument.value.span, "this is none")
        if argument.value.id in dims:
            raise fail("duplicate-argument", f"`{argument.value.id}` is exchanged twice", argument.value.span)
        dims.append(argument.value.id)
    if not dims:
        raise fail("missing-argument", "`exchange` needs the dim that is split in place of the sequence",
                   rule.value.span, help="`exchange(heads)`, for example")  # fmt: skip
    return Way(Selector(()), kind, tuple(dims))


def _ring(rule: sx.Apply, kind: str, arguments: tuple[sx.Argument, ...]) -> Way:
    order = None
    for argument in arguments:
        if argument.name != "order":
            raise _unknown(kind, argument, ("order",))
        name = argument.value.id if isinstance(argument.value, sx.Name) else None
        if name not in ORDERS:
            raise fail("unknown-name", "this is no order of positions", argument.value.span,
                       help=f"orders are {listed(ORDERS)}; without one ranks keep their own")  # fmt: skip
        order = name
    return Way(Selector(()), kind, order=order)


def _plain(rule: sx.Apply, kind: str, arguments: tuple[sx.Argument, ...]) -> Way:
    for argument in arguments:
        raise _unknown(kind, argument, ())
    return Way(Selector(()), kind)


def _unknown(kind: str, argument: sx.Argument, settings: tuple[str, ...]) -> Exception:
    message = f"`{kind}` has no setting `{argument.name}`" if argument.name else f"`{kind}` does not take this"
    help = f"its settings are {listed(settings)}" if settings else "it has no settings"
    return fail("unknown-setting", message, argument.value.span, help=help)
