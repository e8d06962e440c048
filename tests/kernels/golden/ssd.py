"""The state space scan in chunks of rows: forward, backward, and one row of decoding.

    d_t = softplus(dt_t + dt_bias)                    a_t = -exp(A_log) d_t
    S_t = exp(a_t) S_{t-1} + d_t u_t (outer) b_t      y_t = S_t c_t + D u_t

In one chunk, with ca_i the sum of a over the rows of i's document up to i, and S the state that enters:
    y_i   = sum_{j <= i} exp(ca_i - ca_j) (c_i . b_j) d_j u_j  +  exp(ca_i) S c_i  +  D u_i
    S_out = exp(ca_last) S  +  sum_j exp(ca_last - ca_j) d_j u_j (outer) b_j
`steps` computes d and ca, `states` walks the chunks of a head and writes the state that enters each, `chunks` then has
all chunks at once. Backward is the mirror image: `bwd_states` walks from the end and writes the gradient of the state
that leaves each chunk, `bwd_bc` and `bwd_x` have all chunks at once, and `bwd_sums` adds up the gradients of weights.

Dims: B batch, T rows, H heads, G groups of 16 heads, P = 64 head_dim, N = 128 state.
Letters: i and j rows of a chunk, g gradient of y, s state that enters a chunk, z gradient of the state that leaves it.
first[b, t] is the row at which the document of row t starts, -1 where it continues a given state; it alone says which
rows reach which. Exponents are in base 2 and never positive. Rows past the end have d = 0, and change nothing.

Source: Dao and Gu 2024, Transformers are SSMs, section 6; the division into kernels, and the backward pass: ours.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from heddle.runtime.lib import kernels

# Rows of a chunk (in fp32 half as many: tiles are twice as large), and of what `sums` adds at once.
CHUNK, SUMS_BLOCK = 64, 1024
# `states`, both ways: columns p of a program.
STATES_BLOCK_P, STATES_WARPS, STATES_STAGES = 64, 4, 2
# `chunks`: heads of a group that share a program; a divisor of 16.
HEADS, CHUNKS_WARPS, CHUNKS_STAGES = 8, 8, 2
# `bwd_bc`: columns n of a program. `bwd_x`: receiving rows at once; a divisor of CHUNK.
BC_BLOCK_N, BC_WARPS, BC_STAGES = 64, 8, 2
X_BLOCK_I, X_WARPS, X_STAGES = 32, 4, 2
STEP_BLOCK_P, STEP_WARPS = 16, 4
# By the bytes of an element: fp32 takes twice the room, and is not what is tuned.
STATES = {2: (STATES_BLOCK_P, STATES_WARPS, STATES_STAGES), 4: (64, 4, 2)}
BC = {2: (BC_BLOCK_N, BC_WARPS, BC_STAGES), 4: (64, 8, 2)}
X = {2: (X_BLOCK_I, X_WARPS, X_STAGES), 4: (16, 8, 2)}
# Registers of a thread: fp32 needs all. Left free, the assembler may take 32 and keep the rest in memory.
REGISTERS = {2: None, 4: 255}


# --- tiles -----------------------------------------------------------------------------------------------------------


@triton.jit
def dot(x, y):
    """x y, summed in fp32. Operands of fp32 are parts of tf32, large and small, three products in place of one."""
    return tl.dot(x, y, input_precision="tf32x3")


@triton.jit
def load_tile(x_ptr, stride, rows, cols, num_rows, num_cols):
    """x[rows, cols], neighbours along cols; 0 beyond."""
    mask = (rows < num_rows)[:, None] & (cols < num_cols)[None, :]
    return tl.load(x_ptr + rows[:, None] * stride + cols[None, :], mask=mask, other=0.0)


@triton.jit
def store_tile(x_ptr, x, stride, rows, cols, num_rows, num_cols):
    """To x[rows, cols], where these are."""
    mask = (rows < num_rows)[:, None] & (cols < num_cols)[None, :]
    tl.store(x_ptr + rows[:, None] * stride + cols[None, :], x, mask=mask)


@triton.jit
def load_steps(d_ptr, ca_ptr, head, num_rows, start, t, CHUNK: tl.constexpr):
    """d, ca and the ca of the chunk's last row, of one head."""
    last = tl.minimum(start + CHUNK, num_rows) - 1
    d = tl.load(d_ptr + head * num_rows + t, mask=t < num_rows, other=0.0)
    ca = tl.load(ca_ptr + head * num_rows + t, mask=t < num_rows, other=0.0)
    return d, ca, tl.load(ca_ptr + head * num_rows + last)


