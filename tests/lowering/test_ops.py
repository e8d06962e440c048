"""Every op keeps what its room declares: its reference, its type rule, its roles, its monoid, its linear groups.

A law is one test, for all ops whose declaration calls for it (design page, section 1: everything is a property of a
named dim). The code under test is what `cpu.py` prints, run with `runtime.lib`; the truth is `reference.py` in fp64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import reduce
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from heddle.lowering.op import Op
from heddle.lowering.ops import part, rooms, table
from heddle.runtime import lib

from .cases import SMALL, Case, Tensors, cuts, draw_case, draw_document, draw_tensors, run
from .references import FORWARD, MONOIDS, Partial, reference

OPS = sorted(table())
EPS = torch.finfo(torch.float64).eps
# torch's softplus is x itself above 20 (its default threshold), which leaves out log(1 + exp(-20)).
LEFT_OUT = {"softplus": math.exp(-20)}
# Rotations are by constants: the library gives no gradient to their cosines and sines, and says so.
WITHOUT_GRADIENT = {("rotate", "cos"), ("rotate", "sin")}


def law(examples: int) -> Callable[[Any], Any]:
    return settings(max_examples=examples, deadline=None)


def rounding(case: Case, tensors: Tensors, *results: Tensor) -> float:
    """A bound of the rounding in results and gradients: no result sums more products than there are numbers, each
    product at most that of the largest of each operand; 8 rounded operations for each."""
    numbers = sum(x.numel() for x in tensors.values()) + sum(y.numel() for y in results)
    most = math.prod(max(1.0, _most([x])) for x in tensors.values() if x.is_floating_point())
    return 8 * numbers * EPS * most * max(1.0, _most(results))


def _most(tensors: Iterable[Tensor]) -> float:
    """The largest finite magnitude."""
    return max((float(x.detach().double().abs().nan_to_num(0, 0, 0).max()) for x in tensors if x.numel()), default=0.0)


def agree(found: Iterable[Tensor], wanted: Iterable[Tensor], bound: float) -> None:
    for a, b in zip(found, wanted, strict=True):
        assert a.shape == b.shape
        a, b = a.double(), b.double()
        assert bool(((a == b) | ((a - b).abs() <= bound)).all()), f"off by {(a - b).abs().max():.1e}, bound {bound:.1e}"


def ask_gradients(case: Case, tensors: Tensors) -> list[Tensor]:
    """Operands that gradients are asked of, as leaves."""
    wanted = [a.name for a in case.given if a.kind == "real" and (case.name, a.operand) not in WITHOUT_GRADIENT]
    return [tensors[name].requires_grad_() for name in wanted]


def with_roles(*roles: str) -> list[tuple[str, str]]:
    """(op, formal) for every formal whose strongest role is one of these; `*` stands for leading dims, parallel."""
    found = []
    for name, op in sorted(table().items()):
        for formal in op.signature.formals():
            if op.signature.role(formal) in roles:
                found.append((name, formal))
        if "parallel" in roles and any(o.leading for o in op.signature.operands):
            found.append((name, "*"))
    return found


# --- coverage, meaning, types ---------------------------------------------------------------------


def test_every_op_and_every_monoid_has_a_reference():
    assert set(FORWARD) == set(table())
    assert set(MONOIDS) == {name for name, op in table().items() if op.monoid}
    for room in rooms():
        assert part(next(n for n in OPS if part(n, "cpu").__name__.endswith(f".{room}.cpu")), "reference")


@pytest.mark.parametrize("name", OPS)
@law(12)
@given(st.data())
def test_cpu_code_is_the_reference_and_so_are_gradients(name, data):
    """Packed documents included; the reference computes each document alone."""
    case = draw_case(data.draw, name, joined=True)
    tensors, document = draw_tensors(data.draw, case), draw_document(data.draw, case)
    if name != "ssd":
        large = data.draw(st.sampled_from((1, 1, 30)))
        tensors = {k: x * large if x.is_floating_point() else x for k, x in tensors.items()}
    leaves = ask_gradients(case, tensors)
    found, wanted = run(case, tensors, document), reference(case, tensors, document)
    spare = LEFT_OUT.get(name, 0.0)
    agree(found, wanted, rounding(case, tensors, *wanted) + spare)
    if not leaves:
        return
    up = [torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=y.dtype) for y in wanted]
    ours, theirs = (torch.autograd.grad(ys, leaves, up) for ys in (found, wanted))
    agree(ours, theirs, rounding(case, tensors, *wanted, *theirs, *up) + spare * _most(up))


@pytest.mark.parametrize("name", [n for n in OPS if any("real" in table()[n].operand_kinds.get(o.name, ("real",))
                                                        for o in table()[n].signature.operands)])  # fmt: skip
@law(2)
@given(st.data())
def test_gradients_are_differences(name, data):
    """torch.autograd.gradcheck: the backward pass against finite differences of the forward pass."""
    case = draw_case(data.draw, name, SMALL)
    assume(sum(math.prod(case.shape(a.dims)) for a in case.given) <= 60)
    tensors, document = draw_tensors(data.draw, case), draw_document(data.draw, case)
    leaves = ask_gradients(case, tensors)
    names = [k for k, x in tensors.items() if x.requires_grad]
    assert torch.autograd.gradcheck(lambda *xs: run(case, tensors | dict(zip(names, xs, strict=True)), document), leaves)


@pytest.mark.parametrize("name", OPS)
@law(12)
@given(st.data())
def test_types_are_the_shapes_of_results(name, data):
    """What inference says of a use is what its code gives: number, shapes and kinds of the results."""
    case = draw_case(data.draw, name, joined=True)
    found = run(case, draw_tensors(data.draw, case), draw_document(data.draw, case))
    assert [tuple(y.shape) for y in found] == [case.shape(dims) for dims in case.results]
    kinds = [r.type.kind for r in case.graph.nodes[0].results]
    assert [y.is_floating_point() for y in found] == [kind in ("real", "loss") for kind in kinds]


# --- roles ----------------------------------------------------------------------------------------


def narrowed(case: Case, tensors: Tensors, document: Tensor | None, dim: str, start: int, end: int) -> tuple[Any, ...]:
    """The same use of rows start..end of a dim, and of the same share of dims that are a multiple of it."""
    shares = {dim: (start, end)}
    for many, few in case.tied.items():
        if few == dim:
            each = case.size(many) // case.size(few)
            shares[many] = (start * each, end * each)
    small = case.resized(**{d: e - s for d, (s, e) in shares.items()})
    cut = {}
    for a in case.given:
        x = tensors[a.name]
        for d, (s, e) in shares.items():
            x = x.narrow(a.dims.index(d), s, e - s) if d in a.dims else x
        cut[a.name] = x
    if document is not None:
        for axis, d in enumerate((case.lead[0], case.sequence)):
            document = document.narrow(axis, *(start, end - start)) if d == dim else document
    return small, cut, document


def joined(case: Case, dim: str, parts: list[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """Results of the parts side by side along the dim; summed where a result lacks it."""
    owners = [next((d for d in (dim, *(m for m, few in case.tied.items() if few == dim)) if d in r), None) for r in case.results]
    columns = zip(owners, case.results, zip(*parts, strict=True), strict=True)
    return tuple(sum(ys) if d is None else torch.cat(ys, r.index(d)) for d, r, ys in columns)


def pick(draw: Any, case: Case, formal: str) -> str:
    """One of the dims that a formal stands for in this case."""
    dims = tuple(d for d in case.dims_of(formal) if d not in case.sums)
    assume(dims)
    return draw(st.sampled_from(dims))


def along_sequence(op: Op, formal: str) -> bool:
    """Whether the formal is the sequence of an op that reads coordinates: another law speaks of it."""
    return op.coordinates and formal in ("S", "Q")


# The channels of `parallel_conv` stand side by side in its input, so no one dim of it can be cut; that it is
# `causal_conv` for each part is its reference. Channels that a rotation pairs are cut together, in `test_rotate`.
NOT_CUT = {("parallel_conv", "C")}


@pytest.mark.parametrize(("name", "formal"), [
    (n, f) for n, f in with_roles("parallel")
    if f not in table()[n].index and not along_sequence(table()[n], f) and (n, f) not in NOT_CUT
])  # fmt: skip
@law(8)
@given(st.data())
def test_parallel_dims_are_mapped_over(name, formal, data):
    """Role parallel: split, apply, lay side by side is to apply. A result without the dim is the sum of the parts."""
    case = draw_case(data.draw, name)
    dim = pick(data.draw, case, formal)
    if dim in case.tied and case.size(case.tied[dim]) > 1:
        case = case.resized(**{case.tied[dim]: 1})
    tensors, document = draw_tensors(data.draw, case), draw_document(data.draw, case)
    parts = [run(*narrowed(case, tensors, document, dim, s, e)) for s, e in cuts(data.draw, case.size(dim))]
    whole = run(case, tensors, document)
    agree(joined(case, dim, parts), whole, rounding(case, tensors, *whole))


def carriers(case: Case, dim: str) -> set[str]:
    return {a.operand for a in case.given if dim in a.dims}


def added_once(op: Op, carried: set[str]) -> set[str]:
    """Operands that the op is jointly linear in with some that carry a dim, though they do not: a bias counts once."""
    return {o for group in op.linear if carried & set(group) for o in group} - carried


def is_sum(op: Op, formal: str) -> bool:
    """Whether results of parts of a contracted dim add up: no other monoid is declared, and the op is linear in what
    carries the dim."""
    carried = {o.name for o in op.signature.operands if any(f.name == formal for f in o.formals)}
    return not (op.monoid and op.monoid.formal == formal) and any(carried & set(group) for group in op.linear)


@pytest.mark.parametrize(("name", "formal"), [(n, f) for n, f in with_roles("contract") if is_sum(table()[n], f)])
@law(8)
@given(st.data())
def test_contracted_dims_are_summed(name, formal, data):
    """Role contract: results of the parts add up to the whole. A dim whose global index is read is cut by zeros."""
    case = draw_case(data.draw, name)
    dim = pick(data.draw, case, formal)
    tensors, document = draw_tensors(data.draw, case), draw_document(data.draw, case)
    once = added_once(case.op, carriers(case, dim))
    whole, parts = run(case, tensors, document), []
    for s, e in cuts(data.draw, case.size(dim)):
        if formal in case.op.index:
            small, cut, rows = case, zeroed(case, tensors, dim, s, e), document
        else:
            small, cut, rows = narrowed(case, tensors, document, dim, s, e)
        if s:
            cut |= {a.name: torch.zeros_like(cut[a.name]) for a in case.given if a.operand in once}
        parts.append(run(small, cut, rows))
    agree([sum(ys) for ys in zip(*parts, strict=True)], whole, rounding(case, tensors, *whole))


def zeroed(case: Case, tensors: Tensors, dim: str, start: int, end: int) -> Tensors:
    """Operands that carry the dim are 0 outside of start..end."""
    found = {}
    for a in case.given:
        x = tensors[a.name]
        if dim in a.dims:
            axis = a.dims.index(dim)
            parts = list(x.split([start, end - start, x.shape[axis] - end], axis))
            x = torch.cat([torch.zeros_like(parts[0]), parts[1], torch.zeros_like(parts[2])], axis)
        found[a.name] = x
    return found


@pytest.mark.parametrize(("name", "formal"), [
    (n, f) for n, f in with_roles("contract")
    if not (table()[n].monoid and table()[n].monoid.formal == f) and f not in table()[n].index
])  # fmt: skip
@law(6)
@given(st.data())
def test_zeros_contribute_nothing_to_a_contraction(name, formal, data):
    """Role contract: 0 is the identity of a sum, also of one that is not the op's last step (scores of attention)."""
    case = draw_case(data.draw, name)
    dim = pick(data.draw, case, formal)
    if name == "attend" and case.attr("scale") is None:
        case = Case(**{**vars_of(case), "attrs": (*case.attrs, ("scale", 0.5))})
    more = data.draw(st.integers(1, 3))
    tensors, document = draw_tensors(data.draw, case), draw_document(data.draw, case)
    padded = {}
    for a in case.given:
        x = tensors[a.name]
        zeros = [x.new_zeros([more if d == dim else case.size(d) for d in a.dims])] if dim in a.dims else []
        padded[a.name] = torch.cat([x, *zeros], a.dims.index(dim)) if zeros else x
    whole = run(case, tensors, document)
    agree(run(case.resized(**{dim: case.size(dim) + more}), padded, document), whole, rounding(case, tensors, *whole))


