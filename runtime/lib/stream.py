"""Decoding state of a model: coordinates of every row it was given, and the buffers of its layers.

A stream has two forms. Uniform: every batch row holds the same number of rows of one document and no rollback is
kept; places are numbers and buffers are written in place. General: everything is an index tensor [batch]. A uniform
stream becomes general at the first event that needs it, and stays so. A step of a uniform stream can be captured
(`capture.py`): then its place is one number of the device, and all rows that a buffer may ever hold are looked at.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .buffers import Buffer, Cache, Open, Scan, Window
from .clocks import Clock, Groups
from .rows import At, Keys, Step


class Snapshot(NamedTuple):
    """A copy of a stream's state."""

    uniform: int | None
    own: dict[str, Tensor]
    buffers: list[dict[str, Tensor]]


class Stream:
    """State of `batch` sequences of at most `max_length` tokens, of which the last `rollback` can be taken back.

    dtype: of what buffers keep (scan states are at least fp32). A token fed is a tick, one row of each buffer.
    """

    def __init__(
        self,
        model: Any,
        batch: int,
        max_length: int,
        rollback: int = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        for name, value, least in (("batch", batch, 1), ("max_length", max_length, 1), ("rollback", rollback, 0)):
            if value < least:
                raise ValueError(f"stream: {name} is {value}, must be at least {least}")
        self.batch, self.max_length, self.slack = batch, max_length, rollback
        self.dtype, self.device = dtype, torch.device(device)
        self.buffers: list[Buffer] = []
        self.uniform: int | None = 0 if rollback == 0 else None
        self.running = False
        # The clocks that steps asked for groups of.
        self.clocks: dict[Clock, None] = {}
        # `tick`: rows stored; `high`: the most ever stored; per place its position and document, one place for waste.
        self.own = {
            name: torch.zeros(shape, dtype=torch.int64, device=self.device)
            for name, shape in {
                "tick": (batch,),
                "high": (batch,),
                "position": (batch, max_length + 1),
                "document": (batch, max_length + 1),
            }.items()
        }
        self.state = model.slots(self)

    # What a model's `slots` asks for.

    def window(self, channels: int, taps: int) -> Window:
        """The last taps - 1 rows of a convolution over `channels`."""
        return Window(self, channels, taps)

    def cache(
        self,
        k: tuple[int, int],
        v: tuple[int, int],
        keep: int | None = None,
        clock: Clock | None = None,
        times: int = 1,
    ) -> Cache:
        """Keys and values, rows (heads, width), of tokens or of a clock; `keep`: how many rows before the newest are
        read, None for all."""
        return Cache(self, keep, k, v, clock, times)

    def open(self, keep: int, x: int, say: int) -> Open:
        """The rows of the group of tokens that is open: `keep` tokens, x and say numbers each."""
        return Open(self, keep, x, say)

    def scan(self, heads: int, head_dim: int, groups: int, state: int) -> Scan:
        """The state of an ssd."""
        return Scan(self, heads, head_dim, groups, state)

    # A step.

    def begin(self, seq: int, count: Tensor | None = None, start: Tensor | None = None) -> At:
        """Coordinates of the next `seq` rows; `count` int[batch] of them are valid, `start` bool[batch, seq] resets.

        Raises ValueError for counts out of range and where max_length is passed, before anything changes.
        """
        if self.running:
            raise RuntimeError("stream: the step before this one failed half-way; restore a snapshot of all rows")
        if count is not None:
            count = torch.as_tensor(count, dtype=torch.int64, device=self.device)
            if count.shape != (self.batch,) or bool(((count < 0) | (count > seq)).any()):
                raise ValueError(f"stream: count is {count.tolist()}, must be {self.batch} numbers from 0 to {seq}")
            if bool((count == seq).all()):
                count = None
        if start is not None:
            start = torch.as_tensor(start, device=self.device)
            if start.shape != (self.batch, seq) or start.dtype != torch.bool:
                raise ValueError(
                    f"stream: start is {start.dtype}{list(start.shape)}, must be bool[{self.batch}, {seq}]"
                )
            if not bool(start.any()):
                start = None
        if self.uniform is not None and count is None and start is None:
            if self.uniform + seq > self.max_length:
                self._full(self.uniform + seq)
            self.running = True
            own = self.own
            return At.uniform(
                (self.batch, seq), self.device, Step(self, self.uniform, own["tick"], own["high"], own["tick"])
            )
        return self._begin_ragged(seq, count, start)

    def begin_anywhere(self, place: Tensor) -> At:
        """Coordinates of one more row of each sequence, behind `place` int64 [1] others: what is done with them does
        not depend on where they are, but for what `coming` says. They do not begin a step: `begin` does, and checks."""
        own = self.own
        return At.uniform((self.batch, 1), self.device, Step(self, place, own["tick"], own["high"], own["tick"]))

    def coming(self, clock: Clock, seq: int) -> int:
        """How many groups of a clock come with the next `seq` rows, where batch rows agree."""
        assert self.uniform is not None
        self.clocks[clock] = None
        return clock.groups(self.uniform + seq) - clock.groups(self.uniform)

    def _begin_ragged(self, seq: int, count: Tensor | None, start: Tensor | None) -> At:
        if count is None:
            count = torch.full((self.batch,), seq, dtype=torch.int64, device=self.device)
        tick = self.ticks()
        if bool((tick + count > self.max_length).any()):
            self._full(int((tick + count).max()))
        self._generalise()
        self.running = True
        place = tick[:, None] + self.range(seq)
        valid = self.range(seq) < count[:, None]
        starts = place == 0
        if start is not None:
            starts = starts | start
        starts = starts & valid
        last = (tick - 1).clamp_min(0)[:, None]
        # Rows continue the last row's document until a start; `since` counts from the newest start, if any.
        newest = torch.where(starts, self.range(seq), -1).cummax(1).values
        since = self.range(seq) - newest
        continued = self.own["position"].gather(1, last) + 1 + self.range(seq)
        position = torch.where(newest >= 0, since, continued)
        document = self.own["document"].gather(1, last) + starts.cumsum(1)
        step = Step(self, None, tick, self.own["high"], count)
        at = At.ragged((self.batch, seq), step, Keys(position, document, valid), starts)
        # A row that is not valid goes to the last place, which is never read.
        place = torch.where(valid, place, self.max_length)
        self.own["position"].scatter_(1, place, position)
        self.own["document"].scatter_(1, place, document)
        at.memo["place"] = place
        return at

    def commit(self, at: At) -> None:
        """The step is over: its rows are part of the past."""
        if isinstance(at.step.uniform, int):
            self.uniform = at.step.uniform + at.seq
        else:
            self.own["tick"] = at.step.tick + at.step.count
            self.own["high"] = torch.maximum(self.own["high"], self.own["tick"])
        self.running = False

    def _full(self, needed: int) -> None:
        raise ValueError(f"stream: {needed} tokens do not fit in max_length = {self.max_length}")

    # What buffers ask in a step.

    def range(self, n: int) -> Tensor:
        return torch.arange(n, device=self.device)

    def places(self, at: At) -> Tensor:
        """int64 [batch, t]: where new rows go in a buffer that keeps all."""
        return at.memo["place"]

    def end(self, at: At) -> int:
        """How many places are in use after the step, in the longest batch row."""
        if "end" not in at.memo:
            at.memo["end"] = int((at.step.tick + at.step.count).max())
        return at.memo["end"]

    def waste(self, clock: Clock | None = None, times: int = 1) -> int:
        """The place behind all rows of tokens, or of a clock: what is not valid is written there."""
        return self.max_length if clock is None else clock.most(self.max_length) * times

    def groups_before(self, clock: Clock, tick: Tensor) -> Tensor:
        """int64 [batch]: how many groups of a clock came with the first tick[batch] tokens."""
        return self._came(clock, tick).sum(1)

    def _came(self, clock: Clock, tick: Tensor) -> Tensor:
        held = self.own["position"][:, : self.max_length]
        return clock.come(held) & (self.range(self.max_length) < tick[:, None])

    def keys(self, at: At, keep: int | None, count: int, clock: Clock | None = None, times: int = 1) -> Keys:
        """Coordinates of the `count` keys of a cache: all places, or the newest before the step and then its rows."""
        tick = at.step.uniform
        if isinstance(tick, Tensor):
            position = (self.range(count) if keep is None else self.range(count) + (tick - keep))[None]
            return Keys(position, torch.zeros_like(position), (position >= 0) & (position < tick + at.seq))
        if tick is not None:
            first = 0 if keep is None else tick - keep
            position = (self.range(count) + first)[None]
            return Keys(position, torch.zeros_like(position), None if first >= 0 else position >= 0)
        own = self._rows(at, clock, times) if clock is not None and isinstance(at, Groups) else self.own
        if keep is None:
            used = self.range(count) < (at.step.tick + at.step.count)[:, None]
            return Keys(own["position"][:, :count], own["document"][:, :count], used)
        place = at.step.tick[:, None] + self.range(count - at.seq) - (count - at.seq)
        index = place.clamp(0, own["position"].shape[1] - 1)
        new = at.keys()
        assert new.valid is not None and new.document is not None
        return Keys(
            torch.cat((own["position"].gather(1, index), new.position), 1),
            torch.cat((own["document"].gather(1, index), new.document), 1),
            torch.cat((place >= 0, new.valid), 1),
        )

    def _rows(self, at: Groups, clock: Clock, times: int) -> dict[str, Tensor]:
        """Position and document of the rows of a clock in their places, after the step; one place for waste."""
        name = ("rows", clock, times)
        if name not in at.memo:
            came = self._came(clock, at.tokens.step.tick + at.tokens.step.count)
            most = self.waste(clock)
            order = torch.sort((~came).to(torch.int8), dim=1, stable=True).indices[:, :most]
            group = clock.of(self.own["position"][:, : self.max_length]).gather(1, order)
            position = (group[:, :, None] * times + self.range(times)).flatten(1)
            document = self.own["document"].gather(1, order).repeat_interleave(times, 1)
            at.memo[name] = {n: F.pad(x, (0, 1)) for n, x in (("position", position), ("document", document))}
        return at.memo[name]

    # What a user may ask between steps.

    def ticks(self) -> Tensor:
        """int64 [batch]: tokens held by each row."""
        if self.uniform is not None:
            return torch.full((self.batch,), self.uniform, dtype=torch.int64, device=self.device)
        return self.own["tick"].clone()

    @torch.inference_mode()
    def rollback(self, n: int | Tensor) -> None:
        """Take back the last n tokens, of every row or n[batch] of each.

        Raises ValueError below `rollback` ticks under the high-water mark: older rows are no longer there.
        """
        back = torch.as_tensor(n, dtype=torch.int64, device=self.device).expand(self.batch)
        tick = self.ticks()
        high = tick if self.uniform is not None else self.own["high"]
        if bool((back < 0).any()):
            raise ValueError(f"stream: cannot roll back {back.tolist()} tokens, must be at least 0")
        allowed = torch.minimum(tick, tick - (high - self.slack)).clamp_min(0)
        if bool((back > allowed).any()):
            raise ValueError(
                f"stream: cannot roll back {back.tolist()} tokens, rows keep {allowed.tolist()}"
                f" (rollback = {self.slack}, counted from the most tokens a row has held)"
            )
        if not bool(back.any()):
            return
        for buffer in self.buffers:
            if buffer.clock is None:
                buffer.rollback(back)
            else:
                came = [self.groups_before(buffer.clock, t) for t in (tick, tick - back)]
                buffer.rollback((came[0] - came[1]) * buffer.times)
        self.own["tick"] = tick - back

    @torch.inference_mode()
    def snapshot(self) -> Snapshot:
        """A copy of the state, for `restore`."""
        return Snapshot(self.uniform, _copy(self.own), [_copy(buffer.rows) for buffer in self.buffers])

    @torch.inference_mode()
    def restore(self, snapshot: Snapshot, rows: Tensor | list[int] | None = None) -> None:
        """Go back to a snapshot of this stream: all rows, or only `rows` (indices or bool [batch])."""
        if snapshot.own["tick"].shape != (self.batch,):
            raise ValueError(f"stream: the snapshot has {len(snapshot.own['tick'])} rows, the stream {self.batch}")
        if rows is None:
            self.uniform, self.own = snapshot.uniform, _copy(snapshot.own)
            for buffer, saved in zip(self.buffers, snapshot.buffers, strict=True):
                buffer.rows = _copy(saved)
            self.running = False
            return
        own = snapshot.own
        if self.uniform is None or snapshot.uniform != self.uniform:
            self._generalise()
            if snapshot.uniform is not None:
                own = self._spelled(own, snapshot.uniform)
        rows = torch.as_tensor(rows, device=self.device)
        rows = rows.nonzero()[:, 0] if rows.dtype == torch.bool else rows.long()
        for mine, saved in zip([self.own, *(b.rows for b in self.buffers)], [own, *snapshot.buffers], strict=True):
            for name in mine:
                mine[name] = mine[name].index_copy(0, rows, saved[name][rows])

    @torch.inference_mode()
    def select(self, rows: Tensor | list[int]) -> None:
        """Batch row i becomes what row rows[i] was: permute, copy (beams) or drop rows."""
        rows = torch.as_tensor(rows, dtype=torch.int64, device=self.device)
        if rows.dim() != 1 or not len(rows) or bool(((rows < 0) | (rows >= self.batch)).any()):
            raise ValueError(f"stream: rows are {rows.tolist()}, must be indices from 0 to {self.batch - 1}")
        self.batch = len(rows)
        for mine in (self.own, *(buffer.rows for buffer in self.buffers)):
            for name, x in mine.items():
                mine[name] = x.index_select(0, rows)

    def bytes(self) -> int:
        """Bytes of all that is kept; fixed by the model, batch, max_length and rollback."""
        kept = (self.own, *(buffer.rows for buffer in self.buffers))
        return sum(x.numel() * x.element_size() for mine in kept for x in mine.values())

    def _generalise(self) -> None:
        """Spell out in coordinates what the uniform form knows from one number."""
        if self.uniform is not None:
            self.own = self._spelled(self.own, self.uniform)
            self.uniform = None

    def _spelled(self, own: dict[str, Tensor], ticks: int) -> dict[str, Tensor]:
        held = torch.full_like(own["tick"], ticks)
        position = self.range(self.max_length + 1).expand(len(held), -1).clone()
        return {"tick": held, "high": held.clone(), "position": position, "document": torch.ones_like(position)}


def _copy(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x.clone() for name, x in tensors.items()}
