"""What an op is taken apart into where a dim is cut: together it is the op, on one rank and on several.

On one rank the parts are read one after the other. On several, the shard pass places them, and each simulated rank runs
what is printed for it: every operand is a weight there, so each has a gradient and is stored as the layout says.
"""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from heddle.codegen.shared import Shared
from heddle.codegen.writer import Writer
from heddle.dsl.layout import Layout, Split
from heddle.dsl.program import Dim, Init, Node, Program, Type, Value, Weight
from heddle.dsl.selectors import Selector, Step
from heddle.dsl.ways import Way
from heddle.lowering.graph import Graph, GraphProgram
from heddle.lowering.ops import table
from heddle.lowering.passes.infer_types import check_types
from heddle.lowering.passes.shard import shard
from heddle.runtime import lib
from heddle.runtime.lib.laid import part
from heddle.runtime.lib.simulated import simulate

from .cases import TYPES, Case, Silent, Tensors, draw_case, draw_document, draw_tensors, run
from .references import steepness
from .test_ops import agree, rounding

LIFTED = sorted(name for name, op in table().items() if op.lift is not None)
# Which dim of a case is cut.
CUT = {"attend": "s", "rms_norm": "d", "layer_norm": "d", "cross_entropy": "v", "causal_conv": "s", "ssd": "s"}


# Taken apart and run on all ranks: a case is found, not made small.
law = settings(max_examples=max(25, settings.default.max_examples // 4), deadline=None,
               phases=[Phase.explicit, Phase.reuse, Phase.generate])  # fmt: skip


def test_every_lift_is_drawn():
    assert set(CUT) == set(LIFTED)


class Apart:
    """Collects the parts of a use as nodes of a graph, as if a rank had all of each dim."""

    def __init__(self, graph: Graph):
        self.body, self.values = graph.body, dict(graph.values)
        self.dims = {d.name: replace(d, axes=("ranks",)) if d.sequence else d for d in graph.body.dims}
        self.nodes: list[Node] = []

    def size(self, dim: str) -> int | None:
        return self.dims[dim].size

    def type_of(self, name: str) -> Type:
        return self.values[name].type

    def dim(self, base: str, size: int) -> str:
        assert base not in self.dims
        self.dims[base] = Dim(base, size)
        return base

    def split_like(self, dim: str, first: str) -> None:
        assert dim in self.dims and first in self.dims

    def add(self, op, operands, dims, like, kind="real", name=None, bindings=(), **attrs):
        return self._node((Value(name or op, Type(kind, dims)),), op, operands, bindings, attrs)[0]

    def add_all(self, op, operands, results, like, bindings=(), **attrs):
        made = tuple(Value(n, Type("real", dims)) for n, dims in results.items())
        return self._node(made, op, operands, bindings, attrs)

    def _node(self, results, op, operands, bindings, attrs):
        attrs |= {"axes": ("ranks",)} if table()[op].meets else {}
        self.nodes.append(Node(results, op, operands, tuple(attrs.items()), bindings))
        self.values |= {r.name: r for r in results}
        return tuple(r.name for r in results)

    def graph(self) -> Graph:
        return Graph(replace(self.body, dims=tuple(self.dims.values()), nodes=tuple(self.nodes)))


def execute(graph: Graph, program: GraphProgram, tensors: Tensors, at: lib.At) -> dict[str, Tensor]:
    """Every value of a graph, by the text that is printed for its nodes."""
    masks: dict[str, tuple[str, str]] = {}
    writer = Writer(graph, program, Shared(masks), inline=False)
    weights = {w.name for w in graph.body.weights}
    names = {"torch": torch, "F": F, "lib": lib, "spmd": lib.spmd, **TYPES, "at": at}
    names |= {k: x for k, x in tensors.items() if k not in weights}
    owner = SimpleNamespace(training=False)
    for name in weights:
        *path, last = name.split(".")
        holder = owner
        for step in path:
            holder.__dict__.setdefault(step, SimpleNamespace())
            holder = holder.__dict__[step]
        setattr(holder, last, tensors[name])
    names["self"] = owner
    found: dict[str, Tensor] = {}
    for node in graph.nodes:
        text = writer.call(node)
        names |= {name: eval(source, {"lib": lib}) for name, source in masks.values()}
        made = eval(text, names)
        for r, y in zip(node.results, made if isinstance(made, tuple) else (made,), strict=True):
            found[r.name] = y
            names[writer.expression(r.name)] = y
    return found


def as_weights(case: Case) -> Case:
    """The same use, all of whose real operands are weights that stand alone."""
    names = {a.name: a.name.rpartition(".")[2] for a in case.given}
    return replace(
        case,
        args=tuple(None if a is None else replace(a, name=names[a.name], weight=a.kind == "real") for a in case.args),
    )


def drawn(data: Any, name: str, ranks: int) -> tuple[Case, str, Tensors, Tensor | None, Tensor | None]:
    """A case with a dim that is a multiple of the ranks, its operands, its documents and which rows are valid."""
    case = as_weights(draw_case(data.draw, name))
    dim = data.draw(st.sampled_from([d for d in case.sizes if d in (CUT[name], f"{CUT[name]}_outer")]))
    case = case.resized(**{dim: ranks * data.draw(st.sampled_from((1, 2, 3)))})
    if name == "rms_norm":
        first = case.size(case.attr("over")[0])
        groups = data.draw(st.sampled_from([g for g in range(1, first + 1) if first % g == 0]))
        case = replace(case, attrs=tuple((k, groups if k == "groups" else v) for k, v in case.attrs))
    tensors, document = draw_tensors(data.draw, case), draw_document(data.draw, case)
    if document is not None and data.draw(st.booleans()):
        document = None
    valid = None
    if case.sequence and data.draw(st.booleans()):
        shape = case.size(case.lead[0]), case.size(case.sequence)
        valid = torch.rand(shape, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 99)))) < 0.7
        for a in case.given:  # a row that only asks may not hold anything: what it gets is its own affair
            if a.kind == "real" and case.sequence in a.dims and is_read_by_others(case, a):
                mask = valid.view(*shape, *[1] * (len(a.dims) - 2))
                tensors[a.name] = torch.where(mask, tensors[a.name], torch.nan)
    if name == "cross_entropy":  # rows that do not count may hold anything
        tensors["logits"] = torch.where((tensors["target"] >= 0)[..., None], tensors["logits"], torch.nan)
    return case, dim, tensors, document, valid


