"""y = h * rstd * w

    h = x + r
    rstd = rsqrt(sum_c(h * h) / C + 1e-05)
    y = h * rstd * w

R rows of C = 4096 columns: x, r [R, C], w [C] -> h, y [R, C], rstd [R]; and the gradients.
"""
# a.spec:3  h = x + r
# a.spec:4  y = rms_norm(h)

import torch
import triton
import triton.language as tl
from torch import Tensor

from heddle.runtime.lib import kernels

C = 4096
FWD_BLOCK_R = 1
FWD_BLOCK_C = 4096
FWD_WARPS = 8
BWD_BLOCK_R = 1
BWD_BLOCK_C = 4096
BWD_WARPS = 8
BWD_PROGRAMS = 256


@triton.jit
def add_rms_norm_fwd_kernel(
    x_ptr, x_stride, r_ptr, r_stride, w_ptr, h_ptr, y_ptr, rstd_ptr, num_rows, C: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One program owns BLOCK_R rows."""
    cols = tl.arange(0, BLOCK_C)
    rows = (tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
    mask_r = rows < num_rows
    mask = mask_r[:, None]
    x_offs = rows[:, None] * x_stride + cols[None, :]
    x = tl.load(x_ptr + x_offs, mask=mask, other=0.0).to(tl.float32)
    r_offs = rows[:, None] * r_stride + cols[None, :]
    r = tl.load(r_ptr + r_offs, mask=mask, other=0.0).to(tl.float32)
    h = x + r
    offs = rows[:, None] * C + cols[None, :]
    tl.store(h_ptr + offs, h, mask=mask)
    s1 = tl.sum(h * h, axis=1)
    rstd = tl.rsqrt(s1 / C + 1e-05)
    w = tl.load(w_ptr + cols).to(tl.float32)
    y = h * rstd[:, None] * w[None, :]
    tl.store(y_ptr + offs, y, mask=mask)
    tl.store(rstd_ptr + rows, rstd, mask=mask_r)


@triton.jit
def add_rms_norm_bwd_kernel(
    d_h_ptr, d_h_stride, d_y_ptr, d_y_stride, w_ptr, rstd_ptr, h_ptr, d_x_ptr, d_w_parts_ptr, num_rows,
    C: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):
    """Gradients. One program owns every programs-th block of BLOCK_R rows."""
    cols = tl.arange(0, BLOCK_C)
    d_w_acc = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    w = tl.load(w_ptr + cols).to(tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(num_rows, BLOCK_R), tl.num_programs(0)):
        rows = (block * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
        mask_r = rows < num_rows
        mask = mask_r[:, None]
        d_y_offs = rows[:, None] * d_y_stride + cols[None, :]
        d_y = tl.load(d_y_ptr + d_y_offs, mask=mask, other=0.0).to(tl.float32)
        offs = rows[:, None] * C + cols[None, :]
        h = tl.load(h_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + rows, mask=mask_r, other=0.0)
        d_w_acc += d_y * (h * rstd[:, None])
        d_h_offs = rows[:, None] * d_h_stride + cols[None, :]
        d_h = tl.load(d_h_ptr + d_h_offs, mask=mask, other=0.0).to(tl.float32)
        t1 = d_y * w[None, :]
        s1 = tl.sum(t1 * h, axis=1)
        s2 = s1 * rstd * rstd * rstd / C
        d_x = d_h + t1 * rstd[:, None] - h * s2[:, None]
        tl.store(d_x_ptr + offs, d_x, mask=mask)
    tl.store(d_w_parts_ptr + tl.program_id(0) * C + cols, tl.sum(d_w_acc, axis=0))


@triton.jit
def add_rms_norm_total_kernel(
    parts_ptr, total_ptr, total_stride, num_parts, COLUMNS: tl.constexpr, G: tl.constexpr, DIVIDE: tl.constexpr,
    M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):
    """total[m, c] = the sum of parts[n, c] over n of a group g = n % G with g // DIVIDE % M = m.

    One program owns a row m and BLOCK_C columns.
    """
    m = tl.program_id(1)
    cols = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    acc = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    for start in range(0, num_parts, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        mask = (n < num_parts) & (n % G // DIVIDE % M == m)
        offs = n[:, None].to(tl.int64) * COLUMNS + cols[None, :]
        acc += tl.load(parts_ptr + offs, mask=mask[:, None] & (cols < COLUMNS)[None, :], other=0.0)
    tl.store(total_ptr + m * total_stride + cols, tl.sum(acc, axis=0), mask=cols < COLUMNS)


@kernels.op(__name__)
def add_rms_norm_fwd(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    num_rows = x.shape[0]
    h = kernels.empty((num_rows, C), x)
    y = kernels.empty((num_rows, C), x)
    rstd = kernels.empty((num_rows,), x, torch.float32)
    grid = (triton.cdiv(num_rows, FWD_BLOCK_R),)
    kernels.launch(
        add_rms_norm_fwd_kernel, grid, x, x.stride(0), r, r.stride(0), w, h, y, rstd, num_rows, C=C,
        BLOCK_R=FWD_BLOCK_R, BLOCK_C=FWD_BLOCK_C, num_warps=FWD_WARPS,
    )
    return h, y, rstd


@kernels.op(__name__)
def add_rms_norm_bwd(
    w: Tensor, rstd: Tensor, h: Tensor, d_h: Tensor, d_y: Tensor, d_x_dtype: torch.dtype, d_w_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    num_rows = d_h.shape[0]
    d_x = kernels.empty((num_rows, C), d_h, d_x_dtype)
    programs = min(BWD_PROGRAMS, triton.cdiv(num_rows, BWD_BLOCK_R))
    d_w_parts = kernels.empty((programs, C), d_h, torch.float32)
    grid = (programs,)
    kernels.launch(
        add_rms_norm_bwd_kernel, grid, d_h, d_h.stride(0), d_y, d_y.stride(0), w, rstd, h, d_x, d_w_parts, num_rows,
        C=C, BLOCK_R=BWD_BLOCK_R, BLOCK_C=BWD_BLOCK_C, num_warps=BWD_WARPS,
    )
    d_w = kernels.empty((1, C), d_h, d_w_dtype)
    kernels.launch(
        add_rms_norm_total_kernel, (triton.cdiv(C, 128), 1),
        d_w_parts, d_w, d_w.stride(0), d_w_parts.shape[0],
        COLUMNS=C, G=1, DIVIDE=1, M=1, BLOCK_N=16, BLOCK_C=128,
    )
    return d_x, d_w


def _keep(ctx, inputs, output):
    x, r, w = inputs
    h, _y, rstd = output
    ctx.mark_non_differentiable(rstd)
    ctx.save_for_backward(w, rstd, h)
    ctx.x_dtype = x.dtype
    ctx.r_dtype = r.dtype
    ctx.w_dtype = w.dtype


def _backward(ctx, d_h, d_y, _rstd):
    w, rstd, h = ctx.saved_tensors
    d_x, d_w = add_rms_norm_bwd(
        w, rstd, h, kernels.rows(d_h, C), kernels.rows(d_y, C), torch.promote_types(ctx.x_dtype, ctx.r_dtype),
        ctx.w_dtype,
    )
    return d_x.to(ctx.x_dtype), d_x.to(ctx.r_dtype), d_w


add_rms_norm_fwd.register_autograd(_backward, setup_context=_keep)


def add_rms_norm(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """x, r [..., C], w [C] -> h, y [..., C]"""
    kernels.floats(x, r, w)
    rows = kernels.rows(x, C)
    num_rows = rows.shape[0]
    h, y, _rstd = add_rms_norm_fwd(rows, kernels.rows(r, C, num_rows), kernels.table(w, 1, C))
    return h.view(x.shape), y.view(x.shape)
