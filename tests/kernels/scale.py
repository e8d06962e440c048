"""A small kernel's file, written as the generated ones are, for tests of what stands below them."""

SCALE = '''"""y = a x.

R rows, C columns. One program owns one row.
"""

import torch
import triton
import triton.language as tl

from heddle.runtime.lib import kernels


@triton.jit
def scale_kernel(x_ptr, x_stride, y_ptr, C, a, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * x_stride + cols, mask=cols < C, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * C + cols, x * a, mask=cols < C)


@kernels.op(__name__)
def scale_fwd(x: torch.Tensor, a: float) -> torch.Tensor:
    rows, cols = x.shape
    y = kernels.empty((rows, cols), x)
    kernels.launch(scale_kernel, (rows,), x, x.stride(0), y, cols, a, BLOCK=16)
    return y


@kernels.op(__name__)
def scale_bwd(d_y: torch.Tensor, a: float) -> torch.Tensor:
    return scale_fwd(d_y.contiguous(), a)


def _save(ctx, inputs, output):
    ctx.a = inputs[1]


def _backward(ctx, d_y):
    return scale_bwd(d_y, ctx.a), None


scale_fwd.register_autograd(_backward, setup_context=_save)


def scale(x: torch.Tensor, a: float) -> torch.Tensor:
    return scale_fwd(x, a)
'''
