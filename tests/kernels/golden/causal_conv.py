"""y[b, t, c] = silu(bias[c] + sum_j weight[j, c] x[b, t - 3 + j, c])

B sequences, T rows, C = 10240 channels (8192 + 1024 + 1024), 4 taps.
Rows of another document, and rows before the first, read as 0. Source: Gu and Dao 2023 (Mamba), section 3.4.

A program owns a run of rows of some channels and walks along them: what a row shares with its neighbours stays in
registers, and each number is read once. The digit of a variable says how many rows before the present one it is.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from heddle.runtime.lib import kernels

# Channels of a program; its rows, forward and backward. Gradients of weights are first summed over BACK_ROWS.
BLOCK_C, ROWS, BACK_ROWS = 512, 64, 128
WARPS, STAGES = 2, 4
WIDTHS = (8192, 1024, 1024)
BLOCKS = sum(triton.cdiv(width, BLOCK_C) for width in WIDTHS)


@triton.jit
def conv_fwd_kernel(
    x_ptr, stride_xb, stride_xt, w_ptr, bias_ptr, since_ptr, y0_ptr, y1_ptr, y2_ptr, num_rows, before, runs,
    PACKED: tl.constexpr, BLOCK_C: tl.constexpr, ROWS: tl.constexpr, BLOCKS: tl.constexpr, STAGES: tl.constexpr,
):
    """y of a run of ROWS rows. The first `before` rows of x have no result and are only read."""
    block, run = tl.program_id(0) % BLOCKS, tl.program_id(0) // BLOCKS
    b, start = (run // runs).to(tl.int64), before + run % runs * ROWS
    end = tl.minimum(start + ROWS, before + num_rows)
    # Which channels: `cols` of a part, `chans` of all.
    first, width, before_part = 0, 8192, 0
    y_ptr = y0_ptr
    if block >= (8191 + BLOCK_C) // BLOCK_C:
        first, width, before_part = 8192, 1024, (8191 + BLOCK_C) // BLOCK_C
        y_ptr = y1_ptr
    if block >= (8191 + BLOCK_C) // BLOCK_C + (1023 + BLOCK_C) // BLOCK_C:
        first, width, before_part = 9216, 1024, (8191 + BLOCK_C) // BLOCK_C + (1023 + BLOCK_C) // BLOCK_C
        y_ptr = y2_ptr
    cols = (block - before_part) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = cols < width
    chans = first + cols

    w0 = tl.load(w_ptr + 3 * 10240 + chans, mask=mask_c, other=0.0).to(tl.float32)
    w1 = tl.load(w_ptr + 2 * 10240 + chans, mask=mask_c, other=0.0).to(tl.float32)
    w2 = tl.load(w_ptr + 1 * 10240 + chans, mask=mask_c, other=0.0).to(tl.float32)
    w3 = tl.load(w_ptr + 0 * 10240 + chans, mask=mask_c, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + chans, mask=mask_c, other=0.0).to(tl.float32)

    x_ptr += b * stride_xb + start.to(tl.int64) * stride_xt + chans
    y_ptr += (b * num_rows + start - before) * width + cols
    since_ptr += b * num_rows
    # The rows before the first, as far as its document goes.
    since0 = start
    if PACKED:
        since0 = tl.load(since_ptr + start - before, mask=start >= before, other=3).to(tl.int32)
    x1 = tl.load(x_ptr - 1 * stride_xt, mask=mask_c & (start >= 1) & (since0 >= 1), other=0.0).to(tl.float32)
    x2 = tl.load(x_ptr - 2 * stride_xt, mask=mask_c & (start >= 2) & (since0 >= 2), other=0.0).to(tl.float32)
    x3 = tl.load(x_ptr - 3 * stride_xt, mask=mask_c & (start >= 3) & (since0 >= 3), other=0.0).to(tl.float32)

    for row in tl.range(start, end, num_stages=STAGES):
        x0 = tl.load(x_ptr, mask=mask_c, other=0.0).to(tl.float32)
        since0 = tl.load(since_ptr + row - before).to(tl.int32) if PACKED else row  # rows of its document before it
        x1 = tl.where(since0 >= 1, x1, 0.0)
        x2 = tl.where(since0 >= 2, x2, 0.0)
        x3 = tl.where(since0 >= 3, x3, 0.0)
        s = bias + w0 * x0 + w1 * x1 + w2 * x2 + w3 * x3

        tl.store(y_ptr, s / (1.0 + tl.exp(-s)), mask=mask_c)
        x_ptr += stride_xt
        y_ptr += width
        x3 = x2
        x2 = x1
        x1 = x0


@triton.jit
def conv_bwd_kernel(
    x_ptr, stride_xb, stride_xt, w_ptr, bias_ptr, since_ptr,
    dy0_ptr, stride_dy0b, stride_dy0t,
    dy1_ptr, stride_dy1b, stride_dy1t,
    dy2_ptr, stride_dy2b, stride_dy2t,
    dx_ptr, sums_ptr, num_rows, before, runs,
    PACKED: tl.constexpr, BLOCK_C: tl.constexpr, ROWS: tl.constexpr, BLOCKS: tl.constexpr, STAGES: tl.constexpr,
):
    """dx of a run of ROWS rows of x, and what they add to the gradients of weight and bias.

    g = dy silu'(s);  dx[t] = sum_lag w_lag g[t + lag];  dw_lag = sum_t g[t] x[t - lag]
    dx[t] is complete at row t + 3, so the walk goes on for 3 rows behind the run; dx_lag is what is known so far of
    dx, lag rows before.
    """
    block, run = tl.program_id(0) % BLOCKS, tl.program_id(0) // BLOCKS
    all_rows = before + num_rows
    b, start = (run // runs).to(tl.int64), run % runs * ROWS
    end = tl.minimum(start + ROWS, all_rows)
    # Which channels: `cols` of a part, `chans` of all.
    first, width, before_part = 0, 8192, 0
    dy_ptr = dy0_ptr
    stride_dyb, stride_dyt = stride_dy0b, stride_dy0t
    if block >= (8191 + BLOCK_C) // BLOCK_C:
        first, width, before_part = 8192, 1024, (8191 + BLOCK_C) // BLOCK_C
        dy_ptr = dy1_ptr
        stride_dyb, stride_dyt = stride_dy1b, stride_dy1t
    if block >= (8191 + BLOCK_C) // BLOCK_C + (1023 + BLOCK_C) // BLOCK_C:
        first, width, before_part = 9216, 1024, (8191 + BLOCK_C) // BLOCK_C + (1023 + BLOCK_C) // BLOCK_C
        dy_ptr = dy2_ptr
        stride_dyb, stride_dyt = stride_dy2b, stride_dy2t
    cols = (block - before_part) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = cols < width
    chans = first + cols

    w0 = tl.load(w_ptr + 3 * 10240 + chans, mask=mask_c, other=0.0).to(tl.float32)
    w1 = tl.load(w_ptr + 2 * 10240 + chans, mask=mask_c, other=0.0).to(tl.float32)
    w2 = tl.load(w_ptr + 1 * 10240 + chans, mask=mask_c, other=0.0).to(tl.float32)
    w3 = tl.load(w_ptr + 0 * 10240 + chans, mask=mask_c, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + chans, mask=mask_c, other=0.0).to(tl.float32)

    x_ptr += b * stride_xb + start.to(tl.int64) * stride_xt + chans
    dy_ptr += b * stride_dyb + (start - before).to(tl.int64) * stride_dyt + cols
    dx_ptr += (b * all_rows + start - 3) * 10240 + chans
    since_ptr += b * num_rows
    # The rows before the first, as far as its document goes.
    since0 = start
    if PACKED:
        since0 = tl.load(since_ptr + start - before, mask=start >= before, other=3).to(tl.int32)
    x1 = tl.load(x_ptr - 1 * stride_xt, mask=mask_c & (start >= 1) & (since0 >= 1), other=0.0).to(tl.float32)
    x2 = tl.load(x_ptr - 2 * stride_xt, mask=mask_c & (start >= 2) & (since0 >= 2), other=0.0).to(tl.float32)
    x3 = tl.load(x_ptr - 3 * stride_xt, mask=mask_c & (start >= 3) & (since0 >= 3), other=0.0).to(tl.float32)

    dx0 = tl.full((BLOCK_C,), 0.0, tl.float32)
    dw0 = tl.full((BLOCK_C,), 0.0, tl.float32)
    dx1 = tl.full((BLOCK_C,), 0.0, tl.float32)
    dw1 = tl.full((BLOCK_C,), 0.0, tl.float32)
    dx2 = tl.full((BLOCK_C,), 0.0, tl.float32)
    dw2 = tl.full((BLOCK_C,), 0.0, tl.float32)
    dx3 = tl.full((BLOCK_C,), 0.0, tl.float32)
    dw3 = tl.full((BLOCK_C,), 0.0, tl.float32)
    dbias = tl.full((BLOCK_C,), 0.0, tl.float32)
    for row in tl.range(start, end + 3, num_stages=STAGES):
        has_result = (row >= before) & (row < all_rows)
        x0 = tl.load(x_ptr, mask=mask_c & (row < all_rows), other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr, mask=mask_c & has_result, other=0.0).to(tl.float32)
        since0 = row
        if PACKED:
            since0 = tl.load(since_ptr + row - before, mask=has_result, other=3).to(tl.int32)
        x1 = tl.where(since0 >= 1, x1, 0.0)
        x2 = tl.where(since0 >= 2, x2, 0.0)
        x3 = tl.where(since0 >= 3, x3, 0.0)
        s = bias + w0 * x0 + w1 * x1 + w2 * x2 + w3 * x3

        p = 1.0 / (1.0 + tl.exp(-s))
        g = tl.where(has_result, dy * p * (1.0 + s * (1.0 - p)), 0.0)
        dx3 = dx2 + tl.where(since0 >= 3, w3 * g, 0.0)
        dx2 = dx1 + tl.where(since0 >= 2, w2 * g, 0.0)
        dx1 = dx0 + tl.where(since0 >= 1, w1 * g, 0.0)
        dx0 = w0 * g
        tl.store(dx_ptr, dx3, mask=mask_c & (row >= start + 3))
        g = tl.where(row < end, g, 0.0)
        dw0 += g * x0
        dw1 += g * x1
        dw2 += g * x2
        dw3 += g * x3
        dbias += g
        x_ptr += stride_xt
        dy_ptr += stride_dyt
        dx_ptr += 10240
        x3 = x2
        x2 = x1
        x1 = x0
    sums_ptr += run.to(tl.int64) * 5 * 10240 + chans
    tl.store(sums_ptr + 3 * 10240, dw0, mask=mask_c)
    tl.store(sums_ptr + 2 * 10240, dw1, mask=mask_c)
    tl.store(sums_ptr + 1 * 10240, dw2, mask=mask_c)
    tl.store(sums_ptr + 0 * 10240, dw3, mask=mask_c)
    tl.store(sums_ptr + 4 * 10240, dbias, mask=mask_c)


@triton.jit
def conv_step_kernel(
    x_ptr, stride_xb, w_ptr, bias_ptr, window_ptr, y0_ptr, y1_ptr, y2_ptr, BLOCK_C: tl.constexpr, BLOCKS: tl.constexpr,
):
    """y of one row behind the window of those before it, and the window moved on by this row."""
    block, b = tl.program_id(0) % BLOCKS, (tl.program_id(0) // BLOCKS).to(tl.int64)
    # Which channels: `cols` of a part, `chans` of all.
    first, width, before_part = 0, 8192, 0
    y_ptr = y0_ptr
    if block >= (8191 + BLOCK_C) // BLOCK_C:
        first, width, before_part = 8192, 1024, (8191 + BLOCK_C) // BLOCK_C
        y_ptr = y1_ptr
    if block >= (8191 + BLOCK_C) // BLOCK_C + (1023 + BLOCK_C) // BLOCK_C:
        first, width, before_part = 9216, 1024, (8191 + BLOCK_C) // BLOCK_C + (1023 + BLOCK_C) // BLOCK_C
        y_ptr = y2_ptr
    cols = (block - before_part) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = cols < width
    chans = first + cols

    w0 = tl.load(w_ptr + 3 * 10240 + chans, mask=mask_c, other=0.0).to(tl.float32)
    w1 = tl.load(w_ptr + 2 * 10240 + chans, mask=mask_c, other=0.0).to(tl.float32)
    w2 = tl.load(w_ptr + 1 * 10240 + chans, mask=mask_c, other=0.0).to(tl.float32)
    w3 = tl.load(w_ptr + 0 * 10240 + chans, mask=mask_c, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + chans, mask=mask_c, other=0.0).to(tl.float32)

    window_ptr += b * 3 * 10240 + chans
    x0 = tl.load(x_ptr + b * stride_xb + chans, mask=mask_c, other=0.0).to(tl.float32)
    x1 = tl.load(window_ptr + 2 * 10240, mask=mask_c, other=0.0).to(tl.float32)
    x2 = tl.load(window_ptr + 1 * 10240, mask=mask_c, other=0.0).to(tl.float32)
    x3 = tl.load(window_ptr + 0 * 10240, mask=mask_c, other=0.0).to(tl.float32)
    s = bias + w0 * x0 + w1 * x1 + w2 * x2 + w3 * x3
    tl.store(y_ptr + b * width + cols, s / (1.0 + tl.exp(-s)), mask=mask_c)
    tl.store(window_ptr + 2 * 10240, x0, mask=mask_c)
    tl.store(window_ptr + 1 * 10240, x1, mask=mask_c)
    tl.store(window_ptr + 0 * 10240, x2, mask=mask_c)


def rows_of(x: Tensor) -> Tensor:
    """x with channels side by side."""
    return x if x.stride(-1) == 1 else x.contiguous()


@kernels.op(__name__)
def conv_fwd(x: Tensor, weight: Tensor, bias: Tensor | None, since: Tensor | None, before: int) -> list[Tensor]:
    x, batch, rows = rows_of(x), x.shape[0], x.shape[1] - before
    runs = triton.cdiv(rows, ROWS)
    parts = [kernels.empty((batch, rows, width), x) for width in WIDTHS]
    kernels.launch(
        conv_fwd_kernel, (BLOCKS * batch * runs,),
        x, x.stride(0), x.stride(1), weight.contiguous(), bias.contiguous(), x if since is None else since.contiguous(),
        *parts, rows, before, runs,
        PACKED=since is not None, BLOCK_C=BLOCK_C, ROWS=ROWS, BLOCKS=BLOCKS, STAGES=STAGES, num_warps=WARPS,
    )
    return parts


@kernels.op(__name__)
def conv_bwd(
    grads: list[Tensor], x: Tensor, weight: Tensor, bias: Tensor | None, since: Tensor | None, before: int
) -> tuple[Tensor, Tensor, Tensor]:
    x, (batch, rows, channels) = rows_of(x), x.shape
    dx, runs = kernels.empty(x.shape, x), triton.cdiv(rows, BACK_ROWS)
    sums = kernels.empty((batch * runs, 5, channels), x, torch.float32)
    grads = [rows_of(dy) for dy in grads]
    kernels.launch(
        conv_bwd_kernel, (BLOCKS * batch * runs,),
        x, x.stride(0), x.stride(1), weight.contiguous(), bias.contiguous(), x if since is None else since.contiguous(),
        *(given for dy in grads for given in (dy, dy.stride(0), dy.stride(1))), dx, sums, rows - before, before, runs,
        PACKED=since is not None, BLOCK_C=BLOCK_C, ROWS=BACK_ROWS, BLOCKS=BLOCKS, STAGES=STAGES, num_warps=WARPS,
    )
    total = sums.sum(0)
    return dx, total[:4].to(weight.dtype, copy=True), total[4:].flatten().to(bias.dtype, copy=True)


@kernels.op(__name__, mutates=("window", "parts"))
def conv_step(x: Tensor, weight: Tensor, bias: Tensor | None, window: Tensor, parts: list[Tensor]) -> None:
    x = rows_of(x)
    kernels.launch(
        conv_step_kernel, (BLOCKS * len(x),),
        x, x.stride(0), weight.contiguous(), bias.contiguous(), window, *parts,
        BLOCK_C=BLOCK_C, BLOCKS=BLOCKS, num_warps=WARPS,
    )


def remember(ctx, inputs, output):
    *tensors, ctx.before = inputs
    ctx.save_for_backward(*tensors)


def backward(ctx, grads):
    dx, dw, dbias = conv_bwd(grads, *ctx.saved_tensors, ctx.before)
    return dx, dw, dbias, None, None


conv_fwd.register_autograd(backward, setup_context=remember)


def conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, since: Tensor | None = None, before: int = 0,
    window: Tensor | None = None,
) -> list[Tensor]:
    """x [B, before + T, C], weight [4, C], bias [C] -> y [B, T, width] for each part.

    since: int64 [B, T], how many rows of its document stand before a row; None where one document fills each sequence.
    window: [B, 3, C] contiguous, the rows before the single row x [B, 1, C]; it is moved on by that row.
    """
    if window is None:
        return conv_fwd(x, weight, bias, since, before)
    if not window.is_contiguous():
        raise ValueError("conv: the window is written in place, it must be contiguous")
    parts = [kernels.empty((len(x), 1, width), x) for width in WIDTHS]
    conv_step(x, weight, bias, window, parts)
    return parts
