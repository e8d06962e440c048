"""CuTe DSL kernels of linear maps, built without a GPU: what they ask of it, and what they do, interpreted from their PTX.

The rows, columns and tiles of the interpreted ones are beside each other, so that each instruction of a template, and
each of its waits, is needed for the right numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from heddle.lowering.ops.linear.cute import Facts, shared_bytes
from heddle.lowering.target import TARGETS
from heddle.runtime.lib import gemms
from heddle.runtime.machine_code import Resources, resources

from . import harness
from .ptx import LATE, Deadlock, Machine, Program, TensorMap, Violation, parse
from .test_linear import KINDS, NARROW, PUBLISHED, TARGET_NAMES, made, plain, small, text_of

soak = settings.get_current_profile_name() == "soak"

# --- the kernel, built without a GPU ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Built:
    """`shared`: bytes that the kernel asks for when it is traced."""

    program: Program
    ptx: str
    read: Resources
    shared: int


_BUILT: dict[Any, Built] = {}


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("built")


def built(facts: Facts, folder: Path, dtype: torch.dtype = torch.bfloat16, saving: bool = False, text: str = "") -> Built:
    """The kernel of a file, of another `text` if there is one, for tensors of a dtype; `saving`: it stores z."""
    text = text or text_of(facts)
    key = (text, dtype, saving)
    if key not in _BUILT:
        import cutlass
        from cuda.bindings.driver import CUstream
        from cutlass.memory import SmemAllocator

        sizes: list[int] = []
        allocate = SmemAllocator.allocate

        def told(self: Any, kind: Any, *args: Any, **how: Any) -> Any:
            sizes.append(kind.size_in_bytes())
            return allocate(self, kind, *args, **how)

        tensors = [dtype] * (2 + facts.bias + facts.residual) + [dtype if saving else None] * (facts.keeps == "z") + [dtype]
        gemm = gemms.Gemm(getattr(harness.load(text), f"{facts.name}_fwd"), f"{facts.target}a", cutlass, CUstream)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(SmemAllocator, "allocate", told)
            of = gemm.compiled(tensors, f"--keep-ptx --keep-cubin --dump-dir {folder}").artifacts
        _BUILT[key] = Built(parse(of.PTX), of.PTX, resources(of.CUBIN), max(sizes))
    return _BUILT[key]


BUILDS = [("sm_90", "GPT-3 up", True), ("sm_100", "8B down", False)]
MORE_BUILDS = [
    (t, of, s) for t in TARGET_NAMES for of in PUBLISHED for s in (False, True) if (t, of, s) not in BUILDS and (of == "GPT-3 up" or not s)
]


@pytest.mark.parametrize(("target", "of", "saving"), BUILDS + (MORE_BUILDS if soak else []))
def test_published_sizes_build_without_a_gpu(target: str, of: str, saving: bool, folder: Path) -> None:
    n, k, step, residual = PUBLISHED[of]
    facts = made("linear_built", target, n, k, step, residual=residual)
    found = built(facts, folder, saving=saving)
    assert found.read.spill_loads == found.read.spill_stores == found.read.stack_bytes == 0
    assert found.shared <= shared_bytes(facts, saving) <= TARGETS[target].shared
    assert shared_bytes(facts, saving) - found.shared < 1024, "what is reckoned is what is asked for"
    # Four instructions along a tile of 64 columns of K, none of them twice; tiles come and go by TMA.
    assert found.read.tensor_cores == (("wgmma" if target == "sm_90" else "tcgen05", 4),)
    assert found.ptx.count("cp.async.bulk.tensor.2d.shared::c") == 2 + residual
    assert found.ptx.count("cp.async.bulk.tensor.2d.global.shared::cta") == (1 + saving) * facts.block_n // facts.part_n
    if target == "sm_90":
        # setmaxnreg shares 64 k registers among a group that loads and two that multiply.
        assert found.read.registers <= 65536 // 384 and 128 * (40 + 2 * 232) <= 65536
        assert "multicast::cluster" in found.ptx
    else:
        assert found.read.registers <= 128 and ".cta_group::2" in found.ptx


# --- the kernel, interpreted ------------------------------------------------------------------------------------------


def bits(x: Tensor) -> np.ndarray:
    return x.detach().contiguous().view(torch.int16).numpy().view(np.uint16)


def interpreted(facts: Facts, found: Built, tensors: list[Tensor], saving: bool, seed: int) -> tuple[Tensor, Tensor | None]:
    """(y, z) as the kernel writes them; each place is written once. `seed`: in which order things happen."""
    x, *_ = tensors
    y, *z = (torch.full((len(x), facts.n), float("nan"), dtype=x.dtype) for _ in range(1 + saving))
    tiles = -(-len(x) // (facts.block_m * facts.cluster)) * -(-facts.n // facts.block_n)
    (grid,) = gemms.programs(x, tiles, facts.cluster, facts.programs)
    ran(facts, found.program, grid, [*tensors, *z, y], seed)
    return y, z[0] if saving else None


def ran(facts: Facts, program: Program, grid: int, tensors: list[Tensor], seed: int) -> None:
    """Run a kernel on its operands and results, in the order of its launch."""
    x, w, *more = tensors
    bias = more.pop(0) if facts.bias else None
    residual = more.pop(0) if facts.residual else None
    *z, y = more
    part = (facts.block_m, facts.part_n)
    written = [np.zeros(tuple(t.shape), int) for t in (y, *z)]

    def described(tensor: Tensor, box: tuple[int, int], written: np.ndarray | None = None) -> TensorMap:
        return TensorMap(bits(tensor), box, 2 * box[1], written)

    maps = [described(x, (facts.block_m, 64)), described(w, (facts.block_n // facts.cluster, 64))]
    maps += [described(t, part, count) for t, count in zip((y, *z), written)]
    maps += [] if residual is None else [described(residual, part)]
    of, values = iter(maps), {}
    for index, size in enumerate(program.sizes):  # descriptors of TMA, pointers, and rows
        values[index] = next(of) if size == 128 else bits(bias) if size == 8 and bias is not None else len(x)
    Machine(program, values, grid, facts.cluster, seed).run()
    assert not list(of), "a tensor that no parameter describes"
    assert all((count == 1).all() for count in written), "a place is stored twice, or never"


def checked(facts: Facts, found: Built, m: int, dtype: torch.dtype, saving: bool, seed: int) -> None:
    """The kernel's results against fp64 by the rule of error."""
    kind = (facts.said or None, facts.bias, facts.residual)
    shapes = [(m, facts.k), (facts.n, facts.k), *[(facts.n,)] * facts.bias, *[(m, facts.n)] * facts.residual]
    tensors = [harness.values(s, dtype, seed + i, 0.3) for i, s in enumerate(shapes)]
    y, z = interpreted(facts, found, tensors, saving, seed)
    exact = [t.double() for t in tensors]
    want, near = plain(kind, *exact), plain(kind, *tensors)
    harness.worst(y, want, near, harness.floor(want, dtype, facts.k), "y")
    if z is not None:
        want, near = (plain((None, facts.bias, False), *of[: 2 + facts.bias]) for of in (exact, tensors))
        harness.worst(z, want, near, harness.floor(want, dtype, facts.k), "z")


