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

from heddle.codegen.kernels import render
from heddle.lowering.ops.linear.cute import MEASURED, STEPS, Facts, Unfit, choose, fitted, shared_bytes
from heddle.lowering.ops.pointwise.reference import UNARY
from heddle.lowering.target import TARGETS
from heddle.runtime.lib import gemms
from heddle.runtime.plan.devices import DEVICES

from . import harness

pytest.importorskip("cutlass")
TARGET_NAMES = ("sm_90", "sm_100")
NARROW = (torch.bfloat16, torch.float16)
soak = settings.get_current_profile_name() == "soak"


def text_of(facts: Facts) -> str:
    return render("linear", facts.values(), facts.template)


def small(target: str, step: str | None = None, **more: Any) -> Facts:
    """N and K beside whole tiles: 2 tiles of columns, 3 along K, the second and the last of them mostly empty."""
    sizes = {"block_n": 64, "programs": 2, "stages": 2, "saving_stages": 2, **more}
    return fitted("linear_test", target, 72, 136, step, **sizes)


# --- what is decided --------------------------------------------------------------------------------------------------


@given(
    target=st.sampled_from(TARGET_NAMES), n=st.integers(1, 20000), k=st.integers(1, 3000), step=st.sampled_from((None, *STEPS)),
    bias=st.booleans(), residual=st.booleans(),
)  # fmt: skip
def test_what_is_made_fits_the_target(target: str, n: int, k: int, step: str | None, bias: bool, residual: bool) -> None:
    if n % 8 or k % 8:
        with pytest.raises(Unfit, match="units of 16 bytes"):
            fitted("f", target, n, k, step, bias=bias, residual=residual)
        return
    facts = fitted("f", target, n, k, step, bias=bias, residual=residual)
    for saving, stages in ((False, facts.stages), (True, facts.saving_stages)):
        if saving and step is None:
            continue
        assert stages >= 2 and shared_bytes(facts, saving) <= TARGETS[target].shared
    loaded = {b: -(-n // b) * (facts.block_m + b) for b in (64, 128, 192, 256)}
    assert loaded[facts.block_n] == min(loaded.values()), "tiles load what has to be loaded, and little twice"


@pytest.mark.parametrize(
    ("how", "why"),
    [
        (dict(target="sm_80"), "sm_80` has no kernel of products"),
        (dict(target="cpu"), "cpu` has no kernel of products"),
        (dict(step="tanh"), "`tanh` has no text"),
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
        fitted(**{"name": "f", "target": "sm_90", "n": 4096, "k": 4096, **how})


PUBLISHED = {"8B up": (21504, 4096, "relu2", False), "8B down": (4096, 21504, None, True), "340B up": (73728, 18432, "relu2", False)}


@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.parametrize("of", PUBLISHED)
def test_nothing_is_chosen_that_nothing_measured(of: str, trains: bool) -> None:
    n, k, step, residual = PUBLISHED[of]
    for target in TARGET_NAMES:
        facts = fitted("f", target, n, k, step, residual=residual)
        for device in DEVICES.values():
            said = choose(facts, 8192, device, trains=trains)
            assert not said.kernel and said.reason.startswith("library: ")
            assert "no committed measurement" in said.reason or "its product does all of this" in said.reason
    assert MEASURED == {}, "a number here needs its file of benchmarks/results"


@given(
    m=st.integers(1, 100_000), n=st.integers(1, 9000).map(lambda x: 8 * x), k=st.integers(1, 9000).map(lambda x: 8 * x),
    step=st.sampled_from((None, *STEPS)), bias=st.booleans(), residual=st.booleans(), trains=st.booleans(),
    share=st.floats(0.3, 1.3),
)  # fmt: skip
def test_a_measured_kernel_is_chosen_if_it_is_faster(
    m: int, n: int, k: int, step: str | None, bias: bool, residual: bool, trains: bool, share: float
) -> None:
    """Against times that are computed here, tensor by tensor."""
    facts = fitted("f", "sm_90", n, k, step, bias=bias, residual=residual)
    device = DEVICES["h100-80g"]
    said = choose(facts, m, device, trains=trains, measured={(device.name, "sm_90"): share})
    flops, memory = device.flops["bf16"] * device.reached[0], device.memory_rate * device.reached[1]
    x, w, y = 2 * m * k, 2 * n * k, 2 * m * n
    work = 2 * m * n * k / flops
    alone = step is None and not (bias and residual)
    if alone:
        library = max(work, (x + w + y + residual * y) / memory) + device.launch_s
    else:
        library = max(work, (x + w + y) / memory) + (2 * y + residual * y) / memory + 2 * device.launch_s
    moved = x + w + y + residual * y + (trains and step is not None) * y
    kernel = max(work / share, moved / memory) + device.launch_s
    assert said.library_s == pytest.approx(library, rel=1e-12)
    if alone:
        assert not said.kernel and said.saved_bytes == 0
        return
    assert said.kernel_s == pytest.approx(kernel, rel=1e-12) and said.kernel == (said.kernel_s < said.library_s)
    assert said.saved_bytes == (y if trains and step else 2 * y), "z is neither written nor read, or read once less"
    assert said.reason.startswith("kernel: " if said.kernel else "library: ") and f"{share:.0%}" in said.reason
    if work / said.needed > moved / memory:  # at the rate that is needed both take as long
        assert work / said.needed + device.launch_s == pytest.approx(library, rel=1e-9)


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
        exec("\n".join(STEPS[step].cute), names)
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


@pytest.mark.parametrize("step", STEPS)
@given(seed=harness.seeds())
def test_a_slope_is_the_derivative(step: str, seed: int) -> None:
    z = harness.values((40,), torch.float64, seed, 2.0).requires_grad_()
    d_y = harness.values((40,), torch.float64, seed + 1)
    (want,) = torch.autograd.grad(UNARY[step](z), z, d_y)
    mine = eval(STEPS[step].slope, {"torch": torch, "d_y": d_y, "z": z.detach()})
    assert torch.allclose(mine, want, rtol=1e-10, atol=1e-12)


def test_the_same_facts_are_the_same_bytes(golden: Callable[[str, str], None]) -> None:
    texts = {}
    for target in TARGET_NAMES:
        texts[target], again = (text_of(fitted("linear_relu2", target, 21504, 4096, "relu2", bias=True)) for _ in range(2))
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
        if self.facts.step and more[0] is not None:
            more[0].copy_(z)
        y.copy_((UNARY[self.facts.step](z) if self.facts.step else z) + residual)
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
@settings(max_examples=100 if soak else 8)
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
    torch.library.opcheck(module.linear_test_saving if kind[0] else module.linear_test_rows, rows)
    compiled = torch.compile(module.linear_test, backend="aot_eager", fullgraph=True)
    for got, want in zip(*(torch.autograd.grad(f(*rows).float().square().sum(), rows) for f in (compiled, module.linear_test))):
        assert torch.equal(got, want)


def test_z_is_stored_for_gradients_only() -> None:
    module = op_of(*KINDS[0])
    rows = operands((5,), KINDS[0], torch.bfloat16, 1)
    for grad, tensors in ((True, 2), (False, 1)):
        with torch.set_grad_enabled(grad), harness.kernels.launches() as told:
            module.linear_test(*rows)
        (launch,) = told
        assert sum(isinstance(a, Tensor) for a in launch.args) == 2 + tensors and launch.args[-1] == 5


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
