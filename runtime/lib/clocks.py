"""Slower sequences: rows that come with groups of tokens, in a full pass and in a step of a stream.

Nothing is counted: which rows there are follows from the positions of the tokens alone, so whatever takes tokens back
takes the rows that came with them back, too.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .buffers import is_past
from .product import autocast
from .rows import At, Step


class Token(NamedTuple):
    """What says the group of a token: its position in its document, a number or int64 of any shape."""

    position: Any


class Clock:
    """Groups of neighbouring tokens: 0, 1, 2, .. along a document; what is below 0 is in none.

    value: the group of a token, never less than that of the one before it, and by at most 1 more.
    width: the most tokens of a group, None where a group may be as long as its document.
    begins: the rows of a group are there with its first token (the data give them), else with its last (its tokens do).
    """

    def __init__(self, value: Callable[[Token], Any], width: int | None, begins: bool = False) -> None:
        self.value, self.width, self.begins = value, width, begins

    def of(self, position: Tensor) -> Tensor:
        """The group of each position, int64."""
        found = self.value(Token(position))
        return found if isinstance(found, Tensor) else torch.full_like(position, found)

    def groups(self, tokens: int) -> int:
        """How many groups have come with the first tokens of a document."""
        last = tokens - 1 if self.begins else tokens
        return max(0, int(self.value(Token(last))) + self.begins) if tokens else 0

    def came(self, tokens: Tensor) -> Tensor:
        """`groups` of numbers that the device knows, int64 of any shape, each above 0."""
        begins = int(self.begins)
        return (self.of(tokens - begins) + begins).clamp_min(0)

    def most(self, tokens: int) -> int:
        """How many groups can come with this many tokens, whatever documents they are of."""
        return tokens if self.groups(1) else self.groups(tokens)

    def come(self, position: Tensor) -> Tensor:
        """bool: the rows of a group come with this token of a stream."""
        group = self.of(position)
        if self.begins:
            return (group >= 0) & (group > torch.where(position > 0, self.of(position - 1), -1))
        return (group >= 0) & (self.of(position + 1) > group)


class Groups(At):
    """Coordinates of the rows of a clock, `times` for each group: those of a full pass, or those that a step brings.

    Their position counts rows: group * times and up. `members` are the tokens of each group.
    """

    times: int
    tokens: At
    _find: Callable[[], tuple[Tensor, Tensor]]
    regular: int | None = None

    def members(self) -> tuple[Tensor, Tensor]:
        """int64 [batch or 1, groups, width], the rows of a group's tokens in this call (in a step: below 0 for rows
        before it); bool, which of them there are."""
        if "members" not in self.memo:
            self.memo["members"] = self._find()
        return self.memo["members"]

    def fold(self, x: Tensor, before: int = 0) -> Tensor:
        """x[batch, before + seq, *] -> [batch, groups, width, *]; what is no member is arbitrary. `before`: rows of x
        that came before the call."""
        if self.regular is not None:
            width, rest = self.regular, -x.shape[1] % self.regular
            if rest:
                x = torch.cat((x, x.new_zeros(x.shape[0], rest, *x.shape[2:])), 1)
            return x.unflatten(1, (-1, width))
        index = (self.members()[0] + before).clamp(0, max(0, x.shape[1] - 1))
        if len(index) == 1:
            return x[:, index[0]]
        return x[torch.arange(len(index), device=x.device)[:, None, None], index]


def on(at: At, clock: Clock, times: int = 1) -> Groups:
    """The rows of a clock that belong to the tokens of a call."""
    key = (clock, times)
    if key not in at.memo:
        at.memo[key] = _full(at, clock, times) if not at.in_stream else _step(at, clock, times)
    return at.memo[key]


def _full(at: At, clock: Clock, times: int) -> Groups:
    """A full pass has every group that a token is in, also the last of a document, which may be short."""
    position = at.row if at.plain else at.position
    group = clock.of(position)
    if at.valid is not None:
        group = torch.where(at.valid, group, -1)
    first = group >= 0
    first[:, 1:] &= (group[:, 1:] != group[:, :-1]) | (False if at.starts is None else at.starts[:, 1:])
    count = first.sum(1)
    groups = int(count.max())
    place = torch.where(group >= 0, first.cumsum(1) - 1, groups)
    tokens = torch.arange(at.seq, device=position.device).expand_as(place)
    start = tokens.new_full((len(place), groups + 1), at.seq).scatter_reduce_(1, place, tokens, "amin")[:, :groups]
    size = tokens.new_zeros(len(place), groups + 1).scatter_add_(1, place, torch.ones_like(place))[:, :groups]
    made = _rows(at, group, start, None if at.plain else count, times)

    def members() -> tuple[Tensor, Tensor]:
        along = torch.arange(int(size.max()) if size.numel() else 1, device=size.device)
        return start[:, :, None] + along, along < size[:, :, None]

    made._find = members
    if at.plain and groups and clock.width is not None:
        regular = start[0] == torch.arange(groups, device=start.device) * clock.width
        last = clock.width * (groups - 1) < at.seq <= clock.width * groups
        made.regular = clock.width if last and bool(regular.all()) else None
    return made


def _rows(at: At, group: Tensor, which: Tensor, count: Tensor | None, times: int, step: Step | None = None) -> Groups:
    """The coordinates of rows from those of a token of each group; `count` [batch] of them are there, None for all."""
    groups = which.shape[1]
    if count is None:
        made = Groups((*at.lead, groups * times), at.device)
    else:
        index = which.clamp_max(max(0, at.seq - 1))
        document = (at.document if at.document is not None else torch.zeros_like(group)).gather(1, index)
        position = group.gather(1, index)[:, :, None] * times + torch.arange(times, device=group.device)
        there = torch.arange(groups, device=group.device) < count[:, None]
        made = Groups(
            (*at.lead, groups * times),
            at.device,
            position.flatten(1),
            document.repeat_interleave(times, 1),
            there.repeat_interleave(times, 1),
        )
    made.times, made.tokens, made._step, made.gathered, made.mesh = times, at, step, at.gathered, at.mesh
    return made


def _step(at: At, clock: Clock, times: int) -> Groups:
    """The groups whose rows come with the tokens of a step."""
    step = at.step
    if step.uniform is not None:
        before = clock.groups(step.uniform) if isinstance(step.uniform, int) else clock.came(step.uniform)
        come = step.stream.coming(clock, at.seq)
        made = Groups((at.batch, come * times), at.device)
        made.times, made.tokens, made.gathered, made.first = times, at, at.gathered, before * times
        made._step = Step(step.stream, before * times, step.tick, step.high, step.tick)
        made._find = lambda: _before(clock, at.row, *_coming(clock, at.row, None, come))
        return made
    which, count = _coming(clock, at.position, at.valid)
    stored = step.stream.groups_before(clock, step.tick)
    counts = Step(step.stream, None, stored * times, stored * times, count * times)
    made = _rows(at, clock.of(at.position), which, count, times, counts)
    rows = torch.arange(which.shape[1] * times, device=which.device)
    place = (stored * times)[:, None] + rows
    made.memo["place"] = torch.where(rows < (count * times)[:, None], place, step.stream.waste(clock, times))
    made._find = lambda: _before(clock, at.position, which, count)
    return made


def _coming(
    clock: Clock, position: Tensor, valid: Tensor | None, most: int | None = None
) -> tuple[Tensor, Tensor]:
    """Of the tokens at int64 positions [b, t] those with which rows come, in order: int64 [b, most]; how many [b]. The
    device is asked for `most` where it is not given."""
    come = clock.come(position)
    if valid is not None:
        come = come & valid
    count = come.sum(1)
    order = torch.sort((~come).to(torch.int8), dim=1, stable=True).indices
    return order[:, : int(count.max()) if most is None else most], count


def _before(clock: Clock, position: Tensor, which: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """The tokens of groups that end with given tokens."""
    assert clock.width is not None
    back = torch.arange(1 - clock.width, 1, device=position.device)
    last = position.gather(1, which)
    old = last[:, :, None] + back
    there = (clock.of(old) == clock.of(last)[:, :, None]) & (old >= 0)
    real = torch.arange(which.shape[1], device=which.device) < count[:, None]
    return which[:, :, None] + back, there & real[:, :, None]


def summarise(x: Tensor, say: Tensor, rows: Groups, past: Any = None) -> Tensor:
    """x[*, t, *H, *D], say[*, t, *H, R] -> [*, groups * R, *H, *D]: softmax(say) over each group weighs its rows of x.

    rows: the groups of the tokens, one row each. past: the stream's open group. Zhu et al. 2021, eq. 3.
    """
    before, at = 0, rows.tokens
    x, say = at.merge(x), at.merge(say)
    if is_past(past):
        x, say, before = past.extend(x, say, rows.tokens)
    behind, rank = x.shape[2:], say.shape[-1]
    heads = math.prod(say.shape[2:-1])
    inside = rows.members()[1][..., None, None]
    xs, ps = rows.fold(x, before), rows.fold(say, before)
    xs = xs.reshape(*xs.shape[:3], heads, math.prod(behind) // heads)
    ps = ps.reshape(*ps.shape[:3], heads, rank)
    if rows.regular is not None and inside.shape[2] < xs.shape[2]:  # a sequence shorter than a group
        xs, ps = xs[:, :, : inside.shape[2]], ps[:, :, : inside.shape[2]]
    wide = torch.float64 if ps.dtype == torch.float64 else torch.float32
    if rows.regular is not None and rows.tokens.valid is None and not x.shape[1] % rows.regular:
        weight = ps.softmax(2, dtype=wide).to(xs.dtype)  # whole groups side by side: nothing to leave out
    else:
        # Selected, not multiplied by 0: what is no member may be anything. A group that is not there sees its rubbish
        # as 0.
        ps = ps.masked_fill(~(inside | ~inside.any(2, keepdim=True)), -torch.inf)
        weight = torch.where(inside, ps.softmax(2, dtype=wide).to(xs.dtype), 0)
        xs = torch.where(inside, xs, 0)
    made: Tensor = _Weighed.apply(*autocast(weight, xs))
    return at.split(made.reshape(len(made), made.shape[1] * rank, *behind))


class _Weighed(torch.autograd.Function):
    """weight [b, s, w, h, r], x [b, s, w, h, d] -> [b, s, r, h, d]. Keeps both as they lie; the product by itself would
    keep a copy of x with its heads outside."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, x: Tensor) -> Tensor:
        ctx.save_for_backward(weight, x)
        return torch.einsum("bswhr,bswhd->bsrhd", weight, x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        weight, x = ctx.saved_tensors
        return torch.einsum("bsrhd,bswhd->bswhr", grad, x), torch.einsum("bswhr,bsrhd->bswhd", weight, grad)
