"""Chains: their kernels, forward and every gradient, against plain math in fp64."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from heddle.codegen.chains import inputs, source
from heddle.lowering.chains.expr import Chain, Output, Unfit, View, apply, reduce
from heddle.lowering.chains.expr import load as load_expr
from heddle.lowering.chains.plan import Plan, plan
from heddle.lowering.chains.tiles import ROW, TILE, WALK, Tiles, power
from heddle.lowering.target import TARGETS
from heddle.runtime import lib
from heddle.runtime.bounds import bounds

from .chains import EXAMPLES, Example, drop_norm
from .harness import (
    Fault,
    dtypes,
    laid,
    layouts,
    load,
    poisoned,
    scales,
    seeds,
    sizes,
    stable,
    survivors,
    values,
    worst,
)  # fmt: skip

ROOT = Path(__file__).resolve().parents[2]
TRITON = TARGETS["triton"]


def few(count: int) -> settings:
    """So many examples in the suite, ten times as many under `make soak`."""
    return settings(max_examples=count if settings.default.max_examples == 100 else 10 * count)


@dataclass(frozen=True)
class Case:
    """One drawn use of a chain."""

    example: Example
    columns: int
    tiles: tuple[tuple[str, Tiles], ...]
    rows: int = 1
    dtype: torch.dtype = torch.float64
    wide: torch.dtype = torch.float64
    layout: str = "contiguous"
    scale: float = 1.0
    seed: int = 0

    @property
    def plan(self) -> Plan:
        return plan(self.example.chain(self.columns), dict(self.tiles))

    def tensors(self) -> dict[str, Tensor]:
        """Weights have `wide`, so that dtypes mix."""
        shapes = self.example.shapes(self.rows, self.columns)
        return {n: whole(s, self.seed + i) if n in self.example.drawn
                else values(s, self.dtype if len(s) > 1 else self.wide, self.seed + i, self.scale)
                for i, (n, s) in enumerate(shapes.items())}  # fmt: skip


def whole(shape: tuple[int, ...], seed: int) -> Tensor:
    """Numbers of rows."""
    return torch.randint(-(2**63), 2**63 - 1, shape, generator=torch.Generator().manual_seed(seed))


def exactly(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """In fp64; whole numbers are."""
    return {n: t.double() if t.is_floating_point() else t for n, t in tensors.items()}


def tiles_for(reduces: bool, columns: int, block: int, mode: str, programs: int) -> tuple[tuple[str, Tiles], ...]:
    """Small ones, so that the interpreter meets several blocks."""
    mode = mode if reduces else TILE
    width = power(columns) if mode == ROW else block
    one = Tiles(mode, 2, width, 1, programs)
    return ("fwd", one), ("bwd", one), ("bwd_weights", Tiles(TILE, 2, block, 1, programs))


REDUCES = {"drop_norm", "add_rms_norm", "layer_norm", "layer_norm_1p", "gated_norm", "softmax", "everything", "scaled", "skip", "gated", "shared_heads"}


@st.composite
def cases(draw: st.DrawFn, name: str, exact: bool = False) -> Case:
    example = EXAMPLES[name]
    block = draw(st.sampled_from((4, 8)))
    columns = draw(sizes(block, least=1) | st.sampled_from((33, 40, 67)))  # from 33 on, statistics are saved
    mode = draw(st.sampled_from((ROW, WALK)))
    tiles = tiles_for(name in REDUCES, columns, block, mode, draw(st.integers(1, 4)))
    rows = draw(st.integers(0, 3 if example.rows > 1 else 7)) * example.rows
    if exact:
        return Case(example, columns, tiles, rows, seed=draw(seeds()))
    dtype = draw(dtypes())
    wide = draw(st.sampled_from((dtype, torch.float32)))
    return Case(example, columns, tiles, rows, dtype, wide, draw(layouts()), draw(scales()), draw(seeds()))


def derived(example: Example, tensors: Mapping[str, Tensor], slopes: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Outputs and gradients of the example's math in the dtype of the tensors."""
    leaves = {n: t.detach().clone().requires_grad_(n not in example.ungraded) for n, t in tensors.items()}
    out = dict(zip(slopes, example.math(leaves), strict=True))
    wanted = [n for n, t in leaves.items() if t.requires_grad]
    given = [slopes[n].to(out[n].dtype) for n in out]
    grads = torch.autograd.grad(list(out.values()), [leaves[n] for n in wanted], given, allow_unused=True)
    found = {n: t.detach() for n, t in out.items()}
    return found | {f"d_{n}": torch.zeros_like(leaves[n]) if g is None else g for n, g in zip(wanted, grads)}


