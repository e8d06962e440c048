"""Chains: their kernels, forward and every gradient, against plain math in fp64."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from heddle.codegen.chains import inputs, source
from heddle.lowering.chains.plan import Plan, plan
from heddle.lowering.chains.tiles import ROW, TILE, WALK, Tiles, power
from heddle.lowering.target import TARGETS
from heddle.runtime.bounds import bounds

from .chains import EXAMPLES, Example
from .harness import dtypes, laid, layouts, load, poisoned, scales, seeds, sizes, values, worst

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
        return {n: values(s, self.dtype if len(s) > 1 else self.wide, self.seed + i, self.scale)
                for i, (n, s) in enumerate(shapes.items())}  # fmt: skip


def tiles_for(reduces: bool, columns: int, block: int, mode: str, programs: int) -> tuple[tuple[str, Tiles], ...]:
    """Small ones, so that the interpreter meets several blocks."""
    mode = mode if reduces else TILE
    width = power(columns) if mode == ROW else block
    one = Tiles(mode, 2, width, 1, programs)
    return ("fwd", one), ("bwd", one), ("bwd_weights", Tiles(TILE, 2, block, 1, programs))


REDUCES = {"add_rms_norm", "layer_norm", "layer_norm_1p", "gated_norm", "softmax", "everything", "scaled", "skip"}


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
    double = {n: t.double() for n, t in case.tensors().items()}
    names = dict.fromkeys(o.name for o in case.example.chain(case.columns).outputs)
    out = case.example.math(double)
    return {n: values(t.shape, dtype if t.dim() > 1 else torch.float32, case.seed + 50 + i)
            for i, (n, t) in enumerate(zip(names, out, strict=True))}  # fmt: skip


# --- the derivation, in fp64 ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EXAMPLES)
@given(data=st.data())
@few(6)
def test_derived_gradients_are_those_of_autograd(name: str, data: st.DataObject) -> None:
    """Expressions, folded, derived, cut and split into kernels, without a kernel: fp64, 1e-10."""
    case = data.draw(cases(name, exact=True))
    tensors, slopes = case.tensors(), slopes_of(case, torch.float64)
    want = derived(case.example, tensors, {n: s.double() for n, s in slopes.items()})
    found = bounds(case.plan, tensors, slopes, {n: torch.float64 for n in tensors})
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
    double = {n: t.double() for n, t in tensors.items()}
    exact = {n: s.double() for n, s in slopes.items()}
    want, eager = derived(case.example, double, exact), derived(case.example, tensors, slopes)
    limit = bounds(case.plan, double, exact, {n: t.dtype for n, t in tensors.items()})
    leaves = {n: laid(t, case.layout).requires_grad_(n not in case.example.ungraded) for n, t in tensors.items()}
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
@few(4)
def test_kernels_agree_with_fp64(name: str, data: st.DataObject) -> None:
    check(data.draw(cases(name)))