def vars_of(case: Case) -> dict[str, Any]:
    return {f: getattr(case, f) for f in case.__dataclass_fields__}


@pytest.mark.parametrize(("name", "formal"), with_roles("window"))
@law(10)
@given(st.data())
def test_windows_read_their_neighbours_only(name, formal, data):
    """Role window: with as many neighbours as the op reads, a part of the dim gives its part of the result."""
    case = draw_case(data.draw, name)
    dim = pick(data.draw, case, formal)
    tensors, document = draw_tensors(data.draw, case), draw_document(data.draw, case)
    behind, ahead = case.reach
    size, parts = case.size(dim), []
    for s, e in cuts(data.draw, size):
        low, high = max(0, s - behind), min(size, e + ahead)
        near = run(*narrowed(case, tensors, document, dim, low, high))
        parts.append(tuple(y.narrow(r.index(dim), s - low, e - s) for y, r in zip(near, case.results, strict=True)))
    whole = run(case, tensors, document)
    agree(joined(case, dim, parts), whole, rounding(case, tensors, *whole))


STREAMED = [n for n in OPS if table()[n].monoid and hasattr(part(n, "cpu"), "slot")]


@pytest.mark.parametrize("name", STREAMED)
@law(12)
@given(st.data())
def test_state_is_handed_from_part_to_part(name, data):
    """Roles scan, window and attend along a stream: parts in order, each behind the state of those before it, give the
    whole; the state is what the stream pass derives from the monoid."""
    assert table()[name].monoid.peers in ("earlier", "neighbours", "masked")
    case = draw_case(data.draw, name)
    assume(name != "attend" or len(case.attr("masks")) == 1)
    ahead = [run_ahead(case)]
    assume(not any(ahead))
    tensors = draw_tensors(data.draw, case)
    size, batch = case.size(case.sequence), case.size(case.lead[0])
    back = data.draw(st.integers(0, 2))
    stream = lib.Stream(SimpleNamespace(slots=lambda s: eval(case.emitted.slot, {"lib": lib, "stream": s})),
                        batch, size, rollback=back, dtype=torch.float64)  # fmt: skip
    parts = []
    with torch.no_grad():
        whole = run(case, tensors)
        for s, e in cuts(data.draw, size):
            small, cut, _ = narrowed(case, tensors, None, case.sequence, s, e)
            at = stream.begin(e - s)
            parts.append(run(small, cut, at=at, state=stream.state))
            stream.commit(at)
    agree(joined(case, case.sequence, parts), whole, rounding(case, tensors, *whole))


