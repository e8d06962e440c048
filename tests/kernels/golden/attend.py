"""Attention to 2 sources of keys under one softmax.

    o = sum_n p_n v_n    p: softmax over all sources of scale * q . k_n, low <= n < high

Dims: b batch, t query, h key head, g one of the 4 query heads that share it, n key; keys are 128 wide, values 128.
Each query has its own low and high; one that sees nothing gets 0. The rows of a program are pairs (t, g), so that keys
and values are read once for a group. Scores, and lse, the logarithm of a row's sum of weights, are in base 2.

Source: Vaswani et al. 2017, eq. 1; groups: Ainslie et al. 2023; tiles and gradients: Dao et al. 2022; parts: Dao et al.
2023, Flash-Decoding.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from heddle.runtime.lib import kernels

# Of each kernel: BLOCK_M rows, BLOCK_N keys, warps, stages.
FORWARD_M, FORWARD_N, FORWARD_WARPS, FORWARD_STAGES = 128, 64, 8, 3
GRAD_Q_M, GRAD_Q_N, GRAD_Q_WARPS, GRAD_Q_STAGES = 128, 64, 8, 2
GRAD_KV_M, GRAD_KV_N, GRAD_KV_WARPS, GRAD_KV_STAGES = 64, 64, 8, 2
SPLIT_M, SPLIT_N, SPLIT_WARPS, SPLIT_STAGES = 16, 64, 4, 3
# So few rows have their keys read in parts of SPLIT_KEYS, side by side.
SPLIT_ROWS, SPLIT_KEYS = 64, 512
# By the bytes of an element: fp32 takes twice the room, and is not what is tuned.
FORWARD = {2: (FORWARD_M, FORWARD_N, FORWARD_WARPS, FORWARD_STAGES), 4: (16, 32, 8, 2)}
GRAD_Q = {2: (GRAD_Q_M, GRAD_Q_N, GRAD_Q_WARPS, GRAD_Q_STAGES), 4: (32, 32, 8, 2)}
GRAD_KV = {2: (GRAD_KV_M, GRAD_KV_N, GRAD_KV_WARPS, GRAD_KV_STAGES), 4: (32, 32, 4, 2)}
SPLIT = {2: (SPLIT_M, SPLIT_N, SPLIT_WARPS, SPLIT_STAGES), 4: (16, 32, 8, 2)}


# --- rows and keys ------------------------------------------------------------------------------------


@triton.jit
def load_rows(x_ptr, stride_b, stride_t, stride_h, b, h, rows, num_rows, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """x[b, t, h * 4 + g, :] of rows (t, g); 0 beyond."""
    offs = tl.arange(0, BLOCK)
    t = (rows // 4).to(tl.int64)
    head = (h * 4 + rows % 4).to(tl.int64)
    mask = (rows < num_rows)[:, None]
    if WIDTH < BLOCK:
        mask = mask & (offs < WIDTH)[None, :]
    x_ptrs = x_ptr + b * stride_b + (t * stride_t + head * stride_h)[:, None] + offs[None, :]
    return tl.load(x_ptrs, mask=mask, other=0.0)


@triton.jit
def store_rows(x_ptr, x, b, h, rows, num_rows, num_heads, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """To x[b, t, h * 4 + g, :] of rows (t, g), side by side in memory."""
    offs = tl.arange(0, BLOCK)
    place = ((b * (num_rows // 4) + rows // 4) * num_heads + h) * 4 + rows % 4
    mask = (rows < num_rows)[:, None] & (offs < WIDTH)[None, :]
    tl.store(x_ptr + place[:, None] * WIDTH + offs[None, :], x, mask=mask)


@triton.jit
def load_keys(x_ptr, stride_xn, offs_n, there, ALL: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """x[n, :] of keys, or values of theirs; 0 where one is not there. ALL: all are."""
    offs = tl.arange(0, BLOCK)
    x_ptrs = x_ptr + offs_n.to(tl.int64)[:, None] * stride_xn + offs[None, :]
    if ALL and WIDTH == BLOCK:
        return tl.load(x_ptrs)
    return tl.load(x_ptrs, mask=there[:, None] & (offs < WIDTH)[None, :], other=0.0)


@triton.jit
def keys_there(valid_ptr, offs_n, num_keys):
    """Which keys there are, and count."""
    there = offs_n < num_keys
    if valid_ptr is not None:
        there = there & (tl.load(valid_ptr + offs_n, mask=there, other=0) != 0)
    return there


@triton.jit
def span(low, high, mask_m, start, end, BLOCK_N: tl.constexpr):
    """Of the keys start .. end: first .. last, in tiles, is what some row sees, inner .. outer what all rows see."""
    first = tl.maximum(tl.min(low, 0) // BLOCK_N * BLOCK_N, start)
    last = tl.minimum(tl.max(high, 0), end)
    inner = tl.minimum(tl.max(tl.where(mask_m, low, 0), 0), tl.maximum(last, 0))
    inner = tl.maximum(tl.cdiv(inner, BLOCK_N) * BLOCK_N, first)
    outer = tl.maximum(tl.min(tl.where(mask_m, high, 2147483647), 0) // BLOCK_N * BLOCK_N, inner)
    outer = tl.minimum(outer, tl.maximum(last, inner))
    return first, inner, outer, last


# --- forward ------------------------------------------------------------------------------------------


@triton.jit
def take_keys(
    m, mass, acc, q, low, high, mask_m, k_ptr, stride_kn, v_ptr, stride_vn, valid_ptr, num_keys,
    first, last, scale, ALL: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """Take the keys first .. last in: m is the largest score of each row, mass its sum of weights 2^(s - m), acc that
    of weighted values. ALL: every row sees all of them."""
    for n in range(first, last, BLOCK_N):
        offs_n = n + tl.arange(0, BLOCK_N)
        there = keys_there(valid_ptr, offs_n, num_keys)
        k = load_keys(k_ptr, stride_kn, offs_n, there, ALL, 128, 128)
        v = load_keys(v_ptr, stride_vn, offs_n, there, ALL, 128, 128)
        s = tl.dot(q, tl.trans(k), input_precision="ieee") * (scale * 1.4426950408889634)
        if ALL:
            m_new = tl.maximum(m, tl.max(s, 1))
            m_ref = m_new
        else:
            seen = (offs_n[None, :] >= low[:, None]) & (offs_n[None, :] < high[:, None]) & there[None, :]
            s = tl.where(seen, s, float("-inf"))
            m_new = tl.maximum(m, tl.max(s, 1))
            m_ref = tl.where(m_new == float("-inf"), 0.0, m_new)  # no key yet: -inf less -inf would be NaN
        p = tl.exp2(s - m_ref[:, None])
        keep = tl.exp2(m - m_ref)
        mass = mass * keep + tl.sum(p, 1)
        acc = tl.dot(p.to(v.dtype), v, acc * keep[:, None], input_precision="ieee")
        m = m_new
    return m, mass, acc


@triton.jit
def see_keys(
    m, mass, acc, q, low, high, mask_m, k_ptr, stride_kn, v_ptr, stride_vn, valid_ptr, num_keys,
    start, end, scale, BLOCK_N: tl.constexpr,
):
    """Take in what each row sees of the keys start .. end: tiles of which some rows see a part stand at both ends."""
    first, inner, outer, last = span(low, high, mask_m, start, end, BLOCK_N)
    TILES: tl.constexpr = valid_ptr is None
    if TILES:
        m, mass, acc = take_keys(
            m, mass, acc, q, low, high, mask_m, k_ptr, stride_kn, v_ptr, stride_vn, valid_ptr, num_keys,
            first, tl.minimum(inner, last), scale, False, BLOCK_N,
        )
        m, mass, acc = take_keys(
            m, mass, acc, q, low, high, mask_m, k_ptr, stride_kn, v_ptr, stride_vn, valid_ptr, num_keys,
            inner, outer, scale, True, BLOCK_N,
        )
        m, mass, acc = take_keys(
            m, mass, acc, q, low, high, mask_m, k_ptr, stride_kn, v_ptr, stride_vn, valid_ptr, num_keys,
            outer, last, scale, False, BLOCK_N,
        )
    else:
        m, mass, acc = take_keys(
            m, mass, acc, q, low, high, mask_m, k_ptr, stride_kn, v_ptr, stride_vn, valid_ptr, num_keys,
            first, last, scale, False, BLOCK_N,
        )
    return m, mass, acc


@triton.jit
def attend_forward_kernel(
    o_ptr, lse_ptr,
    q_ptr, stride_qb, stride_qt, stride_qh,
    k1_ptr, stride_k1b, stride_k1n, stride_k1h,
    v1_ptr, stride_v1b, stride_v1n, stride_v1h,
    low1_ptr, stride_low1b, high1_ptr, stride_high1b,
    valid1_ptr, stride_valid1b, num_keys1,
    k2_ptr, stride_k2b, stride_k2n, stride_k2h,
    v2_ptr, stride_v2b, stride_v2n, stride_v2h,
    low2_ptr, stride_low2b, high2_ptr, stride_high2b,
    valid2_ptr, stride_valid2b, num_keys2,
    num_heads, num_rows, scale, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """One program: BLOCK_M rows of a key head, and all keys that they see."""
    num_tiles = tl.cdiv(num_rows, BLOCK_M)
    b = (tl.program_id(0) // num_tiles // num_heads).to(tl.int64)
    h = tl.program_id(0) // num_tiles % num_heads
    rows = tl.program_id(0) % num_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = rows < num_rows
    q = load_rows(q_ptr, stride_qb, stride_qt, stride_qh, b, h, rows, num_rows, 128, 128)
    m = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    mass = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, 128), tl.float32)

    # key.position <= query.position and query.position - key.position < 512
    low = tl.load(low1_ptr + b * stride_low1b + rows // 4, mask=mask_m, other=2147483647)
    high = tl.load(high1_ptr + b * stride_high1b + rows // 4, mask=mask_m, other=0)
    k_ptr = k1_ptr + b * stride_k1b + h.to(tl.int64) * stride_k1h
    v_ptr = v1_ptr + b * stride_v1b + h.to(tl.int64) * stride_v1h
    valid_ptr = valid1_ptr
    if valid1_ptr is not None:
        valid_ptr = valid1_ptr + b * stride_valid1b
    m, mass, acc = see_keys(
        m, mass, acc, q, low, high, mask_m,
        k_ptr, stride_k1n, v_ptr, stride_v1n, valid_ptr, num_keys1,
        0, num_keys1, scale, BLOCK_N,
    )

    # key.position < query.position // 16
    low = tl.load(low2_ptr + b * stride_low2b + rows // 4, mask=mask_m, other=2147483647)
    high = tl.load(high2_ptr + b * stride_high2b + rows // 4, mask=mask_m, other=0)
    k_ptr = k2_ptr + b * stride_k2b + h.to(tl.int64) * stride_k2h
    v_ptr = v2_ptr + b * stride_v2b + h.to(tl.int64) * stride_v2h
    valid_ptr = valid2_ptr
    if valid2_ptr is not None:
        valid_ptr = valid2_ptr + b * stride_valid2b
    m, mass, acc = see_keys(
        m, mass, acc, q, low, high, mask_m,
        k_ptr, stride_k2n, v_ptr, stride_v2n, valid_ptr, num_keys2,
        0, num_keys2, scale, BLOCK_N,
    )

    total = tl.where(mass == 0.0, 1.0, mass)
    o = acc / total[:, None]
    lse = tl.where(mass == 0.0, float("inf"), m + tl.log2(total))  # no key: backward, every weight 2^(s - inf) is 0
    store_rows(o_ptr, o, b, h, rows, num_rows, num_heads, 128, 128)
    tl.store(lse_ptr + (b * num_heads + h) * num_rows + rows, lse, mask=mask_m)


# --- a few rows: parts of the keys side by side -------------------------------------------------------


@triton.jit
def attend_split1_kernel(
    part_o_ptr, part_lse_ptr,
    q_ptr, stride_qb, stride_qt, stride_qh,
    k1_ptr, stride_k1b, stride_k1n, stride_k1h,
    v1_ptr, stride_v1b, stride_v1n, stride_v1h,
    low1_ptr, stride_low1b, high1_ptr, stride_high1b,
    valid1_ptr, stride_valid1b, num_keys1,
    first_part, num_heads, num_rows, scale, PART: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """One program: BLOCK_M rows of a key head, and what they see of PART keys of source 1."""
    num_tiles = tl.cdiv(num_rows, BLOCK_M)
    b = (tl.program_id(0) // num_tiles // num_heads).to(tl.int64)
    h = tl.program_id(0) // num_tiles % num_heads
    rows = tl.program_id(0) % num_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = rows < num_rows
    tl.static_assert(PART % BLOCK_N == 0)  # no tile is of two parts
    part = tl.program_id(1)
    m = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    mass = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, 128), tl.float32)
    q = load_rows(q_ptr, stride_qb, stride_qt, stride_qh, b, h, rows, num_rows, 128, 128)
    low = tl.load(low1_ptr + b * stride_low1b + rows // 4, mask=mask_m, other=2147483647)
    high = tl.load(high1_ptr + b * stride_high1b + rows // 4, mask=mask_m, other=0)
    k_ptr = k1_ptr + b * stride_k1b + h.to(tl.int64) * stride_k1h
    v_ptr = v1_ptr + b * stride_v1b + h.to(tl.int64) * stride_v1h
    valid_ptr = valid1_ptr
    if valid1_ptr is not None:
        valid_ptr = valid1_ptr + b * stride_valid1b
    m, mass, acc = see_keys(
        m, mass, acc, q, low, high, mask_m,
        k_ptr, stride_k1n, v_ptr, stride_v1n, valid_ptr, num_keys1,
        part * PART, tl.minimum(part * PART + PART, num_keys1), scale, BLOCK_N,
    )
    offs_e = tl.arange(0, 128)
    place = ((first_part + part) * (tl.num_programs(0) // num_tiles) + b * num_heads + h) * num_rows + rows
    mask = mask_m[:, None] & (offs_e < 128)[None, :]
    total = tl.where(mass == 0.0, 1.0, mass)
    tl.store(part_o_ptr + place[:, None] * 128 + offs_e[None, :], acc / total[:, None], mask=mask)
    tl.store(part_lse_ptr + place, tl.where(mass == 0.0, float("-inf"), m + tl.log2(total)), mask=mask_m)


@triton.jit
def attend_split2_kernel(
    part_o_ptr, part_lse_ptr,
    q_ptr, stride_qb, stride_qt, stride_qh,
    k2_ptr, stride_k2b, stride_k2n, stride_k2h,
    v2_ptr, stride_v2b, stride_v2n, stride_v2h,
    low2_ptr, stride_low2b, high2_ptr, stride_high2b,
    valid2_ptr, stride_valid2b, num_keys2,
    first_part, num_heads, num_rows, scale, PART: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """One program: BLOCK_M rows of a key head, and what they see of PART keys of source 2."""
    num_tiles = tl.cdiv(num_rows, BLOCK_M)
    b = (tl.program_id(0) // num_tiles // num_heads).to(tl.int64)
    h = tl.program_id(0) // num_tiles % num_heads
    rows = tl.program_id(0) % num_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = rows < num_rows
    tl.static_assert(PART % BLOCK_N == 0)  # no tile is of two parts
    part = tl.program_id(1)
    m = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    mass = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, 128), tl.float32)
    q = load_rows(q_ptr, stride_qb, stride_qt, stride_qh, b, h, rows, num_rows, 128, 128)
    low = tl.load(low2_ptr + b * stride_low2b + rows // 4, mask=mask_m, other=2147483647)
    high = tl.load(high2_ptr + b * stride_high2b + rows // 4, mask=mask_m, other=0)
    k_ptr = k2_ptr + b * stride_k2b + h.to(tl.int64) * stride_k2h
    v_ptr = v2_ptr + b * stride_v2b + h.to(tl.int64) * stride_v2h
    valid_ptr = valid2_ptr
    if valid2_ptr is not None:
        valid_ptr = valid2_ptr + b * stride_valid2b
    m, mass, acc = see_keys(
        m, mass, acc, q, low, high, mask_m,
        k_ptr, stride_k2n, v_ptr, stride_v2n, valid_ptr, num_keys2,
        part * PART, tl.minimum(part * PART + PART, num_keys2), scale, BLOCK_N,
    )
    offs_e = tl.arange(0, 128)
    place = ((first_part + part) * (tl.num_programs(0) // num_tiles) + b * num_heads + h) * num_rows + rows
    mask = mask_m[:, None] & (offs_e < 128)[None, :]
    total = tl.where(mass == 0.0, 1.0, mass)
    tl.store(part_o_ptr + place[:, None] * 128 + offs_e[None, :], acc / total[:, None], mask=mask)
    tl.store(part_lse_ptr + place, tl.where(mass == 0.0, float("-inf"), m + tl.log2(total)), mask=mask_m)


@triton.jit
def attend_combine_kernel(
    o_ptr, lse_ptr, part_o_ptr, part_lse_ptr, num_parts, num_heads, num_rows, BLOCK_M: tl.constexpr
):
    """One program: BLOCK_M rows of a key head. Each part is weighed by its sum of weights, 2^lse."""
    num_tiles = tl.cdiv(num_rows, BLOCK_M)
    b = (tl.program_id(0) // num_tiles // num_heads).to(tl.int64)
    h = tl.program_id(0) // num_tiles % num_heads
    rows = tl.program_id(0) % num_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = rows < num_rows
    offs_e = tl.arange(0, 128)
    m = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    mass = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, 128), tl.float32)
    for part in range(num_parts):
        place = (part * (tl.num_programs(0) // num_tiles) + b * num_heads + h) * num_rows + rows
        lse = tl.load(part_lse_ptr + place, mask=mask_m, other=float("-inf"))
        mask = mask_m[:, None] & (offs_e < 128)[None, :]
        o = tl.load(part_o_ptr + place[:, None] * 128 + offs_e[None, :], mask=mask, other=0.0)
        m_new = tl.maximum(m, lse)
        m_ref = tl.where(m_new == float("-inf"), 0.0, m_new)
        keep, weight = tl.exp2(m - m_ref), tl.exp2(lse - m_ref)
        mass = mass * keep + weight
        acc = acc * keep[:, None] + o * weight[:, None]
        m = m_new
    total = tl.where(mass == 0.0, 1.0, mass)
    o = acc / total[:, None]
    lse = tl.where(mass == 0.0, float("inf"), m + tl.log2(total))
    store_rows(o_ptr, o, b, h, rows, num_rows, num_heads, 128, 128)
    tl.store(lse_ptr + (b * num_heads + h) * num_rows + rows, lse, mask=mask_m)


# --- backward -----------------------------------------------------------------------------------------


@triton.jit
def answer_keys(
    d_q, q, d_o, lse, delta, low, high, mask_m, k_ptr, stride_kn, v_ptr, stride_vn, valid_ptr, num_keys,
    first, last, scale, ALL: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """d_q and what the keys first .. last add to it; a score's gradient is p * (d_o . v - d_o . o)."""
    for n in range(first, last, BLOCK_N):
        offs_n = n + tl.arange(0, BLOCK_N)
        there = keys_there(valid_ptr, offs_n, num_keys)
        k = load_keys(k_ptr, stride_kn, offs_n, there, ALL, 128, 128)
        v = load_keys(v_ptr, stride_vn, offs_n, there, ALL, 128, 128)
        s = tl.dot(q, tl.trans(k), input_precision="ieee") * (scale * 1.4426950408889634)
        seen = mask_m[:, None] & there[None, :]
        if not ALL:
            seen = seen & (offs_n[None, :] >= low[:, None]) & (offs_n[None, :] < high[:, None])
            s = tl.where(seen, s, float("-inf"))
        p = tl.exp2(s - lse[:, None])
        d_s = p * (tl.dot(d_o, tl.trans(v), input_precision="ieee") - delta[:, None])
        d_q = tl.dot(d_s.to(k.dtype), k, d_q, input_precision="ieee")
    return d_q


