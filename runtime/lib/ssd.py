"""The state-space scan of Mamba-2 (Dao and Gu 2024), in chunks, with its own backward pass.

    dt = softplus(dt_raw + dt_bias)        A = -exp(A_log)                       no clamp
    S_t = exp(dt_t A) S_{t-1} + dt_t u_t (outer) b_t                             S [H, P, N]
    y_t = S_t c_t + D u_t

Dims and the form by chunks: `chunks.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .buffers import Scan, is_past
from .chunks import Rows, run
from .kernels import FLOATS
from .mesh import Group
from .norm import wide
from .rows import At
from .spmd import R, V, all_gather

# (u, dt, b, c, A_log, D, dt_bias, first, state, update) -> y and the final state; dt is before the softplus, `first` as
# of `_first`, `state` fp32 [B, H, P, N] or None, over which the final one is written if `update`.
Kernel = Callable[..., tuple[Tensor, Tensor]]


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
    kernel: Kernel | None = None,
) -> Tensor:
    """u [B, T, H, P], dt [B, T, H], b and c [B, T, G, N], A_log, D, dt_bias [H] -> y [B, T, H, P] in u's dtype.

    Inside everything is fp32, or fp64 where u is. The result does not depend on `chunk` but for rounding. The state
    restarts with each document; padding rows leave it as it is (dt = 0 after the softplus). `kernel` computes what its
    dtypes allow, in chunks of its own.
    Raises ValueError where G does not divide H.
    """
    if u.shape[-2] % b.shape[-2]:
        raise ValueError(f"ssd: {u.shape[-2]} heads are not a multiple of {b.shape[-2]} groups")
    u, dt, b, c = (at.merge(x) for x in (u, dt, b, c))
    kernel = kernel if _suits(u, dt, b, c) else None
    if is_past(past):
        return _decode(u, dt, b, c, A_log, D, dt_bias, at, chunk, past, kernel)
    if at.valid is not None:
        # Selected, not multiplied by 0: padding may hold anything, even NaN.
        valid = at.valid[:, :, None]
        u, b, c = (torch.where(valid[..., None], x, 0) for x in (u, b, c))
        dt = torch.where(valid, dt, -torch.inf)
    # Decays stay as precise as the work asks, whatever autocast makes of the products around.
    with torch.autocast(u.device.type, enabled=False):
        if kernel is not None:
            return at.split(kernel(u, dt, b, c, A_log, D, dt_bias, _first(at.starts, at.memo))[0])
        return at.split(_Ssd.apply(u, dt, b, c, A_log, D, dt_bias, at.starts, chunk))


def _suits(u: Tensor, dt: Tensor, b: Tensor, c: Tensor) -> bool:
    """Whether a kernel takes these: its products are of one dtype, and its sums are fp32."""
    return u.dtype == b.dtype == c.dtype and u.dtype in FLOATS and dt.dtype in FLOATS and u.numel() > 0


def _first(starts: Tensor | None, memo: dict[Any, Any] | None = None) -> Tensor | None:
    """int32 [B, T]: the row at which the document of each row starts, -1 where it continues what was before these."""
    if starts is None:
        return None
    memo = {} if memo is None else memo
    if "first" not in memo:
        row = torch.arange(starts.shape[1], device=starts.device)
        memo["first"] = torch.where(starts, row, -1).cummax(1).values.int()
    return memo["first"]


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
        rows = Rows(u, soft, b, c, -A_log.to(kind).exp(), starts, chunk)
        states = soft.new_empty(len(rows.bounds()), rows.batch, rows.heads, rows.width, rows.state)
        y, _ = run(rows, D.to(kind), None, states)
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
        rows = Rows(u, soft, b, c, A, starts, ctx.chunk)
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
    rows: Rows, g: Tensor, state: Tensor | None, after: Tensor | None, ahead: Tensor | None
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
    kernel: Kernel | None,
) -> Tensor:
    """Rows of a stream: continue from the past's state, and leave it the new one."""
    state, slack = past.rows["state"], past.stream.slack
    if kernel is None and at.step.uniform is not None and at.seq == 1:
        soft = F.softplus(_as(dt, past.wide) + dt_bias)
        return _one(u, soft, b, c, _as(A_log, past.wide).exp().neg_(), D, state)
    if at.valid is not None:
        valid = at.valid[:, :, None]
        dt = torch.where(valid, dt, -torch.inf)
        u, b, c = (torch.where(valid[..., None], x, 0) for x in (u, b, c))
    weights = A_log, D, dt_bias
    if at.step.uniform is not None or not slack:
        if kernel is not None:
            return kernel(u, dt, b, c, *weights, _first(at.starts, at.memo), state, True)[0]
        y, last = _behind(u, dt, b, c, weights, at.starts, chunk, state)
        state.copy_(last)
        return y
    u, dt, b, starts, fold = _replay(u, dt, b, at, past)
    c = F.pad(c, (0, 0, 0, 0, slack, 0))
    # The same rows once more, for the state alone: those that may still be taken back are the identity.
    kept, stops = torch.where(fold[..., None], dt, -torch.inf), starts & fold
    if kernel is not None:
        y, _ = kernel(u, dt, b, c, *weights, _first(starts), state)
        kernel(u, kept, b, c, *weights, _first(stops), state, True)
        return y[:, slack:]
    y, _ = _behind(u, dt, b, c, weights, starts, chunk, state)
    rows = Rows(u, F.softplus(kept + dt_bias), b, c, -_as(A_log, past.wide).exp(), stops, u.shape[1])
    rows.load(0, u.shape[1])
    rows.advance(state, state)
    return y[:, slack:]