def is_read_by_others(case: Case, arg: Any) -> bool:
    """Whether rows of an operand are read for other rows."""
    formal = arg.formals[arg.dims.index(case.sequence)]
    return case.op.signature.role(formal) != "parallel"


def rows(case: Case, document: Tensor | None, valid: Tensor | None, ranks: int) -> lib.At:
    shape = (case.size(case.lead[0]), case.size(case.sequence)) if case.sequence else (1, 1)
    at = lib.At(shape, None, document=document, valid=valid)
    at.mesh = Silent({"ranks": ranks}, 0)
    return at


def leaves_of(case: Case, tensors: Tensors) -> dict[str, Tensor]:
    return {a.name: tensors[a.name].requires_grad_() for a in case.given if a.kind == "real"}


def whole(case: Case, tensors: Tensors, at: lib.At) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """The result of the op itself, a gradient of it (none of rows that are not valid), and those of its operands."""
    leaves = leaves_of(case, tensors)
    (y,) = run(case, tensors, at=at)
    up = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=y.dtype)
    if at.valid is not None:
        mask = at.valid.view(*at.valid.shape, *[1] * (y.dim() - 2))
        y, up = torch.where(mask, y, 0), torch.where(mask, up, 0)
    grads = torch.autograd.grad(y, list(leaves.values()), up, materialize_grads=True)
    return y, up, dict(zip(leaves, grads, strict=True))


def bound(case: Case, tensors: Tensors, y: Tensor, up: Tensor, grads: dict[str, Tensor]) -> float:
    known = {k: x.detach().nan_to_num(0) if x.is_floating_point() else x for k, x in tensors.items()}
    return rounding(case, known, y, up, *grads.values()) * steepness(case, known)


