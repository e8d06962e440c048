"""The selective scan (Dao and Gu 2024, section 6), one row at a time.

d_t = softplus(dt_t + dt_bias), A = -exp(A_log)
S_t = exp(d_t A) S_{t-1} + d_t u_t (outer) B_t,    y_t = S_t C_t + D u_t
"""

from __future__ import annotations

import torch
from torch import Tensor

State = tuple[Tensor, Tensor]


def ssd(
    u: Tensor, dt: Tensor, B: Tensor, C: Tensor, A_log: Tensor, D: Tensor, dt_bias: Tensor, starts: Tensor | None = None
) -> Tensor:
    """u[b, S, H, P], dt[b, S, H], B and C[b, S, G, N] -> y[b, S, H, P]; rows of `starts` bool[b, S] clear the state."""
    y, _ = run(identity(u, B), u, dt, B, C, A_log, D, dt_bias, starts)
    return y


def run(
    state: State,
    u: Tensor,
    dt: Tensor,
    B: Tensor,
    C: Tensor,
    A_log: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    starts: Tensor | None = None,
) -> tuple[Tensor, State]:
    """Rows behind a state: their results, and the state behind them."""
    heads = u.shape[2] // B.shape[2]
    B, C = B.repeat_interleave(heads, 2), C.repeat_interleave(heads, 2)
    raw = dt + dt_bias
    d, A = torch.logaddexp(torch.zeros_like(raw), raw), -torch.exp(A_log)
    decay, S = state
    rows = []
    for t in range(u.shape[1]):
        if starts is not None:
            S = torch.where(starts[:, t, None, None, None], torch.zeros_like(S), S)
            decay = torch.where(starts[:, t, None], torch.zeros_like(decay), decay)
        a = torch.exp(d[:, t] * A)
        S = a[..., None, None] * S + (d[:, t, :, None] * u[:, t])[..., None] * B[:, t, :, None]
        decay = decay * a
        rows.append((S * C[:, t, :, None]).sum(-1) + D[:, None] * u[:, t])
    y = torch.stack(rows, 1) if rows else torch.zeros_like(u)
    return y, (decay, S)


def ssd_leave(u: Tensor, dt: Tensor, B: Tensor, A_log: Tensor, dt_bias: Tensor, starts: Tensor | None = None) -> State:
    """decay[b, H] and state[b, H, P, N] of some rows."""
    return lift(u, dt, B, torch.zeros_like(B), A_log, torch.zeros_like(A_log), dt_bias, starts)


def ssd_before(decays: Tensor, states: Tensor) -> Tensor:
    """The state behind parts in order: decays[parts, b, H], states[parts, b, H, P, N] -> [b, H, P, N]."""
    both = torch.ones_like(decays[:0].sum(0)), states[:0].sum(0)
    for part in zip(decays, states, strict=True):
        both = combine(both, part)
    return both[1]


def ssd_inside(
    u: Tensor, dt: Tensor, B: Tensor, C: Tensor, A_log: Tensor, D: Tensor, dt_bias: Tensor, starts: Tensor | None = None
) -> Tensor:
    """The results of some rows as if nothing stood before them."""
    return finish(identity(u, B), u, dt, B, C, A_log, D, dt_bias, starts)


def ssd_behind(
    y: Tensor, dt: Tensor, C: Tensor, A_log: Tensor, dt_bias: Tensor, enter: Tensor, starts: Tensor | None = None
) -> Tensor:
    """y and what the state enter[b, H, P, N] adds to it: the scan of rows that bring nothing of their own."""
    nothing, zero = torch.zeros_like(y), torch.zeros_like(A_log)
    state = torch.ones_like(enter[..., 0, 0]), enter
    return y + finish(state, nothing, dt, torch.zeros_like(C), C, A_log, zero, dt_bias, starts)


def identity(u: Tensor, B: Tensor) -> State:
    """(decay, state) of no rows."""
    b, _, h, p = u.shape
    return torch.ones(b, h, dtype=u.dtype), torch.zeros(b, h, p, B.shape[-1], dtype=u.dtype)


def lift(
    u: Tensor, dt: Tensor, B: Tensor, C: Tensor, A_log: Tensor, D: Tensor, dt_bias: Tensor, starts: Tensor | None = None
) -> State:
    """(decay, state) of some rows, whoever asks; the decay is 0 where a document starts in them."""
    return run(identity(u, B), u, dt, B, C, A_log, D, dt_bias, starts)[1]


def combine(a: State, b: State) -> State:
    """Rows of a, then rows of b: not commutative."""
    return a[0] * b[0], b[0][..., None, None] * a[1] + b[1]


def finish(
    state: State,
    u: Tensor,
    dt: Tensor,
    B: Tensor,
    C: Tensor,
    A_log: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    starts: Tensor | None = None,
) -> Tensor:
    """The results of some rows, from the state of all rows before them."""
    return run(state, u, dt, B, C, A_log, D, dt_bias, starts)[0]
