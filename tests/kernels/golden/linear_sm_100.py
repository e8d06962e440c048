"""y = a(x w^T + bias): a matrix product of Blackwell, worked on before it is stored.

a(z) = relu2(z), in fp32.

M rows, N = 21504 columns of y, K = 4096 of x; w [N, K]. CLUSTER CTAs own tiles of CLUSTER * BLOCK_M x BLOCK_N of y, one
after another, BLOCK_M rows each. Of a CTA's warps one loads tiles of x and w by TMA, one starts the products (tcgen05)
of all CTAs, whose sums lie in tensor memory, and four store parts of PART_N columns by TMA, while the next tile is
summed. Rows and columns beside a tensor are loaded as 0 and not stored.
Names: mX whole, gX tiles, sX shared memory, tX tensor memory, rX registers; tXgX: this thread's part of gX, for copies
of X.

Source: ours; the roles of warps are those of CUTLASS 4.x (NVIDIA, 2025), on the CuTe DSL (NVIDIA, 2025).
"""

from heddle.runtime.lib import gemms, kernels

gemms.require()

import cutlass
import cutlass.cute as cute
import torch
import triton
import triton.language as tl
from cuda.bindings.driver import CUstream
from cutlass import Float32, Int32, Int64, const_expr, pipeline, range_constexpr
from cutlass.cute.nvgpu import CopyUniversalOp, OperandMajorMode, cpasync, tcgen05
from cutlass.memory import SmemAllocator, TmemAllocator
from cutlass.pipeline import PipelineUserType, make_pipeline_state
from cutlass.tensor_utils import LayoutEnum
from cutlass.utils import blackwell_helpers as blackwell