def run_ahead(case: Case) -> bool:
    """Whether a row reads later rows, so that no stream can give it in time."""
    from heddle.lowering.passes.stream import _late

    return bool(_late(case.graph, case.graph.nodes[0]))


# --- index ----------------------------------------------------------------------------------------


def test_indexes_are_shifted():
    """Formals in `index` read the global index: a part knows its offset. Here: an index, and a table split by rows."""


# --- linear groups --------------------------------------------------------------------------------


def mixed(case: Case, data: Any, group: Iterable[str]) -> tuple[list[Tensors], tuple[float, float], Any]:
    """Operands twice, equal outside the group, and a combination of both."""
    x, document = draw_tensors(data.draw, case), draw_document(data.draw, case)
    other = draw_tensors(data.draw, case)
    in_group = {a.name for a in case.given if a.operand in group}
    y = {k: other[k] if k in in_group else v for k, v in x.items()}
    a, b = data.draw(st.sampled_from(((1.0, 1.0), (-2.0, 0.5), (0.0, 3.0))))
    both = {k: a * x[k] + b * y[k] if k in in_group else v for k, v in x.items()}
    return [x, y, both], (a, b), document


@pytest.mark.parametrize(("name", "group"), [(n, g) for n in OPS for g in table()[n].linear])
@law(8)
@given(st.data())
def test_declared_groups_are_jointly_linear(name, group, data):
    """f(a x + b y) = a f(x) + b f(y), x and y all operands of the group at once."""
    case = draw_case(data.draw, name)
    assume({a.operand for a in case.given} & set(group))
    # A number in place of a tensor of the group is the same in x and y, and so no part of a combination.
    assume(not any(arg is None and o.name in group and case.attr(o.name) is not None and name in ("add", "sub")
                   for arg, o in zip(case.args, case.op.signature.operands, strict=False)))  # fmt: skip
    (x, y, both), (a, b), document = mixed(case, data, group)
    fx, fy, f = (run(case, t, document) for t in (x, y, both))
    bound = rounding(case, both, *fx, *fy, *f) * max(1, abs(a), abs(b)) * max(1.0, _most(x.values()), _most(y.values()))
    agree(f, [a * p + b * q for p, q in zip(fx, fy, strict=True)], bound)


