"""The state-space scan of Mamba-2 (Dao and Gu 2024), in chunks, with its own backward pass.

    dt = softplus(dt_raw + dt_bias)        A = -exp(A_log)                       no clamp
    S_t = exp(dt_t A) S_{t-1} + dt_t u_t (outer) b_t                             S [H, P, N]
    y_t = S_t c_t + D u_t

Dims: B batch, T seq, Q chunk, H heads, P head_dim, G groups (head h reads group h // (H // G)), R heads a group, N state.
A chunk, with ca the cumulative sum of a = dt A inside it, restarted at each document, and x = dt u:
    y_i  = sum_{j <= i, same document} exp(ca_i - ca_j) (c_i . b_j) x_j  +  exp(ca_i) S_in c_i  +  D u_i
    S_out = exp(ca_last) S_in + sum_j exp(ca_last - ca_j) x_j (outer) b_j
Chunks run one after the other: everything of one chunk fits the cache of a core, and no state but S_in is kept.
"""

from __future__ import annotations

from math import prod
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .buffers import Scan, is_past
from .norm import wide
from .rows import At


def ssd(
    u: Tensor,
    dt: Tensor,
    b: Tensor,
    c: Tensor,
    A_log: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    at: At,
    chunk: int = 128,
    past: Any = None,
) -> Tensor:
    """u [B, T, H, P], dt [B, T, H], b and c [B, T, G, N], A_log, D, dt_bias [H] -> y [B, T, H, P] in u's dtype.

    Inside everything is fp32, or fp64 where u is. The result does not depend on `chunk` but for rounding. The state
    restarts with each document; padding rows leave it as it is (dt = 0 after the softplus).
    Raises ValueError where G does not divide H.
    """
    if u.shape[2] % b.shape[2]:
        raise ValueError(f"ssd: {u.shape[2]} heads are not a multiple of {b.shape[2]} groups")
    if is_past(past):
        return _decode(u, dt, b, c, A_log, D, dt_bias, at, chunk, past)
    if at.valid is not None:
        # Selected, not multiplied by 0: padding may hold anything, even NaN.
        valid = at.valid[:, :, None]
        u, b, c = (torch.where(valid[..., None], x, 0) for x in (u, b, c))
        dt = torch.where(valid, dt, -torch.inf)
    # Decays stay as precise as the work asks, whatever autocast makes of the products around.
    with torch.autocast(u.device.type, enabled=False):
        return _Ssd.apply(u, dt, b, c, A_log, D, dt_bias, at.starts, chunk)


# Decays below e^-43 = 2e-19 are raised to it: they are far under the rounding of what they are added to, and a
# product with numbers under 1e-38 costs a processor a hundred times a normal one.
FLOOR = -43.0


class _Seen(NamedTuple):
    """Which rows of a chunk reach which: what documents and causality leave. Each may broadcast over the batch.

    to: [B, 1, Q, Q] 1 where j <= i in one document; enters: [B, 1, Q] 1 where the state that enters the chunk reaches
    i; leaves: [B, 1, Q] 1 where j reaches the chunk's end; stops: bool [B, 1, 1, 1], a document starts in the chunk.
    """

    to: Tensor
    enters: Tensor | None
    leaves: Tensor | None
    stops: Tensor | None


def _seen(starts: Tensor | None, rows: int, like: Tensor) -> _Seen:
    lower = like.new_ones(rows, rows).tril_()[None, None]
    if starts is None:
        return _Seen(lower, None, None, None)
    segment = starts.cumsum(1)
    same = (segment[:, :, None] == segment[:, None]).to(like.dtype)
    enters, leaves = segment == 0, segment == segment[:, -1:]
    return _Seen(
        lower * same[:, None],
        enters.to(like.dtype)[:, None],
        leaves.to(like.dtype)[:, None],
        ~enters[:, -1][:, None, None, None],
    )


class _Rows:
    """The rows of one call, a chunk at a time. Every chunk works in the same memory.

    u [B, T, H, P], b and c [B, T, G, N] in any dtype; dt [B, T, H] after the softplus and A [H] in the dtype of the work.
    Tensors of a chunk are [B, H, Q, P] (rows) or, for products that the heads of a group share, [B, G, Q, R * P] (tall).
    """

    def __init__(
        self, u: Tensor, dt: Tensor, b: Tensor, c: Tensor, A: Tensor, starts: Tensor | None, chunk: int
    ) -> None:
        self.u, self.dt, self.b, self.c, self.A, self.starts, self.chunk = u, dt, b, c, A, starts, chunk
        self.batch, self.seq, self.heads, self.width = u.shape
        self.groups, self.state = b.shape[2:]
        self.each = self.heads // self.groups
        self.memory: dict[str, Tensor] = {}
        self.plain: dict[int, _Seen] = {}

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
        if self.seen.enters is not None:
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


