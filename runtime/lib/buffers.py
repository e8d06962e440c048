"""What decoding keeps: three buffers, each a few tensors whose rows are on dim -2 and whose size is fixed.

Law (design/streaming.md): what no later row can tell apart is folded into a base, what a later row may still read is
remembered, the rest is forgotten. Nothing is counted in a buffer: what it holds follows from the stream's coordinates,
so a rollback that restores those restores all.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .rows import At, Keys, Mask

if TYPE_CHECKING:
    from .clocks import Clock
    from .stream import Stream


class _Stateless:
    """The state of a full forward pass: all its attributes and items are itself, and no op finds a past in it."""

    def __getattr__(self, name: str) -> _Stateless:
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __getitem__(self, index: Any) -> _Stateless:
        return self

    def __iter__(self) -> Iterator[_Stateless]:
        while True:
            yield self

    def __repr__(self) -> str:
        return "STATELESS"


STATELESS = _Stateless()


def is_past(past: Any) -> bool:
    """Whether an op was given a buffer."""
    return past is not None and past is not STATELESS


class Slots:
    """The buffers of a module by name, as a tree: values are buffers, other Slots, or lists of Slots."""

    def __init__(self, **named: Any) -> None:
        self.__dict__.update(named)

    def __repr__(self) -> str:
        return f"Slots({', '.join(f'{name}={value!r}' for name, value in self.__dict__.items())})"


class Buffer:
    """Tensors {name: [batch, ...]} that belong to one stream."""

    # Whose rows come: those of tokens, if of no clock.
    clock: Clock | None = None
    times: int = 1

    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        self.rows: dict[str, Tensor] = {}
        stream.buffers.append(self)

    def rollback(self, back: Tensor) -> None:
        """Forget the last back[batch] rows; nothing to do where rows are found by their place in the stream."""


def take_rows(x: Tensor, index: Tensor) -> Tensor:
    """x[b, *lead, n, d] at index int64[b, r] of dim -2 -> [b, *lead, r, d]."""
    index = index.view(len(index), *(1,) * (x.dim() - 3), index.shape[1], 1)
    return x.gather(-2, index.expand(*x.shape[:-2], index.shape[-2], x.shape[-1]))


class Tail(Buffer):
    """The last `keep` rows and, for rollback, `stream.slack` more; right-aligned, so that they meet the new rows.

    shapes: {name: (*lead, width)} of a row, stored as [batch, *lead, keep + slack, width].
    """

    def __init__(
        self, stream: Stream, keep: int, dtypes: dict[str, torch.dtype], *, times: int = 1, **shapes: tuple[int, ...]
    ) -> None:
        super().__init__(stream)
        # A token brings `times` rows at most, so this many may be taken back.
        self.slack = stream.slack * times
        self.keep, self.capacity = keep, keep + self.slack
        for name, shape in shapes.items():
            full = (stream.batch, *shape[:-1], self.capacity, shape[-1])
            self.rows[name] = torch.zeros(full, dtype=dtypes[name], device=stream.device)

    def join(self, at: At, **new: Tensor) -> dict[str, Tensor]:
        """Old rows (all `capacity`) and then new rows [batch, *lead, t, width]; remembers the last of them."""
        joined = {}
        for name, x in new.items():
            old = self.rows[name]
            joined[name] = both = torch.cat((old, x if x.dtype == old.dtype else x.to(old.dtype)), -2)
            if not self.capacity:
                continue
            if at.step.uniform is not None:
                old.copy_(both.narrow(-2, both.shape[-2] - self.capacity, self.capacity))
            else:
                self.rows[name] = take_rows(both, at.step.count[:, None] + self.stream.range(self.capacity))
        return joined

    def rollback(self, back: Tensor) -> None:
        if self.capacity:
            # Rows older than the horizon fall out on the left; what is read there instead is never visible again.
            index = (self.stream.range(self.capacity) - back[:, None]).clamp_min(0)
            self.rows = {name: take_rows(x, index) for name, x in self.rows.items()}


class Window(Tail):
    """The last taps - 1 rows of a convolution's input [batch, t, channels]."""

    def __init__(self, stream: Stream, channels: int, taps: int) -> None:
        super().__init__(stream, taps - 1, {"x": stream.dtype}, x=(channels,))

    def moved_by(self, x: Tensor, at: At) -> Tensor | None:
        """The rows before [batch, taps - 1, channels], for a kernel that moves them on by x itself; None where x is not
        one row of each batch row, or where the rows before may still be taken back."""
        kept = self.rows["x"]
        everyday = at.seq == 1 and at.starts is None and at.valid is None and at.step.uniform is not None
        return kept if everyday and self.keep and not self.slack and x.dtype == kept.dtype else None

    def extend(self, x: Tensor, at: At) -> Tensor:
        """[batch, taps - 1 + t, channels]: the rows before, then these. Rows that are not valid are the last."""
        joined = self.join(at, x=x)["x"]
        return joined[:, self.stream.slack :] if self.stream.slack else joined


class Open(Tail):
    """The rows of the open group of tokens: the last width - 1 tokens of x[batch, t, *] and say[batch, t, *]."""

    def __init__(self, stream: Stream, keep: int, x: int, say: int) -> None:
        super().__init__(stream, keep, {"x": stream.dtype, "say": stream.dtype}, x=(x,), say=(say,))

    def extend(self, x: Tensor, say: Tensor, at: At) -> tuple[Tensor, Tensor, int]:
        """x and say with the rows before them in front, and how many these are."""
        joined = self.join(at, x=x.flatten(2), say=say.flatten(2))
        both = [joined[name].unflatten(2, new.shape[2:]) for name, new in (("x", x), ("say", say))]
        return both[0], both[1], self.capacity


