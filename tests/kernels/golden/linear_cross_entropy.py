"""loss[r] = log(sum_v exp(y[r, v])) - y[r, target[r]],  y = 30.0 tanh(z / 30.0);  0 where target[r] is -1

R rows, V = 131072 columns; z are logits in their storage dtype, sums are fp32. One program owns one row and walks along
it with the largest value so far, m, and the sum of exp(y - m) (Milakov and Gimelshein 2018, algorithm 3).
The slope of the loss takes the place of the logits, so that what follows is two matrix products (Hsu et al. 2024,
section 3.2); the walk for it finds the row in a cache.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from heddle.runtime.lib import kernels

# Columns of a step. They, and the warps, are the order in which a row is summed: a numerics class.
BLOCK_V, WARPS, STAGES = 4096, 8, 3


@triton.jit
def shaped(z):
    """y = 30.0 tanh(z / 30.0)"""
    a = z / 30.0
    t = a * a
    near = a * (1.0 + t * (-1.0 / 3.0 + t * (2.0 / 15.0 - t * (17.0 / 315.0))))  # what follows would cancel here
    z = 30.0 * tl.where(t < 0.01, near, 1.0 - 2.0 / (1.0 + tl.exp(2.0 * a)))
    return z


@triton.jit
def ce_kernel(
    z_ptr, stride_zr, target_ptr, loss_ptr, SLOPE: tl.constexpr, BLOCK_V: tl.constexpr, STAGES: tl.constexpr
):
    """The loss of a row, and in place of its logits what the loss does along them."""
    row = tl.program_id(0).to(tl.int64)
    z_ptr += row * stride_zr
    target = tl.load(target_ptr + row)
    is_scored = target >= 0
    # Before the walk, whose sums all threads wait for: behind it the slope is written.
    picked = shaped(tl.load(z_ptr + target, mask=is_scored & (target < 131072), other=float("nan")).to(tl.float32))
    m, s = -float("inf"), 0.0
    for first in tl.range(0, 131072, BLOCK_V, num_stages=STAGES):
        cols = first + tl.arange(0, BLOCK_V)
        mask_v = (cols < 131072) & is_scored
        y = tl.where(mask_v, shaped(tl.load(z_ptr + cols, mask=mask_v, other=0.0).to(tl.float32)), -float("inf"))
        m_new = tl.maximum(m, tl.max(y, 0))
        m_ref = tl.where(m_new == -float("inf"), 0.0, m_new)  # a row of -inf so far has no largest value
        s = s * tl.exp(m - m_ref) + tl.sum(tl.exp(y - m_ref), 0)
        m = m_new
    log_s = tl.log(tl.where(is_scored, s, 1.0))
    tl.store(loss_ptr + row, tl.where(is_scored, log_s + (m - picked), 0.0))

    if SLOPE:
        for first in tl.range(0, 131072, BLOCK_V, num_stages=STAGES):
            cols = first + tl.arange(0, BLOCK_V)
            mask_v = cols < 131072
            y = shaped(tl.load(z_ptr + cols, mask=mask_v & is_scored, other=0.0).to(tl.float32))
            slope = tl.exp(y - m - log_s) - tl.where(cols == target, 1.0, 0.0)
            slope *= (1.0 - (y / 30.0) * (y / 30.0))
            tl.store(z_ptr + cols, tl.where(is_scored, slope, 0.0), mask=mask_v)


@kernels.op(__name__, mutates=("logits",))
def ce_rows(logits: Tensor, target: Tensor, slope: bool) -> Tensor:
    if logits.stride(1) != 1:
        raise ValueError("ce: the logits are written in place, their columns must lie side by side")
    loss = kernels.empty(target.shape, logits, torch.float32)
    kernels.launch(
        ce_kernel, (len(target),), logits, logits.stride(0), target.contiguous(), loss,
        SLOPE=slope, BLOCK_V=BLOCK_V, STAGES=STAGES, num_warps=WARPS,
    )
    return loss


def ce(logits: Tensor, target: Tensor, slope: bool) -> Tensor:
    """logits [R, 131072], target int64 [R] -> loss fp32 [R]. With `slope` the logits become d loss / d logits."""
    return ce_rows(logits, target, slope)