@triton.jit
def load_documents(first_ptr, batch, num_rows, start, t, CHUNK: tl.constexpr):
    """Where the documents of a chunk's rows start, and where that of its last row does."""
    first = tl.full((CHUNK,), -1, tl.int32)
    first_last = tl.full((), -1, tl.int32)
    if first_ptr is not None:
        first = tl.load(first_ptr + batch * num_rows + t, mask=t < num_rows, other=-1)
        first_last = tl.load(first_ptr + batch * num_rows + tl.minimum(start + CHUNK, num_rows) - 1)
    return first, first_last


@triton.jit
def softplus(x):
    """log(1 + exp(x)) to an ulp, also where it is small: Kahan's log1p(e) = log(w) e / (w - 1), w = 1 + e."""
    e = tl.exp(tl.where(x > 20.0, 0.0, x))
    w = 1.0 + e
    log1p = tl.where(w == 1.0, e, tl.log(w) * (e / tl.where(w == 1.0, 1.0, w - 1.0)))
    return tl.where(x > 20.0, x, log1p)


# --- forward ---------------------------------------------------------------------------------------------------------


@triton.jit
def ssd_steps_kernel(
    dt_ptr, stride_db, stride_dt, stride_dh, A_log_ptr, dt_bias_ptr, first_ptr, d_ptr, ca_ptr, num_rows, num_heads,
    CHUNK: tl.constexpr,
):
    """d and ca[B, H, T]. A program owns one chunk of one head."""
    chunk, h, batch = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    t = chunk * CHUNK + tl.arange(0, CHUNK)
    dt_ptr += batch * stride_db + h * stride_dh
    raw = tl.load(dt_ptr + t.to(tl.int64) * stride_dt, mask=t < num_rows, other=float("-inf")).to(tl.float32)
    d = softplus(raw + tl.load(dt_bias_ptr + h).to(tl.float32))
    a = -tl.exp(tl.load(A_log_ptr + h).to(tl.float32)) * d * 1.4426950408889634
    first, _first_last = load_documents(first_ptr, batch, num_rows, chunk * CHUNK, t, CHUNK)
    seen = (t[None, :] <= t[:, None]) & (t[None, :] >= first[:, None])
    # Others add 0: the sums of a document have no rounding of another's.
    ca = tl.sum(tl.where(seen, a[None, :], 0.0), 1)
    tl.store(d_ptr + (batch * num_heads + h) * num_rows + t, d, mask=t < num_rows)
    tl.store(ca_ptr + (batch * num_heads + h) * num_rows + t, ca, mask=t < num_rows)


@triton.jit
def ssd_states_kernel(
    u_ptr, stride_ub, stride_ut, stride_uh, d_ptr, ca_ptr, b_ptr, stride_bb, stride_bt, stride_bg,
    first_ptr, state_ptr, states_ptr, final_ptr, num_rows, num_heads,
    PER_GROUP: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """states[B, chunk, H, P, N], and the final one. A program owns columns p of one head, and walks its chunks."""
    h, batch = tl.program_id(0).to(tl.int64), tl.program_id(2).to(tl.int64)
    p, n = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_N)
    head, num_chunks = batch * num_heads + h, (num_rows + CHUNK - 1) // CHUNK
    u_ptr += batch * stride_ub + h * stride_uh
    b_ptr += batch * stride_bb + h // PER_GROUP * stride_bg
    s = tl.full((BLOCK_P, BLOCK_N), 0.0, tl.float32)
    if state_ptr is not None:
        s = load_tile(state_ptr + head * P * N, N, p, n, P, N)
    for chunk in range(num_chunks):
        store_tile(states_ptr + ((batch * num_chunks + chunk) * num_heads + h) * P * N, s, N, p, n, P, N)
        t = chunk * CHUNK + tl.arange(0, CHUNK)
        _first, first_last = load_documents(first_ptr, batch, num_rows, chunk * CHUNK, t, CHUNK)
        d, ca, ca_last = load_steps(d_ptr, ca_ptr, head, num_rows, chunk * CHUNK, t, CHUNK)
        u = load_tile(u_ptr, stride_ut, t.to(tl.int64), p, num_rows, P)
        b = load_tile(b_ptr, stride_bt, t.to(tl.int64), n, num_rows, N)
        leave = d * tl.exp2(tl.where(t >= first_last, ca_last - ca, float("-inf")))
        s = tl.where(first_last < chunk * CHUNK, s * tl.exp2(ca_last), 0.0)
        s += dot(tl.trans((u.to(tl.float32) * leave[:, None]).to(u.dtype)), b)
    store_tile(final_ptr + head * P * N, s, N, p, n, P, N)