# (facts beside the small ones, dtype, whether z is stored)
CASES = [
    (dict(step="silu", bias=True, residual=True), torch.bfloat16, True),
    (dict(step="relu2", cluster=1, band=1, part_stages=1), torch.float16, False),
]
MORE_CASES = [
    (dict(step="gelu_tanh", bias=True, part_n=64, stages=3), torch.float16, True),
    (dict(residual=True, stages=4, part_stages=3), torch.bfloat16, False),
    (dict(bias=True, block_n=128), torch.bfloat16, False),
]


@pytest.mark.parametrize("target", TARGET_NAMES)
@pytest.mark.parametrize(("more", "dtype", "saving"), CASES + (MORE_CASES if soak else []), ids=lambda x: x.get("step", "none") if isinstance(x, dict) else "")
def test_the_kernel_is_its_reference(target: str, more: dict[str, Any], dtype: torch.dtype, saving: bool, folder: Path) -> None:
    facts = small(target, **more)
    found = built(facts, folder, dtype, saving)

    @settings(max_examples=10 if soak else 2)
    @given(m=st.sampled_from((1, 127, 129, 255, 300, 700)), seed=harness.seeds())
    def holds(m: int, seed: int) -> None:
        checked(facts, found, m, dtype, saving, seed)

    holds()


@pytest.mark.skipif(not soak, reason="a build of its own")
def test_a_tile_of_half_the_rows(folder: Path) -> None:
    facts = small("sm_90", block_m=64)
    checked(facts, built(facts, folder), 130, torch.bfloat16, False, 1)


