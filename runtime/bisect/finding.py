"""The first op where two runs differ by more than rounding explains.

Three runs of one model on the same tokens: A, B, and one in fp64 on one device. The last one rounds each value to what
both dtypes hold, and all three go on with that, so that each use of an op is given the same in all of them, and an
error stays where it is made. Then backward: at the results of each use arrive the gradients of the fp64 run, and what
it makes of them for its operands is compared. How far rounding may move each number is found by running the fp64 run
again with the roundings of a dtype, drawn (`rounding`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from ...dsl.program import Program
from ...lowering.pipeline import lower
from ...lowering.target import TARGETS
from ..compile import Artifact, emitted, instantiate
from .oracle import Oracle, far, size
from .rounding import WIDE, arithmetic, rounded
from .running import Feed, Name, Runner, Unit
from .sides import Side
from .watching import Key

NOISE = 0.1
"""Drawn weights are moved by so much: an op whose weights are all one would do without them."""


@dataclass(frozen=True)
class Row:
    """One tensor that was compared: a value (`of` None), or the gradient of `of` by the use of an op that gives `key`.

    `difference` is the largest between both runs, `allowed` what rounding explains; `errors` are how far each run is
    from fp64, `size` the largest number. `carried` is the difference where each run goes on with its own numbers, of
    values only.
    """

    key: Key
    op: str
    spec: str
    of: Name | None
    difference: float
    allowed: float
    errors: tuple[float, float]
    size: float
    carried: float | None = None

    @property
    def share(self) -> float:
        """The difference as a share of what is allowed."""
        if self.difference == 0:
            return 0.0
        return self.difference / self.allowed if self.allowed else float("inf")


@dataclass(frozen=True)
class Found:
    """What was compared, in the order in which it runs: `values`, then `gradients`. `weights` are those that the sides
    do not share, with the largest difference; `left_out` the values that one of the runs does not have."""

    values: tuple[Row, ...]
    gradients: tuple[Row, ...]
    weights: dict[str, float] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()

    @property
    def first(self) -> Row | None:
        """The first that rounding does not explain."""
        return next((r for r in (*self.values, *self.gradients) if not r.share <= 1), None)

    @property
    def equal(self) -> bool:
        """Whether nothing differs but by rounding."""
        return self.first is None and not self.weights


def written(program: Program, side: Side) -> Artifact:
    """The module of a side, which tells of its uses. Raises `SpecError` for a layout that cannot be."""
    return emitted(lower(program, layout=side.layout, target=TARGETS[side.target]), named=True)


def drawn(program: Program, seed: int) -> dict[str, Tensor]:
    """Weights and buffers by path, fp64: the initial values of the spec, moved a little."""
    model = instantiate(emitted(lower(program)), seed=seed)
    source = torch.Generator().manual_seed(seed)
    found = {name: x.detach().to(WIDE) for name, x in model.state_dict().items()}
    for path, _, view in model.named_logical_parameters():
        found[path] = view.detach().to(WIDE) + NOISE * torch.randn(view.shape, generator=source, dtype=WIDE)
    return found


class Comparison:
    """Two runs side by side. `weights` by path, of each side; `made` are their modules."""

    def __init__(self, program: Program, sides: tuple[Side, Side], made: tuple[Artifact, Artifact], feed: Feed,
                 weights: tuple[Mapping[str, Tensor], Mapping[str, Tensor]]) -> None:  # fmt: skip
        self.feed = feed
        self.dtypes = tuple(s.kind for s in sides)
        self.kinds = [arithmetic(s.kind, s.layout is not None) for s in sides]
        self.weights = [{n: rounded(w, self.dtypes) for n, w in own.items()} for own in weights]
        self.runners = [Runner(*one) for one in zip(made, self.dtypes, self.weights, strict=True)]
        self.oracle = Oracle(program, feed, self.weights[0], self.dtypes)
        free = [r.free(feed) for r in self.runners]
        self.common = [k for k in self.oracle.keys if all(k in values for values in free)]
        self.oracle.hold(self.common)

    def found(self, second: Artifact | None = None) -> Found:
        """What they give, number by number; `second` in place of the second one's module."""
        runner = self.runners[1] if second is None else Runner(second, self.dtypes[1], self.weights[1])
        ran = (self._first, self._ran(runner))
        mine, theirs = self.weights
        apart = {n: d for n in mine if n in theirs and (d := far(mine[n], theirs[n]))}
        left_out = tuple(str(k) for k in self.oracle.keys if k not in self.oracle.given)
        return Found(tuple(self._values(ran)), tuple(self._gradients(ran)), apart, left_out)

    @cached_property
    def _first(self) -> _Ran:
        return self._ran(self.runners[0])

    def _ran(self, runner: Runner) -> _Ran:
        return _Ran(runner.free(self.feed), *runner.held(self.feed, self.oracle.given, self.oracle.arrives))

    def _values(self, ran: tuple[_Ran, _Ran]) -> Iterator[Row]:
        for key in self.common:
            want = [self.oracle.made[key]]
            a, b = (r.values[key] for r in ran)
            most = sum(self.oracle.value_allowed(kind, key) for kind in self.kinds)
            carried = _apart(*(r.free[key] for r in ran))
            op, spec = self._named(key)
            errors = _apart(a, want), _apart(b, want)
            yield Row(key, op, spec, None, _apart(a, b), most, errors, size(want[0]), carried)

    def _gradients(self, ran: tuple[_Ran, _Ran]) -> Iterator[Row]:
        """Units in the order of the backward pass. One that both runs have is compared between them, else with fp64."""
        order = {k: i for i, k in enumerate(self.common)}
        units = dict.fromkeys(unit for r in ran for unit in r.gradients)
        for unit in sorted(units, key=lambda u: -max(order[k] for k in u.results)):
            have = [(r.gradients[unit], kind) for r, kind in zip(ran, self.kinds, strict=True) if unit in r.gradients]
            exact, (op, spec) = self.oracle.exact(unit), self._named(unit.results[-1])
            for name in dict.fromkeys([*exact, *(n for own, _ in have for n in own)]):
                like = exact[name] if name in exact else next(own[name][0] for own, _ in have if name in own)
                nothing = torch.zeros_like(like, dtype=WIDE)
                want = exact.get(name, nothing)
                found = [own.get(name, [nothing]) for own, _ in have]
                apart = _apart(*found) if len(found) == 2 else _apart(found[0], [want])
                most = sum(self.oracle.gradient_allowed(kind, unit, name) for _, kind in have)
                by_side = [r.gradients[unit].get(name, [nothing]) if unit in r.gradients else [want] for r in ran]
                errors = [_apart(x, [want]) for x in by_side]
                yield Row(unit.results[-1], op, spec, name, apart, most, (errors[0], errors[1]), size(want))

    def _named(self, key: Key) -> tuple[str, str]:
        """The op that gives a value, and the line of the spec that asked for it."""
        graph, value = self.oracle.run.watch.named[key]
        node = self.oracle.lowered.graphs[graph].producers[value]
        span = next((s for s in node.spans if s.source.text), None)
        return node.op, "" if span is None else f"{span.source.name}:{span.line}  {span.source.line(span.line).strip()}"


@dataclass(frozen=True)
class _Ran:
    """Of a side: its values where nothing is held, and where all is, and gradients by unit."""

    free: dict[Key, list[Tensor]]
    values: dict[Key, list[Tensor]]
    gradients: dict[Unit, dict[Name, list[Tensor]]]


def _apart(first: Iterable[Tensor], second: Iterable[Tensor]) -> float:
    """The largest difference of any of the first from any of the second."""
    theirs = list(second)
    return max(far(x, y) for x in first for y in theirs)