def slopes_of(case: Case, dtype: torch.dtype) -> dict[str, Tensor]:
    """Gradients of the outputs."""
    double = exactly(case.tensors())
    names = dict.fromkeys(o.name for o in case.example.chain(case.columns).outputs)
    out = case.example.math(double)
    return {n: values(t.shape, dtype if t.dim() > 1 else torch.float32, case.seed + 50 + i)
            for i, (n, t) in enumerate(zip(names, out, strict=True))}  # fmt: skip


# --- the derivation, in fp64 ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EXAMPLES)
@given(data=st.data())
@few(4)
def test_derived_gradients_are_those_of_autograd(name: str, data: st.DataObject) -> None:
    """Expressions, folded, derived, cut and split into kernels, without a kernel: fp64, 1e-10."""
    case = data.draw(cases(name, exact=True))
    tensors, slopes = case.tensors(), slopes_of(case, torch.float64)
    want = derived(case.example, tensors, {n: s.double() for n, s in slopes.items()})
    found = bounds(case.plan, tensors, slopes, dict.fromkeys(tensors, torch.float64))
    assert set(found) >= set(want)
    for n, t in want.items():
        torch.testing.assert_close(found[n].value.reshape(t.shape), t, rtol=1e-10, atol=1e-10)
        assert found[n].error.isfinite().all() and (found[n].error >= 0).all()


# --- the kernels ------------------------------------------------------------------------------------------------------


def check(case: Case, module: object | None = None) -> float:
    """Outputs and gradients of the generated file within the rule of error; the worst share."""
    name = case.example.chain(case.columns).name
    chain = case.example.chain(case.columns)
    if module is None:
        module = load(source(chain, TRITON, name, dict(case.tiles)))
    tensors, slopes = case.tensors(), slopes_of(case, case.dtype)
    double = exactly(tensors)
    exact = {n: s.double() for n, s in slopes.items()}
    want, eager = derived(case.example, double, exact), derived(case.example, tensors, slopes)
    limit = bounds(case.plan, double, exact, {n: t.dtype for n, t in tensors.items()})
    leaves = {n: laid(t, "contiguous" if n in case.example.drawn else case.layout).requires_grad_(n not in case.example.ungraded)
              for n, t in tensors.items()}  # fmt: skip
    with poisoned():
        out = getattr(module, name)(*(leaves[n] for n in inputs(chain)))
        out = (out,) if isinstance(out, Tensor) else out
        wanted = [n for n in leaves if leaves[n].requires_grad]
        grads = torch.autograd.grad(out, [leaves[n] for n in wanted], list(slopes.values()))
    found = dict(zip(slopes, out, strict=True)) | {f"d_{n}": g for n, g in zip(wanted, grads, strict=True)}
    share = 0.0
    for n, got in found.items():
        source_of = tensors.get(n.removeprefix("d_")) if n.startswith("d_") else None
        assert source_of is None or (got.dtype, got.shape) == (source_of.dtype, source_of.shape)
        floor = limit[n].error.reshape(want[n].shape)
        share = max(share, worst(got, want[n], eager[n], floor, n))
    return share


@pytest.mark.parametrize("name", EXAMPLES)
@given(data=st.data())
@few(3)
def test_kernels_agree_with_fp64(name: str, data: st.DataObject) -> None:
    check(data.draw(cases(name)))