@triton.jit
def ssd_chunks_kernel(
    u_ptr, stride_ub, stride_ut, stride_uh, d_ptr, ca_ptr, b_ptr, stride_bb, stride_bt, stride_bg,
    c_ptr, stride_cb, stride_ct, stride_cg, D_ptr, first_ptr, states_ptr, y_ptr, num_rows, num_heads,
    PER_GROUP: tl.constexpr, HEADS: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """y[B, T, H, P]. A program owns one chunk of HEADS heads of a group, which share c b^T."""
    chunk, block, batch = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    p, n, t = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_N), chunk * CHUNK + tl.arange(0, CHUNK)
    group, rows = block * HEADS // PER_GROUP, t.to(tl.int64)
    u_ptr += batch * stride_ub
    states_ptr += (batch * tl.num_programs(0) + chunk) * num_heads * P * N
    y_ptr += batch * num_rows * num_heads * P
    first, _first_last = load_documents(first_ptr, batch, num_rows, chunk * CHUNK, t, CHUNK)
    b = load_tile(b_ptr + batch * stride_bb + group * stride_bg, stride_bt, rows, n, num_rows, N)
    c = load_tile(c_ptr + batch * stride_cb + group * stride_cg, stride_ct, rows, n, num_rows, N)
    # Pairs that do not see each other are cut here, once for all heads; how they decay no longer matters.
    seen = (t[None, :] <= t[:, None]) & (t[None, :] >= first[:, None])
    scores = tl.where(seen, dot(c, tl.trans(b)), 0.0)
    for h in range(block * HEADS, block * HEADS + HEADS):
        d, ca, _ca_last = load_steps(d_ptr, ca_ptr, batch * num_heads + h, num_rows, chunk * CHUNK, t, CHUNK)
        u = load_tile(u_ptr + h * stride_uh, stride_ut, rows, p, num_rows, P)
        s = load_tile(states_ptr + h * P * N, N, p, n, P, N)
        decay = tl.exp2(tl.minimum(ca[:, None] - ca[None, :], 0.0))
        y = dot((scores * decay * d[None, :]).to(u.dtype), u)
        # Selected, not multiplied by 0: the state of another document may be anything, even inf.
        y += tl.where((first < chunk * CHUNK)[:, None], tl.exp2(ca)[:, None] * dot(c, tl.trans(s)), 0.0)
        y += tl.load(D_ptr + h).to(tl.float32) * u.to(tl.float32)
        store_tile(y_ptr + h * P, y, num_heads * P, rows, p, num_rows, P)


# --- backward --------------------------------------------------------------------------------------------------------


@triton.jit
def ssd_bwd_states_kernel(
    g_ptr, d_ptr, ca_ptr, c_ptr, stride_cb, stride_ct, stride_cg,
    first_ptr, d_final_ptr, z_ptr, d_state_ptr, num_rows, num_heads,
    PER_GROUP: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """z[B, chunk, H, P, N], and the gradient of the given state. Programs as in `states`."""
    h, batch = tl.program_id(0).to(tl.int64), tl.program_id(2).to(tl.int64)
    p, n = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_N)
    head, num_chunks = batch * num_heads + h, (num_rows + CHUNK - 1) // CHUNK
    g_ptr += (batch * num_rows * num_heads + h) * P
    c_ptr += batch * stride_cb + h // PER_GROUP * stride_cg
    z = load_tile(d_final_ptr + head * P * N, N, p, n, P, N)
    for i in range(num_chunks):
        chunk = num_chunks - 1 - i
        store_tile(z_ptr + ((batch * num_chunks + chunk) * num_heads + h) * P * N, z, N, p, n, P, N)
        t = chunk * CHUNK + tl.arange(0, CHUNK)
        first, first_last = load_documents(first_ptr, batch, num_rows, chunk * CHUNK, t, CHUNK)
        _d, ca, ca_last = load_steps(d_ptr, ca_ptr, head, num_rows, chunk * CHUNK, t, CHUNK)
        g = load_tile(g_ptr, num_heads * P, t.to(tl.int64), p, num_rows, P)
        c = load_tile(c_ptr, stride_ct, t.to(tl.int64), n, num_rows, N)
        enter = tl.exp2(tl.where(first < chunk * CHUNK, ca, float("-inf")))
        z = tl.where(first_last < chunk * CHUNK, z * tl.exp2(ca_last), 0.0)
        z += dot(tl.trans((g.to(tl.float32) * enter[:, None]).to(g.dtype)), c)
    store_tile(d_state_ptr + head * P * N, z, N, p, n, P, N)


