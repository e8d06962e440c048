"""dweight[v] = sum of dy[r] over the places r whose token is v

R places, V rows of the table, N = 4096 columns. The tokens are sorted, equal ones in their order, and cut into runs of RUN
places. A program owns one run and some columns and walks along it; a token that begins and ends in the run is written
to its row. What a run has of a token that began in a run before is its head, what goes on in the run behind is its
tail; a second kernel adds these up, so that a token that is everywhere is the work of many programs. No atomics: the
order of each sum is that of the places. Ours.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from heddle.runtime.lib import kernels

# Places of a program, by which sums are cut: a numerics class; its columns.
RUN, BLOCK_N = 32, 1024
WARPS, STAGES = 4, 4


@triton.jit
def rows_runs_kernel(
    dy_ptr, stride_dyr, token_ptr, place_ptr, dw_ptr, head_ptr, tail_ptr, num_places,
    RUN: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):
    """Sums of the tokens of one run. token[i] is the i-th in order, place[i] is where it stands."""
    run = tl.program_id(0)
    start = run * RUN
    end = tl.minimum(start + RUN, num_places)
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = cols < 4096
    dy_ptr += cols
    dw_ptr += cols

    began_before = tl.load(token_ptr + start - 1, mask=start > 0, other=-1) == tl.load(token_ptr + start)
    acc = tl.full((BLOCK_N,), 0.0, tl.float32)
    head = tl.full((BLOCK_N,), 0.0, tl.float32)
    for i in tl.range(start, end, num_stages=STAGES):
        place = tl.load(place_ptr + i)
        acc += tl.load(dy_ptr + place * stride_dyr, mask=mask_n, other=0.0).to(tl.float32)
        token = tl.load(token_ptr + i).to(tl.int64)
        ends = tl.load(token_ptr + i + 1, mask=i + 1 < num_places, other=-1) != token
        head = tl.where(ends & began_before, acc, head)
        tl.store(dw_ptr + token * 4096, acc, mask=mask_n & ends & (began_before == 0))
        acc = tl.where(ends, 0.0, acc)
        began_before = began_before & (ends == 0)
    at = run.to(tl.int64) * 4096 + cols
    tl.store(head_ptr + at, head, mask=mask_n)
    tl.store(tail_ptr + at, acc, mask=mask_n)


@triton.jit
def rows_join_kernel(token_ptr, dw_ptr, head_ptr, tail_ptr, num_places, RUN: tl.constexpr, BLOCK_N: tl.constexpr):
    """The row of the token that begins in this run and goes on behind it, if there is one."""
    run = tl.program_id(0)
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = cols < 4096
    behind = (run + 1) * RUN  # the first place of the next run
    token = tl.load(token_ptr + behind - 1, mask=behind < num_places, other=-1).to(tl.int64)
    goes_on = (token >= 0) & (tl.load(token_ptr + behind, mask=behind < num_places, other=-1) == token)
    begins = tl.load(token_ptr + run * RUN - 1, mask=run > 0, other=-1) != token
    if goes_on & begins:
        at = run.to(tl.int64) * 4096 + cols
        acc = tl.load(tail_ptr + at, mask=mask_n, other=0.0)
        at += 4096
        behind += RUN
        # Runs that are this token and no other; the run in which it ends has it as its head.
        while tl.load(token_ptr + behind, mask=behind < num_places, other=-1) == token:
            acc += tl.load(tail_ptr + at, mask=mask_n, other=0.0)
            at += 4096
            behind += RUN
        acc += tl.load(head_ptr + at, mask=mask_n, other=0.0)
        tl.store(dw_ptr + token * 4096 + cols, acc, mask=mask_n)


@kernels.op(__name__)
def rows_bwd(dy: Tensor, tokens: Tensor, rows: int) -> Tensor:
    dy = dy if dy.stride(1) == 1 else dy.contiguous()
    dw = kernels.empty((rows, 4096), dy).zero_()
    in_order, places = tokens.to(torch.int32).sort(stable=True)
    runs, blocks = triton.cdiv(len(tokens), RUN), triton.cdiv(4096, BLOCK_N)
    head, tail = (kernels.empty((runs, 4096), dy, torch.float32) for _ in range(2))
    kernels.launch(
        rows_runs_kernel, (runs, blocks), dy, dy.stride(0), in_order, places, dw, head, tail, len(tokens),
        RUN=RUN, BLOCK_N=BLOCK_N, STAGES=STAGES, num_warps=WARPS,
    )
    kernels.launch(
        rows_join_kernel, (runs, blocks), in_order, dw, head, tail, len(tokens),
        RUN=RUN, BLOCK_N=BLOCK_N, num_warps=WARPS,
    )
    return dw


def rows(dy: Tensor, tokens: Tensor, rows: int) -> Tensor:
    """dy [R, 4096], tokens int64 [R] -> the gradient [rows, 4096] of the table, in the dtype of dy."""
    return rows_bwd(dy, tokens, rows)