@triton.jit
def answer_rows(
    d_q, q, d_o, lse, delta, low, high, mask_m, k_ptr, stride_kn, v_ptr, stride_vn, valid_ptr, num_keys,
    scale, BLOCK_N: tl.constexpr,
):
    """The same of all keys that the rows see, tile by tile as in `see_keys`."""
    first, inner, outer, last = span(low, high, mask_m, 0, num_keys, BLOCK_N)
    TILES: tl.constexpr = valid_ptr is None
    if TILES:
        d_q = answer_keys(
            d_q, q, d_o, lse, delta, low, high, mask_m, k_ptr, stride_kn, v_ptr, stride_vn, valid_ptr, num_keys,
            first, tl.minimum(inner, last), scale, False, BLOCK_N,
        )
        d_q = answer_keys(
            d_q, q, d_o, lse, delta, low, high, mask_m, k_ptr, stride_kn, v_ptr, stride_vn, valid_ptr, num_keys,
            inner, outer, scale, True, BLOCK_N,
        )
        d_q = answer_keys(
            d_q, q, d_o, lse, delta, low, high, mask_m, k_ptr, stride_kn, v_ptr, stride_vn, valid_ptr, num_keys,
            outer, last, scale, False, BLOCK_N,
        )
    else:
        d_q = answer_keys(
            d_q, q, d_o, lse, delta, low, high, mask_m, k_ptr, stride_kn, v_ptr, stride_vn, valid_ptr, num_keys,
            first, last, scale, False, BLOCK_N,
        )
    return d_q


