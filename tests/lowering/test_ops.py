"""Every op keeps what its room declares: its reference, its type rule, its roles, its monoid, its linear groups.

A law is one test, for all ops whose declaration calls for it (design page, section 1: everything is a property of a
named dim). The code under test is what `cpu.py` prints, run with `runtime.lib`; the truth is `reference.py` in fp64.
"""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import reduce
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import Phase, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from heddle.codegen.shared import Shared
from heddle.codegen.writer import Writer
from heddle.dsl.diagnostics import SpecError
from heddle.dsl.program import Body, Dim, Node, Type, Value
from heddle.lowering.graph import Graph
from heddle.lowering.op import Monoid, Op
from heddle.lowering.ops import part, rooms
from heddle.lowering.ops import table as all_ops
from heddle.lowering.ops.pointwise.op import BINARY, COMPARE, LOGIC, UNARY
from heddle.lowering.passes.stream import streaming_errors
from heddle.runtime import lib
from heddle.runtime.lib.chance import state_of
from heddle.runtime.lib.dropping import further, kept

from .cases import (
    APART,
    MASKS,
    POINTWISE,
    SMALL,
    Arg,
    Case,
    Tensors,
    cuts,
    draw_case,
    draw_document,
    draw_tensors,
    program_of,
    run,
)
from .references import FORWARD, MONOIDS, Partial, attend_of, flat, reference, steepness


def table() -> dict[str, Op]:
    """The ops that cases can be drawn of."""
    return {name: op for name, op in all_ops().items() if name not in APART}


OPS = sorted(table())
EPS = torch.finfo(torch.float64).eps
# torch's softplus is x itself above 20 (its default threshold), which leaves out log(1 + exp(-20)).
LEFT_OUT = {"softplus": math.exp(-20)}
# What rounds or chooses is flat.
WITHOUT_GRADIENT = {
    ("floordiv", "x"),
    ("floordiv", "y"),
    ("sign", "x"),
    ("constant", "x"),
    ("top_k", "x"),
    ("row_max", "logits"),
    *((name, n) for name in COMPARE for n in "xy"),
}


# Decays are exponentials of exponentials of what they are given.
SCANS = ("ssd", "ssd_leave", "ssd_inside", "ssd_behind")


