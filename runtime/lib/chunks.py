"""The chunks of a state-space scan: what one chunk of rows gives, and what it hands to the next.

Dims: B batch, T seq, Q chunk, H heads, P head_dim, G groups (head h reads group h // (H // G)), R heads a group,
N state. A chunk, with ca the cumulative sum of a = dt A inside it, restarted at each document, and x = dt u:
    y_i  = sum_{j <= i, same document} exp(ca_i - ca_j) (c_i . b_j) x_j  +  exp(ca_i) S_in c_i  +  D u_i
    S_out = exp(ca_last) S_in + sum_j exp(ca_last - ca_j) x_j (outer) b_j
Chunks run one after the other: everything of one chunk fits the cache of a core, and no state but S_in is kept.
"""

from __future__ import annotations

from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

# Decays below e^-43 = 2e-19 are raised to it: they are far under the rounding of what they are added to, and a
# product with numbers under 1e-38 costs a processor a hundred times a normal one.
FLOOR = -43.0


class Seen(NamedTuple):
    """Which rows of a chunk reach which: what documents and causality leave. Each may broadcast over the batch.

    to: [B, 1, Q, Q] 1 where j <= i in one document; enters: [B, 1, Q] 1 where the state that enters the chunk reaches
    i; leaves: [B, 1, Q] 1 where j reaches the chunk's end; stops: bool [B, 1, 1, 1], a document starts in the chunk.
    """

    to: Tensor
    enters: Tensor | None
    leaves: Tensor | None
    stops: Tensor | None


def _seen(starts: Tensor | None, rows: int, like: Tensor) -> Seen:
    lower = like.new_ones(rows, rows).tril_()[None, None]
    if starts is None:
        return Seen(lower, None, None, None)
    segment = starts.cumsum(1)
    same = (segment[:, :, None] == segment[:, None]).to(like.dtype)
    enters, leaves = segment == 0, segment == segment[:, -1:]
    return Seen(
        lower * same[:, None],
        enters.to(like.dtype)[:, None],
        leaves.to(like.dtype)[:, None],
        ~enters[:, -1][:, None, None, None],
    )


