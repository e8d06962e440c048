"""Depthwise causal convolution over the rows of a document.

Dims: B batch, T seq, C channels, k taps. Tap j reads the row k - 1 - j before; `lag` is that distance.

Four shifted products beat torch's conv1d on a CPU by far (forward and backward at [4, 512, 3072], 4 taps, 2 threads:
28 ms against 129), and the backward pass in blocks of rows that stay in a core's cache beats the same over whole
tensors (20 ms against 48). Weights are stored [k, C], so that a tap is a contiguous row.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .buffers import is_past
from .kernels import suits
from .linear import Fused
from .mesh import Group
from .norm import wide
from .product import autocast
from .rows import At
from .spmd import R, V, all_gather

# Numbers of one block of rows: a few such blocks fit the second-level cache.
BLOCK = 1 << 17


class ParallelConv(Fused):
    """Convolutions side by side in one: x[*, T, sum of channels] -> a tensor [*, T, *channels] for each part."""

    def __init__(self, parts: Mapping[str, tuple[int, ...]], taps: int, bias: bool = True) -> None:
        super().__init__({name: (channels, bias) for name, channels in parts.items()}, (taps,), flip=True)

    def forward(
        self, x: Tensor, at: At, past: Any = None, act: str | None = None, kernel: Any = None
    ) -> tuple[Tensor, ...]:
        pieces = _convolve(at.merge(x), self.weight, self.bias, at, past, act, self.sizes, kernel)
        lead = tuple(x.shape[:-1])
        return tuple([y.view(lead + dims) for y, (dims, _) in zip(pieces, self.parts.values(), strict=True)])


class Conv(ParallelConv):
    """x[*, T, *channels] -> the same shape; weight [*channels, taps], bias [*channels]."""

    def __init__(self, channels: tuple[int, ...], taps: int, bias: bool = True) -> None:
        super().__init__({"": channels}, taps, bias)

    def forward(  # type: ignore[override]
        self, x: Tensor, at: At, past: Any = None, act: str | None = None, kernel: Any = None
    ) -> Tensor:
        return super().forward(x.flatten(len(at.lead) + 1), at, past, act, kernel)[0]


def causal_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, at: At, past: Any = None, act: str | None = None, kernel: Any = None
) -> Tensor:
    """y[t, C] = act(bias[C] + sum_j weight[C, j] x[t - k + 1 + j, C]), rows before the document's start read as 0.

    x [B, T, C], weight [C, k], bias [C] or None, act None or "silu" -> [B, T, C] in x's dtype. The sum is at least
    fp32. Padding rows read as 0. kernel: a generated one for these channels, this activation, with or without a bias.
    """
    return at.split(_convolve(at.merge(x), weight.T, bias, at, past, act, [x.shape[-1]], kernel)[0])


def _convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None, at: At, past: Any, act: str | None, widths: list[int], kernel: Any
) -> tuple[Tensor, ...]:
    """weight [k, C]; -> y in pieces of `widths`."""
    if act not in (None, "silu"):
        raise ValueError(f"causal_conv: act is None or 'silu', found {act!r}")
    if is_past(past):
        return _stream(x, weight, bias, at, past, act, widths, kernel)
    if at.valid is not None:
        # Selected, not multiplied by 0: padding may hold anything, even NaN.
        x = torch.where(at.valid[:, :, None], x, 0)
    since = None if at.starts is None else at.since
    x, weight, bias = autocast(x, weight, bias)
    if kernel is not None and suits(x, weight, bias):
        return tuple(kernel(x, weight, bias, since))
    return _Conv.apply(x, weight, bias, since, act, widths)


def _stream(
    x: Tensor, weight: Tensor, bias: Tensor | None, at: At, past: Any, act: str | None, widths: list[int], kernel: Any
) -> tuple[Tensor, ...]:
    """Convolve rows of a stream behind those that it keeps."""
    if kernel is not None and suits(x, weight, bias):
        window = past.moved_by(x, at)
        if window is not None:
            return tuple(kernel(x, weight, bias, window=window))
        joined = past.extend(x, at)
        return tuple(kernel(joined, weight, bias, None if at.starts is None else at.since, before=len(weight) - 1))
    y = _behind(past.extend(x, at), weight, bias, at, act)
    return (y,) if len(widths) == 1 else torch.split_with_sizes(y, widths, -1)


def _behind(joined: Tensor, weight: Tensor, bias: Tensor | None, at: At, act: str | None) -> Tensor:
    """Convolve joined [B, k - 1 + T, C]: the rows before, then the rows of this call."""
    taps, seq = len(weight), at.seq
    if seq == 1 and at.starts is None:
        # The everyday step: one product and one sum, in place.
        y = (wide(joined) * weight).sum(1, keepdim=True)
        if bias is not None:
            y += bias
        if act:
            F.silu(y, inplace=True)
        return y if y.dtype == joined.dtype else y.to(joined.dtype)
    y = torch.zeros_like(joined[:, :seq], dtype=wide(joined).dtype)
    if bias is not None:
        y += bias
    for j in range(taps):
        rows, lag = joined[:, j : j + seq], taps - 1 - j
        if lag and at.starts is not None:
            rows = torch.where((at.since >= lag)[:, :, None], rows, 0)
        y.addcmul_(rows, weight[j])
    y = F.silu(y, inplace=True) if act else y
    return y.to(joined.dtype)


def _blocks(shape: torch.Size, device: torch.device) -> list[tuple[int, int, int]]:
    """(batch row, first row, end) of blocks, all rows of a sequence at once where there is no cache to fill."""
    batch, seq, channels = shape
    size = max(1, BLOCK // channels) if device.type == "cpu" else seq
    return [(i, s, min(s + size, seq)) for i in range(batch) for s in range(0, seq, size)]


def _far(since: Tensor | None, i: int, s: int, e: int, taps: int) -> Tensor | None:
    """since[i, s:e] as a column, or None where every row has taps - 1 rows of its document before it."""
    if since is None or e <= s:
        return None
    rows = since[i, s:e]
    # On a GPU the question would wait for all that is under way, and cost more than the answer saves.
    return None if rows.device.type == "cpu" and bool((rows >= taps - 1).all()) else rows[:, None]


def _sum_taps(
    x: Tensor, weight: Tensor, bias: Tensor | None, far: Tensor | None, i: int, s: int, e: int, out: Tensor
) -> Tensor:
    """The convolution before its activation, for rows s..e of batch row i, into out [e - s, C]."""
    taps = len(weight)
    low = max(0, s - taps + 1)
    rows = wide(x[i, low:e])
    now = rows[s - low :]
    if bias is None:
        torch.mul(now, weight[-1], out=out)
    else:
        torch.addcmul(bias, now, weight[-1], out=out)
    for lag in range(1, taps):
        skip = max(0, lag - s)
        before = rows[max(0, s - lag) - low : max(0, e - lag - low)]
        if far is not None:
            before = before.masked_fill(far[skip:] < lag, 0)
        out[skip:].addcmul_(before, weight[-1 - lag])
    return out


class _Conv(torch.autograd.Function):
    """Keeps x alone; the sum before the activation is made again, block by block."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        since: Tensor | None,
        act: str | None,
        widths: list[int],
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x, weight, bias, since)
        ctx.act, ctx.widths = act, widths
        w, b = wide(weight), None if bias is None else wide(bias)
        y = torch.empty_like(x, memory_format=torch.contiguous_format)
        for i, s, e in _blocks(x.shape, x.device):
            out = y[i, s:e] if y.dtype == w.dtype else w.new_empty(e - s, x.shape[2])
            _sum_taps(x, w, b, _far(since, i, s, e, len(w)), i, s, e, out)
            if act:
                F.silu(out, inplace=True)
            if out.dtype != y.dtype:
                y[i, s:e] = out
        return tuple(y.split(widths, -1))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, since = ctx.saved_tensors
        w, b = wide(weight), None if bias is None else wide(bias)
        taps, channels = w.shape
        blocks = _blocks(x.shape, x.device)
        size = blocks[0][2]
        grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
        # Products with the weights are summed over rows only at the end: one addition a number and block.
        sums = w.new_zeros(taps, size, channels)
        bias_sums = w.new_zeros(size, channels)
        before, ahead = w.new_empty(size, channels), w.new_empty(size + taps - 1, channels)
        for i, s, e in reversed(blocks):
            # ahead[:n] are gradients of rows s..e before the activation, ahead[n:] those of the taps - 1 rows after.
            n = e - s
            if e == x.shape[1]:
                ahead[n:] = 0
            else:
                ahead[n : n + taps - 1] = ahead[: taps - 1].clone()
            g = ahead[:n]
            if ctx.act:
                _sum_taps(x, w, b, _far(since, i, s, e, taps), i, s, e, before[:n])
            parts = zip(grads, *(t.split(ctx.widths, 1) for t in (before[:n], g)), strict=True)
            for grad, y, grad_y in parts:
                if ctx.act:
                    torch.ops.aten.silu_backward.grad_input(wide(grad[i, s:e]), y, grad_input=grad_y)
                else:
                    grad_y.copy_(grad[i, s:e])
            rows = wide(x[i, s:e])
            bias_sums[:n] += g
            sums[-1, :n].addcmul_(g, rows)
            out = grad_x[i, s:e] if grad_x.dtype == w.dtype else torch.empty_like(rows)
            torch.mul(g, w[-1], out=out)
            far = _far(since, i, s, min(e + taps - 1, x.shape[1]), taps)
            for lag in range(1, taps):
                later = ahead[lag : lag + n]
                if far is not None:
                    # Rows lag later that belong to another document do not read these.
                    own = far[lag : lag + n] >= lag
                    later = torch.where(F.pad(own, (0, 0, 0, n - len(own))), later, 0)
                out.addcmul_(later, w[-1 - lag])
                sums[-1 - lag, :n].addcmul_(later, rows)
            if out.dtype != grad_x.dtype:
                grad_x[i, s:e] = out
        grad_bias = None if bias is None else bias_sums.sum(0).to(bias.dtype)
        return grad_x, sums.sum(1).to(weight.dtype), grad_bias, None, None, None


