"""CuTe DSL kernels of linear maps: what is decided, the text, and the kernels themselves, interpreted from their PTX."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import pairwise
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from heddle.codegen.products import fragments, source
from heddle.lowering.chains.expr import Expr, Unfit, apply, load
from heddle.lowering.ops.linear.cute import HELD, Facts, estimate, fitted, prologue_gain, shared_bytes
from heddle.lowering.ops.pointwise.reference import UNARY
from heddle.lowering.target import TARGETS
from heddle.runtime.lib import gemms
from heddle.runtime.plan.devices import DEVICES

from . import harness

pytest.importorskip("cutlass")
TARGET_NAMES = HELD
Z = load("z", "rc")
STEPS = ("relu2", "silu", "gelu_tanh")
NARROW = (torch.bfloat16, torch.float16)
soak = settings.get_current_profile_name() == "soak"


def text_of(facts: Facts) -> str:
    return source("linear", facts, facts.name)


def made(name: str, target: str, n: int, k: int, step: str | None = None, **more: Any) -> Facts:
    """The facts of a kernel that ends with an op."""
    return fitted(name, target, n, k, step_of(step), step or "", **more)


def step_of(name: str | None) -> Expr | None:
    return None if name is None else apply(name, Z)


def small(target: str, step: str | None = None, **more: Any) -> Facts:
    """N and K beside whole tiles: 2 tiles of columns, 3 along K, the second and the last of them mostly empty."""
    sizes = {"block_n": 64, "programs": 2, "stages": 2, "saving_stages": 2, **more}
    return made("linear_test", target, 72, 136, step, **sizes)


# --- what is decided --------------------------------------------------------------------------------------------------


@given(
    target=st.sampled_from(TARGET_NAMES), n=st.integers(1, 20000), k=st.integers(1, 3000), step=st.sampled_from((None, *STEPS)),
    bias=st.booleans(), residual=st.booleans(),
)  # fmt: skip
def test_what_is_made_fits_the_target(target: str, n: int, k: int, step: str | None, bias: bool, residual: bool) -> None:
    if n % 8 or k % 8:
        with pytest.raises(Unfit, match="units of 16 bytes"):
            made("f", target, n, k, step, bias=bias, residual=residual)
        return
    facts = made("f", target, n, k, step, bias=bias, residual=residual)
    for saving, stages in ((False, facts.stages), (True, facts.saving_stages)):
        if saving and facts.keeps != "z":
            continue
        assert stages >= 2 and shared_bytes(facts, saving) <= TARGETS[target].shared
    loaded = {b: -(-n // b) * (facts.block_m + b) for b in (64, 128, 192, 256)}
    assert loaded[facts.block_n] == min(loaded.values()), "tiles load what has to be loaded, and little twice"


@pytest.mark.parametrize(
    ("how", "why"),
    [
        (dict(target="sm_80"), "sm_80` has no kernel of products"),
        (dict(target="cpu"), "cpu` has no kernel of products"),
        (dict(step="sin"), "`sin` has no text"),
        (dict(n=4092), "4092 outputs"),
        (dict(k=0), "0 inputs"),
        (dict(block_m=96), "block_m = 96"),
        (dict(block_n=264), "block_n = 264"),
        (dict(cluster=4), "cluster = 4"),
        (dict(stages=40), "not for 40"),
        (dict(block_k=32), "block_k = 32"),
        (dict(part_stages=30), "leave room for -?[01] stages"),
    ],
    ids=lambda x: "-".join(map(str, x.values())) if isinstance(x, dict) else "",
)
def test_what_does_not_fit_says_why(how: dict[str, Any], why: str) -> None:
    with pytest.raises(Unfit, match=why):
        made(**{"name": "f", "target": "sm_90", "n": 4096, "k": 4096, **how})


PUBLISHED = {"8B up": (21504, 4096, "relu2", False), "8B down": (4096, 21504, None, True), "GPT-3 up": (49152, 12288, "gelu_tanh", False)}


@given(
    m=st.integers(1, 100_000), n=st.integers(1, 9000).map(lambda x: 8 * x), k=st.integers(1, 9000).map(lambda x: 8 * x),
    step=st.sampled_from((None, *STEPS)), residual=st.booleans(), trains=st.booleans(),
)  # fmt: skip
def test_what_a_kernel_saves(m: int, n: int, k: int, step: str | None, residual: bool, trains: bool) -> None:
    """Against times that are computed here, tensor by tensor."""
    facts = made("f", "sm_90", n, k, step, residual=residual)
    device = DEVICES["h100-80g"]
    said = estimate(facts, m, device, trains=trains)
    flops, memory = device.flops["bf16"] * device.reached[0], device.memory_rate * device.reached[1]
    x, w, y = 2 * m * k, 2 * n * k, 2 * m * n
    work = 2 * m * n * k / flops
    library = max(work, (x + w + y) / memory) + (2 * y + residual * y) / memory + 2 * device.launch_s
    moved = x + w + y + residual * y + (trains and facts.keeps == "z") * y
    assert said.library_s == pytest.approx(library, rel=1e-12)
    assert said.kernel_s == pytest.approx(max(work, moved / memory) + device.launch_s, rel=1e-12)
    assert said.gain == pytest.approx(1 - said.kernel_s / said.library_s, rel=1e-9)
    assert said.saved_bytes == (y if trains and facts.keeps == "z" else 2 * y), "z is neither written nor read, or read once less"
    if work / said.needed > moved / memory:  # at the rate that is needed both take as long
        assert work / said.needed + device.launch_s == pytest.approx(library, rel=1e-9)


def test_a_norm_inside_a_product_would_save_few_percent() -> None:
    """Of published sizes, the products behind a norm: why there is no kernel of it."""
    for n, k in ((18560, 4096), (21504, 4096), (28672, 4096), (24576, 6144), (6144, 4096)):
        for device in DEVICES.values():
            assert prologue_gain(n, k, 8192, device) < 0.05
    assert prologue_gain(64, 4096, 8192, DEVICES["h100-80g"]) > 0.4


# --- the text ---------------------------------------------------------------------------------------------------------


@given(
    n=st.integers(1, 30), tiles_m=st.integers(1, 9), band=st.integers(1, 12), programs=st.integers(1, 20), target=st.sampled_from(TARGET_NAMES)
)  # fmt: skip
def test_every_tile_is_one_program_s(n: int, tiles_m: int, band: int, programs: int, target: str) -> None:
    """Tiles as they are walked: program p has tiles p, p + programs, .. of the order that the file gives."""
    module = harness.load(text_of(small(target, band=3)))
    module = SimpleNamespace(**{"tile_of": _with_globals(module.tile_of, BAND=band, TILES_N=n)})
    seen = [module.tile_of(t, tiles_m) for p in range(programs) for t in range(p, tiles_m * n, programs)]
    assert sorted(seen) == [(i, j) for i in range(tiles_m) for j in range(n)]
    order = [module.tile_of(t, tiles_m) for t in range(tiles_m * n)]
    assert all(j // band <= k // band for (_, j), (_, k) in pairwise(order)), "one band of columns after another"


def _with_globals(function: Callable[..., Any], **more: Any) -> Callable[..., Any]:
    return type(function)(function.__code__, {**function.__globals__, **more})


class _Fragments:
    """The few names of the DSL that lines of a step use, for numpy: single precision, as on the GPU."""

    where = staticmethod(np.where)
    full_like = staticmethod(np.full_like)
    math = SimpleNamespace(exp=lambda x, **how: np.exp(x), rcp=lambda x, **how: np.float32(1) / x)


def ended(step: str, z: np.ndarray) -> np.ndarray:
    names = {"z": z, "cute": _Fragments}
    with np.errstate(all="ignore"):
        exec("\n".join(fragments(apply(step, Z))), names)
    assert names["a"].dtype == np.float32
    return names["a"]


@pytest.mark.parametrize("step", STEPS)
@given(seed=harness.seeds(), scale=st.sampled_from((1e-3, 0.02, 1.0, 30.0, 1e4)))
def test_a_step_is_its_reference(step: str, seed: int, scale: float) -> None:
    """Relative to each value: e^x has the error of its argument, so what is nearly 0 has more."""
    z = harness.values((64,), torch.float32, seed, scale)
    mine, want = torch.from_numpy(ended(step, z.numpy())).double(), UNARY[step](z.double())
    u = harness.roundoff(torch.float32)
    z = z.double()
    slack = {"relu2": 1.0, "silu": 6 + 2 * z.abs(), "gelu_tanh": 8 + 12 * (z.abs() + z.abs() ** 3)}[step]
    # The reference adds 1 and a tanh near -1, in fp64; what is smaller than the smallest number is 0 in fp32.
    assert ((mine - want).abs() <= u * slack * want.abs() + 4e-16 * z.abs() + 1e-37).all()


@pytest.mark.parametrize("step", STEPS)
def test_a_step_of_what_is_not_finite(step: str) -> None:
    found = ended(step, np.array([np.nan, np.inf, 0.0, -200.0], np.float32))
    assert np.isnan(found[0]) and found[1] == np.inf and found[2] == found[3] == 0


def test_the_same_facts_are_the_same_bytes(golden: Callable[[str, str], None]) -> None:
    texts = {}
    for target in TARGET_NAMES:
        texts[target], again = (text_of(made("linear_relu2", target, 21504, 4096, "relu2", bias=True)) for _ in range(2))
        assert texts[target] == again
        harness.stable(again)
    golden("linear_sm_90", texts["sm_90"])
    golden("linear_sm_100", texts["sm_100"])


# --- the op: the kernel's place is taken by PyTorch -------------------------------------------------------------------


class Library:
    """Does what the kernel does, with sums in fp32, and writes each result where the kernel does."""

    def __init__(self, facts: Facts) -> None:
        self.facts, self.ran = facts, 0

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        assert grid[0] % self.facts.cluster == 0 and 0 < grid[0] <= self.facts.programs
        return self._run

    def _run(self, x: Tensor, w: Tensor, *more: Any) -> None:
        assert all(t is None or t.is_contiguous() for t in (x, w, *more[:-1]))
        *more, y, m = more
        assert m == len(x) == len(y)
        z = x.float() @ w.float().T + (more.pop(0).float() if self.facts.bias else 0.0)
        residual = more.pop(0).float() if self.facts.residual else 0.0
        if self.facts.keeps == "z" and more[0] is not None:
            more[0].copy_(z)
        y.copy_((UNARY[self.facts.said](z) if self.facts.step else z) + residual)
        self.ran += 1


KINDS = [("relu2", False, False), ("silu", True, True), ("gelu_tanh", True, False), (None, False, True), (None, True, True)]


@cache
def op_of(step: str | None, bias: bool, residual: bool, target: str = "sm_90") -> ModuleType:
    facts = small(target, step, bias=bias, residual=residual)
    module = harness.load(text_of(facts))
    module.gemm = Library(facts)
    return module


def operands(m: tuple[int, ...], kind: tuple[str | None, bool, bool], dtype: torch.dtype, seed: int, how: str = "contiguous") -> list[Tensor]:
    _, bias, residual = kind
    shapes = [(*m, 136), (72, 136), *([(72,)] if bias else []), *([(*m, 72)] if residual else [])]
    return [harness.laid(harness.values(s, dtype, seed + i, 0.3), how).requires_grad_() for i, s in enumerate(shapes)]


def plain(kind: tuple[str | None, bool, bool], x: Tensor, w: Tensor, *more: Tensor) -> Tensor:
    """In the dtype of the operands, by what the library has for each step."""
    step, bias, residual = kind
    z = torch.nn.functional.linear(x, w, more[0] if bias else None)
    return (UNARY[step](z) if step else z) + (more[-1] if residual else 0.0)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=100 if soak else 5)
@given(m=st.sampled_from(((0,), (1,), (7,), (3, 5))), dtype=st.sampled_from(NARROW), how=harness.layouts(), seed=harness.seeds())
def test_results_and_gradients(kind: tuple[str | None, bool, bool], m: tuple[int, ...], dtype: torch.dtype, how: str, seed: int) -> None:
    module = op_of(*kind)
    mine, eager = operands(m, kind, dtype, seed, how), operands(m, kind, dtype, seed)
    exact = [t.detach().double().requires_grad_() for t in eager]
    d_y = harness.values((*m, 72), dtype, seed + 9)
    with harness.poisoned():
        y = module.linear_test(*mine)
    found = {"y": (y, plain(kind, *exact), plain(kind, *eager))}
    gradients = zip(*(torch.autograd.grad(r, of, d_y.to(r.dtype)) for r, of in zip(found["y"], (mine, exact, eager))))
    found.update({f"d_{i}": g for i, g in enumerate(gradients)})
    assert y.shape == (*m, 72) and y.is_contiguous()
    for name, (got, want, near) in found.items():
        harness.worst(got, want, near, harness.floor(want.detach(), dtype, 136 + 72), name)


@pytest.mark.parametrize(("kind", "target"), [(KINDS[1], "sm_90"), (KINDS[3], "sm_90"), (KINDS[0], "sm_100")])
def test_the_op_passes_the_checks_of_torch(kind: tuple[str | None, bool, bool], target: str) -> None:
    module = op_of(*kind, target)
    rows = operands((5,), kind, torch.bfloat16, 1)
    torch.library.opcheck(getattr(module, "linear_test_saving", module.linear_test_rows), rows)
    compiled = torch.compile(module.linear_test, backend="aot_eager", fullgraph=True)
    for got, want in zip(*(torch.autograd.grad(f(*rows).float().square().sum(), rows) for f in (compiled, module.linear_test))):
        assert torch.equal(got, want)


@pytest.mark.parametrize(("kind", "stored"), [(KINDS[0], 1), (KINDS[2], 2)])
def test_z_is_stored_for_gradients_only(kind: tuple[str | None, bool, bool], stored: int) -> None:
    """And not where the slope follows from the result."""
    module = op_of(*kind)
    rows = operands((5,), kind, torch.bfloat16, 1)
    for grad, tensors in ((True, stored), (False, 1)):
        with torch.set_grad_enabled(grad), harness.kernels.launches() as told:
            module.linear_test(*rows)
        launch, *more = told
        assert not more
        assert sum(isinstance(a, Tensor) for a in launch.args) == len(rows) + tensors and launch.args[-1] == 5


def test_what_it_does_not_take() -> None:
    module = op_of(*KINDS[1])
    x, w, bias, residual = operands((5,), KINDS[1], torch.bfloat16, 1)
    for wrong in (x.float(), x.double()):
        with pytest.raises(TypeError, match="takes bf16 or fp16"):
            module.linear_test(wrong, w.to(wrong.dtype), bias.to(wrong.dtype), residual.to(wrong.dtype))
    with pytest.raises(TypeError, match=r"`w` is torch.float16.*one dtype"):
        module.linear_test(x, w.half(), bias, residual)
    with pytest.raises(ValueError, match=r"`bias` has shape \(71,\), not \(72,\)"):
        module.linear_test(x, w, bias[1:], residual)
    with pytest.raises(RuntimeError, match=r"sm_90a needs compute capability 9.0; cpu is no GPU"):
        gemms.Gemm(None, "sm_90a", None, None)[(2,)](x, w, 5)  # type: ignore[arg-type]
