"""Kernels built ahead of time, without a GPU: specialised as Triton would, read, cached, refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton
from torch import Tensor

from heddle.codegen.tiles import with_constants
from heddle.lowering.target import TARGETS
from heddle.runtime import ahead
from heddle.runtime.ahead import Built, build
from heddle.runtime.lib import kernels
from heddle.runtime.lib.kernels import Launch
from heddle.runtime.machine_code import Resources
from heddle.runtime.products import Product, expected, lost
from heddle.runtime.tables import print_builds

from . import harness
from .product import PRODUCT
from .scale import SCALE

GPUS = [t for t in TARGETS.values() if t.capability]
EXPECTED = {"sm_80": "mma", "sm_90": "wgmma", "sm_100": "tcgen05"}


FIGURES = {
    "seconds": 0.5, "shared": 16, "products": (("mma", 1),), "code_bytes": 9000, "problems": ("none",),
    "resources": Resources(32, 0, 1, 2, (("mma", 4),), 5, 6),
}  # fmt: skip


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, device="meta", dtype=dtype)


def told(text: str, *args: Any, interpret: bool = False) -> list[Launch]:
    """The launches of the function of a file that has its name."""
    module = harness.load(text, interpret)
    with kernels.launches() as found:
        (module.product if "def product(" in text else module.scale)(*args)
    return found


def product(text: str = PRODUCT, dtype: torch.dtype = torch.bfloat16, k: int = 512, **how: Any) -> list[Launch]:
    return told(text, meta(1024, k, dtype=dtype), meta(512, k, dtype=dtype), **how)


# Four stages of two tiles of 64 rows and 512 columns, 512 kB.
LARGE = harness.plant(harness.plant(PRODUCT, "BLOCK_K = 64", "BLOCK_K = 512"), "STAGES = 3", "STAGES = 4")


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("built")


@pytest.mark.parametrize("target", GPUS, ids=lambda t: t.name)
def test_a_kernel_with_products_uses_the_tensor_cores_of_its_target(target: Any, cache: Path) -> None:
    first, second = build(product(), target, cache)
    assert (first.kernel, second.kernel) == ("product_kernel", "row_sum_kernel")
    assert first.problems == second.problems == () and first.target == target.name
    read = first.resources
    assert read and [kind for kind, _ in read.tensor_cores] == [EXPECTED[target.name]]
    assert first.products == ((EXPECTED[target.name], 1),)
    assert 32 < read.registers <= 255 and read.spill_loads == read.spill_stores == read.stack_bytes == 0
    assert 0 < first.shared <= first.limit == target.shared and first.code_bytes > 10_000
    assert read.loads == read.wide_loads > 0, "rows of 512 bf16 are loaded 16 bytes at a time"
    assert second.resources and not second.resources.tensor_cores and second.products == ()
    assert first.shapes == ("a bf16[1024, 512]", "b bf16[512, 512]", "c bf16[1024, 512]")
    assert first.constants == (("BLOCK_M", "64"), ("BLOCK_N", "64"), ("BLOCK_K", "64"))
    assert first.options == (("num_warps", 4), ("num_stages", 3))


def test_what_is_not_a_multiple_of_16_is_not_taken_for_one(cache: Path) -> None:
    """The launcher says what is divisible; a build that assumes it where it is not would read other bytes."""
    sm_90 = TARGETS["sm_90"]
    for launches in (product(k=513), told(PRODUCT, meta(1024, 520)[:, 1:513], meta(512, 512)),
                     told(PRODUCT, meta(1024 * 512 + 1)[1:].view(1024, 512), meta(512, 512))):  # fmt: skip
        odd = build(launches, sm_90, cache)[0].resources
        assert odd and odd.wide_loads < odd.loads
    whole = build(product(), sm_90, cache)[0].resources
    assert whole and whole.wide_loads == whole.loads


def test_one_is_a_constant_as_when_it_is_launched(cache: Path) -> None:
    (one,) = build(told(SCALE, meta(4, 1), 2.0), TARGETS["sm_90"], cache)
    assert one.constants == (("x_stride", "1"), ("C", "1"), ("BLOCK", "16"))


def test_one_specialisation_is_built_once(cache: Path) -> None:
    launches = product() + product() + told(PRODUCT, meta(1024, 1024), meta(512, 1024)) + product(dtype=torch.float16)
    found = build(launches, TARGETS["sm_90"], cache)
    # sizes are arguments: only the types are another build
    assert [(b.kernel, b.shapes[0].split("[")[0]) for b in found] == [
        ("product_kernel", "a bf16"), ("row_sum_kernel", "c bf16"), ("product_kernel", "a fp16"), ("row_sum_kernel", "c fp16"),
    ]  # fmt: skip


def test_a_file_that_was_loaded_for_the_interpreter_is_built_too(cache: Path) -> None:
    (compiled,) = build(told(SCALE, meta(4, 32), 2.0), TARGETS["sm_90"], cache)
    (interpreted,) = build(told(SCALE, meta(4, 32), 2.0, interpret=True), TARGETS["sm_90"])
    assert interpreted.resources == compiled.resources and interpreted.code_bytes == compiled.code_bytes
    x = harness.values((2, 3), torch.float32, 0)
    assert torch.equal(harness.load(SCALE).scale(x, 2.0), x * 2)


def test_what_was_interpreted_does_not_change_what_is_built() -> None:
    """The interpreter replaces parts of the language while a kernel runs, and those of Triton's own functions, too."""
    a, b = (harness.values((70, 65), torch.float32, i) for i in range(2))
    for _ in range(2):
        c, y = harness.load(PRODUCT).product(a, b)
        assert torch.allclose(c, a @ b.T, atol=1e-4) and torch.allclose(y, c.sum(1), atol=1e-4)
        assert not build(product()[1:], TARGETS["sm_90"])[0].problems


