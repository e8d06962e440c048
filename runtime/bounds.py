"""What rounding may cost a chain's kernels: their expressions again in fp64, each value with a running error bound.

First order: an op adds its own rounding and underflow to what its operands' errors become, the derivative times them;
a sum of n adds (log2 n + 3) u sum|x|; a store adds u_out |y| and the smallest subnormal. What the backward pass reads
back carries the error of its store. Source: Higham 2002, Accuracy and Stability of Numerical Algorithms, section 3.3.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..lowering.chains.expr import Expr, View, ordered
from ..lowering.chains.plan import Kernel, Plan, Store, Sum
from ..lowering.chains.table import CALL, TABLE
from .lib.chance import STEP, mixed, passes

UNIT = 2.0**-24  # half the distance of 1 to the next number in fp32
LEAST = 2.0**-126  # the smallest normal number there: what is less may be 0


@dataclass(frozen=True)
class Bound:
    """A value in fp64 and how far from it a kernel's may be, elementwise."""

    value: Tensor
    error: Tensor


class _Numbers:
    """The algebra of the op table on fp64 tensors."""

    def __getattr__(self, op: str) -> Any:
        own = type(self).__dict__.get(f"_{op}")
        return getattr(torch, op) if own is None else own.__func__

    @staticmethod
    def _div(p: Any, q: Any) -> Any:
        return p / q

    _mul = staticmethod(lambda p, q: p * q)
    _add = staticmethod(lambda p, q: p + q)
    _sub = staticmethod(lambda p, q: p - q)
    _softplus = staticmethod(lambda x: torch.logaddexp(x, torch.zeros_like(x)))
    _at_least = staticmethod(lambda x, k: torch.where(x < k, k, x))
    _at_most = staticmethod(lambda x, k: torch.where(x > k, k, x))
    _relu2 = staticmethod(lambda x: torch.relu(x) ** 2)


_NUMBERS = _Numbers()


def bounds(
    plan: Plan, tensors: Mapping[str, Tensor], slopes: Mapping[str, Tensor], dtypes: Mapping[str, torch.dtype]
) -> dict[str, Bound]:
    """Of every output, by name, and every gradient, `d_NAME` of the input.

    tensors: of the chain, tiles [R, width], weights [rows, width], [R] or [rows] without columns. slopes: gradients of
    outputs, by output. dtypes: of the tensors.
    """
    given = {n: _exact(t) for n, t in tensors.items()} | {f"d_{n}": _exact(t) for n, t in slopes.items()}
    rows = len(tensors[plan.first])
    found: dict[str, Bound] = {}
    for kernel in (plan.forward, *plan.backward):
        made = _run(plan, kernel, {**given, **found}, rows, dtypes)
        for name, bound in made.items():  # several views of one tensor are written one after another
            old = found.get(name)
            found[name] = bound if old is None else Bound(old.value + bound.value, old.error + bound.error)
    for g in plan.gradients:
        if g.divide > 1:
            found[f"d_{g.of}"] = _rounded(_spread(found[f"{g.name}_rows"], g.divide), dtypes[g.of])
        elif g.name not in found:  # the gradient of an output, in the dtype of the input
            found[f"d_{g.of}"] = _rounded(given[g.name], dtypes[g.of])
    return found | {f"d_{g.of}": found[g.name] for g in plan.gradients if g.name in found and g.divide == 1}


def _spread(x: Bound, divide: int) -> Bound:
    """The sum of so many rows one behind the other."""
    value, error, size = (t.reshape(-1, divide, *t.shape[1:]) for t in (x.value, x.error, x.value.abs()))
    return Bound(value.sum(1), error.sum(1) + (math.log2(divide) + 3) * UNIT * size.sum(1))


def _exact(x: Tensor) -> Bound:
    """In fp64, or int64 where it is whole numbers."""
    return Bound(x.double() if x.is_floating_point() else x.long(), torch.zeros(x.shape, dtype=torch.float64))


def _run(
    plan: Plan, kernel: Kernel, given: Mapping[str, Bound], rows: int, dtypes: Mapping[str, torch.dtype]
) -> dict[str, Bound]:
    columns = plan.chain.columns
    values: dict[Expr, Bound] = {}
    for e in ordered(kernel.values):
        values[e] = _of(e, values, given, rows, columns)
    made: dict[str, Bound] = {}
    given_back = [(s.name, _stored(s, values[s.value], rows, columns, dtypes)) for s in kernel.stores]
    given_back += [(f"d_{s.of}", _summed(s, values[s.value], rows, columns, dtypes)) for s in kernel.sums]
    for name, bound in given_back:
        old = made.get(name)
        made[name] = bound if old is None else Bound(old.value + bound.value, old.error + bound.error)
    return made