@triton.jit
def attend_grad_q_kernel(
    delta_ptr, d_o_ptr, stride_d_ob, stride_d_ot, stride_d_oh, o_ptr, lse_ptr,
    d_q_ptr, q_ptr, stride_qb, stride_qt, stride_qh,
    k1_ptr, stride_k1b, stride_k1n, stride_k1h,
    v1_ptr, stride_v1b, stride_v1n, stride_v1h,
    low1_ptr, stride_low1b, high1_ptr, stride_high1b,
    valid1_ptr, stride_valid1b, num_keys1,
    k2_ptr, stride_k2b, stride_k2n, stride_k2h,
    v2_ptr, stride_v2b, stride_v2n, stride_v2h,
    low2_ptr, stride_low2b, high2_ptr, stride_high2b,
    valid2_ptr, stride_valid2b, num_keys2,
    num_heads, num_rows, scale, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """One program: BLOCK_M rows of a key head, and all keys that they see. delta[b, h, row] = d_o . o."""
    num_tiles = tl.cdiv(num_rows, BLOCK_M)
    b = (tl.program_id(0) // num_tiles // num_heads).to(tl.int64)
    h = tl.program_id(0) // num_tiles % num_heads
    rows = tl.program_id(0) % num_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = rows < num_rows
    place = (b * num_heads + h) * num_rows + rows
    d_o = load_rows(
        d_o_ptr, stride_d_ob, stride_d_ot, stride_d_oh, b, h, rows, num_rows, 128, 128
    )
    stride_ot = num_heads * 512
    own_o_ptr = o_ptr + b * (num_rows // 4) * stride_ot
    o = load_rows(
        own_o_ptr, 0, stride_ot, 128, b, h, rows, num_rows, 128, 128
    )
    delta = tl.sum(d_o.to(tl.float32) * o.to(tl.float32), 1)
    tl.store(delta_ptr + place, delta, mask=mask_m)
    lse = tl.load(lse_ptr + place, mask=mask_m, other=float("inf"))
    q = load_rows(q_ptr, stride_qb, stride_qt, stride_qh, b, h, rows, num_rows, 128, 128)
    d_q = tl.zeros((BLOCK_M, 128), tl.float32)

    # key.position <= query.position and query.position - key.position < 512
    low = tl.load(low1_ptr + b * stride_low1b + rows // 4, mask=mask_m, other=2147483647)
    high = tl.load(high1_ptr + b * stride_high1b + rows // 4, mask=mask_m, other=0)
    k_ptr = k1_ptr + b * stride_k1b + h.to(tl.int64) * stride_k1h
    v_ptr = v1_ptr + b * stride_v1b + h.to(tl.int64) * stride_v1h
    valid_ptr = valid1_ptr
    if valid1_ptr is not None:
        valid_ptr = valid1_ptr + b * stride_valid1b
    d_q = answer_rows(
        d_q, q, d_o, lse, delta, low, high, mask_m,
        k_ptr, stride_k1n, v_ptr, stride_v1n, valid_ptr, num_keys1,
        scale, BLOCK_N,
    )

    # key.position < query.position // 16
    low = tl.load(low2_ptr + b * stride_low2b + rows // 4, mask=mask_m, other=2147483647)
    high = tl.load(high2_ptr + b * stride_high2b + rows // 4, mask=mask_m, other=0)
    k_ptr = k2_ptr + b * stride_k2b + h.to(tl.int64) * stride_k2h
    v_ptr = v2_ptr + b * stride_v2b + h.to(tl.int64) * stride_v2h
    valid_ptr = valid2_ptr
    if valid2_ptr is not None:
        valid_ptr = valid2_ptr + b * stride_valid2b
    d_q = answer_rows(
        d_q, q, d_o, lse, delta, low, high, mask_m,
        k_ptr, stride_k2n, v_ptr, stride_v2n, valid_ptr, num_keys2,
        scale, BLOCK_N,
    )

    store_rows(d_q_ptr, d_q * scale, b, h, rows, num_rows, num_heads, 128, 128)


@triton.jit
def attend_grad_kv_kernel(
    d_k_ptr, d_v_ptr, d_o_ptr, stride_d_ob, stride_d_ot, stride_d_oh, lse_ptr, delta_ptr,
    q_ptr, stride_qb, stride_qt, stride_qh,
    k_ptr, stride_kb, stride_kn, stride_kh, v_ptr, stride_vb, stride_vn, stride_vh,
    low_ptr, stride_lowb, high_ptr, stride_highb,
    first_ptr, stride_firstb, last_ptr, stride_lastb, valid_ptr, stride_validb,
    num_keys, num_heads, num_rows, scale, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """One program: BLOCK_N keys of a key head of one source, and all rows that see one of them."""
    num_tiles = tl.cdiv(num_keys, BLOCK_N)
    b = (tl.program_id(0) // num_tiles // num_heads).to(tl.int64)
    h = tl.program_id(0) // num_tiles % num_heads
    offs_n = tl.program_id(0) % num_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < num_keys
    if valid_ptr is not None:
        valid_ptr += b * stride_validb
    there = keys_there(valid_ptr, offs_n, num_keys)
    k_ptr += b * stride_kb + h.to(tl.int64) * stride_kh
    v_ptr += b * stride_vb + h.to(tl.int64) * stride_vh
    k = load_keys(k_ptr, stride_kn, offs_n, there, False, 128, 128)
    v = load_keys(v_ptr, stride_vn, offs_n, there, False, 128, 128)
    last = tl.max(tl.load(last_ptr + b * stride_lastb + offs_n, mask=mask_n, other=0), 0)
    first = tl.min(tl.load(first_ptr + b * stride_firstb + offs_n, mask=mask_n, other=2147483647), 0)
    first = tl.minimum(first, last) * 4 // BLOCK_M * BLOCK_M
    d_k = tl.zeros((BLOCK_N, 128), tl.float32)
    d_v = tl.zeros((BLOCK_N, 128), tl.float32)
    for row in range(first, last * 4, BLOCK_M):
        rows = row + tl.arange(0, BLOCK_M)
        mask_m = rows < num_rows
        t = rows // 4
        place = (b * num_heads + h) * num_rows + rows
        q = load_rows(q_ptr, stride_qb, stride_qt, stride_qh, b, h, rows, num_rows, 128, 128)
        d_o = load_rows(
            d_o_ptr, stride_d_ob, stride_d_ot, stride_d_oh, b, h, rows, num_rows, 128, 128
        )
        lse = tl.load(lse_ptr + place, mask=mask_m, other=float("inf"))
        delta = tl.load(delta_ptr + place, mask=mask_m, other=0.0)
        low = tl.load(low_ptr + b * stride_lowb + t, mask=mask_m, other=2147483647)
        high = tl.load(high_ptr + b * stride_highb + t, mask=mask_m, other=0)
        seen = (offs_n[:, None] >= low[None, :]) & (offs_n[:, None] < high[None, :]) & there[:, None]
        s = tl.dot(k, tl.trans(q), input_precision="ieee") * (scale * 1.4426950408889634)
        p = tl.exp2(tl.where(seen, s, float("-inf")) - lse[None, :])
        d_v = tl.dot(p.to(d_o.dtype), d_o, d_v, input_precision="ieee")
        d_s = p * (tl.dot(v, tl.trans(d_o), input_precision="ieee") - delta[None, :])
        d_k = tl.dot(d_s.to(q.dtype), q, d_k, input_precision="ieee")
    place = (b * num_keys + offs_n) * num_heads + h
    offs_d, offs_e = tl.arange(0, 128), tl.arange(0, 128)
    mask = mask_n[:, None] & (offs_d < 128)[None, :]
    tl.store(d_k_ptr + place[:, None] * 128 + offs_d[None, :], d_k * scale, mask=mask)
    mask = mask_n[:, None] & (offs_e < 128)[None, :]
    tl.store(d_v_ptr + place[:, None] * 128 + offs_e[None, :], d_v, mask=mask)


# --- ops ----------------------------------------------------------------------------------------------


def dense(x: Tensor) -> Tensor:
    """x with its last dim side by side in memory, as loads want it."""
    return x if x.stride(-1) == 1 else x.contiguous()


def batch_stride(x: Tensor | None) -> int:
    """How far the batch rows of x are apart; 0 where one stands for all."""
    return 0 if x is None or x.shape[0] == 1 else x.stride(0)


@kernels.op(__name__)
def attend_forward(
    q: Tensor,
    k1: Tensor, v1: Tensor, low1: Tensor, high1: Tensor,
    first1: Tensor | None, last1: Tensor | None, valid1: Tensor | None,
    k2: Tensor, v2: Tensor, low2: Tensor, high2: Tensor,
    first2: Tensor | None, last2: Tensor | None, valid2: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """o [b, t, heads, 128] and lse [b, key heads, rows]."""
    batch, queries, num_heads = q.shape[0], q.shape[1], k1.shape[2]
    num_rows = queries * 4
    o = kernels.empty((batch, queries, num_heads * 4, 128), q)
    lse = kernels.empty((batch, num_heads, num_rows), q, torch.float32)
    q = dense(q)
    k1, v1 = dense(k1), dense(v1)
    k2, v2 = dense(k2), dense(v2)
    if num_rows > SPLIT_ROWS:
        block_m, block_n, warps, stages = FORWARD[q.element_size()]
        kernels.launch(
            attend_forward_kernel, (triton.cdiv(num_rows, block_m) * batch * num_heads,), o, lse,
            q, *q.stride()[:3],
            k1, *k1.stride()[:3], v1, *v1.stride()[:3],
            low1, batch_stride(low1), high1, batch_stride(high1),
            valid1, batch_stride(valid1), k1.shape[1],
            k2, *k2.stride()[:3], v2, *v2.stride()[:3],
            low2, batch_stride(low2), high2, batch_stride(high2),
            valid2, batch_stride(valid2), k2.shape[1],
            num_heads, num_rows, scale, BLOCK_M=block_m, BLOCK_N=block_n, num_warps=warps, num_stages=stages,
        )
        return o, lse
    block_m, block_n, warps, stages = SPLIT[q.element_size()]
    programs = triton.cdiv(num_rows, block_m) * batch * num_heads
    parts1 = triton.cdiv(k1.shape[1], SPLIT_KEYS)
    parts2 = triton.cdiv(k2.shape[1], SPLIT_KEYS)
    num_parts = parts1 + parts2
    part_o = kernels.empty((num_parts, batch, num_heads, num_rows, 128), q, torch.float32)
    part_lse = kernels.empty((num_parts, batch, num_heads, num_rows), q, torch.float32)
    kernels.launch(
        attend_split1_kernel, (programs, parts1), part_o, part_lse,
        q, *q.stride()[:3],
        k1, *k1.stride()[:3], v1, *v1.stride()[:3],
        low1, batch_stride(low1), high1, batch_stride(high1),
        valid1, batch_stride(valid1), k1.shape[1],
        0, num_heads, num_rows, scale,
        PART=SPLIT_KEYS, BLOCK_M=block_m, BLOCK_N=block_n, num_warps=warps, num_stages=stages,
    )
    kernels.launch(
        attend_split2_kernel, (programs, parts2), part_o, part_lse,
        q, *q.stride()[:3],
        k2, *k2.stride()[:3], v2, *v2.stride()[:3],
        low2, batch_stride(low2), high2, batch_stride(high2),
        valid2, batch_stride(valid2), k2.shape[1],
        parts1, num_heads, num_rows, scale,
        PART=SPLIT_KEYS, BLOCK_M=block_m, BLOCK_N=block_n, num_warps=warps, num_stages=stages,
    )
    kernels.launch(
        attend_combine_kernel, (programs,), o, lse, part_o, part_lse, num_parts, num_heads, num_rows,
        BLOCK_M=block_m, num_warps=warps,
    )
    return o, lse


@kernels.op(__name__)
def attend_backward(
    d_o: Tensor, o: Tensor, lse: Tensor, q: Tensor,
    k1: Tensor, v1: Tensor, low1: Tensor, high1: Tensor,
    first1: Tensor | None, last1: Tensor | None, valid1: Tensor | None,
    k2: Tensor, v2: Tensor, low2: Tensor, high2: Tensor,
    first2: Tensor | None, last2: Tensor | None, valid2: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients d_q, d_k1, d_v1, d_k2, d_v2."""
    batch, queries, num_heads = q.shape[0], q.shape[1], k1.shape[2]
    num_rows = queries * 4
    for who in (first1, last1, first2, last2):
        if who is None:
            raise ValueError("attend: gradients need to know who asks for a key, `first` and `last`")
    d_o, q = dense(d_o), dense(q)
    k1, v1 = dense(k1), dense(v1)
    k2, v2 = dense(k2), dense(v2)
    delta = kernels.empty((batch, num_heads, num_rows), q, torch.float32)
    d_q = kernels.empty(q.shape, q)
    d_k1, d_v1 = kernels.empty(k1.shape, k1), kernels.empty(v1.shape, v1)
    d_k2, d_v2 = kernels.empty(k2.shape, k2), kernels.empty(v2.shape, v2)
    block_m, block_n, warps, stages = GRAD_Q[q.element_size()]
    kernels.launch(
        attend_grad_q_kernel, (triton.cdiv(num_rows, block_m) * batch * num_heads,),
        delta, d_o, *d_o.stride()[:3], o, lse,
        d_q, q, *q.stride()[:3],
        k1, *k1.stride()[:3], v1, *v1.stride()[:3],
        low1, batch_stride(low1), high1, batch_stride(high1),
        valid1, batch_stride(valid1), k1.shape[1],
        k2, *k2.stride()[:3], v2, *v2.stride()[:3],
        low2, batch_stride(low2), high2, batch_stride(high2),
        valid2, batch_stride(valid2), k2.shape[1],
        num_heads, num_rows, scale, BLOCK_M=block_m, BLOCK_N=block_n, num_warps=warps, num_stages=stages,
    )
    block_m, block_n, warps, stages = GRAD_KV[q.element_size()]
    kernels.launch(
        attend_grad_kv_kernel, (triton.cdiv(k1.shape[1], block_n) * batch * num_heads,),
        d_k1, d_v1, d_o, *d_o.stride()[:3], lse, delta, q, *q.stride()[:3],
        k1, *k1.stride()[:3], v1, *v1.stride()[:3],
        low1, batch_stride(low1), high1, batch_stride(high1),
        first1, batch_stride(first1), last1, batch_stride(last1), valid1, batch_stride(valid1),
        k1.shape[1], num_heads, num_rows, scale,
        BLOCK_M=block_m, BLOCK_N=block_n, num_warps=warps, num_stages=stages,
    )
    kernels.launch(
        attend_grad_kv_kernel, (triton.cdiv(k2.shape[1], block_n) * batch * num_heads,),
        d_k2, d_v2, d_o, *d_o.stride()[:3], lse, delta, q, *q.stride()[:3],
        k2, *k2.stride()[:3], v2, *v2.stride()[:3],
        low2, batch_stride(low2), high2, batch_stride(high2),
        first2, batch_stride(first2), last2, batch_stride(last2), valid2, batch_stride(valid2),
        k2.shape[1], num_heads, num_rows, scale,
        BLOCK_M=block_m, BLOCK_N=block_n, num_warps=warps, num_stages=stages,
    )
    return d_q, d_k1, d_v1, d_k2, d_v2


def _save(ctx, inputs, output):
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*output, *tensors)
    ctx.mark_non_differentiable(output[1])


def _pull_back(ctx, d_o, _):
    o, lse, *tensors = ctx.saved_tensors
    d_q, d_k1, d_v1, d_k2, d_v2 = attend_backward(d_o, o, lse, *tensors, ctx.scale)
    return (
        d_q,
        d_k1, d_v1, None, None, None, None, None,
        d_k2, d_v2, None, None, None, None, None,
        None,
    )


attend_forward.register_autograd(_pull_back, setup_context=_save)


def attend(q, *sources, scale):
    """q [b, t, heads, 128], each source a `sources.Read` -> o [b, t, heads, 128].

    fp32 is multiplied as IEEE 754 says, without tensor cores, also where torch may use TF32.
    Raises TypeError for other dtypes than fp32, bf16 and fp16 (all tensors share one), ValueError for other sizes.
    """
    kernels.floats(q)
    source1, source2 = sources
    for one in sources:
        if q.shape[2:] != (4 * one.k.shape[2], 128) or one.v.shape[3] != 128:
            raise ValueError("attend: 4 query heads share a key head, keys are 128 wide, values 128")
    o, _ = attend_forward(
        q,
        source1.k, source1.v, source1.low, source1.high, source1.first, source1.last, source1.valid,
        source2.k, source2.v, source2.low, source2.high, source2.first, source2.last, source2.valid,
        scale,
    )
    return o