N, K = 21504, 4096
# Sizes that a tuner may replace; none of them changes a sum.
BLOCK_M, BLOCK_N, BLOCK_K = 128, 256, 64
PART_N, PART_STAGES = 32, 2
STAGES = 6
CLUSTER, BAND, PROGRAMS = 2, 8, 148
SUM_STAGES, TENSOR_COLUMNS = 2, 1 << (2 * BLOCK_N - 1).bit_length()  # two tiles of sums, in a power of two
PARTS = BLOCK_N // PART_N
TILES_N, TILES_K = -(-N // BLOCK_N), -(-K // BLOCK_K)
BLOCK = 1024  # places of a program of the slope
STORE_WARPS, PRODUCT_WARP, LOAD_WARP = 4, 4, 5


def tile_of(index, tiles_m):
    """(row, column) of a tile: down a band of BAND columns, whose weights stay in the L2 cache, then the next band."""
    band, inside = index // (BAND * tiles_m), index % (BAND * tiles_m)
    width = cutlass.min(BAND, TILES_N - band * BAND)
    return inside // width, band * BAND + inside % width


def product_of(dtype):
    """The instruction: CLUSTER * 128 rows, each CTA with its own rows of x and its part of those of w."""
    ctas = tcgen05.CtaGroup.TWO if CLUSTER == 2 else tcgen05.CtaGroup.ONE
    shape, of, major = (CLUSTER * BLOCK_M, BLOCK_N, 16), tcgen05.OperandSource.SMEM, OperandMajorMode.K
    return cute.make_tiled_mma(tcgen05.MmaF16BF16Op(dtype, Float32, shape, ctas, of, major, major))


def layouts(product, dtype, stages):
    """Of stages of x and w and of parts of y in shared memory, swizzled as TMA and tcgen05 have it."""
    tile = (CLUSTER * BLOCK_M, BLOCK_N, BLOCK_K)
    return (
        blackwell.make_smem_layout_a(product, tile, dtype, stages),
        blackwell.make_smem_layout_b(product, tile, dtype, stages),
        blackwell.make_smem_layout_epi(dtype, LayoutEnum.ROW_MAJOR, (BLOCK_M, PART_N), PART_STAGES),
    )


@cute.jit
def linear_relu2_fwd(
    x: cute.Pointer,
    w: cute.Pointer,
    bias: cute.Pointer,
    y: cute.Pointer,
    m: Int32,
    programs: Int32,
    stream: CUstream,
):
    """Describe the tensors to TMA and launch. x [m, K], w [N, K], y [m, N]: pointers to rows without gaps."""
    dtype, stages = x.dtype, STAGES
    product = product_of(dtype)
    x_layout, w_layout, part_layout = layouts(product, dtype, stages)
    x_tile, w_tile = (cute.slice_(layout, (None, None, None, 0)) for layout in (x_layout, w_layout))
    part = cute.slice_(part_layout, (None, None, 0))
    cluster = cute.tiled_divide(cute.make_layout((CLUSTER, 1, 1)), (product.thr_id,)).shape
    tile = (CLUSTER * BLOCK_M, BLOCK_N, BLOCK_K)
    pair_load = cpasync.CopyBulkTensorTileG2SOp(tcgen05.CtaGroup.TWO if CLUSTER == 2 else tcgen05.CtaGroup.ONE)
    store = cpasync.CopyBulkTensorTileS2GOp()
    mX = cute.make_tensor(x, cute.make_layout((m, K), stride=(K, 1)))
    mW = cute.make_tensor(w, cute.make_layout((N, K), stride=(K, 1)))
    rows = cute.make_layout((m, N), stride=(N, 1))
    load_x, mX = cute.nvgpu.make_tiled_tma_atom_A(pair_load, mX, x_tile, tile, product, cluster)
    load_w, mW = cute.nvgpu.make_tiled_tma_atom_B(pair_load, mW, w_tile, tile, product, cluster)
    store_y, mY = cpasync.make_tiled_tma_atom(store, cute.make_tensor(y, rows), part, (BLOCK_M, PART_N))
    mB = cute.make_tensor(bias, cute.make_layout((8, N // 8)))
    tensors = (load_x, mX, load_w, mW, store_y, mY, mB)
    linear_relu2_fwd_kernel(*tensors, m, dtype, stages).launch(
        grid=(programs, 1, 1),
        block=(32 * (STORE_WARPS + 2), 1, 1),
        cluster=(CLUSTER, 1, 1),
        min_blocks_per_mp=1,
        stream=stream,
    )


@cute.kernel
def linear_relu2_fwd_kernel(
    load_x: cute.CopyAtom,
    mX: cute.Tensor,
    load_w: cute.CopyAtom,
    mW: cute.Tensor,
    store_y: cute.CopyAtom,
    mY: cute.Tensor,
    mB: cute.Tensor,
    m: Int32,
    dtype: cutlass.Constexpr,
    stages: cutlass.Constexpr,
):
    thread = cute.arch.thread_idx()[0]
    warp_id = cute.arch.make_warp_uniform(cute.arch.warp_idx())
    rank = cute.arch.make_warp_uniform(cute.arch.block_idx_in_cluster())
    tiles_m = cute.ceil_div(m, BLOCK_M * CLUSTER)
    first, step = cute.arch.block_idx()[0] // CLUSTER, cute.arch.grid_dim()[0] // CLUSTER

    # ---- shared memory
    product = product_of(dtype)
    x_layout, w_layout, part_layout = layouts(product, dtype, stages)
    cluster = cute.tiled_divide(cute.make_layout((CLUSTER, 1, 1)), (product.thr_id,))

    @cute.struct
    class Shared:
        loaded_barriers: cute.struct.MemRange[Int64, 2 * stages]
        summed_barriers: cute.struct.MemRange[Int64, 2 * SUM_STAGES]
        free_barrier: Int64
        address: Int32
        x_stages: cute.struct.Align[cute.struct.MemRange[dtype, cute.cosize(x_layout.outer)], 1024]
        w_stages: cute.struct.Align[cute.struct.MemRange[dtype, cute.cosize(w_layout.outer)], 1024]
        y_parts: cute.struct.Align[cute.struct.MemRange[dtype, cute.cosize(part_layout.outer)], 1024]

    shared = SmemAllocator().allocate(Shared)
    sX = shared.x_stages.get_tensor(x_layout.outer, swizzle=x_layout.inner)
    sW = shared.w_stages.get_tensor(w_layout.outer, swizzle=w_layout.inner)
    sY = shared.y_parts.get_tensor(part_layout.outer, swizzle=part_layout.inner)
    x_tile, w_tile = (cute.slice_(layout, (None, None, None, 0)) for layout in (x_layout, w_layout))

    # ---- barriers: a stage is loaded (bytes of all CTAs) and free; a tile is summed and free (each warp that stores)
    one = pipeline.CooperativeGroup(pipeline.Agent.Thread)
    loaded = pipeline.PipelineTmaUmma.create(
        barrier_storage=shared.loaded_barriers.data_ptr(),
        num_stages=stages,
        producer_group=one,
        consumer_group=one,
        tx_count=CLUSTER * (cute.size_in_bytes(dtype, x_tile) + cute.size_in_bytes(dtype, w_tile)),
        cta_layout_vmnk=cluster,
        defer_sync=True,
    )
    summed = pipeline.PipelineUmmaAsync.create(
        barrier_storage=shared.summed_barriers.data_ptr(),
        num_stages=SUM_STAGES,
        producer_group=one,
        consumer_group=pipeline.CooperativeGroup(pipeline.Agent.Thread, CLUSTER * STORE_WARPS),
        cta_layout_vmnk=cluster,
        defer_sync=True,
    )
    tensor_memory = TmemAllocator(
        shared.address.ptr,
        barrier_for_retrieve=pipeline.NamedBarrier(barrier_id=2, num_threads=32 * (STORE_WARPS + 1)),
        allocator_warp_id=0,
        is_two_cta=CLUSTER == 2,
        two_cta_tmem_dealloc_mbar_ptr=shared.free_barrier.ptr,
    )
    pipeline.pipeline_init_arrive(cluster_shape_mn=(CLUSTER, 1), is_relaxed=True)

    # ---- tiles: (inside, rows of tiles, columns of tiles)
    own = product.get_slice(rank)
    gX = own.partition_A(cute.local_tile(mX, (CLUSTER * BLOCK_M, BLOCK_K), (None, None)))
    gW = own.partition_B(cute.local_tile(mW, (BLOCK_N, BLOCK_K), (None, None)))
    gY = cute.local_tile(mY, (BLOCK_M, PART_N), (None, None))
    alone = cute.make_layout(1)
    sums = product.make_fragment_C(
        cute.append(product.partition_shape_C((CLUSTER * BLOCK_M, BLOCK_N)), SUM_STAGES)
    ).layout
    pipeline.pipeline_init_wait(cluster_shape_mn=(CLUSTER, 1))

    # ---- loads
    if warp_id == LOAD_WARP:
        tXsX, tXgX = cpasync.tma_partition(load_x, 0, alone, cute.group_modes(sX, 0, 3), cute.group_modes(gX, 0, 3))
        tWsW, tWgW = cpasync.tma_partition(load_w, 0, alone, cute.group_modes(sW, 0, 3), cute.group_modes(gW, 0, 3))
        filled = make_pipeline_state(PipelineUserType.Producer, stages)
        for tile in cutlass.range(first, tiles_m * TILES_N, step, unroll=1):
            tile_m, tile_n = tile_of(tile, tiles_m)
            for tile_k in cutlass.range(TILES_K, unroll=1):
                loaded.producer_acquire(filled)
                done = loaded.producer_get_barrier(filled)
                cute.copy(load_x, tXgX[None, tile_m, tile_k], tXsX[None, filled.index], tma_bar_ptr=done)
                cute.copy(load_w, tWgW[None, tile_n, tile_k], tWsW[None, filled.index], tma_bar_ptr=done)
                filled.advance()
        loaded.producer_tail(filled)

    # ---- products: the first CTA of a cluster starts them for both
    if warp_id == PRODUCT_WARP:
        tensor_memory.wait_for_alloc()
        tAcc = cute.make_tensor(tensor_memory.retrieve_ptr(Float32), sums)
        if rank == 0:
            tCrX, tCrW = product.make_fragment_A(sX), product.make_fragment_B(sW)
            read = make_pipeline_state(PipelineUserType.Consumer, stages)
            summing = make_pipeline_state(PipelineUserType.Producer, SUM_STAGES)
            for _ in cutlass.range(first, tiles_m * TILES_N, step, unroll=1):
                summed.producer_acquire(summing)
                acc = tAcc[None, None, None, summing.index]
                product.set(tcgen05.Field.ACCUMULATE, False)
                for _ in cutlass.range(TILES_K, unroll=1):
                    loaded.consumer_wait(read)
                    for k in range_constexpr(cute.size(tCrX, mode=[2])):
                        cute.gemm(product, acc, tCrX[None, None, k, read.index], tCrW[None, None, k, read.index], acc)
                        product.set(tcgen05.Field.ACCUMULATE, True)
                    loaded.consumer_release(read)
                    read.advance()
                summed.producer_commit(summing)
                summing.advance()
            summed.producer_tail(summing)

    # ---- epilogue: a thread has a row of a part
    if warp_id < STORE_WARPS:
        tensor_memory.allocate(TENSOR_COLUMNS)
        tensor_memory.wait_for_alloc()
        begin = tensor_memory.retrieve_ptr(Float32)
        tParts = cute.flat_divide(cute.make_tensor(begin, sums)[((None, None), 0, 0, None)], (BLOCK_M, PART_N))
        columns = cute.make_copy_atom(tcgen05.Ld32x32bOp(tcgen05.Repetition(PART_N)), Float32)
        to_registers = tcgen05.make_tmem_copy(columns, tParts[None, None, 0, 0, 0])
        tTtAcc = to_registers.get_slice(thread).partition_S(tParts)
        part = cute.make_identity_tensor((BLOCK_M, PART_N))
        rZ = cute.make_rmem_tensor(to_registers.get_slice(thread).partition_D(part).shape, Float32)
        rOut = cute.make_rmem_tensor(rZ.shape, dtype)
        wide = cute.make_copy_atom(CopyUniversalOp(), dtype, num_bits_per_copy=128)
        to_shared = cute.make_tiled_copy_D(wide, to_registers)
        own_shared = to_shared.get_slice(thread)
        tYsY = own_shared.partition_D(sY)
        tSsY, tSgY = cpasync.tma_partition(store_y, 0, alone, cute.group_modes(sY, 0, 2), cute.group_modes(gY, 0, 2))

        stored = make_pipeline_state(PipelineUserType.Consumer, SUM_STAGES)
        storers = pipeline.NamedBarrier(barrier_id=1, num_threads=32 * STORE_WARPS)
        buffer = Int32(0)
        for tile in cutlass.range(first, tiles_m * TILES_N, step, unroll=1):
            tile_m, tile_n = tile_of(tile, tiles_m)
            summed.consumer_wait(stored)
            for part_n in range_constexpr(PARTS):
                cute.copy(to_registers, tTtAcc[None, None, None, 0, part_n, stored.index], rZ)
                cute.arch.fence_view_async_tmem_load()
                if const_expr(part_n == PARTS - 1):
                    with cute.arch.elect_one():
                        summed.consumer_release(stored)
                for i in range_constexpr(0, PART_N, 8):
                    # Columns beside the tensor take the last there are, and are not stored.
                    eight = cutlass.min((tile_n * BLOCK_N + part_n * PART_N + i) // 8, N // 8 - 1)
                    rB = mB[None, eight].load().to(Float32)
                    for j in range_constexpr(8):
                        rZ[i + j] = rZ[i + j] + rB[j]
                z = rZ.load()
                a = cute.where(z < 0.0, cute.full_like(z, 0.0), z * z)
                rOut.store(a.to(dtype))
                cute.copy(to_shared, to_shared.retile(rOut), tYsY[None, None, None, buffer])
                cute.arch.fence_proxy("async.shared", space="cta")
                storers.arrive_and_wait()
                if warp_id == 0:
                    row, column = tile_m * CLUSTER + rank, tile_n * PARTS + part_n
                    with cute.arch.elect_one():
                        cute.copy(store_y, tSsY[None, buffer], tSgY[None, row, column])
                        cute.arch.cp_async_bulk_commit_group()
                        cute.arch.cp_async_bulk_wait_group(PART_STAGES - 1, read=True)
                storers.arrive_and_wait()
                buffer = (buffer + 1) % PART_STAGES
            stored.advance()
        if warp_id == 0:
            with cute.arch.elect_one():
                cute.arch.cp_async_bulk_wait_group(0, read=True)
        tensor_memory.relinquish_alloc_permit()
        tensor_memory.free(begin)


gemm = gemms.Gemm(linear_relu2_fwd, "sm_100a", cutlass, CUstream)


@triton.jit
def linear_relu2_slope_kernel(d_y_ptr, y_ptr, d_z_ptr, size, BLOCK: tl.constexpr):
    """The gradient of z, place by place: d_y times the slope of the step, which its result says."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < size
    d_y = tl.load(d_y_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    y = tl.load(y_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    tl.store(d_z_ptr + offs, 2 * (tl.sqrt(y) * d_y), mask=mask)


def _run(x, w, bias):
    """y of rows x [M, K]."""
    m = x.shape[0]
    gemms.check(("x", x, (m, K)), ("w", w, (N, K)))
    gemms.check(("x", x, (m, K)), ("bias", bias, (N,)))
    y = kernels.empty((m, N), x)
    grid = gemms.programs(x, -(-m // (BLOCK_M * CLUSTER)) * TILES_N, CLUSTER, PROGRAMS)
    x, w = x.contiguous(), w.contiguous()
    bias = bias.contiguous()
    kernels.launch(gemm, grid, x, w, bias, y, m)
    return y


@kernels.op(__name__)
def linear_relu2_rows(x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return _run(x, w, bias)


@kernels.op(__name__)
def linear_relu2_slope(d_y: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    d_y, d_z, size = d_y.contiguous(), kernels.empty(y.shape, y), y.numel()
    kernels.launch(linear_relu2_slope_kernel, (triton.cdiv(size, BLOCK),), d_y, y, d_z, size, BLOCK=BLOCK)
    return d_z


def _save(ctx, inputs, output):
    ctx.save_for_backward(inputs[0], inputs[1], output)


def _backward(ctx, d_y):
    """The products of the gradient are the library's."""
    x, w, y = ctx.saved_tensors
    d_z = linear_relu2_slope(d_y, y)
    d_x = d_z @ w if ctx.needs_input_grad[0] else None
    d_w = d_z.t() @ x if ctx.needs_input_grad[1] else None
    return d_x, d_w, d_z.sum(0)


linear_relu2_rows.register_autograd(_backward, setup_context=_save)


@gemms.on("sm_100")
def linear_relu2(
    x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor
) -> torch.Tensor:
    """x [..., K], w [N, K], bias [N] -> y [..., N], in bf16 or fp16.

    Sums are fp32. Raises TypeError for other dtypes, ValueError for other shapes.
    """
    lead = x.shape[:-1]
    rows = (x.reshape(-1, K), w, bias)
    return linear_relu2_rows(*rows).view(*lead, N)