@pytest.mark.parametrize("name", ["gated_norm", "softmax", "rope"])
@given(seed=seeds(), mode=st.sampled_from((ROW, WALK)))
@few(1)
def test_rows_are_alone(name: str, seed: int, mode: str) -> None:
    """The same bits for a row wherever it stands, and whatever stands beside it; forward and backward."""
    example = EXAMPLES[name]
    case = Case(example, 37, tiles_for(name in REDUCES, 37, 8, mode, 2), 5 * example.rows, torch.bfloat16, torch.float32, seed=seed)
    order = torch.randperm(5, generator=torch.Generator().manual_seed(seed))

    def moved(t: Tensor) -> Tensor:
        return t if len(t) % 5 else t.view(5, -1, t.shape[-1])[order].view(t.shape)

    tensors, slopes = case.tensors(), slopes_of(case, case.dtype)
    plain = run(case, tensors, slopes)
    other = run(case, {n: moved(t) for n, t in tensors.items()}, {n: moved(t) for n, t in slopes.items()})
    shared = {f"d_{n}" for n, t in tensors.items() if len(t) % 5}  # a weight's gradient is a sum in another order
    for n in plain.keys() - shared:
        assert torch.equal(moved(plain[n]), other[n]), n
    again = run(case, tensors, slopes)
    assert all(torch.equal(plain[n], again[n]) for n in plain)


def run(case: Case, tensors: Mapping[str, Tensor], slopes: Mapping[str, Tensor]) -> dict[str, Tensor]:
    chain = case.example.chain(case.columns)
    module = load(source(chain, TRITON, chain.name, dict(case.tiles)))
    leaves = {n: t.detach().clone().requires_grad_(n not in case.example.ungraded) for n, t in tensors.items()}
    out = getattr(module, chain.name)(*(leaves.get(n) for n in inputs(chain)))
    out = (out,) if isinstance(out, Tensor) else out
    wanted = [n for n, t in leaves.items() if t.requires_grad]
    grads = torch.autograd.grad(out, [leaves[n] for n in wanted], list(slopes.values()))
    return dict(zip(slopes, out, strict=True)) | {f"d_{n}": g for n, g in zip(wanted, grads, strict=True)}