def _behind(
    u: Tensor,
    dt: Tensor,
    b: Tensor,
    c: Tensor,
    weights: tuple[Tensor, Tensor, Tensor],
    starts: Tensor | None,
    chunk: int,
    state: Tensor,
) -> tuple[Tensor, Tensor]:
    """The scan of rows behind a state, and the last state; dt is before the softplus."""
    A_log, D, dt_bias = (_as(x, state.dtype) for x in weights)
    soft = F.softplus(_as(dt, state.dtype) + dt_bias)
    return run(Rows(u, soft, b, c, -A_log.exp(), starts, chunk), D, state)


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
    """Pending rows and then new ones: u, dt, b, starts, and which of them become part of the state for good. dt is
    before the softplus.

    `slack` pending rows stand before the new ones, of which the last tick - base were not folded yet; the others
    become the identity. base and the new base follow from the high-water mark alone.
    """
    assert past.pending is not None
    assert at.starts is not None
    step, slack = at.step, past.stream.slack
    base = (step.high - slack).clamp_min(0)
    after = (torch.maximum(step.high, step.tick + step.count) - slack).clamp_min(0)
    first = slack - (step.tick - base)
    new = {"u": u.flatten(2), "b": b.flatten(2), "dt": dt, "start": at.starts[..., None]}
    old = past.pending.join(at, **new)
    place = past.stream.range(slack + at.seq)
    live = place >= first[:, None]
    fold = live & (place < (first + after - base)[:, None])
    dt = torch.where(live[..., None], old["dt"], -torch.inf)
    starts = old["start"][..., 0] & live
    u, b = (old[name].to(x.dtype).unflatten(-1, x.shape[2:]) for name, x in (("u", u), ("b", b)))
    return u, dt, b, starts, fold


# --- of a sequence that ranks share -----------------------------------------------------------------


def _logs(dt: Tensor, A_log: Tensor, dt_bias: Tensor, at: At) -> tuple[Tensor, Tensor]:
    """softplus(dt + dt_bias) and the logarithms of decays, [B, T, H]; padding decays nothing."""
    if at.valid is not None:
        dt = torch.where(at.valid[:, :, None], dt, -torch.inf)
    soft = F.softplus(wide(dt) + dt_bias)
    return soft, -soft * wide(A_log).exp()


def ssd_leave(u: Tensor, dt: Tensor, b: Tensor, A_log: Tensor, dt_bias: Tensor, at: At) -> tuple[Tensor, Tensor]:
    """By what these rows let an earlier state decay, [B, H], and the state that they leave, [B, H, P, N].

    u [B, T, H, P], dt [B, T, H], b [B, T, G, N]. A document that starts here ends what was before it.
    """
    soft, logs = _logs(dt, A_log, dt_bias, at)
    if at.valid is not None:
        u, b = (torch.where(at.valid[:, :, None, None], x, 0) for x in (u, b))
    segment = at.segment
    # Summed from the end: a row's decay must not be the difference of two large sums.
    behind = F.pad(logs[:, 1:].flip(1).cumsum(1).flip(1), (0, 0, 0, 1))
    decay = torch.where(segment[:, -1:] == 0, logs.sum(1).exp(), 0)
    last = (segment == segment[:, -1:])[..., None]
    weight = torch.where(last, soft * behind.exp(), 0)
    x = (wide(u) * weight[..., None]).unflatten(2, (b.shape[2], -1))
    with torch.autocast(u.device.type, enabled=False):  # as in `ssd`
        return decay, torch.einsum("btgep,btgn->bgepn", x, wide(b)).flatten(1, 2)


def ssd_before(decay: Tensor, state: Tensor, group: Group) -> Tensor:
    """The state that enters a rank's rows: what the ranks before it leave, each decayed by those between.

    decay [B, H], state [B, H, P, N] of this rank's rows -> [B, H, P, N].
    """
    shape = (group.size, *state.shape)
    decays = all_gather(decay, group, src=V, dst=R).view(group.size, *decay.shape)
    states = all_gather(state, group, src=V, dst=R).view(shape)
    entering = torch.zeros_like(states[0])
    for rank in range(group.size):  # all of them, so that each rank takes part in the backward of the gathers
        further = decays[rank][..., None, None] * entering + states[rank]
        entering = torch.where(torch.tensor(rank < group.rank, device=state.device), further, entering)
    return entering


def ssd_behind(y: Tensor, dt: Tensor, c: Tensor, A_log: Tensor, dt_bias: Tensor, enter: Tensor, at: At) -> Tensor:
    """y [B, T, H, P] of rows by themselves, and what a state that enters [B, H, P, N] adds to those of its document."""
    _, logs = _logs(dt, A_log, dt_bias, at)
    if at.valid is not None:  # selected here, for its gradient is a factor of that of `enter`
        c = torch.where(at.valid[:, :, None, None], c, 0)
    scale = torch.where((at.segment == 0)[..., None], logs.cumsum(1).exp(), 0)
    held = enter.unflatten(1, (c.shape[2], -1))
    with torch.autocast(y.device.type, enabled=False):
        read = torch.einsum("btgn,bgepn->btgep", wide(c), held).flatten(2, 3)
    return y + (read * scale[..., None]).to(y.dtype)