@pytest.mark.parametrize("name", LIFTED)
@law
@given(st.data())
def test_parts_of_a_use_are_the_use(name, data):
    """On a mesh of one: the types that the lift writes are those of its ops; the result and every gradient are the op's."""
    case, _, tensors, document, valid = drawn(data, name, 1)
    at = rows(case, document, valid, 1)
    y, up, grads = whole(case, tensors, at)
    apart = Apart(case.graph)
    (node,) = case.graph.nodes
    last = table()[name].lift(node, apart)
    assert last == node.name
    graph = apart.graph()
    check_types(graph)
    found = execute(graph, case.program, tensors, at)[last]
    if valid is not None:
        found = torch.where(valid.view(*valid.shape, *[1] * (y.dim() - 2)), found, 0)
    near = bound(case, tensors, y, up, grads)
    agree([found], [y], near)
    leaves = leaves_of(case, tensors)
    agree(torch.autograd.grad(found, list(leaves.values()), up, materialize_grads=True), grads.values(), near)


def placed(case: Case, dim: str, ranks: int, order: str | None = None) -> GraphProgram:
    """The use on each of some ranks, as the shard pass writes it. An op that is only taken apart if told so is told."""
    way = Way(Selector((Step(case.name),), optional=True), "ring", order=order)
    layout = Layout("cut", (("ranks", ranks),), (Split(Selector((Step(dim),)), ("ranks",)),), ways=(way,))
    body = case.graph.body
    weights = tuple(Weight(w.name, w.dims, Init("free"), case.name) for w in body.weights)
    graph = Graph(replace(body, weights=weights))
    program = Program("case", "case", "model", {}, {}, {})
    return shard(GraphProgram(program, {"case": graph}, frozenset({"hoisted"}), roots=("case",), layout=layout))


@pytest.mark.parametrize("name", LIFTED)
@law
@given(st.data())
def test_a_use_that_is_cut_is_the_use(name, data):
    """Cut over 2 to 4 ranks: documents, padding of any kind, parts shorter than what the op reads."""
    ranks = data.draw(st.integers(2, 4))
    case, dim, tensors, document, valid = drawn(data, name, ranks)
    y, up, grads = whole(case, tensors, rows(case, document, valid, 1))
    order = data.draw(st.sampled_from([None, "zigzag"])) if case.size(dim) % (2 * ranks) == 0 else None
    program = placed(case, dim, ranks, order)
    graph, laid = program.graphs["case"], program.laid
    check_types(graph)
    in_runs = name == "rms_norm" and case.attr("groups") % ranks == 0 and dim == case.attr("over")[0]
    assert in_runs or name not in {n.op for n in graph.nodes}, "it was not taken apart"
    (output,) = graph.body.outputs
    place = laid.places["case"][output]
    # Where a group count and the ranks share only a factor, the axis is two.
    axes = {a.name: a.size for a in laid.mesh.atoms}
    partial, replicated = (tuple(a for a, x in place.letters if x == letter) for letter in "PR")

    def rank(mesh: Any) -> tuple[Tensor, dict[str, Tensor]]:
        at = rows(case, document, valid, ranks)
        at.mesh = mesh
        mine = dict(tensors)
        for w in graph.body.weights:
            mine[w.name] = part(tensors[w.name].detach(), laid.weights["case"][w.name].splits, mesh).clone().requires_grad_()
        z = execute(graph, program, mine, at)[output]
        mask = None if valid is None else part(valid.view(*valid.shape, *[1] * (y.dim() - 2)), place.splits, mesh)
        z = z if mask is None else torch.where(mask, z, 0)
        own = part(up, place.splits, mesh)
        if mesh.place(*replicated):  # the gradient is what all of them add
            own = torch.zeros_like(own)
        leaves = [mine[w.name] for w in graph.body.weights]
        made = dict(zip([w.name for w in graph.body.weights],
                        torch.autograd.grad(z, leaves, own, materialize_grads=True), strict=True))  # fmt: skip
        for w in graph.body.weights:
            made[w.name] = mesh[laid.weights["case"][w.name].sync].all_reduce(made[w.name])
        return mesh[partial].all_reduce(z.detach()), made

    near = bound(case, tensors, y, up, grads)
    for which, (z, made) in enumerate(simulate(axes, rank)):
        mesh = Silent(axes, which)
        agree([z], [part(y, place.splits, mesh)], near)
        for name_, grad in made.items():
            agree([grad], [part(grads[name_], laid.weights["case"][name_].splits, mesh)], near)