def test_rows_of_any_shape() -> None:
    """Dims before and behind, weights of several dims, an output that nobody uses, dtypes that differ."""
    module = load(source(EXAMPLES["add_rms_norm"].chain(12), TRITON, "add_rms_norm"))
    x = values((2, 5, 3, 4), torch.float32, 1).requires_grad_()
    r = values((2, 5, 12), torch.bfloat16, 2).requires_grad_()
    w = values((3, 4), torch.float32, 3).requires_grad_()
    h, y = module.add_rms_norm(x, r, w)
    assert h.shape == y.shape == x.shape and h.dtype == torch.float32
    dx, dr, dw = torch.autograd.grad(y.sum(), (x, r, w))  # through y alone, by a gradient that is one number everywhere
    assert [g.dtype for g in (dx, dr, dw)] == [torch.float32, torch.bfloat16, torch.float32]
    want = derived(EXAMPLES["add_rms_norm"], {"x": x.double().flatten(-2), "r": r.double(), "w": w.double().flatten()},
                   {"h": torch.zeros(2, 5, 12), "y": torch.ones(2, 5, 12)})  # fmt: skip
    torch.testing.assert_close(dx.flatten(-2).double(), want["d_x"], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(dw.flatten().double(), want["d_w"], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(dr, dx.view(dr.shape).bfloat16(), rtol=0, atol=0)


# --- dropout ------------------------------------------------------------------------------------------------------------


def test_nothing_is_dropped_where_nothing_is_drawn() -> None:
    """Outside of training: the bits of the kernel that has no dropout, forward and backward."""
    example = EXAMPLES["drop_norm"]
    case = Case(example, 37, tiles_for(True, 37, 8, WALK, 2), 3, torch.float32, torch.float32)
    plain = replace(example, chain=lambda c: drop_norm(c, lambda x, *_: x))
    assert "mixed" not in source(plain.chain(37), TRITON, "plain")
    tensors, slopes = case.tensors(), slopes_of(case, case.dtype)
    found = run(case, {n: t for n, t in tensors.items() if n not in example.drawn}, slopes)
    want = run(replace(case, example=plain), {n: t for n, t in tensors.items() if n not in example.drawn}, slopes)
    assert all(torch.equal(found[n], want[n]) for n in want)
    assert not any(torch.equal(found[n], t) for n, t in run(case, tensors, slopes).items() if n in ("h", "o", "d_x"))


@given(seed=st.integers(0, 2**62), rows=st.integers(1, 3), rate=st.sampled_from((0.1, 0.5, 0.9)), before=st.integers(0, 2**40))
@few(3)
def test_the_zeros_are_those_of_the_library(seed: int, rows: int, rate: float, before: int) -> None:
    """Also of infinities, and in the gradient; in which places a rank's rows are in the whole, the library says."""
    drawn = load_expr("drawn", "r", drawn=True)
    chain = Chain("dropout", 37, (Output("y", apply("dropout", load_expr("x", "rc"), drawn, rate=rate)),))
    x = values((rows, 2, 37), torch.float32, 1)
    x.view(-1)[::5] = torch.inf
    owner, found = SimpleNamespace(training=True, site=seed % 7), []
    for how in ("kernel", "library"):
        at, leaf = lib.At((rows, 2)), x.clone().requires_grad_()
        at.chance, at.before = seed, before
        if how == "library":
            y = lib.dropout(leaf, rate, owner, "y", at)
        else:
            y = load(source(chain, TRITON, "dropout")).dropout(leaf, lib.drawn(leaf, owner, "y", at))
        found.append((y.detach(), *torch.autograd.grad(y, leaf, torch.ones_like(y))))
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b) and not a.isnan().any()
    assert load(source(chain, TRITON, "dropout")).dropout(x, None) is x


# --- what torch asks of an op -------------------------------------------------------------------------------------------


def test_torch_knows_the_ops() -> None:
    """Fake forms, gradients, no alias; through the compiler in one graph, with the same bits."""
    chain = EXAMPLES["gated_norm"].chain(37)
    module = load(source(chain, TRITON, "gated_norm"))
    x, z = (values((6, 37), torch.float32, i).requires_grad_() for i in (1, 2))
    w = values((3, 37), torch.float32, 3).requires_grad_()
    torch.library.opcheck(module.gated_norm_fwd, (x, z, w))
    module_ = load(source(drop_norm(37), TRITON, "drop_norm"))
    for drawn in (None, whole((6, 1), 3)):
        given_ = {"x": x, "z": z, "r": x.detach(), "w": w[:1].detach(), "drawn": drawn}
        torch.library.opcheck(module_.drop_norm_fwd, tuple(given_.get(n) for n in inputs(drop_norm(37))))
    compiled = torch.compile(module.gated_norm, backend="aot_eager", fullgraph=True)
    for a, b in zip(*(torch.autograd.grad(f(x, z, w).square().sum(), (x, z, w)) for f in (module.gated_norm, compiled))):
        assert torch.equal(a, b)


# --- faults -------------------------------------------------------------------------------------------------------------

FAULTS = {
    "drop_norm": (ROW, {
        "columns not counted": Fault("cols[None, :].to(tl.int64) * -70", "cols[None, :].to(tl.int64) * 0 - 70"),
        "one number for all rows": Fault("tl.load(drawn_ptr + rows,", "tl.load(drawn_ptr + rows * 0,"),
        "not mixed": Fault("number = mixed(", "number = ("),
        "another mixer": Fault("(x >> 27) & 137438953471", "(x >> 26) & 137438953471"),
        "shifts that keep the sign": Fault("(x >> 30) & 17179869183", "x >> 30"),
        "not scaled": Fault("x * scale, 0.0", "x, 0.0"),
        "those dropped are kept": Fault(">= least", "< least"),
        "gradient not dropped": Fault("d_x = dropped(", "d_x = tl.maximum(t1, t1) + 0 * dropped("),
        "numbers of the other use": Fault("dropped(d_o, drawn_,", "dropped(d_o, drawn,"),
    }),
    "gated_norm": (ROW, {
        "a column short": Fault("mask_c = cols < C", "mask_c = cols < C - 1"),
        "a row short": Fault("mask_r = rows < num_rows", "mask_r = rows < num_rows - 1"),
        "padding counted": Fault("s1 / C + 1e-05", "s1 / BLOCK_C + 1e-05"),
        "another epsilon": Fault("+ 1e-05", "+ 1e-06"),
        "one group's weight": Fault("w_ptr + group * C + cols", "w_ptr + cols"),
        "blocks skipped": Fault("tl.num_programs(0)):", "tl.num_programs(0) + 1):"),
        "parts over each other": Fault("(tl.program_id(0) * 3 + group) * C", "(tl.program_id(0) + group) * C"),
        "no gradient of the statistic": Fault("- y * s2[:, None]", ""),
        "weight's gradient of rows not scaled": Fault("d_o * (y * rstd[:, None])", "d_o * y"),
        "wrong slope of the gate": Fault("(t1 * (1 - t1))", "(t1 * (1 + t1))"),
        "last parts only": Fault("acc += tl.load(parts_ptr", "acc = tl.load(parts_ptr"),
        "parts of all groups": Fault("(n % G // DIVIDE % M == m)", "(n >= 0)"),
        "stale statistic": Fault("tl.load(rstd_ptr + rows,", "tl.load(rstd_ptr + rows * 0,"),
    }),
    "layer_norm_1p": (WALK, {
        "last block only": Fault("s1_acc += x", "s1_acc = x"),
        "padding in the variance": Fault("tl.where(mask_c[None, :], t1 * t1, 0.0)", "t1 * t1"),
        "mean not taken off": Fault("t1 = x - mu[:, None]", "t1 = x"),
        "first block of the weights only": Fault("cols = tl.program_id(1) * BLOCK_C + ", "cols = "),
        "weight without its 1": Fault("d_y * (1 + w)[None, :]", "d_y * w[None, :]"),
        "gradient of the mean lost": Fault("- s4[:, None]", ""),
        "gradient of the variance lost": Fault("- (x - mu[:, None]) * s3[:, None]", ""),
        "bias left out": Fault("+ b[None, :]", ""),
    }),
    "softmax": (WALK, {
        "padding in the sum": Fault("tl.where(mask_c[None, :], tl.exp(x - m[:, None]), 0.0)", "tl.exp(x - m[:, None])"),
        "padding is the largest": Fault('tl.where(mask_c[None, :], x, float("-inf"))', "x + 1000 * (1 - mask_c[None, :].to(tl.float32))"),
        "not normalised": Fault(" / l[:, None]\n", "\n"),
        "gradient of the sum lost": Fault(" - s2[:, None]", ""),
    }),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_faults_are_found(name: str) -> None:
    mode, faults = FAULTS[name]
    example = EXAMPLES[name]
    # As few blocks as have several columns, rows and programs, more parts than one step adds, and one block too many.
    tiles = tiles_for(True, 37, 16, mode, 6)
    chain = example.chain(37)
    text = source(chain, TRITON, chain.name, dict(tiles))
    cases_ = [Case(example, 37, tiles, (13 if mode == ROW else 5) * example.rows, dtype, torch.float32, scale=scale, seed=7)
              for dtype, scale in ((torch.float32, 0.02), (torch.float32, 1.0))]  # fmt: skip

    def look(module: object) -> None:
        for case in cases_:
            check(case, module)

    assert survivors(text, faults, look) == []


# --- the text ------------------------------------------------------------------------------------------------------------


def test_reads_as_by_hand(golden: Callable[[str, str], None]) -> None:
    text = source(EXAMPLES["add_rms_norm"].chain(4096), TRITON, "add_rms_norm")
    golden("add_rms_norm", text)
    stable(text)


@pytest.mark.parametrize("name", EXAMPLES)
@pytest.mark.parametrize("columns", [64, 4096, 21504])
def test_text(name: str, columns: int) -> None:
    """Of a size that is published: lines of a length that can be read, rows counted in 64 bits, no atomics."""
    text = source(EXAMPLES[name].chain(columns), TRITON, "f")
    assert max(map(len, text.splitlines())) <= 120
    assert "atomic" not in text and text.count(".to(tl.int64)") >= text.count("rows = (")
    compile(text, "f.py", "exec")


def test_same_bytes_in_another_process() -> None:
    code = """
from heddle.codegen.chains import source
from heddle.lowering.chains.expr import Chain, Output, apply, load, number, reduce
from heddle.lowering.target import TARGETS
x, z, w = load("x", "rc"), load("z", "rc"), load("w", "c")
y = apply("mul", x, apply("silu", z))
s = apply("rsqrt", apply("add", apply("div", reduce("sum", apply("mul", y, y)), number(67)), number(1e-5)))
o = apply("max", apply("mul", apply("mul", y, s), w), apply("gelu", apply("sub", x, reduce("sum", z))))
print(source(Chain("f", 67, (Output("o", o), Output("s", s, "r"))), TARGETS["sm_90"], "f"))
"""
    found = {
        subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": seed}, cwd=ROOT,
                       capture_output=True, text=True, check=True).stdout
        for seed in ("1", "2")
    }  # fmt: skip
    assert len(found) == 1 and len(found.pop()) > 1000


def test_what_is_kept() -> None:
    """One read of the sum instead of both terms; statistics where rows are long, nothing where they are short."""
    long = plan(EXAMPLES["add_rms_norm"].chain(4096))
    assert set(long.kept) == {"h", "rstd", "w"} and [s.name for s in long.saved] == ["rstd"]
    assert [g.name for g in long.gradients] == ["d_x", "d_x", "d_w"]
    assert set(plan(EXAMPLES["add_rms_norm"].chain(16)).kept) == {"h", "w"}
    assert set(plan(EXAMPLES["swiglu"].chain(4096)).kept) == {"gate", "up"}
    assert {s.name for s in plan(EXAMPLES["softmax"].chain(4096)).saved} == {"m", "l"}


def test_walks_of_a_layer_norm() -> None:
    """What is centred sums to 0, so the gradient's two sums are found in one walk, and a second stores."""
    text = source(EXAMPLES["layer_norm"].chain(21504), TRITON, "layer_norm")
    body = text[text.index("def layer_norm_bwd_kernel") : text.index("def layer_norm_bwd_weights_kernel")]
    assert body.count("for start in range") == 2


# --- what is no chain -----------------------------------------------------------------------------------------------------


def test_reasons() -> None:
    x, y = load_expr("x", "rc"), load_expr("y", "rc")
    with pytest.raises(Unfit, match="exponent that is a tensor"):
        apply("pow", x, y)
    with pytest.raises(Unfit, match="largest column"):
        plan(Chain("f", 8, (Output("y", apply("sub", x, reduce("max", x))),)))
    parts = [load_expr("x", "rc", View(start=i, width=12)) for i in (0, 4)]
    with pytest.raises(Unfit, match="read in two places"):
        plan(Chain("f", 8, (Output("y", apply("mul", *parts)),)))
    with pytest.raises(Unfit, match="some columns of `c`"):
        plan(Chain("f", 8, (Output("y", apply("mul", x, load_expr("c", "rc", View(divide=2, width=9)))),)))
    with pytest.raises(Unfit, match="a row of its own"):
        plan(Chain("f", 8, (Output("y", apply("exp", load_expr("w", "c"))),)))
    with pytest.raises(Unfit, match="no text"):
        apply("floordiv", x, y)
    with pytest.raises(ValueError, match="not written once"):
        plan(Chain("f", 8, (Output("y", x, view=View(width=24)), Output("y", x, view=View(start=8, width=24)))))
    with pytest.raises(ValueError, match="cannot be a name"):
        plan(Chain("f", 8, (Output("rows", apply("exp", x)),)))


def test_wrong_tensors() -> None:
    module = load(source(EXAMPLES["gated_norm"].chain(8), TRITON, "gated_norm"))
    x, w = torch.ones(6, 8), torch.ones(3, 8)
    with pytest.raises(TypeError, match="float64"):
        module.gated_norm(x.double(), x.double(), w.double())
    with pytest.raises(ValueError, match="rows of 8"):
        module.gated_norm(torch.ones(6, 9), x, w)
    with pytest.raises(ValueError, match="6 are needed"):
        module.gated_norm(x, torch.ones(3, 8), w)
    with pytest.raises(ValueError, match="are not of 3 groups"):
        module.gated_norm(x[:4], x[:4], w)
    with pytest.raises(ValueError, match="is not 3 rows of 8"):
        module.gated_norm(x, x, torch.ones(8))