def _scan(rows: _Rows, D: Tensor, state: Tensor | None, states: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """-> y [B, T, H, P] in u's dtype and the last state; `states` [chunks, B, H, P, N] collects the state after each."""
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


class _Ssd(torch.autograd.Function):
    """Keeps its inputs and the states between chunks; everything else is made again in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        u: Tensor,
        dt: Tensor,
        b: Tensor,
        c: Tensor,
        A_log: Tensor,
        D: Tensor,
        dt_bias: Tensor,
        starts: Tensor | None,
        chunk: int,
    ) -> Tensor:
        kind = wide(u[:0]).dtype
        soft = F.softplus(dt.to(kind) + dt_bias)
        rows = _Rows(u, soft, b, c, -A_log.to(kind).exp(), starts, chunk)
        states = soft.new_empty(len(rows.bounds()), rows.batch, rows.heads, rows.width, rows.state)
        y, _ = _scan(rows, D.to(kind), None, states)
        ctx.save_for_backward(u, dt, b, c, A_log, D, dt_bias, starts, states[:-1])
        ctx.chunk = chunk
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        u, dt, b, c, A_log, D, dt_bias, starts, states = ctx.saved_tensors
        inputs = (u, dt, b, c, A_log, D, dt_bias)
        kind = wide(u[:0]).dtype
        raw = dt.to(kind) + dt_bias
        soft, A = F.softplus(raw), -A_log.to(kind).exp()
        rows = _Rows(u, soft, b, c, A, starts, ctx.chunk)
        grad_u, grad_b, grad_c = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (u, b, c))
        grad_dt, grad_a = torch.empty_like(soft), torch.empty_like(soft)
        grad_D = soft.new_zeros(rows.heads)
        ahead: Tensor | None = None
        bounds = rows.bounds()
        for i, (s, e) in reversed(list(enumerate(bounds))):
            rows.load(s, e)
            g = rows.room("g", *rows.rows).copy_(grad[:, s:e].transpose(1, 2))
            after = states[i] if i + 1 < len(bounds) else None
            grads, ahead = _backward_chunk(rows, g, states[i - 1] if i else None, after, ahead)
            grad_x, by_b, by_c, a = grads
            spare = torch.mul(grad_x, rows.u_now, out=rows.room("y", *rows.rows))
            torch.addcmul(spare.sum(-1), a, A[:, None], out=grad_dt[:, s:e].transpose(1, 2))
            grad_D += torch.mul(g, rows.u_now, out=spare).sum((0, 2, 3))
            grad_x.mul_(rows.step[..., None]).addcmul_(g, D.to(kind)[:, None, None])
            grad_u[:, s:e] = grad_x.transpose(1, 2)
            grad_b[:, s:e], grad_c[:, s:e] = by_b.transpose(1, 2), by_c.transpose(1, 2)
            grad_a[:, s:e] = a.transpose(1, 2)
        grad_raw = grad_dt * raw.sigmoid()
        out = (grad_u, grad_raw, grad_b, grad_c, (grad_a * soft).sum((0, 1)) * A, grad_D, grad_raw.sum((0, 1)))
        return *(x.to(old.dtype) for x, old in zip(out, inputs, strict=True)), None, None


def _backward_chunk(
    rows: _Rows, g: Tensor, state: Tensor | None, after: Tensor | None, ahead: Tensor | None
) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], Tensor | None]:
    """Of the loaded chunk: gradients of x, b, c and a, and of the state that entered.

    g [B, H, Q, P]: gradient of y; state, after: what enters and leaves; ahead: gradient of `after`.
    No gradient of the [Q, Q] decays is formed: what ca_i gets is g_i . y_i (as receiver) minus x_j . grad_x_j (as
    sender), and ca_last gets <ahead, after>.
    """
    n = rows.rows[2]
    b, c, flat_g = rows.flat(rows.b_now), rows.flat(rows.c_now), rows.flat(g)
    mixing, between = (rows.room(name, *rows.square) for name in ("mixing", "between"))
    grad_x = rows.room("grad_x", *rows.rows)
    torch.bmm(rows.mix(mixing).mT, flat_g, out=rows.flat(grad_x))
    torch.bmm(flat_g, rows.flat(rows.x).mT, out=rows.flat(between))
    grad_ca = mixing.mul_(between).sum(-1)
    between.mul_(rows.decay)
    grad_scores = between.view(rows.batch, rows.groups, rows.each, n, n)
    grad_scores = torch.sum(grad_scores, 2, out=rows.room("grad_scores", rows.batch, rows.groups, n, n))
    flat_scores = rows.flat(grad_scores.mul_(rows.seen.to))
    grad_b, grad_c = (rows.room(name, *rows.shared) for name in ("grad_b", "grad_c"))
    torch.bmm(flat_scores, b, out=rows.flat(grad_c))
    torch.bmm(flat_scores.mT, c, out=rows.flat(grad_b))
    off = rows.room("off", rows.batch * rows.groups, n, rows.each * rows.width)
    grouped = (rows.batch, rows.groups, rows.each, n)
    if ahead is not None:
        assert after is not None
        wide_ahead = rows.wide(ahead)
        rows.flat(grad_b).baddbmm_(rows.tall(rows.x, rows.leave, "tall"), wide_ahead)
        torch.bmm(b, wide_ahead.mT, out=off)
        grad_x.view(*grouped, -1).addcmul_(rows.by_head(off), rows.leave.view(*grouped, 1))
        leaving = torch.mul(ahead, after, out=rows.room("state", *ahead.shape)).sum((-1, -2))
        ahead = rows.pass_on(ahead, ahead)
    if state is not None:
        tall = rows.tall(g, rows.enter, "tall")
        wide_state = rows.wide(state)
        rows.flat(grad_c).baddbmm_(tall, wide_state)
        torch.bmm(c, wide_state.mT, out=off)
        grad_ca += rows.by_head(off.mul_(tall)).sum(-1).view(grad_ca.shape)
        if ahead is None:
            ahead = torch.empty_like(state)
            torch.bmm(tall.mT, c, out=rows.wide(ahead))
        else:
            rows.wide(ahead).baddbmm_(tall.mT, c)
    grad_ca -= torch.mul(grad_x, rows.x, out=rows.room("y", *rows.rows)).sum(-1)
    if after is not None:
        grad_ca[..., -1] += leaving
    return (grad_x, grad_b, grad_c, (grad_ca.unsqueeze(-2) @ rows.seen.to).squeeze(-2)), ahead


def _decode(
    u: Tensor,
    dt: Tensor,
    b: Tensor,
    c: Tensor,
    A_log: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    at: At,
    chunk: int,
    past: Scan,
) -> Tensor:
    """Rows of a stream: continue from the past's state, and leave it the new one."""
    dt = F.softplus(_as(dt, past.wide) + dt_bias)
    A = _as(A_log, past.wide).exp().neg_()
    if at.step.uniform is not None and at.seq == 1:
        return _one(u, dt, b, c, A, D, past.rows["state"])
    if at.valid is not None:
        valid = at.valid[:, :, None]
        dt = torch.where(valid, dt, 0)
        u, b, c = (torch.where(valid[..., None], x, 0) for x in (u, b, c))
    state, slack, wide_D = past.rows["state"], past.stream.slack, D.to(past.wide)
    if at.step.uniform is not None or not slack:
        y, last = _scan(_Rows(u, dt, b, c, A, at.starts, chunk), wide_D, state)
        state.copy_(last)
        return y
    u, dt, b, starts, fold = _replay(u, dt, b, at, past)
    c = F.pad(c, (0, 0, 0, 0, slack, 0))
    y, _ = _scan(_Rows(u, dt, b, c, A, starts, chunk), wide_D, state)
    # The same rows once more, for the state alone: those that may still be taken back are the identity.
    rows = _Rows(u, torch.where(fold[..., None], dt, 0), b, c, A, starts & fold, u.shape[1])
    rows.load(0, u.shape[1])
    rows.advance(state, state)
    return y[:, slack:]


def _one(u: Tensor, dt: Tensor, b: Tensor, c: Tensor, A: Tensor, D: Tensor, state: Tensor) -> Tensor:
    """One row of each sequence; the state is updated in place. No more than seven calls touch more than [H]."""
    batch, _, heads, width = u.shape
    groups, n = b.shape[2:]
    kind, out = state.dtype, u.dtype
    u, b, c = _as(u, kind), _as(b, kind), _as(c, kind)
    x = (u * dt[..., None]).view(batch * groups, -1, 1)
    tall = state.mul_((dt * A).exp_().view(batch, heads, 1, 1)).view(batch * groups, -1, n)
    tall.baddbmm_(x, b.reshape(batch * groups, 1, n))
    y = torch.bmm(tall, c.reshape(batch * groups, n, 1)).view(batch, 1, heads, width)
    return _as(y.addcmul_(u, _as(D, kind)[:, None]), out)


def _as(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`to`, without the call where nothing changes: a step makes many of them."""
    return x if x.dtype == dtype else x.to(dtype)


def _replay(u: Tensor, dt: Tensor, b: Tensor, at: At, past: Scan) -> tuple[Tensor, ...]:
    """Pending rows and then new ones: u, dt, b, starts, and which of them become part of the state for good.

    `slack` pending rows stand before the new ones, of which the last tick - base were not folded yet; the others
    become the identity. base and the new base follow from the high-water mark alone.
    """
    assert past.pending is not None
    step, slack = at.step, past.stream.slack
    base = (step.high - slack).clamp_min(0)
    after = (torch.maximum(step.high, step.tick + step.count) - slack).clamp_min(0)
    first = slack - (step.tick - base)
    new = {"u": u.flatten(2), "b": b.flatten(2), "dt": dt, "start": at.starts[..., None]}
    old = past.pending.join(at, **new)
    place = past.stream.range(slack + at.seq)
    live = place >= first[:, None]
    fold = live & (place < (first + after - base)[:, None])
    dt = torch.where(live[..., None], old["dt"], 0)
    starts = old["start"][..., 0] & live
    u, b = (old[name].to(x.dtype).unflatten(-1, x.shape[2:]) for name, x in (("u", u), ("b", b)))
    return u, dt, b, starts, fold