def test_what_was_built_is_kept_and_only_for_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr(ahead, "_figures", lambda made, target: (calls.append(target.name), FIGURES)[1])

    def scale(text: str = SCALE, target: str = "sm_90", columns: int = 32) -> Built:
        return build(told(text, meta(4, columns), 2.0), TARGETS[target], tmp_path)[0]

    first = scale()
    assert scale() == first and len(calls) == 1 and first.resources == FIGURES["resources"]
    for other in ({"text": harness.plant(SCALE, "x * a", "x * a * a")}, {"target": "sm_80"}, {"columns": 33},
                  {"text": harness.plant(SCALE, "BLOCK=16", "BLOCK=16, num_warps=1")},
                  {"text": harness.plant(SCALE, "BLOCK=16", "BLOCK=32")}):  # fmt: skip
        before = len(calls)
        scale(**other)
        assert len(calls) == before + 1, other
    monkeypatch.setattr(triton, "__version__", "3.9")
    scale()
    assert len(calls) == 7
    for kept in tmp_path.glob("*.json"):
        kept.write_text("{")
    assert replace(scale(), key=first.key) == first and len(calls) == 8
    assert not [p for p in tmp_path.iterdir() if p.suffix != ".json"]


def test_a_tile_that_does_not_fit_is_not_sound_although_triton_builds_it(cache: Path) -> None:
    first, second = build(product(LARGE, k=2048), TARGETS["sm_90"], cache)
    assert first.shared > first.limit and not second.problems
    (problem,) = first.problems
    assert problem == f"{first.shared:,} bytes of shared memory, and a program on sm_90 has 232,448"


def test_products_outside_of_tensor_cores_are_told(cache: Path) -> None:
    """In fp32 as IEEE says it, no tensor core computes them, and none is missing; in tf32 one does."""
    exact = harness.plant(PRODUCT, "tl.trans(b), acc)", 'tl.trans(b), acc, input_precision="ieee")')
    exact = harness.plant(exact, "BLOCK_M = 64\nBLOCK_N = 64\nBLOCK_K = 64", "BLOCK_M = 16\nBLOCK_N = 16\nBLOCK_K = 16")
    first = build(product(exact, torch.float32), TARGETS["sm_90"], cache)[0]
    assert first.products == () and not first.problems and first.resources and not first.resources.tensor_cores
    in_tf32 = exact.replace('"ieee"', '"tf32"')
    second = build(product(in_tf32, torch.float32), TARGETS["sm_90"], cache)[0]
    assert second.products == (("mma", 1),) and not second.problems and second.resources and second.resources.tensor_cores
    sound = SimpleNamespace(shared=0)
    (problem,) = ahead._problems(sound, first.resources, (("mma", 1),), first.code_bytes, TARGETS["sm_90"])
    assert problem == "products for mma: 1, and its instructions: 0"
    assert not [*ahead._problems(sound, first.resources, (), first.code_bytes, TARGETS["sm_90"])]
    large = SimpleNamespace(shared=0, tmem_size=1024)
    (problem,) = ahead._problems(large, second.resources, (("mma", 1),), 9000, TARGETS["sm_100"])
    assert problem == "1024 columns of tensor memory, and a program on sm_100 has 512"
    (problem,) = ahead._problems(sound, first.resources, (), 500, TARGETS["sm_90"])
    assert problem == "500 bytes of code: nothing is left of it"


