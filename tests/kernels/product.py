"""A kernel's file with products, written as the generated ones are, for tests of builds."""

PRODUCT = '''"""c = a b^T, rounded once; and the sum of each row of c.

M rows, N columns, K contracted. One program owns a tile [BLOCK_M, BLOCK_N] of c.
"""

import torch
import triton
import triton.language as tl

from heddle.runtime.lib import kernels

BLOCK_M = 64
BLOCK_N = 64
BLOCK_K = 64
WARPS = 4
STAGES = 3


@triton.jit
def tile(x_ptr, stride, rows, num_rows, columns, num_columns):
    mask = (rows < num_rows)[:, None] & (columns < num_columns)[None, :]
    return tl.load(x_ptr + rows[:, None].to(tl.int64) * stride + columns[None, :], mask=mask, other=0.0)


@triton.jit
def product_kernel(
    a_ptr, stride_am, b_ptr, stride_bn, c_ptr, M, N, K,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, K, BLOCK_K):
        offs_k = k + tl.arange(0, BLOCK_K)
        a = tile(a_ptr, stride_am, offs_m, M, offs_k, K)
        b = tile(b_ptr, stride_bn, offs_n, N, offs_k, K)
        acc = tl.dot(a, tl.trans(b), acc)
    mask = (offs_m < M)[:, None] & (offs_n < N)[None, :]
    tl.store(c_ptr + offs_m[:, None].to(tl.int64) * N + offs_n[None, :], acc, mask=mask)


@triton.jit
def row_sum_kernel(c_ptr, y_ptr, N, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    acc = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, N, BLOCK):
        offs_n = start + tl.arange(0, BLOCK)
        acc += tl.load(c_ptr + row * N + offs_n, mask=offs_n < N, other=0.0).to(tl.float32)
    tl.store(y_ptr + row, tl.sum(acc, 0))


@kernels.op(__name__)
def product_fwd(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    (M, K), (N, _) = a.shape, b.shape
    c, y = kernels.empty((M, N), a), kernels.empty((M,), a, torch.float32)
    grid = (triton.cdiv(M, BLOCK_M), triton.cdiv(N, BLOCK_N))
    kernels.launch(
        product_kernel, grid, a, a.stride(0), b, b.stride(0), c, M, N, K,
        BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, BLOCK_K=BLOCK_K, num_warps=WARPS, num_stages=STAGES,
    )
    kernels.launch(row_sum_kernel, (M,), c, y, N, BLOCK=1024, num_warps=4)
    return c, y


def product(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return product_fwd(a, b)
'''