class Rows:
    """The rows of one call, a chunk at a time. Every chunk works in the same memory.

    u [B, T, H, P], b and c [B, T, G, N] in any dtype; dt [B, T, H] after the softplus and A [H] in that of the work.
    Tensors of a chunk are [B, H, Q, P] (rows) or, for products that heads of a group share, [B, G, Q, R * P] (tall).
    """

    def __init__(
        self, u: Tensor, dt: Tensor, b: Tensor, c: Tensor, A: Tensor, starts: Tensor | None, chunk: int
    ) -> None:
        self.u, self.dt, self.b, self.c, self.A, self.starts, self.chunk = u, dt, b, c, A, starts, chunk
        self.batch, self.seq, self.heads, self.width = u.shape
        self.groups, self.state = b.shape[2:]
        self.each = self.heads // self.groups
        self.memory: dict[str, Tensor] = {}
        self.plain: dict[int, Seen] = {}

    def room(self, name: str, *shape: int) -> Tensor:
        """Memory for one intermediate, the same in every chunk; holds whatever was there."""
        size = prod(shape)
        if name not in self.memory or self.memory[name].numel() < size:
            self.memory[name] = self.dt.new_empty(size)
        return self.memory[name][:size].view(shape)

    def bounds(self) -> list[tuple[int, int]]:
        return [(s, min(s + self.chunk, self.seq)) for s in range(0, self.seq, self.chunk)]

    def flat(self, x: Tensor) -> Tensor:
        """[B, H or G, ...] -> [B * .., ...], for bmm."""
        return x.view(-1, *x.shape[2:])

    def wide(self, state: Tensor) -> Tensor:
        """A state [B, H, P, N] with the heads of a group side by side, [B * G, R * P, N]."""
        return state.view(self.batch * self.groups, self.each * self.width, self.state)

    def load(self, s: int, e: int) -> None:
        """Rows s..e: x = dt u, decays, scores, and how the entering state and the leaving one are reached."""
        n = e - s
        self.rows = (self.batch, self.heads, n, self.width)
        self.shared = (self.batch, self.groups, n, self.state)
        self.square = (self.batch, self.heads, n, n)
        if self.starts is None:
            if n not in self.plain:
                self.plain[n] = _seen(None, n, self.dt)
            self.seen = self.plain[n]
        else:
            self.seen = _seen(self.starts[:, s:e], n, self.dt)
        self.step = self.dt[:, s:e].transpose(1, 2).contiguous()
        self.u_now = self.u[:, s:e].transpose(1, 2)
        self.x = torch.mul(self.u_now, self.step[..., None], out=self.room("x", *self.rows))
        self.b_now = self.room("b", *self.shared).copy_(self.b[:, s:e].transpose(1, 2))
        self.c_now = self.room("c", *self.shared).copy_(self.c[:, s:e].transpose(1, 2))
        # A product with 0 and 1, so that nothing of another document enters even the rounding of the sums.
        ca = ((self.step * self.A[:, None]).unsqueeze(-2) @ self.seen.to.mT).squeeze(-2)
        last = ca[..., -1:]
        self.enter, self.leave = ca.clamp_min(FLOOR).exp_(), (last - ca).clamp_(FLOOR, 0).exp_()
        self.through = self.enter[..., -1:, None]
        if self.seen.enters is not None and self.seen.leaves is not None:
            self.enter, self.leave = self.enter * self.seen.enters, self.leave * self.seen.leaves
        # Above the diagonal and between documents the difference may be positive; it is cut to 0 and its score is 0.
        self.decay = torch.sub(ca[..., :, None], ca[..., None, :], out=self.room("decay", *self.square))
        self.decay.clamp_(FLOOR, 0).exp_()
        scores = self.room("scores", self.batch, self.groups, n, n)
        torch.bmm(self.flat(self.c_now), self.flat(self.b_now).mT, out=self.flat(scores))
        self.scores = scores.mul_(self.seen.to)

    def mix(self, out: Tensor) -> Tensor:
        """exp(ca_i - ca_j) (c_i . b_j), [B * H, Q, Q]."""
        by_group = (self.batch, self.groups, self.each, *self.square[2:])
        torch.mul(self.decay.view(by_group), self.scores[:, :, None], out=out.view(by_group))
        return self.flat(out)

    def tall(self, x: Tensor, scale: Tensor, name: str) -> Tensor:
        """x [B, H, Q, P] times scale [B, H, Q], heads of a group side by side: [B * G, Q, R * P]."""
        out = self.room(name, self.batch, self.groups, self.rows[2], self.each, self.width)
        grouped = (self.batch, self.groups, self.each, self.rows[2])
        torch.mul(x.view(*grouped, -1), scale.view(*grouped, 1), out=out.transpose(2, 3))
        return out.view(-1, self.rows[2], self.each * self.width)

    def by_head(self, tall: Tensor) -> Tensor:
        """[B * G, Q, R * P] -> a view [B, G, R, Q, P]."""
        return tall.view(self.batch, self.groups, self.rows[2], self.each, self.width).transpose(2, 3)

    def pass_on(self, state: Tensor, out: Tensor) -> Tensor:
        """exp(ca_last) S, or 0 where a document starts in the chunk."""
        torch.mul(state, self.through, out=out)
        # Selected, not multiplied by 0: the state of another document may be anything, even inf.
        return out if self.seen.stops is None else out.masked_fill_(self.seen.stops, 0)

    def advance(self, state: Tensor | None, out: Tensor) -> Tensor:
        """The state that leaves the chunk, into out (which may be the one that entered)."""
        tall = self.tall(self.x, self.leave, "tall")
        if state is None:
            torch.bmm(tall.mT, self.flat(self.b_now), out=self.wide(out))
        else:
            self.wide(self.pass_on(state, out)).baddbmm_(tall.mT, self.flat(self.b_now))
        return out

    def output(self, state: Tensor | None) -> Tensor:
        """y of the chunk without D u, [B, H, Q, P]; uses up the decays."""
        y = self.room("y", *self.rows)
        torch.bmm(self.mix(self.decay), self.flat(self.x), out=self.flat(y))
        if state is not None:
            off = self.room("off", self.batch * self.groups, self.rows[2], self.each * self.width)
            torch.bmm(self.flat(self.c_now), self.wide(state).mT, out=off)
            grouped = (self.batch, self.groups, self.each, self.rows[2])
            y.view(*grouped, -1).addcmul_(self.by_head(off), self.enter.view(*grouped, 1))
        return y


def run(rows: Rows, D: Tensor, state: Tensor | None, states: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """-> y [B, T, H, P] in u's dtype and the last state; `states` [chunks, B, H, P, N] gets that after each."""
    y = torch.empty_like(rows.u, memory_format=torch.contiguous_format)
    spare = state
    for i, (s, e) in enumerate(rows.bounds()):
        rows.load(s, e)
        part = rows.output(state)
        torch.addcmul(part.transpose(1, 2), rows.u[:, s:e], D[:, None], out=y[:, s:e])
        if states is not None:
            spare = states[i]
        elif i == 0:
            spare = rows.dt.new_empty(rows.batch, rows.heads, rows.width, rows.state)
        assert spare is not None
        state = rows.advance(state, spare)
    assert state is not None
    return y, state