@triton.jit
def ssd_bwd_bc_kernel(
    u_ptr, stride_ub, stride_ut, stride_uh, g_ptr, d_ptr, ca_ptr, b_ptr, stride_bb, stride_bt, stride_bg,
    c_ptr, stride_cb, stride_ct, stride_cg, first_ptr, states_ptr, z_ptr, d_b_ptr, d_c_ptr, got_ptr, given_ptr,
    num_rows, num_heads,
    PER_GROUP: tl.constexpr, TILES: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """d_b and d_c[B, T, G, N]; got and given[tile, B, H, T], the parts of d_a and d_d that are made from states.

    A program owns columns n of one chunk and group. What pairs get is summed over heads before it meets b and c.
    """
    chunk, batch = tl.program_id(0), tl.program_id(2).to(tl.int64)
    group, tile = (tl.program_id(1) // TILES).to(tl.int64), tl.program_id(1) % TILES
    p, t = tl.arange(0, BLOCK_P), chunk * CHUNK + tl.arange(0, CHUNK)
    n, rows = tile * BLOCK_N + tl.arange(0, BLOCK_N), t.to(tl.int64)
    u_ptr += batch * stride_ub
    g_ptr += batch * num_rows * num_heads * P
    states_ptr += (batch * tl.num_programs(0) + chunk) * num_heads * P * N
    z_ptr += (batch * tl.num_programs(0) + chunk) * num_heads * P * N
    first, first_last = load_documents(first_ptr, batch, num_rows, chunk * CHUNK, t, CHUNK)
    enters, leaves, last = first < chunk * CHUNK, t >= first_last, tl.minimum(chunk * CHUNK + CHUNK, num_rows) - 1
    b = load_tile(b_ptr + batch * stride_bb + group * stride_bg, stride_bt, rows, n, num_rows, N)
    c = load_tile(c_ptr + batch * stride_cb + group * stride_cg, stride_ct, rows, n, num_rows, N)
    pairs = tl.full((CHUNK, CHUNK), 0.0, tl.float32)
    d_b, d_c = tl.full((CHUNK, BLOCK_N), 0.0, tl.float32), tl.full((CHUNK, BLOCK_N), 0.0, tl.float32)
    for h in range(group * PER_GROUP, group * PER_GROUP + PER_GROUP):
        d, ca, ca_last = load_steps(d_ptr, ca_ptr, batch * num_heads + h, num_rows, chunk * CHUNK, t, CHUNK)
        u = load_tile(u_ptr + h * stride_uh, stride_ut, rows, p, num_rows, P)
        g = load_tile(g_ptr + h * P, num_heads * P, rows, p, num_rows, P)
        pairs += dot(g, tl.trans(u)) * tl.exp2(tl.minimum(ca[:, None] - ca[None, :], 0.0)) * d[None, :]
        # What rows get from the state that enters, and what they give to the one that leaves.
        s = load_tile(states_ptr + h * P * N, N, p, n, P, N)
        got = tl.where(enters[:, None], tl.exp2(ca)[:, None] * dot(g, s), 0.0)
        d_c += got
        z = load_tile(z_ptr + h * P * N, N, p, n, P, N)
        given = tl.where(leaves[:, None], tl.exp2(tl.where(leaves, ca_last - ca, 0.0))[:, None] * dot(u, z), 0.0)
        d_b += d[:, None] * given
        # What the state brings through decays with every row, as if the last one got it.
        through = tl.exp2(ca_last) * tl.sum(s.to(tl.float32) * z.to(tl.float32))
        through = tl.where((t == last) & (first_last < chunk * CHUNK), through, 0.0)
        offs_t = ((tile * tl.num_programs(2) + batch) * num_heads + h) * num_rows + t
        tl.store(got_ptr + offs_t, tl.sum(got * c.to(tl.float32), 1) + through, mask=t < num_rows)
        tl.store(given_ptr + offs_t, tl.sum(given * b.to(tl.float32), 1), mask=t < num_rows)
    seen = (t[None, :] <= t[:, None]) & (t[None, :] >= first[:, None])
    pairs = tl.where(seen, pairs, 0.0).to(b.dtype)
    d_c += dot(pairs, b)
    d_b += dot(tl.trans(pairs), c)
    num_groups = num_heads // PER_GROUP
    offs_b = (batch * num_rows * num_groups + group) * N
    store_tile(d_b_ptr + offs_b, d_b, num_groups * N, rows, n, num_rows, N)
    store_tile(d_c_ptr + offs_b, d_c, num_groups * N, rows, n, num_rows, N)


@triton.jit
def sum_before(lower, pairs):
    """sum_{j < t} pairs[j, i] for each t and i: a product with 0 and 1. In bf16 two parts hold 16 bits of it."""
    if lower.dtype == tl.float32:
        before = dot(lower, pairs)
    else:
        high = pairs.to(tl.bfloat16)
        before = dot(lower, high) + dot(lower, (pairs - high.to(tl.float32)).to(tl.bfloat16))
    return before


@triton.jit
def ssd_bwd_x_kernel(
    u_ptr, stride_ub, stride_ut, stride_uh, g_ptr, dt_ptr, stride_db, stride_dt, stride_dh, d_ptr, ca_ptr,
    b_ptr, stride_bb, stride_bt, stride_bg, c_ptr, stride_cb, stride_ct, stride_cg, A_log_ptr, D_ptr, dt_bias_ptr,
    first_ptr, z_ptr, got_ptr, given_ptr, d_u_ptr, d_dt_ptr, part_ptr, num_rows, num_heads,
    PER_GROUP: tl.constexpr, TILES: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """d_u[B, T, H, P], d_dt[B, T, H], and parts[3, B, H, T] of d_A_log, d_D and d_dt_bias.

    A program owns one chunk of one head, and walks receiving rows i in blocks; tiles of pairs are [j, i], sender and
    receiver. a_t gets what pairs j < t <= i get: a sum over them, and no difference of sums, which would cancel.
    """
    h, chunk, batch = (tl.program_id(0) % num_heads).to(tl.int64), tl.program_id(0) // num_heads, tl.program_id(1)
    start, head, group = chunk * CHUNK, batch.to(tl.int64) * num_heads + h, h // PER_GROUP
    p, n, t = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_N), start + tl.arange(0, CHUNK)
    rows, batch = t.to(tl.int64), batch.to(tl.int64)
    size = tl.num_programs(1).to(tl.int64) * num_heads * num_rows
    b_ptr += batch * stride_bb + group * stride_bg
    c_ptr += batch * stride_cb + group * stride_cg
    g_ptr += (batch * num_rows * num_heads + h) * P
    z_ptr += ((batch * (tl.num_programs(0) // num_heads) + chunk) * num_heads + h) * P * N
    _first, first_last = load_documents(first_ptr, batch, num_rows, start, t, CHUNK)
    d, ca, ca_last = load_steps(d_ptr, ca_ptr, head, num_rows, start, t, CHUNK)
    u = load_tile(u_ptr + batch * stride_ub + h * stride_uh, stride_ut, rows, p, num_rows, P)
    b = load_tile(b_ptr, stride_bt, rows, n, num_rows, N)
    z = load_tile(z_ptr, N, p, n, P, N)
    leave = tl.where(t >= first_last, ca_last - ca, 0.0)
    d_x = tl.where((t >= first_last)[:, None], tl.exp2(leave)[:, None] * dot(b, tl.trans(z)), 0.0)
    zero = tl.full((CHUNK,), 0.0, tl.float32)
    d_d, d_a, d_D = zero, zero, zero
    lower = (t[None, :] < t[:, None]).to(tl.float32 if u.dtype == tl.float32 else tl.bfloat16)
    for i in range(start, tl.minimum(start + CHUNK, num_rows), BLOCK_I):
        t_i = i + tl.arange(0, BLOCK_I)
        c = load_tile(c_ptr, stride_ct, t_i.to(tl.int64), n, num_rows, N)
        g = load_tile(g_ptr, num_heads * P, t_i.to(tl.int64), p, num_rows, P)
        ca_i = tl.load(ca_ptr + head * num_rows + t_i, mask=t_i < num_rows, other=float("-inf"))
        d_i = tl.load(d_ptr + head * num_rows + t_i, mask=t_i < num_rows, other=0.0)
        later = t[:, None] <= t_i[None, :]
        seen = later
        if first_ptr is not None:
            first_i = tl.load(first_ptr + batch * num_rows + t_i, mask=t_i < num_rows, other=-1)
            seen = later & (t[:, None] >= first_i[None, :])
        mix = dot(b, tl.trans(c)) * tl.exp2(tl.where(seen, ca_i[None, :] - ca[:, None], float("-inf")))
        met = dot(u, tl.trans(g))
        d_x += dot(mix.to(g.dtype), g)
        # The sum of pairs over i is u_j . d_x_j, without the state's part; the diagonal of `met` is what D gets.
        pairs = mix * met
        d_d += tl.sum(pairs, 1)
        d_D += tl.sum(tl.where(t[:, None] == t_i[None, :], met, 0.0), 1)
        d_a += tl.sum(tl.where(later, sum_before(lower, pairs * d[:, None]), 0.0), 1)
        # Of the states: what rows i >= t got from the one that enters, what rows before t gave to the one that leaves.
        for tile in range(TILES):
            offs_i = tile * size + head * num_rows + t_i
            got = tl.load(got_ptr + offs_i, mask=t_i < num_rows, other=0.0)
            given = tl.load(given_ptr + offs_i, mask=t_i < num_rows, other=0.0) * d_i
            d_a += tl.sum(tl.where(later, got[None, :], given[None, :]), 1)
    for tile in range(TILES):
        d_d += tl.load(given_ptr + tile * size + head * num_rows + t, mask=t < num_rows, other=0.0)
    dt_ptr += batch * stride_db + h * stride_dh
    raw = tl.load(dt_ptr + rows * stride_dt, mask=t < num_rows, other=float("-inf")).to(tl.float32)
    raw += tl.load(dt_bias_ptr + h).to(tl.float32)
    rate = -tl.exp(tl.load(A_log_ptr + h).to(tl.float32))
    d_raw = (d_d + rate * d_a) / (1.0 + tl.exp(-raw))
    tl.store(d_dt_ptr + (batch * num_rows + rows) * num_heads + h, d_raw, mask=t < num_rows)
    tl.store(part_ptr + head * num_rows + t, rate * d * d_a, mask=t < num_rows)
    tl.store(part_ptr + size + head * num_rows + t, d_D, mask=t < num_rows)
    tl.store(part_ptr + 2 * size + head * num_rows + t, d_raw, mask=t < num_rows)
    g = load_tile(g_ptr, num_heads * P, rows, p, num_rows, P)
    d_u = d[:, None] * d_x + tl.load(D_ptr + h).to(tl.float32) * g.to(tl.float32)
    store_tile(d_u_ptr + (batch * num_rows * num_heads + h) * P, d_u, num_heads * P, rows, p, num_rows, P)


@triton.jit
def ssd_bwd_sums_kernel(part_ptr, sum_ptr, num_batch, num_rows, num_heads, SUMS_BLOCK: tl.constexpr):
    """sums[3, H] of parts[3, B, H, T]. A program owns one head of one of the three."""
    h, which = tl.program_id(0), tl.program_id(1).to(tl.int64)
    acc = tl.full((SUMS_BLOCK,), 0.0, tl.float32)
    for batch in range(num_batch):
        row = part_ptr + ((which * num_batch + batch) * num_heads + h) * num_rows
        for start in range(0, num_rows, SUMS_BLOCK):
            t = start + tl.arange(0, SUMS_BLOCK)
            acc += tl.load(row + t, mask=t < num_rows, other=0.0)
    tl.store(sum_ptr + which * num_heads + h, tl.sum(acc, 0))


# --- one row ---------------------------------------------------------------------------------------------------------


@triton.jit
def ssd_step_kernel(
    u_ptr, stride_ub, stride_uh, dt_ptr, stride_db, stride_dh, b_ptr, stride_bb, stride_bg, c_ptr, stride_cb, stride_cg,
    A_log_ptr, D_ptr, dt_bias_ptr, first_ptr, state_ptr, y_ptr, num_heads,
    PER_GROUP: tl.constexpr, P: tl.constexpr, N: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """y[B, H, P] of one row of each sequence; the state is replaced. A program owns columns p of one head."""
    h, batch = tl.program_id(0).to(tl.int64), tl.program_id(2).to(tl.int64)
    p, n = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_N)
    head, group = batch * num_heads + h, h // PER_GROUP
    s = load_tile(state_ptr + head * P * N, N, p, n, P, N)
    u = tl.load(u_ptr + batch * stride_ub + h * stride_uh + p, mask=p < P, other=0.0).to(tl.float32)
    b = tl.load(b_ptr + batch * stride_bb + group * stride_bg + n, mask=n < N, other=0.0).to(tl.float32)
    c = tl.load(c_ptr + batch * stride_cb + group * stride_cg + n, mask=n < N, other=0.0).to(tl.float32)
    raw = tl.load(dt_ptr + batch * stride_db + h * stride_dh).to(tl.float32) + tl.load(dt_bias_ptr + h).to(tl.float32)
    d = softplus(raw)
    if first_ptr is not None:
        s = tl.where(tl.load(first_ptr + batch) < 0, s, 0.0)
    s = s * tl.exp(-tl.exp(tl.load(A_log_ptr + h).to(tl.float32)) * d) + (d * u)[:, None] * b[None, :]
    store_tile(state_ptr + head * P * N, s, N, p, n, P, N)
    y = tl.sum(s * c[None, :], 1) + tl.load(D_ptr + h).to(tl.float32) * u
    tl.store(y_ptr + head * P + p, y, mask=p < P)


# --- ops of torch ----------------------------------------------------------------------------------------------------


def inner(x: Tensor) -> Tensor:
    """x with neighbours along its last dim, as kernels read it."""
    return x if x.stride(-1) == 1 else x.contiguous()


def chunk_of(u: Tensor) -> int:
    """Rows of a chunk."""
    return CHUNK if u.element_size() == 2 else max(16, CHUNK // 2)


def walk(
    u: Tensor, dt: Tensor, b: Tensor, A_log: Tensor, dt_bias: Tensor, first: Tensor | None, state: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """d and ca, fp32[B, H, T]; states[B, chunk, H, P, N] that enter chunks, like u; the final one, fp32[B, H, P, N]."""
    (batch, rows, heads, _), chunk = u.shape, chunk_of(u)
    d, ca = (kernels.empty((batch, heads, rows), u, torch.float32) for _ in range(2))
    kernels.launch(
        ssd_steps_kernel, (triton.cdiv(rows, chunk), heads, batch),
        dt, *dt.stride(), A_log, dt_bias, first, d, ca, rows, heads, CHUNK=chunk,
    )
    states = kernels.empty((batch, triton.cdiv(rows, chunk), heads, 64, 128), u)
    final = kernels.empty((batch, heads, 64, 128), u, torch.float32)
    block_p, warps, stages = STATES[u.element_size()]
    kernels.launch(
        ssd_states_kernel, (heads, triton.cdiv(64, block_p), batch),
        u, *u.stride()[:3], d, ca, b, *b.stride()[:3], first, state, states, final, rows, heads,
        PER_GROUP=16, P=64, N=128, CHUNK=chunk, BLOCK_P=block_p, BLOCK_N=128,
        num_warps=warps, num_stages=stages, maxnreg=REGISTERS[u.element_size()],
    )
    return d, ca, states, final


@kernels.op(__name__)
def ssd_fwd(
    u: Tensor, dt: Tensor, b: Tensor, c: Tensor, A_log: Tensor, D: Tensor, dt_bias: Tensor,
    first: Tensor | None, state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """y and the final state."""
    u, b, c = inner(u), inner(b), inner(c)
    (batch, rows, heads, _), chunk = u.shape, chunk_of(u)
    d, ca, states, final = walk(u, dt, b, A_log, dt_bias, first, state)
    y = kernels.empty(u.shape, u)
    kernels.launch(
        ssd_chunks_kernel, (states.shape[1], heads // HEADS, batch),
        u, *u.stride()[:3], d, ca, b, *b.stride()[:3], c, *c.stride()[:3], D, first, states, y, rows, heads,
        PER_GROUP=16, HEADS=HEADS, P=64, N=128, CHUNK=chunk, BLOCK_P=64, BLOCK_N=128,
        num_warps=CHUNKS_WARPS, num_stages=CHUNKS_STAGES, maxnreg=REGISTERS[u.element_size()],
    )
    return y, final


@kernels.op(__name__)
def ssd_bwd(
    g: Tensor, d_final: Tensor, u: Tensor, dt: Tensor, b: Tensor, c: Tensor, A_log: Tensor, D: Tensor, dt_bias: Tensor,
    first: Tensor | None, state: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of u, dt, b, c, of A_log, D and dt_bias as fp32[3, H], and of the given state."""
    u, b, c, g, d_final = inner(u), inner(b), inner(c), g.contiguous(), d_final.contiguous()
    (batch, rows, heads, _), chunk = u.shape, chunk_of(u)
    d, ca, states, _ = walk(u, dt, b, A_log, dt_bias, first, state)
    z, d_state = kernels.empty(states.shape, states), kernels.empty(d_final.shape, d_final)
    block_p, warps, stages = STATES[u.element_size()]
    kernels.launch(
        ssd_bwd_states_kernel, (heads, triton.cdiv(64, block_p), batch),
        g, d, ca, c, *c.stride()[:3], first, d_final, z, d_state, rows, heads,
        PER_GROUP=16, P=64, N=128, CHUNK=chunk, BLOCK_P=block_p, BLOCK_N=128,
        num_warps=warps, num_stages=stages, maxnreg=REGISTERS[u.element_size()],
    )
    block_n, warps, stages = BC[u.element_size()]
    tiles = triton.cdiv(128, block_n)
    d_b, d_c = kernels.empty(b.shape, b), kernels.empty(c.shape, c)
    got, given = (kernels.empty((tiles, batch, heads, rows), u, torch.float32) for _ in range(2))
    kernels.launch(
        ssd_bwd_bc_kernel, (states.shape[1], b.shape[2] * tiles, batch),
        u, *u.stride()[:3], g, d, ca, b, *b.stride()[:3], c, *c.stride()[:3], first, states, z,
        d_b, d_c, got, given, rows, heads,
        PER_GROUP=16, TILES=tiles, P=64, N=128, CHUNK=chunk, BLOCK_P=64, BLOCK_N=block_n,
        num_warps=warps, num_stages=stages, maxnreg=REGISTERS[u.element_size()],
    )
    d_u, d_dt = kernels.empty(u.shape, u), kernels.empty(dt.shape, dt)
    parts = kernels.empty((3, batch, heads, rows), u, torch.float32)
    block_i, warps, stages = X[u.element_size()]
    kernels.launch(
        ssd_bwd_x_kernel, (states.shape[1] * heads, batch),
        u, *u.stride()[:3], g, dt, *dt.stride(), d, ca, b, *b.stride()[:3], c, *c.stride()[:3], A_log, D, dt_bias, first, z,
        got, given, d_u, d_dt, parts, rows, heads,
        PER_GROUP=16, TILES=tiles, P=64, N=128, CHUNK=chunk, BLOCK_I=min(block_i, chunk),
        BLOCK_P=64, BLOCK_N=128, num_warps=warps, num_stages=stages, maxnreg=REGISTERS[u.element_size()],
    )
    sums = kernels.empty((3, heads), u, torch.float32)
    kernels.launch(ssd_bwd_sums_kernel, (heads, 3), parts, sums, batch, rows, heads, SUMS_BLOCK=SUMS_BLOCK)
    return d_u, d_dt, d_b, d_c, sums, d_state


@kernels.op(__name__, mutates=("state",))
def ssd_step(
    u: Tensor, dt: Tensor, b: Tensor, c: Tensor, A_log: Tensor, D: Tensor, dt_bias: Tensor,
    first: Tensor | None, state: Tensor,
) -> Tensor:
    """y of one row of each sequence, [B, 1, H, P]; the state becomes that behind it."""
    u, b, c = inner(u), inner(b), inner(c)
    y = kernels.empty(u.shape, u)
    kernels.launch(
        ssd_step_kernel, (u.shape[2], triton.cdiv(64, STEP_BLOCK_P), u.shape[0]),
        u, u.stride(0), u.stride(2), dt, dt.stride(0), dt.stride(2), b, b.stride(0), b.stride(2),
        c, c.stride(0), c.stride(2), A_log, D, dt_bias, first, state, y, u.shape[2],
        PER_GROUP=16, P=64, N=128, BLOCK_P=STEP_BLOCK_P, BLOCK_N=128, num_warps=STEP_WARPS,
    )
    return y


def _keep(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, g, d_final):
    u, dt, b, c, A_log, D, dt_bias, first, state = ctx.saved_tensors
    d_u, d_dt, d_b, d_c, sums, d_state = ssd_bwd(g, d_final, u, dt, b, c, A_log, D, dt_bias, first, state)
    heads = (x.to(old.dtype) for x, old in zip(sums, (A_log, D, dt_bias), strict=True))
    return d_u, d_dt, d_b, d_c, *heads, None, None if state is None else d_state


ssd_fwd.register_autograd(_backward, setup_context=_keep)


def scan(
    u: Tensor, dt: Tensor, b: Tensor, c: Tensor, A_log: Tensor, D: Tensor, dt_bias: Tensor,
    first: Tensor | None = None, state: Tensor | None = None, update: bool = False,
) -> tuple[Tensor, Tensor]:
    """u[B, T, H, P], dt[B, T, H], b and c[B, T, G, N], A_log, D and dt_bias[H] -> y like u, final state fp32[B, H, P, N].

    first: int32[B, T], where the document of a row starts, -1 where it continues `state`; None: all continue. state: what
    stands before the rows, fp32[B, H, P, N], None: zeros. update: the final state is written over it, with no gradient.
    Raises TypeError for dtypes that it does not take; in fp16, products of c and b have to be below 65504.
    """
    kernels.floats(u, dt, b, c, A_log, D, dt_bias)
    if not u.dtype == b.dtype == c.dtype:
        raise TypeError(f"u, b and c of one dtype are multiplied; u is {u.dtype}, b {b.dtype}, c {c.dtype}")
    if state is not None and (state.dtype != torch.float32 or update and not state.is_contiguous()):
        raise TypeError(f"a state is fp32, and contiguous where it is replaced; {state.dtype}, strides {state.stride()}")
    A_log, D, dt_bias = A_log.contiguous(), D.contiguous(), dt_bias.contiguous()
    first = None if first is None else first.to(torch.int32).contiguous()
    if update and u.shape[1] == 1:
        return ssd_step(u, dt, b, c, A_log, D, dt_bias, first, state), state
    y, final = ssd_fwd(u, dt, b, c, A_log, D, dt_bias, first, None if state is None else state.contiguous())
    return y, state.copy_(final) if update else final