def law(examples: int) -> Callable[[Any], Any]:
    """`make soak` draws more."""
    return settings(max_examples=examples * max(1, settings.default.max_examples // 100), deadline=None)


def rounding(case: Case, tensors: Tensors, *results: Tensor) -> float:
    """A bound of the rounding in results and gradients: no result sums more products than there are numbers, each
    product at most that of the largest of each operand; 8 rounded operations for each. A norm divides by its
    deviation, its gradient twice."""
    numbers = sum(x.numel() for x in tensors.values()) + sum(y.numel() for y in results)
    most = math.prod(max(1.0, _most([x])) for x in tensors.values() if x.is_floating_point())
    return 8 * numbers * EPS * most * max(1.0, _most(results)) * steepness(case, tensors) ** 2


def _most(tensors: Iterable[Tensor]) -> float:
    """The largest finite magnitude."""
    return max((float(x.detach().double().abs().nan_to_num(0, 0, 0).max()) for x in tensors if x.numel()), default=0.0)


def agree(found: Iterable[Tensor], wanted: Iterable[Tensor], bound: float) -> None:
    for a, b in zip(found, wanted, strict=True):
        assert a.shape == b.shape
        # Of masks there are results in fp32.
        near = bound * (torch.finfo(torch.float32).eps / EPS if torch.float32 in (a.dtype, b.dtype) else 1)
        a, b = a.double(), b.double()
        assert bool(((a == b) | ((a - b).abs() <= near)).all()), f"off by {(a - b).abs().max():.1e}, bound {near:.1e}"


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
    for room in (r for r in rooms() if r not in APART):
        assert part(next(n for n in OPS if part(n, "cpu").__name__.endswith(f".{room}.cpu")), "reference")


@pytest.mark.parametrize("name", OPS)
@law(12)
@given(st.data())
def test_cpu_code_is_the_reference_and_so_are_gradients(name, data):
    """Packed documents included; the reference computes each document alone."""
    case = draw_case(data.draw, name, joined=True)
    tensors, document = draw_tensors(data.draw, case), draw_document(data.draw, case)
    if name not in SCANS:
        large = data.draw(st.sampled_from((1, 1, 30)))
        tensors = {k: x * large if x.is_floating_point() else x for k, x in tensors.items()}
    leaves = ask_gradients(case, tensors)
    found, wanted = run(case, tensors, document), reference(case, tensors, document)
    spare = LEFT_OUT.get(name, 0.0)
    agree(found, wanted, rounding(case, tensors, *wanted) + spare)
    if not leaves:
        return
    up = [torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=y.dtype) for y in wanted]
    ours, theirs = (torch.autograd.grad(ys, leaves, up, materialize_grads=True) for ys in (found, wanted))
    agree(ours, theirs, rounding(case, tensors, *wanted, *theirs, *up) + spare * _most(up))


def has_gradient(name: str) -> bool:
    op = table()[name]
    real = [o.name for o in op.signature.operands if "real" in op.operand_kinds.get(o.name, ("real",))]
    return any((name, o) not in WITHOUT_GRADIENT for o in real)


@pytest.mark.parametrize("name", [n for n in OPS if has_gradient(n)])
@law(2)
@given(st.data())
def test_gradients_are_differences(name, data):
    """torch.autograd.gradcheck: the backward pass against finite differences of the forward pass."""
    case = draw_case(data.draw, name, SMALL)
    assume(sum(math.prod(case.shape(a.dims)) for a in case.given) <= 60)
    tensors, document = draw_tensors(data.draw, case), draw_document(data.draw, case)
    leaves = ask_gradients(case, tensors)
    assume(leaves)
    names = [k for k, x in tensors.items() if x.requires_grad]
    assert torch.autograd.gradcheck(
        lambda *xs: run(case, tensors | dict(zip(names, xs, strict=True)), document), leaves
    )


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
    """Results of the parts side by side along the dim; summed where no result has it, else untouched by it."""
    along = (dim, *(many for many, few in case.tied.items() if few == dim))
    owners = [next((d for d in along if d in r), None) for r in case.results]
    lacks = torch.add if not any(owners) else lambda a, b: a
    columns = zip(owners, case.results, zip(*parts, strict=True), strict=True)
    return tuple(reduce(lacks, ys) if d is None else torch.cat(ys, r.index(d)) for d, r, ys in columns)


def pick(draw: Any, case: Case, formal: str) -> str:
    """One of the dims that a formal stands for in this case."""
    dims = tuple(d for d in case.dims_of(formal) if d not in case.sums)
    assume(dims)
    return draw(st.sampled_from(dims))


def along_sequence(op: Op, formal: str) -> bool:
    """Whether the formal is the sequence of an op that reads coordinates: another law speaks of it."""
    return op.coordinates and formal in ("S", "Q")


# The channels of `parallel_conv` stand side by side in its input, so no one dim of it can be cut; that it is
# `causal_conv` for each part is its reference. A rotation couples channel j with j + pairs: no role says that, so
# `test_rotations_turn_each_pair_alone` says what holds. A merged dim of parts is no part of the merged dim.
NOT_CUT = {
    ("reshape", "A"),
    ("reshape", "B"),
    ("concat", "A"),
    ("concat", "B"),
    ("concat", "C"),
    ("attend", "N"),
    ("attend_ring", "N"),
    ("parallel_conv", "C"),
    ("rotate", "D"),
    ("rotate", "R"),
    # Rows that stand before others are no part of the result; runs that are made are no dim of an operand.
    ("conv_behind", "B"),
    ("rows_before", "B"),
    ("group_squares", "G"),
}


@pytest.mark.parametrize(
    ("name", "formal"),
    [
        (n, f)
        for n, f in with_roles("parallel")
        if f not in (*table()[n].index, *table()[n].rigid)
        and not along_sequence(table()[n], f)
        and (n, f) not in NOT_CUT
    ],
)
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
    return not (op.hands_over or op.monoid and op.monoid.formal == formal) and any(carried & set(group) for group in op.linear)


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


@pytest.mark.parametrize(
    ("name", "formal"),
    [
        (n, f)
        for n, f in with_roles("contract")
        if not (table()[n].monoid and table()[n].monoid.formal == f)
        and not table()[n].hands_over
        and f not in table()[n].index
    ],
)
@law(6)
@given(st.data())
def test_zeros_contribute_nothing_to_a_contraction(name, formal, data):
    """Role contract: 0 is the identity of a sum, also of one that is not the op's last step (scores of attention)."""
    case = draw_case(data.draw, name)
    dim = pick(data.draw, case, formal)
    if name.startswith("attend") and case.attr("scale") is None:
        case = replace(case, attrs=(*case.attrs, ("scale", 0.5)))
    more = data.draw(st.integers(1, 3))
    tensors, document = draw_tensors(data.draw, case), draw_document(data.draw, case)
    padded = {}
    for a in case.given:
        x = tensors[a.name]
        zeros = [x.new_zeros([more if d == dim else case.size(d) for d in a.dims])] if dim in a.dims else []
        padded[a.name] = torch.cat([x, *zeros], a.dims.index(dim)) if zeros else x
    whole = run(case, tensors, document)
    agree(run(case.resized(**{dim: case.size(dim) + more}), padded, document), whole, rounding(case, tensors, *whole))


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
    assume(not name.startswith("attend") or len(case.attr("masks")) == 1)
    assume(not streaming_errors(replace(case.program, program=replace(case.program.program, root="case"))))
    tensors = draw_tensors(data.draw, case)
    size, batch = case.size(case.sequence), case.size(case.lead[0])
    back = data.draw(st.integers(0, 2))
    stream = lib.Stream(
        SimpleNamespace(slots=lambda s: eval(case.emitted.slot, {"lib": lib, "stream": s})),
        batch,
        size,
        rollback=back,
        dtype=torch.float64,
    )
    parts = []
    with torch.no_grad():
        whole = run(case, tensors)
        for s, e in cuts(data.draw, size):
            small, cut, _ = narrowed(case, tensors, None, case.sequence, s, e)
            at = stream.begin(e - s)
            parts.append(run(small, cut, at=at, state=stream.state))
            stream.commit(at)
    agree(joined(case, case.sequence, parts), whole, rounding(case, tensors, *whole))


# --- what is particular to one declaration --------------------------------------------------------


@law(20)
@given(st.data())
def test_parts_of_a_dim_with_an_index_know_their_offset(data):
    """Formals in `index`, where a part is a part of the index itself: rows of a table, columns of a product, an index.
    (The offsets of classes and of taps are in the laws of their monoid and their contraction.)"""
    for name, formal in (("embed", "V"), ("linear", "K")):
        case = draw_case(data.draw, name)
        case = replace(case, args=tuple(None if a is None or a.operand == "bias" else a for a in case.args))
        tensors = draw_tensors(data.draw, case)
        (x, weight), whole = list(flat(case, tensors).values())[:2], run(case, tensors)[0]
        partial = part(name, "reference").partial
        if name == "embed":
            parts = [partial(x, weight[s:e], s) for s, e in cuts(data.draw, len(weight))]
        else:
            parts = [partial(x[..., s:e], weight[:, s:e]) for s, e in cuts(data.draw, weight.shape[1])]
        agree([sum(parts).reshape(whole.shape)], [whole], rounding(case, tensors, whole))
        assert formal == "K" or formal in case.op.index
    case = draw_case(data.draw, "index")
    (whole,) = run(case, {})
    parts = [run(case.resized(d=e - s), {})[0] + s for s, e in cuts(data.draw, case.size("d"))]
    assert torch.equal(torch.cat(parts), whole)
    assert "D" in case.op.index


@law(10)
@given(st.data())
def test_rotations_turn_each_pair_alone(data):
    """Channels j and j + pairs may be cut out together with their angle (Su et al. 2021, eq. 15: blocks of two)."""
    case = draw_case(data.draw, "rotate")
    tensors, pairs = draw_tensors(data.draw, case), case.size("r")
    (whole,) = run(case, tensors)
    rest = tensors["x"][..., 2 * pairs :]
    for s, e in cuts(data.draw, pairs):
        rows = [*range(s, e), *range(pairs + s, pairs + e)]
        cut = {"x": tensors["x"][..., rows], "cos": tensors["cos"][..., s:e], "sin": tensors["sin"][..., s:e]}
        (some,) = run(case.resized(d=len(rows), r=e - s), cut)
        agree([whole[..., rows]], [some], rounding(case, tensors, whole))
    assert torch.equal(whole[..., 2 * pairs :], rest)


def test_angles_have_no_leading_dim_of_their_own():
    """They may lack some of what they turn, which is drawn."""
    angles = [Arg(n, n, ("own", "s", "r"), ("*", "S", "R")) for n in ("cos", "sin")]
    x = Arg("x", "x", ("batch", "s", "h", "d"), ("*", "S", "H", "D"))
    case = Case("rotate", {"batch": 2, "own": 2, "s": 3, "h": 2, "d": 4, "r": 2}, (x, *angles))
    with pytest.raises(SpecError) as caught:
        case.graph  # noqa: B018
    assert [d.code for d in caught.value.diagnostics] == ["dim-mismatch"]


@law(10)
@given(st.data())
def test_dropout_in_training_keeps_or_zeroes(data):
    """In training the result is the reference of some choice of what is kept, and so is the gradient."""
    case = draw_case(data.draw, "dropout")
    tensors, rate = draw_tensors(data.draw, case), case.attr("rate")
    (x,) = ask_gradients(case, tensors)
    (y,) = run(case, tensors, training=True)
    wanted = part("dropout", "reference").dropout(x, (y != 0) | (rate == 0), rate)
    agree([y], [wanted], rounding(case, tensors, wanted))
    agree(*(torch.autograd.grad(z.sum(), [x]) for z in (y, wanted)), rounding(case, tensors, wanted))


@pytest.mark.parametrize("name", ["attend", "attend_ring"])
@law(20)
@given(st.data())
def test_attention_in_training_is_the_reference_with_some_weights_zeroed(name, data):
    """Those that numbers of the row, the head, the query and the key say, also where documents are packed."""
    case = draw_case(data.draw, name)
    case = replace(case, attrs=(*((k, v) for k, v in case.attrs if k != "dropout"), ("dropout", 0.25)))
    tensors, document = draw_tensors(data.draw, case), draw_document(data.draw, case)
    leaves, at = ask_gradients(case, tensors), lib.At((case.size("batch"), case.size("s")), document=document)
    at.chance = data.draw(st.integers(0, 99))
    found = run(case, tensors, document, at, training=True)
    name_ = re.search(r'lib.drop\(0.25, self, "(\w+)"', case.emitted.text)[1]
    key = at.chance, 0, zlib.crc32(name_.encode()), 0
    rows, *grid = (torch.arange(case.size(d)) for d in ("batch", "h", "s", "s"))
    state = further(state_of(key, None), rows)
    masks = [kept(0.25, further(state, torch.tensor(i)), grid).transpose(1, 2) for i in range(len(case.attr("masks")))]
    wanted = [attend_of(case, tensors, document, masks)]
    agree(found, wanted, rounding(case, tensors, *wanted))
    ups = [torch.randn(y.shape, dtype=y.dtype) for y in wanted]
    ours, theirs = (torch.autograd.grad(ys, leaves, ups, allow_unused=True) for ys in (found, wanted))
    agree(*([torch.zeros_like(x) if g is None else g for x, g in zip(leaves, gs, strict=True)] for gs in (ours, theirs)),
          rounding(case, tensors, *wanted, *(g for g in theirs if g is not None)))  # fmt: skip


@pytest.mark.parametrize(("name", "act"), [(n, e) for n in OPS for e in table()[n].epilogues])
@law(8)
@given(st.data())
def test_epilogues_are_applied_to_the_result(name, act, data):
    """A pointwise op that is put into another one gives what it gives behind it, gradients too."""
    case = draw_case(data.draw, name)
    tensors, document = draw_tensors(data.draw, case), draw_document(data.draw, case)
    leaves = ask_gradients(case, tensors)
    found = run(replace(case, attrs=(*case.attrs, ("act", act))), tensors, document)
    wanted = [part(act, "reference").UNARY[act](y) for y in run(case, tensors, document)]
    ours, theirs = (torch.autograd.grad(sum((y * y).sum() for y in ys), leaves) for ys in (found, wanted))
    agree(found, wanted, rounding(case, tensors, *wanted))
    agree(ours, theirs, rounding(case, tensors, *wanted, *theirs))


@pytest.mark.parametrize("name", [n for n in OPS if table()[n].coordinates and n != "coordinate"])
@law(10)
@given(st.data())
def test_padding_changes_nothing(name, data):
    """Rows that are not valid are not there, whatever they hold: results and gradients are those of the rows before."""
    case = draw_case(data.draw, name)
    assume(case.sequence)
    case = replace(case, place=(0, 1)) if case.place else case
    tensors, size = draw_tensors(data.draw, case), case.size(case.sequence)
    keep = data.draw(st.integers(1, size))
    small, short, _ = narrowed(case, tensors, None, case.sequence, 0, keep)
    valid = (torch.arange(size) < keep).expand(case.size(case.lead[0]), size)
    for a in case.given:
        if case.sequence in a.dims and a.kind == "real":
            # A query that is padding gives a row that nobody reads, so only what others read is poisoned.
            poison = 7.0 if a.operand == "q" else torch.nan
            tensors[a.name] = tensors[a.name].index_fill(a.dims.index(case.sequence), torch.arange(keep, size), poison)
    found = run(case, tensors, at=lib.At(tuple(valid.shape), None, valid=valid))
    pairs = list(zip(found, case.results, strict=True))
    found = tuple(y.narrow(r.index(case.sequence), 0, keep) if case.sequence in r else y for y, r in pairs)
    wanted = run(small, short)
    agree(found, wanted, rounding(case, short, *wanted))


INNER = [n for n in POINTWISE if n not in ("outer", "floordiv", "where", *COMPARE, *LOGIC)]
PAIRS = {**BINARY, **COMPARE, "logical_and": "", "logical_or": "", "outer": ""}


@pytest.mark.parametrize("name", [n for n in POINTWISE if n != "where"])
def test_chains_are_one_expression_with_the_same_meaning(name):
    """An op whose operand is written in its place binds as if it had been computed before: every pair of ops."""
    x, y = (
        torch.randn(7, generator=torch.Generator().manual_seed(i), dtype=torch.float64).abs() + 0.25 for i in (1, 2)
    )
    for inner in COMPARE if name in LOGIC else INNER:
        for place in (0, 1) if name in PAIRS else (0,):
            for scalar in (False, True) if name in (*BINARY, *COMPARE) else (False,):
                graph = chain(name, inner, place, scalar)
                writer = Writer(graph, program_of(graph), Shared(), inline=True)
                text = writer.call(graph.nodes[-1])
                value = eval(text, {"torch": torch, "F": F, "lib": lib, "x": x, "y": y, "w": y, "v": y > 0.5})
                wanted = of_chain(name, inner, place, scalar, x, y)
                # What is outside of a domain is NaN on both sides.
                agree([_number(value)], [_number(wanted)], 64 * EPS * max(1, _most([wanted])))


def _number(x: Tensor) -> Tensor:
    return x.double().nan_to_num(-3)


def chain(name: str, inner: str, place: int, scalar: bool) -> Graph:
    """`m = inner(x, y)`, `z = name(.., m, ..)` with `m` at a place and `y`, or a number, at the other."""
    real = Type("real", ("a",))
    bounds = (("low", 0.1), ("high", 0.5))
    mask = Type("mask", ("a",))
    inside, made_of = (mask if inner in COMPARE else real), ("x", "y") if inner in PAIRS else ("x",)
    first = Node((Value("m", inside),), inner, made_of, bounds if inner == "clip" else ())
    operands: tuple[str | None, ...] = ("m",)
    if name in PAIRS:
        other = None if scalar else "w" if name == "outer" else "v" if name in LOGIC else "y"
        operands = ("m", other) if place == 0 else (other, "m")
    attrs = bounds if name == "clip" else ((("y", "x")[place], 0.5),) if scalar else ()
    both = (("A", ("a",)), ("B", ("b",)))
    dims = ("a", "b") if place == 0 else ("b", "a")
    made = Value("z", Type("real", dims) if name == "outer" else mask if name in (*COMPARE, *LOGIC) else real)
    second = Node((made,), name, operands, attrs, both if name == "outer" else (("D", ("a",)),))
    inputs = (Value("x", real), Value("y", real), Value("w", Type("real", ("b",))), Value("v", mask))
    sizes = (Dim("a", 7), Dim("b", 7))
    return Graph(Body("chain", "chain", sizes, inputs, (), (), (first, second), ("z",)))


def of_chain(name: str, inner: str, place: int, scalar: bool, x: Tensor, y: Tensor) -> Tensor:
    room = part(name, "reference")
    ops = {**room.UNARY, **room.BINARY, **room.LOGIC, "clip": lambda v: room.clip(v, 0.1, 0.5), "outer": room.outer}
    m = ops[inner](x, y) if inner in PAIRS else ops[inner](x)
    if name not in PAIRS:
        return ops[name](m)
    other = torch.tensor(0.5, dtype=m.dtype) if scalar else y > 0.5 if name in LOGIC else y
    return ops[name](m, other) if place == 0 else ops[name](other, m)


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
    assume({a.operand for a in case.given if a.kind == "real"} & set(group))
    # A number in place of a tensor of the group is the same in x and y, and so no part of a combination.
    assume(
        not any(
            arg is None and o.name in group and case.attr(o.name) is not None and name in ("add", "sub", "where")
            for arg, o in zip(case.args, case.op.signature.operands, strict=False)
        )
    )
    (x, y, both), (a, b), document = mixed(case, data, group)
    fx, fy, f = (run(case, t, document) for t in (x, y, both))
    bound = rounding(case, both, *fx, *fy, *f) * max(1, abs(a), abs(b)) * max(1.0, _most(x.values()), _most(y.values()))
    agree(f, [a * p + b * q for p, q in zip(fx, fy, strict=True)], bound)


# Of one rank alone what others hand over is 0: `test_lifts.py` has several.
@pytest.mark.parametrize("name", [n for n in OPS if not table()[n].meets])
def test_no_linear_operand_is_undeclared(name):
    """f(-2 x) = -2 f(x) fails in some case for every operand that is in no group: the groups are all there are."""
    op = table()[name]
    declared = {o for group in op.linear for o in group}
    real = [o.name for o in op.signature.operands if "real" in op.operand_kinds.get(o.name, ("real",))]
    suspects = set(real) - declared

    @settings(max_examples=12, deadline=None, derandomize=True, database=None)
    @given(st.data())
    def look(data):
        case = draw_case(data.draw, name)
        tensors, document = draw_tensors(data.draw, case), draw_document(data.draw, case)
        whole = run(case, tensors, document)
        for operand in sorted(suspects & {a.operand for a in case.given}):
            scaled = {a.name: tensors[a.name] * -2 if a.operand == operand else tensors[a.name] for a in case.given}
            bound = rounding(case, scaled, *whole)
            pairs = zip(run(case, scaled, document), whole, strict=True)
            if not all(bool(((y.double() + 2 * x.double()).abs() <= bound).all()) for y, x in pairs):
                suspects.discard(operand)

    if suspects:
        look()
    assert not suspects, f"`{name}` is linear in {sorted(suspects)}, which no group says"


# --- monoids --------------------------------------------------------------------------------------


def drawn_monoid(data: Any, name: str, hole: bool = False) -> tuple[Case, Tensors, Tensor | None, Partial]:
    case = draw_case(data.draw, name)
    tensors = draw_tensors(data.draw, case)
    if (
        hole
        and name in ("softmax", "cross_entropy", "max_over")
        and case.size(case.dims_of(case.op.monoid.formal)[-1]) > 1
    ):
        x = next(iter(tensors.values()))
        # Every row keeps a last number that is finite.
        x[..., :-1] = torch.where(x[..., :-1] > 0, -torch.inf, x[..., :-1])
        x[..., 0] = -torch.inf
    ask_gradients(case, tensors)
    # The rows of a window know no documents; where they are cut is the law of the CPU code above.
    document = None if table()[name].monoid.peers == "neighbours" else draw_document(data.draw, case)
    return case, tensors, document, MONOIDS[name](case, flat(case, tensors), document)


@pytest.mark.parametrize("name", sorted(MONOIDS))
@law(12)
@given(st.data())
def test_parts_combine_to_the_whole(name, data):
    """lift, combine and finish of the reference on parts of the marked dim are what the CPU code gives for all of it,
    gradients too. Parts may hold nothing but -inf where a softmax runs, or keys that no mask allows."""
    case, tensors, document, m = drawn_monoid(data, name, hole=True)
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
    y = y.reshape(wanted.shape)
    agree([y], [wanted], rounding(case, tensors, *whole))
    leaves = [x for x in tensors.values() if x.requires_grad]
    up = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    # A log of probability 0 is -inf, and so has no gradient.
    up = up.masked_fill(torch.isinf(wanted), 0)
    if leaves:
        ours, theirs = (torch.autograd.grad(z, leaves, up, materialize_grads=True) for z in (y, wanted))
        agree(ours, theirs, rounding(case, tensors, *whole, *theirs, up))


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


# --- the tests can fail ---------------------------------------------------------------------------

FAULTS = {
    "a statistic called parallel": (
        "softmax",
        {"text": "x[*, D] -> y[*, D]"},
        test_parallel_dims_are_mapped_over,
        {"formal": "D"},
    ),
    "a bias added by every part": (
        "linear",
        {"linear": (("x",), ("weight",))},
        test_contracted_dims_are_summed,
        {"formal": "K"},
    ),
    "a scan in any order": (
        "ssd",
        {"monoid": Monoid("S", ("decay", "state"), "all", True)},
        test_monoids_are_monoids,
        {},
    ),
    "a group that is not joint": (
        "mul",
        {"linear": (("x", "y"),)},
        test_declared_groups_are_jointly_linear,
        {"group": ("x", "y")},
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_declaration_is_found(fault, monkeypatch):
    """Each of these wrong declarations turns the law that speaks of it red."""
    name, wrong, law_of, arguments = FAULTS[fault]
    monkeypatch.setitem(all_ops(), name, replace(table()[name], **wrong))

    @settings(max_examples=20, deadline=None, derandomize=True, database=None, phases=(Phase.generate,))
    @given(st.data())
    def again(data):
        law_of.hypothesis.inner_test(name=name, data=data, **arguments)

    with pytest.raises(AssertionError):
        again()


# --- corners ---------------------------------------------------------------------------------------


def test_norms_of_one_row_have_gradients():
    """x[hidden] without leading dims is a row like any other."""
    x, weight = (
        torch.randn(3, dtype=torch.float64, requires_grad=True),
        torch.ones(3, dtype=torch.float64, requires_grad=True),
    )
    lib.rms_norm(x, weight, 1e-5).sum().backward()


def test_tables_of_others_may_be_compound():
    """`embed(tokens, vocab -> [heads, head_dim], weight = other.weight)` is a row of that table."""
    args = (
        Arg("ids", "ids", ("s",), ("*",), "token"),
        Arg("weight", "weight", ("v", "n", "m"), ("V", "N", "N"), weight=True),
    )
    case = Case("embed", {"s": 2, "v": 3, "n": 2, "m": 2}, args, (("map", (("v",), ("n", "m"))),))
    tensors = {"ids": torch.tensor([2, 0]), "weight": torch.randn(3, 2, 2, dtype=torch.float64)}
    assert torch.equal(run(case, tensors)[0], tensors["weight"][tensors["ids"]])


@pytest.mark.parametrize("which", ["position", "document", "valid"])
def test_coordinates_exist_where_nothing_is_packed(which):
    """A batch of one document a row has a document and a validity too."""
    case = Case("coordinate", {"batch": 2, "s": 3}, (), (("dim", ("s",)), ("which", which)), "s", ("batch",))
    assert [y.shape for y in run(case, {})] == [(2, 3)]


CASES_WITH_LEAD = {
    "rotate": Case(
        "rotate",
        {"batch": 2, "s": 3, "h": 2, "d": 4, "r": 2},
        (
            Arg("x", "x", ("batch", "s", "h", "d"), ("*", "S", "H", "D")),
            Arg("cos", "cos", ("s", "r"), ("S", "R")),
            Arg("sin", "sin", ("s", "r"), ("S", "R")),
        ),
    ),
    "attend": Case(
        "attend",
        {"batch": 2, "s": 3, "k": 1, "h": 2, "d": 2, "e": 2},
        (
            Arg("q", "q", ("batch", "s", "h", "d"), ("*", "Q", "H", "D")),
            Arg("k0", "k", ("s", "k", "d"), ("S", "K", "D")),
            Arg("v0", "v", ("s", "k", "e"), ("S", "K", "E")),
        ),
        (("masks", (MASKS["full"][0],)),),
        "s",
        ("batch",),
    ),
    "cross_entropy": Case(
        "cross_entropy",
        {"batch": 2, "s": 3, "v": 5},
        (Arg("logits", "logits", ("s", "v"), ("*", "V")), Arg("target", "target", ("batch", "s"), ("*", "*"), "token")),
    ),
    "ssd": Case(
        "ssd",
        {"batch": 2, "s": 3, "g": 1, "h": 2, "p": 2, "n": 2},
        (
            Arg("u", "u", ("batch", "s", "h", "p"), ("*", "S", "H", "P")),
            Arg("dt", "dt", ("batch", "s", "h"), ("*", "S", "H")),
            Arg("b", "b", ("s", "g", "n"), ("S", "G", "N")),
            Arg("c", "c", ("s", "g", "n"), ("S", "G", "N")),
            *(Arg(w, w, ("h",), ("H",), weight=True) for w in ("A_log", "D", "dt_bias")),
        ),
        (("chunk", 2),),
        "s",
        ("batch",),
    ),
}


@pytest.mark.parametrize(
    "name",
    sorted(CASES_WITH_LEAD),
)
def test_operands_that_lack_a_leading_dim_serve_all_of_it(name):
    """Either the type rule refuses leading dims that only some operands have, or the code means what it allows."""
    short, make = CASES_WITH_LEAD[name], torch.Generator().manual_seed(0)
    try:
        short.graph  # noqa: B018
    except SpecError:
        return
    tensors = {a.name: torch.randn(short.shape(a.dims), generator=make, dtype=torch.float64) for a in short.given}
    if name == "cross_entropy":
        tensors["target"] = torch.tensor([[0, 1, 2], [3, 4, 0]])
    spread = [
        replace(a, dims=("batch", *a.dims), formals=("*", *a.formals)) if not a.weight and "batch" not in a.dims else a
        for a in short.given
    ]
    full = replace(short, args=tuple(spread))
    wide = {a.name: tensors[a.name].expand(full.shape(a.dims)) for a in full.given}
    wanted = run(full, wide)
    agree(run(short, tensors), wanted, rounding(full, wide, *wanted))


# These are not defined for whole numbers in torch, or give whole numbers that the type rule calls real.


@pytest.mark.parametrize(
    "name",
    [n for n in POINTWISE if n not in ("clip", "where", *LOGIC)],
)
def test_coordinates_are_whole_where_their_type_says_so(name):
    """Pointwise ops of coordinates: the result is a coordinate and whole, or real and a fraction."""
    x, y = (
        Arg(n, n, ("a",) if n == "x" or name != "outer" else ("b",), (f,), "coordinate")
        for n, f in (("x", "D"), ("y", "D"))
    )
    case = Case(name, {"a": 3} | ({"b": 2} if name == "outer" else {}), (x,) if name in UNARY else (x, y))
    tensors = {a.name: torch.arange(1, 1 + case.size(a.dims[0])) for a in case.given}
    (kind,) = (r.type.kind for r in case.graph.nodes[0].results)
    assert run(case, tensors)[0].is_floating_point() == (kind == "real")


@pytest.mark.parametrize("name", ["add", "sub", "mul", "floordiv", "max", "min"])
def test_a_fraction_makes_a_coordinate_real(name):
    """`seq.position * 0.5` is no coordinate."""
    case = Case(name, {"a": 3}, (Arg("x", "x", ("a",), ("D",), "coordinate"), None), (("y", 0.5),))
    assert run(case, {"x": torch.arange(3)})[0].is_floating_point()
    assert case.graph.nodes[0].results[0].type.kind == "real"