@pytest.mark.parametrize(("target", "rows", "warps", "wanted"), [
    ("sm_100", 128, 8, "tcgen05"), ("sm_90", 32, 4, "mma"), ("sm_100", 32, 4, "mma"), ("sm_90", 64, 2, "mma"),
    ("sm_100", 64, 16, "mma"),
])  # fmt: skip
def test_the_shape_of_a_product_says_what_computes_it(target: str, rows: int, warps: int, wanted: str, cache: Path) -> None:
    """As Triton chooses: what it is to become is worked out from its shape, and is what it becomes."""
    of = with_constants(PRODUCT, {"BLOCK_M": rows, "WARPS": warps})
    first = build(product(of), TARGETS[target], cache)[0]
    assert first.products == ((wanted, 1),) and not first.problems
    assert first.resources and [kind for kind, _ in first.resources.tensor_cores] == [wanted]


def test_products_that_came_down_to_single_warps_are_a_problem() -> None:
    """`wgmma` is lost where Triton takes `mma` although the product is large enough; `mma` beside it does not hide that."""
    large, small, exact = (Product(m, 64, 64, bits, bits == 32) for m, bits in ((64, 16), (16, 16), (64, 32)))
    wanted = expected([large, small, exact], 90, 4)
    assert wanted == (("mma", 1), ("wgmma", 1)) and expected([exact], 90, 4) == ()
    assert lost((("mma", 8), ("wgmma", 2)), wanted) == []
    assert lost((("mma", 16),), wanted) == ["products for wgmma: 1, and its instructions: 0"]
    assert expected([large._replace(k=8)], 90, 4) == expected([large._replace(n=4)], 100, 4) == (("mma", 1),)


def test_spills_are_counted(cache: Path) -> None:
    """256 values a thread, all of which are wanted again once their sum is known."""
    wide = harness.plant(harness.plant(SCALE, "x * a", "x * a / tl.sum(x, 0)"), "BLOCK=16", "BLOCK=8192, num_warps=1")
    (found,) = build(told(wide, meta(4, 8192, dtype=torch.float32), 2.0), TARGETS["sm_90"], cache)
    read = found.resources
    assert read and read.registers == 255 and read.spill_loads > 0 and read.spill_stores > 0 and read.stack_bytes > 0


def test_what_triton_cannot_build_is_told_in_one_line(capfd: pytest.CaptureFixture[str]) -> None:
    wrong = harness.plant(PRODUCT, "tl.dot(a, tl.trans(b), acc)", "tl.dot(a, b, acc)")
    wrong = harness.plant(wrong, "BLOCK_K = 64", "BLOCK_K = 32")
    first, second = build(product(wrong), TARGETS["sm_90"])
    (problem,) = first.problems
    assert problem.startswith("Triton 3.") and "does not build it: " in problem and "\n" not in problem
    assert first.resources is None and not second.problems
    assert capfd.readouterr() == ("", "")


def test_a_target_that_is_no_generation_of_gpu_builds_nothing() -> None:
    for name in ("cpu", "triton"):
        with pytest.raises(ValueError, match=name):
            build([], TARGETS[name])


def test_a_table_shows_each_build_and_what_is_wrong(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    built = build(product(LARGE, k=2048), TARGETS["sm_90"], cache)
    wrong = replace(built[1], resources=None, problems=("Triton 3.7.1 does not build it: no",))
    print_builds([*built, wrong])
    lines = capsys.readouterr().out.splitlines()
    first = built[0].resources
    assert first and lines[0].split() == ["sm_90", "registers", "spills", "shared", "tensor", "cores", "wide", "loads", "seconds"]
    assert lines[1].split()[:6] == [
        "product_kernel", str(first.registers), str(first.spill_loads + first.spill_stores), f"{built[0].shared:,}",
        str(first.tensor_cores[0][1]), "wgmma",
    ]  # fmt: skip
    assert lines[2] == (
        "  a bf16[1024, 2048], b bf16[512, 2048], c bf16[1024, 512]; "
        "BLOCK_M=64, BLOCK_N=64, BLOCK_K=512, num_warps=4, num_stages=4"
    )
    assert lines[3] == f"  cannot be used: {built[0].problems[0]}"
    assert lines[6].split() == ["row_sum_kernel", *"-----", f"{wrong.seconds:.1f}"]
    assert lines[8] == "  cannot be used: Triton 3.7.1 does not build it: no" and len(lines) == 9