# --- of a sequence that ranks share -----------------------------------------------------------------


def rows_before(x: Tensor, count: int, group: Group, at: At) -> Tensor:
    """The last `count` rows of the ranks before this one: x [B, T, ...] -> [B, count, ...].

    Zeros where there are none, and in place of padding.
    """
    first = max(0, x.shape[1] - count)
    tail = x[:, first:]
    if at.valid is not None:
        tail = torch.where(at.valid[:, first:].reshape(*tail.shape[:2], *[1] * (x.dim() - 2)), tail, 0)
    tails = all_gather(tail, group, src=V, dst=R).view(group.size, *tail.shape)
    # A slice of all of them, on every rank: so that each takes part in the backward of the gather.
    joined = torch.cat((x.new_zeros(x.shape[0], count, *x.shape[2:]), *tails), 1)
    return joined.narrow(1, group.rank * tail.shape[1], count)


def conv_behind(
    x: Tensor, before: Tensor, weight: Tensor, bias: Tensor | None, at: At, act: str | None = None, kernel: Any = None
) -> Tensor:
    """`causal_conv` of x [B, T, *channels] behind `before` [B, taps - 1, *channels]; weight [*channels, taps]."""
    taps, channels = weight.shape[-1], x.shape[2:]
    if at.valid is not None:
        x = torch.where(at.valid.reshape(*at.valid.shape, *[1] * len(channels)), x, 0)
    joined = torch.cat((before, x), 1).flatten(2)
    flat_bias = None if bias is None else bias.flatten()
    joined, flat, flat_bias = autocast(joined, weight.flatten(0, -2).T, flat_bias)
    if kernel is not None and suits(joined, flat, flat_bias):
        (y,) = kernel(joined, flat, flat_bias, at.since, before=taps - 1)
        return y.unflatten(-1, channels)
    # How many rows of its document stand before a row: those of the halo are read by rows here, and give nothing.
    since = F.pad(at.since, (taps - 1, 0), value=taps)
    (y,) = _Conv.apply(joined, flat, flat_bias, since, act, [joined.shape[2]])
    return y[:, taps - 1 :].unflatten(-1, channels)