class Cache(Buffer):
    """Keys and values of one attention source, as [batch, heads, rows, width].

    keep None: every row of the stream, at its own place. keep n: for a causal window of n + 1, the last n rows.
    clock: whose rows the keys are, `times` for each group; None for tokens.
    """

    def __init__(
        self,
        stream: Stream,
        keep: int | None,
        k: tuple[int, ...],
        v: tuple[int, ...],
        clock: Clock | None = None,
        times: int = 1,
    ) -> None:
        super().__init__(stream)
        self.keep, self.clock, self.times = keep, clock, times
        if keep is None:
            # One place more than rows: what is not valid is written there and never read.
            for name, (heads, width) in {"k": k, "v": v}.items():
                full = (stream.batch, heads, stream.waste(clock, times) + 1, width)
                self.rows[name] = torch.zeros(full, dtype=stream.dtype, device=stream.device)
        else:
            self.tail = Tail(stream, keep, {"k": stream.dtype, "v": stream.dtype}, times=times, k=k, v=v)
            self.tail.clock, self.tail.times = clock, times

    def extend(self, k: Tensor, v: Tensor, at: At, mask: Mask, queries: At) -> tuple[Tensor, Tensor, Tensor | str]:
        """Remember k, v [b, t, V, D]; -> all keys and values [b, V, n, D] and what the queries see of them."""
        k, v = self.store(k, v, at)
        return k, v, self._seen(at, mask, k.shape[2], queries)

    def store(self, k: Tensor, v: Tensor, at: At) -> tuple[Tensor, Tensor]:
        """Remember k, v [b, t, V, D]; -> all keys and values [b, V, n, D]."""
        k, v = k.transpose(1, 2), v.transpose(1, 2)
        if at.valid is not None:
            k, v = (torch.where(at.valid[:, None, :, None], x, 0) for x in (k, v))
        if self.keep is not None:
            both = self.tail.join(at, k=k, v=v)
            return both["k"], both["v"]
        tick, t = at.step.uniform, at.seq
        own_k, own_v = self.rows["k"], self.rows["v"]
        if isinstance(tick, Tensor):
            place = tick + self.stream.range(t)
            own_k.index_copy_(2, place, k.to(own_k.dtype))
            own_v.index_copy_(2, place, v.to(own_v.dtype))
            end = self.stream.waste(self.clock, self.times)
        elif tick is not None:
            own_k[:, :, tick : tick + t] = k
            own_v[:, :, tick : tick + t] = v
            end = tick + t
        else:
            place = self.stream.places(at)[:, None, :, None]
            own_k.scatter_(2, place.expand(k.shape), k.to(own_k.dtype))
            own_v.scatter_(2, place.expand(v.shape), v.to(own_v.dtype))
            end = self.stream.end(at)
        return own_k[:, :, :end], own_v[:, :, :end]

    def _seen(self, at: At, mask: Mask, count: int, queries: At) -> Tensor | str:
        """What the queries see of `count` keys, worked out once a step for all layers alike."""
        name = (mask, *self.name)
        if name not in queries.memo:
            queries.memo[name] = self._see(at, mask, count, queries)
        return queries.memo[name]

    @property
    def name(self) -> tuple[Any, ...]:
        """What is the same for two caches whose keys have the same coordinates in a step."""
        return self.keep, self.clock, self.times

    def _see(self, at: At, mask: Mask, count: int, queries: At) -> Tensor | str:
        tick, t = at.step.uniform, at.seq
        if queries is at and isinstance(tick, int) and mask.interval and mask.ahead in (0, None):
            first = 0 if self.keep is None else tick - self.keep
            if t == 1 and first >= 0 and (mask.behind is None or mask.behind >= tick - first):
                return "all"
            if tick == 0 and self.keep is None and mask.behind is None:
                return "all" if mask.ahead is None else "causal"
        return mask.visible(queries, self.keys(at, count))

    def keys(self, at: At, count: int) -> Keys:
        """The coordinates of the `count` keys that `extend` gives."""
        return self.stream.keys(at, self.keep, count, self.clock, self.times)


class Scan(Buffer):
    """The state [batch, heads, head_dim, state] of a scan, and the inputs that may still be taken back.

    The state is the fold of all rows older than `slack` ticks below the high-water mark: a fold has no inverse, so
    younger rows stay in `pending` and are folded anew in every step.
    """

    def __init__(self, stream: Stream, heads: int, head_dim: int, groups: int, state: int) -> None:
        super().__init__(stream)
        self.wide = torch.float64 if stream.dtype == torch.float64 else torch.float32
        shape = (stream.batch, heads, head_dim, state)
        self.rows["state"] = torch.zeros(shape, dtype=self.wide, device=stream.device)
        dtypes = {"u": stream.dtype, "b": stream.dtype, "dt": self.wide, "start": torch.bool}
        widths: dict[str, Any] = {"u": (heads * head_dim,), "b": (groups * state,), "dt": (heads,), "start": (1,)}
        self.pending = Tail(stream, 0, dtypes, **widths) if stream.slack else None