# --- monoids --------------------------------------------------------------------------------------


def drawn_monoid(data: Any, name: str) -> tuple[Case, Tensors, Tensor | None, Partial]:
    case = draw_case(data.draw, name)
    tensors = draw_tensors(data.draw, case)
    # The rows of a window know no documents; where they are cut is the law of the CPU code above.
    document = None if table()[name].monoid.peers == "neighbours" else draw_document(data.draw, case)
    from .references import flat

    return case, tensors, document, MONOIDS[name](case, flat(case, tensors), document)


@pytest.mark.parametrize("name", sorted(MONOIDS))
@law(12)
@given(st.data())
def test_parts_combine_to_the_whole(name, data):
    """lift, combine and finish of the reference on parts of the marked dim are what the CPU code gives for all of it."""
    case, tensors, document, m = drawn_monoid(data, name)
    whole = run(case, tensors, document)
    parts = cuts(data.draw, m.width)
    if case.op.monoid.peers in ("all", "masked"):
        order = data.draw(st.permutations(parts))
        state = reduce(m.combine, [m.lift(s, e) for s, e in order], m.identity)
        made = [m.finish(state, s, e) for s, e in (parts if m.axis is not None else parts[:1])]
    else:
        state, made = m.identity, []
        for s, e in parts:
            made.append(m.finish(state, s, e))
            state = m.combine(state, m.lift(s, e))
    y = made[0] if m.axis is None else torch.cat(made, m.axis)
    wanted = torch.cat([w.flatten(2) for w in whole], -1) if name == "parallel_conv" else whole[0]
    agree([y.reshape(wanted.shape)], [wanted], rounding(case, tensors, *whole))


@pytest.mark.parametrize("name", sorted(MONOIDS))
@law(10)
@given(st.data())
def test_monoids_are_monoids(name, data):
    """(a b) c = a (b c), 1 a = a = a 1, and a b = b a where every peer contributes, in whatever order."""
    case, tensors, _, m = drawn_monoid(data, name)
    monoid = case.op.monoid
    assert len(m.identity) == len(monoid.state)
    bounds = cuts(data.draw, m.width)
    states = [m.lift(*data.draw(st.sampled_from(bounds))) for _ in range(3)]
    a, b, c = states
    bound = rounding(case, tensors, *(x for s in states for x in s))
    agree(m.combine(m.combine(a, b), c), m.combine(a, m.combine(b, c)), bound)
    agree(m.combine(m.identity, a), a, bound)
    agree(m.combine(a, m.identity), a, bound)
    if monoid.peers in ("all", "masked"):
        agree(m.combine(a, b), m.combine(b, a), bound)
