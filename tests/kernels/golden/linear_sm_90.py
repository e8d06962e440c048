"""y = a(x w^T + bias): a matrix product of Hopper, worked on before it is stored.

a(z) = relu2(z), in fp32.

M rows, N = 21504 columns of y, K = 4096 of x; w [N, K]. A CTA owns tiles of BLOCK_M x BLOCK_N of y, one after another.
Its first warp loads tiles of x and w by TMA; 2 warpgroups multiply them (wgmma) and store parts of PART_N columns.
Rows and columns beside a tensor are loaded as 0 and not stored.
Names: mX whole, gX tiles, sX shared memory, rX registers; tXgX: this thread's part of gX, for copies of X.

Source: ours; the roles of warps are those of CUTLASS 3.x (NVIDIA, 2023), on the CuTe DSL (NVIDIA, 2025).
"""

from heddle.runtime.lib import gemms, kernels

gemms.require()

import cutlass
import cutlass.cute as cute
import torch
import triton
import triton.language as tl
from cuda.bindings.driver import CUstream
from cutlass import Float32, Int16, Int32, Int64, const_expr, pipeline, range_constexpr
from cutlass.cute.nvgpu import OperandMajorMode, cpasync, warp, warpgroup
from cutlass.memory import SmemAllocator
from cutlass.pipeline import PipelineUserType, make_pipeline_state
from cutlass.tensor_utils import LayoutEnum
from cutlass.utils import hopper_helpers as hopper

