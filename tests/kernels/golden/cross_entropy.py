"""loss[r] = log(sum_v exp(y[r, v])) - y[r, target[r]],  y = z;  0 where target[r] is -1

R rows, V = 131072 columns; z are logits in their storage dtype, sums are fp32. One program owns one row and walks along
it with the largest value so far, m, and the sum of exp(y - m) (Milakov and Gimelshein 2018, algorithm 3).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from heddle.runtime.lib import kernels

# Columns of a step. They, and the warps, are the order in which a row is summed: a numerics class.
BLOCK_V, WARPS, STAGES = 4096, 8, 3


@triton.jit
def ce_fwd_kernel(
    z_ptr, stride_zr, target_ptr, loss_ptr, m_ptr, log_s_ptr, BLOCK_V: tl.constexpr, STAGES: tl.constexpr
):
    """The loss of a row, and what its softmax is made of."""
    row = tl.program_id(0).to(tl.int64)
    z_ptr += row * stride_zr
    target = tl.load(target_ptr + row)
    is_scored = target >= 0
    picked = tl.load(z_ptr + target, mask=is_scored & (target < 131072), other=float("nan")).to(tl.float32)
    m, s = -float("inf"), 0.0
    for first in tl.range(0, 131072, BLOCK_V, num_stages=STAGES):
        cols = first + tl.arange(0, BLOCK_V)
        mask_v = (cols < 131072) & is_scored
        y = tl.load(z_ptr + cols, mask=mask_v, other=-float("inf")).to(tl.float32)
        m_new = tl.maximum(m, tl.max(y, 0))
        m_ref = tl.where(m_new == -float("inf"), 0.0, m_new)  # a row of -inf so far has no largest value
        s = s * tl.exp(m - m_ref) + tl.sum(tl.exp(y - m_ref), 0)
        m = m_new
    log_s = tl.log(tl.where(is_scored, s, 1.0))
    tl.store(loss_ptr + row, tl.where(is_scored, log_s + (m - picked), 0.0))

    tl.store(m_ptr + row, m)
    tl.store(log_s_ptr + row, log_s)


@triton.jit
def ce_bwd_kernel(
    dloss_ptr, z_ptr, stride_zr, target_ptr, m_ptr, log_s_ptr, dz_ptr, BLOCK_V: tl.constexpr, STAGES: tl.constexpr
):
    """dz = dloss (softmax(y) - one hot); rows that are not scored are not read."""
    row = tl.program_id(0).to(tl.int64)
    z_ptr += row * stride_zr
    dz_ptr += row * 131072
    target = tl.load(target_ptr + row)
    is_scored = target >= 0
    dloss, m, log_s = tl.load(dloss_ptr + row), tl.load(m_ptr + row), tl.load(log_s_ptr + row)
    for first in tl.range(0, 131072, BLOCK_V, num_stages=STAGES):
        cols = first + tl.arange(0, BLOCK_V)
        mask_v = cols < 131072
        y = tl.load(z_ptr + cols, mask=mask_v & is_scored, other=0.0).to(tl.float32)
        slope = dloss * (tl.exp(y - m - log_s) - tl.where(cols == target, 1.0, 0.0))
        tl.store(dz_ptr + cols, tl.where(is_scored, slope, 0.0), mask=mask_v)


def rows_of(logits: Tensor) -> Tensor:
    """logits with columns side by side."""
    return logits if logits.stride(1) == 1 else logits.contiguous()


@kernels.op(__name__)
def ce_fwd(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    logits = rows_of(logits)
    loss, m, log_s = (kernels.empty(target.shape, logits, torch.float32) for _ in range(3))
    kernels.launch(
        ce_fwd_kernel, (len(target),), logits, logits.stride(0), target.contiguous(), loss, m, log_s,
        BLOCK_V=BLOCK_V, STAGES=STAGES, num_warps=WARPS,
    )
    return loss, m, log_s


@kernels.op(__name__)
def ce_bwd(dloss: Tensor, logits: Tensor, target: Tensor, m: Tensor, log_s: Tensor) -> Tensor:
    logits, dz = rows_of(logits), kernels.empty(logits.shape, logits)
    kernels.launch(
        ce_bwd_kernel, (len(target),),
        dloss.contiguous(), logits, logits.stride(0), target.contiguous(), m, log_s, dz,
        BLOCK_V=BLOCK_V, STAGES=STAGES, num_warps=WARPS,
    )
    return dz


def remember(ctx, inputs, output):
    _, m, log_s = output
    ctx.mark_non_differentiable(m, log_s)
    ctx.save_for_backward(*inputs, m, log_s)


def backward(ctx, dloss, dm, dlog_s):
    return ce_bwd(dloss, *ctx.saved_tensors), None


ce_fwd.register_autograd(backward, setup_context=remember)


def ce(logits: Tensor, target: Tensor) -> Tensor:
    """logits [R, 131072], target int64 [R] -> loss fp32 [R]."""
    return ce_fwd(logits, target)[0]