# Faults of both templates, (what is in the file, what is there instead), then those of one.
FENCED = 'tYsY[None, None, None, buffer])\n                cute.arch.fence_proxy("async.shared", space="cta")'
FAULTS = {
    "the last tile of K is left out": (", -(-K // BLOCK_K)", ", K // BLOCK_K"),
    "a tile of columns is left out": ("= -(-N // BLOCK_N),", "= N // BLOCK_N,"),
    "all tiles of rows are the first": ("return inside // width,", "return inside // width * 0,"),
    "CTAs of a cluster have the same rows": ("row, column = tile_m * CLUSTER + rank", "row, column = tile_m * CLUSTER"),
    "sums go on from the tile before": ("Field.ACCUMULATE, False)", "Field.ACCUMULATE, True)"),
    "the first bias for all": ("mB[None, ", "mB[None, 0 * "),
    "no residual": ("a = a + rR.load().to(Float32)", "a = a + 0.0 * rR.load().to(Float32)"),
    "z after the step": ("rOut.store(z.to(dtype))", "rOut.store((z * z).to(dtype))"),
    "stages are not waited for": ("loaded.consumer_wait(read)", "pass"),
    "stages are never free": ("loaded.consumer_release(", "str("),
    "the residual is not waited for": ("residuals.consumer_wait(ready)", "pass"),
    "stores do not see what was written": (FENCED, FENCED[: FENCED.index("\n")]),
    "parts are overwritten while they are stored": ("wait_group(PART_STAGES - 1", "wait_group(PART_STAGES"),
    "fewer bytes are waited for": ("cute.size_in_bytes(dtype, w_tile)", "cute.size_in_bytes(dtype, w_tile) // 2"),
}
ONLY = {
    "sm_90": {
        "a stage is free before its product ends": ("warpgroup.wait_group(1)", "warpgroup.wait_group(2)"),
        "sums are read before they are there": ("warpgroup.wait_group(0)", "warpgroup.wait_group(1)"),
        "w is not shared with the other CTA": ("every = Int16((1 << CLUSTER) - 1)", "every = Int16(1)"),
    },
    "sm_100": {
        "sums are not waited for": ("summed.consumer_wait(stored)", "pass"),
        "sums are overwritten before they are stored": ("summed.producer_acquire(summing)", "pass"),
        "sums are given back while they are loaded": ("                cute.arch.fence_view_async_tmem_load()\n", ""),
    },
}
# Each fault is a build of its own: `make soak` has all of them.
ALL_FAULTS = [(t, f) for t in TARGET_NAMES for f in FAULTS | ONLY[t]]
QUICK = [("sm_90", "a stage is free before its product ends"), ("sm_100", "parts are overwritten while they are stored")]


@pytest.mark.parametrize(("target", "name"), ALL_FAULTS if soak else QUICK)
def test_a_fault_is_found(target: str, name: str, folder: Path) -> None:
    """By wrong numbers, or because what hardware would do with it is not defined, or nothing goes on."""
    facts = small(target, "silu", bias=True, residual=True, block_m=64 if target == "sm_90" else 128)
    text = harness.plant(text_of(facts), *(FAULTS | ONLY[target])[name])
    found = built(facts, folder, saving=True, text=text)
    assert any(_goes_wrong(facts, found, seed) for seed in sorted(range(len(LATE)), key=lambda s: LATE[s][0] not in ("store", "product")))


def _goes_wrong(facts: Facts, found: Built, seed: int) -> bool:
    try:
        checked(facts, found, 300, torch.bfloat16, True, seed)
    except (AssertionError, Violation, Deadlock):
        return True
    return False


# --- the kernel, on its GPU -------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=20)
@given(
    m=st.sampled_from((0, 1, 127, 129, 1000, 4099)), n=st.sampled_from((8, 72, 256, 1032)), k=st.sampled_from((8, 136, 1000, 4096)),
    dtype=st.sampled_from(NARROW), seed=harness.seeds(),
)  # fmt: skip
def test_the_kernel_on_its_gpu(kind: tuple[str | None, bool, bool], m: int, n: int, k: int, dtype: torch.dtype, seed: int) -> None:
    target = f"sm_{torch.cuda.get_device_capability()[0]}0"
    if target not in TARGET_NAMES:
        pytest.skip(f"no kernel of products for {target}")
    step, bias, residual = kind
    module = harness.load(text_of(made("linear_gpu", target, n, k, step, bias=bias, residual=residual)))
    shapes = [(m, k), (n, k), *([(n,)] if bias else []), *([(m, n)] if residual else [])]
    mine = [harness.values(s, dtype, seed + i, 0.3).cuda().requires_grad_() for i, s in enumerate(shapes)]
    exact = [t.detach().double().requires_grad_() for t in mine]
    d_y = harness.values((m, n), dtype, seed + 9).cuda()
    results = [module.linear_gpu(*mine), plain(kind, *exact), plain(kind, *mine)]
    found = [results, *zip(*(torch.autograd.grad(r, of, d_y.to(r.dtype)) for r, of in zip(results, (mine, exact, mine))))]
    for got, want, near in found:
        harness.worst(got, want, near, harness.floor(want.detach(), dtype, max(k, m, n)))
    assert torch.equal(module.linear_gpu(*mine), results[0]), "the same bits each time"