N, K = 21504, 4096
# Sizes that a tuner may replace; none of them changes a sum.
BLOCK_M, BLOCK_N, BLOCK_K = 128, 256, 64
PART_N, PART_STAGES = 32, 2
STAGES = 4
CLUSTER, BAND, PROGRAMS = 2, 8, 132
CONSUMERS = BLOCK_M // 64  # warpgroups, 64 rows each
PARTS = BLOCK_N // PART_N
TILES_N, TILES_K = -(-N // BLOCK_N), -(-K // BLOCK_K)
BLOCK = 1024  # places of a program of the slope


def tile_of(index, tiles_m):
    """(row, column) of a tile: down a band of BAND columns, whose weights stay in the L2 cache, then the next band."""
    band, inside = index // (BAND * tiles_m), index % (BAND * tiles_m)
    width = cutlass.min(BAND, TILES_N - band * BAND)
    return inside // width, band * BAND + inside % width


def layouts(dtype, stages):
    """Of stages of x and w and of parts of y in shared memory, swizzled as TMA and wgmma have it."""
    tile = (BLOCK_M, BLOCK_N, BLOCK_K)
    return (
        hopper.make_smem_layout_a(LayoutEnum.ROW_MAJOR, tile, dtype, stages),
        hopper.make_smem_layout_b(LayoutEnum.ROW_MAJOR, tile, dtype, stages),
        hopper.make_smem_layout_epi(dtype, LayoutEnum.ROW_MAJOR, (BLOCK_M, PART_N), PART_STAGES),
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
    x_layout, w_layout, part_layout = layouts(dtype, stages)
    x_tile, w_tile, part = (cute.slice_(layout, (None, None, 0)) for layout in (x_layout, w_layout, part_layout))
    load, store = cpasync.CopyBulkTensorTileG2SOp(), cpasync.CopyBulkTensorTileS2GOp()
    shared_load = const_expr(cpasync.CopyBulkTensorTileG2SMulticastOp() if CLUSTER > 1 else load)
    mX = cute.make_tensor(x, cute.make_layout((m, K), stride=(K, 1)))
    mW = cute.make_tensor(w, cute.make_layout((N, K), stride=(K, 1)))
    rows = cute.make_layout((m, N), stride=(N, 1))
    load_x, mX = cpasync.make_tiled_tma_atom(load, mX, x_tile, (BLOCK_M, BLOCK_K))
    load_w, mW = cpasync.make_tiled_tma_atom(shared_load, mW, w_tile, (BLOCK_N, BLOCK_K), num_multicast=CLUSTER)
    store_y, mY = cpasync.make_tiled_tma_atom(store, cute.make_tensor(y, rows), part, (BLOCK_M, PART_N))
    mB = cute.make_tensor(bias, cute.make_layout((2, N // 2)))
    tensors = (load_x, mX, load_w, mW, store_y, mY, mB)
    linear_relu2_fwd_kernel(*tensors, m, dtype, stages).launch(
        grid=(programs, 1, 1),
        block=(128 * (1 + CONSUMERS), 1, 1),
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
    x_layout, w_layout, part_layout = layouts(dtype, stages)

    @cute.struct
    class Shared:
        loaded_barriers: cute.struct.MemRange[Int64, 2 * stages]
        x_stages: cute.struct.Align[cute.struct.MemRange[dtype, cute.cosize(x_layout.outer)], 1024]
        w_stages: cute.struct.Align[cute.struct.MemRange[dtype, cute.cosize(w_layout.outer)], 1024]
        y_parts: cute.struct.Align[cute.struct.MemRange[dtype, cute.cosize(part_layout.outer)], 1024]

    shared = SmemAllocator().allocate(Shared)
    sX = shared.x_stages.get_tensor(x_layout.outer, swizzle=x_layout.inner)
    sW = shared.w_stages.get_tensor(w_layout.outer, swizzle=w_layout.inner)
    sY = shared.y_parts.get_tensor(part_layout.outer, swizzle=part_layout.inner)
    x_tile, w_tile = (cute.slice_(layout, (None, None, 0)) for layout in (x_layout, w_layout))

    # ---- barriers: a stage is loaded (bytes arrived), a stage is free (each warp of each CTA that got w arrived)
    one = pipeline.CooperativeGroup(pipeline.Agent.Thread)
    loaded = pipeline.PipelineTmaAsync.create(
        barrier_storage=shared.loaded_barriers.data_ptr(),
        num_stages=stages,
        producer_group=one,
        consumer_group=pipeline.CooperativeGroup(pipeline.Agent.Thread, CLUSTER * CONSUMERS * 4),
        tx_count=cute.size_in_bytes(dtype, x_tile) + cute.size_in_bytes(dtype, w_tile),
        cta_layout_vmnk=cute.make_layout((1, CLUSTER, 1, 1)),
        defer_sync=True,
    )
    pipeline.pipeline_init_arrive(cluster_shape_mn=(CLUSTER, 1), is_relaxed=True)

    # ---- tiles: (inside, rows of tiles, columns of tiles)
    gX = cute.local_tile(mX, (BLOCK_M, BLOCK_K), (None, None))
    gW = cute.local_tile(mW, (BLOCK_N, BLOCK_K), (None, None))
    gY = cute.local_tile(mY, (BLOCK_M, PART_N), (None, None))
    pipeline.pipeline_init_wait(cluster_shape_mn=(CLUSTER, 1))

    if warp_id < 4:
        cute.arch.setmaxregister_decrease(40)
        # ---- loads; each CTA of a cluster loads its part of the rows of w for all of them
        if warp_id == 0:
            alone = cute.make_layout(1)
            tXsX, tXgX = cpasync.tma_partition(load_x, 0, alone, cute.group_modes(sX, 0, 2), cute.group_modes(gX, 0, 2))
            tWsW, tWgW = cpasync.tma_partition(
                load_w, rank, cute.make_layout(CLUSTER), cute.group_modes(sW, 0, 2), cute.group_modes(gW, 0, 2)
            )
            filled = make_pipeline_state(PipelineUserType.Producer, stages)
            every = Int16((1 << CLUSTER) - 1)
            for tile in cutlass.range(first, tiles_m * TILES_N, step, unroll=1):
                tile_m, tile_n = tile_of(tile, tiles_m)
                for tile_k in cutlass.range(TILES_K, unroll=1):
                    loaded.producer_acquire(filled)
                    done = loaded.producer_get_barrier(filled)
                    to_x, to_w = tXsX[None, filled.index], tWsW[None, filled.index]
                    cute.copy(load_x, tXgX[None, tile_m * CLUSTER + rank, tile_k], to_x, tma_bar_ptr=done)
                    cute.copy(load_w, tWgW[None, tile_n, tile_k], to_w, tma_bar_ptr=done, mcast_mask=every)
                    filled.advance()
            loaded.producer_tail(filled)
    else:
        cute.arch.setmaxregister_increase(232)
        own = thread - 128
        # ---- the product: 64 rows a warpgroup
        product = hopper.make_trivial_tiled_mma(
            dtype, dtype, OperandMajorMode.K, OperandMajorMode.K, Float32, (CONSUMERS, 1, 1), (64, BLOCK_N)
        )
        group = product.get_slice(cute.arch.make_warp_uniform(own // 128) * 128)
        tCrX = product.make_fragment_A(group.partition_A(sX))
        tCrW = product.make_fragment_B(group.partition_B(sW))
        acc = cute.make_rmem_tensor(group.partition_shape_C((BLOCK_M, BLOCK_N)), Float32)

        # ---- its parts: acc in the order in which matrices of 8 x 8 are stored
        matrices = cute.make_copy_atom(warp.StMatrix8x8x16bOp(False, 4), dtype)
        of_acc = cute.make_tiled_copy_C_atom(matrices, product)
        to_shared = cute.make_tiled_copy_S(matrices, of_acc)
        own_shared = to_shared.get_slice(own)
        tYrAcc = to_shared.retile(acc)
        tYsY = own_shared.partition_D(sY)
        alone = cute.make_layout(1)
        tSsY, tSgY = cpasync.tma_partition(store_y, 0, alone, cute.group_modes(sY, 0, 2), cute.group_modes(gY, 0, 2))
        rZ = cute.make_rmem_tensor(cute.shape(own_shared.partition_S(sY))[:3], Float32)
        rOut = cute.make_rmem_tensor(rZ.shape, dtype)
        values = const_expr(cute.size(rZ))
        # The column in its tile of each value; two stand side by side.
        tYcC = to_shared.retile(product.get_slice(own).partition_C(cute.make_identity_tensor((BLOCK_M, BLOCK_N))))

        read = make_pipeline_state(PipelineUserType.Consumer, stages)
        freed = make_pipeline_state(PipelineUserType.Consumer, stages)
        consumers = pipeline.NamedBarrier(barrier_id=1, num_threads=128 * CONSUMERS)
        buffer = Int32(0)
        for tile in cutlass.range(first, tiles_m * TILES_N, step, unroll=1):
            tile_m, tile_n = tile_of(tile, tiles_m)

            # ---- mainloop: a stage is free when the product after it has begun and this one has ended
            product.set(warpgroup.Field.ACCUMULATE, False)
            warpgroup.fence()
            for tile_k in cutlass.range(TILES_K, unroll=1):
                loaded.consumer_wait(read)
                for k in range_constexpr(cute.size(tCrX, mode=[2])):
                    cute.gemm(product, acc, tCrX[None, None, k, read.index], tCrW[None, None, k, read.index], acc)
                    product.set(warpgroup.Field.ACCUMULATE, True)
                warpgroup.commit_group()
                read.advance()
                if tile_k > 0:
                    warpgroup.wait_group(1)
                    loaded.consumer_release(freed)
                    freed.advance()
            warpgroup.wait_group(0)
            loaded.consumer_release(freed)
            freed.advance()

            # ---- epilogue
            for part_n in range_constexpr(PARTS):
                for i in range_constexpr(values):
                    rZ[i] = tYrAcc[part_n * values + i]
                for i in range_constexpr(0, values, 2):
                    # A column beside the tensor takes the last pair there is, and is not stored.
                    pair = cutlass.min((tile_n * BLOCK_N + tYcC[part_n * values + i][1]) // 2, N // 2 - 1)
                    rB = mB[None, pair].load().to(Float32)
                    rZ[i], rZ[i + 1] = rZ[i] + rB[0], rZ[i + 1] + rB[1]
                z = rZ.load()
                a = cute.where(z < 0.0, cute.full_like(z, 0.0), z * z)
                rOut.store(a.to(dtype))
                cute.copy(to_shared, rOut, tYsY[None, None, None, buffer])
                cute.arch.fence_proxy("async.shared", space="cta")
                consumers.arrive_and_wait()
                if warp_id == 4:
                    row, column = tile_m * CLUSTER + rank, tile_n * PARTS + part_n
                    with cute.arch.elect_one():
                        cute.copy(store_y, tSsY[None, buffer], tSgY[None, row, column])
                        cute.arch.cp_async_bulk_commit_group()
                        cute.arch.cp_async_bulk_wait_group(PART_STAGES - 1, read=True)
                consumers.arrive_and_wait()
                buffer = (buffer + 1) % PART_STAGES
        if warp_id == 4:
            with cute.arch.elect_one():
                cute.arch.cp_async_bulk_wait_group(0, read=True)


gemm = gemms.Gemm(linear_relu2_fwd, "sm_90a", cutlass, CUstream)


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


@gemms.on("sm_90")
def linear_relu2(
    x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor
) -> torch.Tensor:
    """x [..., K], w [N, K], bias [N] -> y [..., N], in bf16 or fp16.

    Sums are fp32. Raises TypeError for other dtypes, ValueError for other shapes.
    """
    lead = x.shape[:-1]
    rows = (x.reshape(-1, K), w, bias)
    return linear_relu2_rows(*rows).view(*lead, N)