def _of(e: Expr, values: Mapping[Expr, Bound], given: Mapping[str, Bound], rows: int, columns: int) -> Bound:
    if e.op == "load":
        return Bound(_read(given[e.name].value, e, rows, columns), _read(given[e.name].error, e, rows, columns))
    if e.op == "number":
        value = torch.full((1, 1), e.value, dtype=torch.float64)
        return Bound(value, value.abs() * UNIT)
    if e.op in ("sum", "max_over"):
        (x,) = (values[a] for a in e.args)
        if e.op == "max_over":
            return Bound(x.value.amax(-1, True), x.error.amax(-1, True))
        depth = math.log2(max(1, x.value.shape[-1])) + 3
        return Bound(x.value.sum(-1, True), x.error.sum(-1, True) + depth * UNIT * x.value.abs().sum(-1, True))
    op = TABLE[e.op]
    args = [values[a] for a in e.args]
    if e.op == "dropped":
        x, drawn = args
        some = passes(mixed(drawn.value + torch.arange(columns) * STEP), e.least)
        size = (x.value * e.scale).abs()
        return Bound(torch.where(some, x.value * e.scale, 0), torch.where(some, x.error * e.scale + 2 * UNIT * size, 0))
    y = getattr(_NUMBERS, e.op)(*(a.value for a in args), **dict(e.attrs))
    if op.is_mask:
        return Bound(y, torch.zeros(y.shape, dtype=torch.float64))
    error = op.error * UNIT * y.abs() + (LEAST if op.error else 0.0)
    slopes = op.slopes(_NUMBERS, y, torch.ones_like(y), *(a.value for a in args))
    for a, slope in zip(args, slopes, strict=True):
        if slope is None:
            continue
        # A function of hardware reduces its operand first, which rounds it: e^x is 2^(x log2 e).
        own = UNIT * a.value.abs() if op.binds == CALL and op.error else 0.0
        moved = (slope * (a.error + own)).nan_to_num(0.0).abs()
        # No slope bounds a root near 0; the root of the change does.
        error = error + (torch.minimum(moved, (a.error + own).sqrt()) if e.op == "sqrt" else moved)
    return Bound(y, error)


def _read(x: Tensor, e: Expr, rows: int, columns: int) -> Tensor:
    """As a kernel sees it: [R or 1, C or 1]."""
    view = e.view
    wide = "c" in e.dims
    if x.dim() < 2:
        x = x.reshape(-1, 1) if "r" in e.dims or view.modulo is not None else x.reshape(1, -1)
    x = x[:, view.start : view.start + columns] if wide else x[:, :1]
    if view.divide > 1 or view.modulo is not None:
        at = torch.arange(rows) // view.divide
        x = x[at if view.modulo is None else at % view.modulo]
    return x


def _rounded(x: Bound, dtype: torch.dtype) -> Bound:
    """Stored in a dtype."""
    kind = torch.finfo(dtype)
    least = kind.smallest_normal * kind.eps
    return Bound(x.value, x.error + kind.eps / 2 * (x.value.abs() + x.error) + least)


def _stored(s: Store, x: Bound, rows: int, columns: int, dtypes: Mapping[str, torch.dtype]) -> Bound:
    """In its tensor's columns; others are 0."""
    x = _rounded(x, dtypes[s.like] if s.like is not None else torch.float32)
    if s.dims == "r":
        return Bound(x.value.expand(rows, 1)[:, 0], x.error.expand(rows, 1)[:, 0])
    return _placed(s.view, Bound(x.value.expand(rows, columns), x.error.expand(rows, columns)), columns)


def _placed(view: View, x: Bound, columns: int) -> Bound:
    width = view.width or columns
    value, error = (torch.zeros(len(t), width, dtype=torch.float64) for t in (x.value, x.error))
    value[:, view.start : view.start + columns] = x.value
    error[:, view.start : view.start + columns] = x.error
    return Bound(value, error)


def _summed(s: Sum, x: Bound, rows: int, columns: int, dtypes: Mapping[str, torch.dtype]) -> Bound:
    """Over the rows that read a row of the weight, at worst one after another."""
    wide = columns if s.dims == "c" else 1
    value, error = (t.expand(rows, wide) for t in (x.value, x.error))
    count = s.view.modulo or 1
    at = torch.arange(rows) // s.view.divide % count
    shape = (count, wide)
    total, summed = (torch.zeros(shape, dtype=torch.float64).index_add_(0, at, t) for t in (value, error))
    summed += (rows + 3) * UNIT * torch.zeros(shape, dtype=torch.float64).index_add_(0, at, value.abs())
    return _placed(s.view if s.dims == "c" else View(), _rounded(Bound(total, summed), dtypes[s.of]), wide)
