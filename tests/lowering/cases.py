"""One use of an op as a test case: drawn from its signature, typed by its room, emitted by its room and run.

A `Case` is a graph of one node. Its dims are named after the formals of the signature, so that a law about a role can
find every axis that it speaks of. Sizes are 1, odd and prime; weights stand alone or in the module that the room makes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from itertools import pairwise
from types import CodeType, SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

from heddle.codegen.facts import Use
from heddle.codegen.shared import Shared
from heddle.codegen.writer import Writer
from heddle.dsl import syntax as sx
from heddle.dsl.program import TOKENS, Body, Dim, Init, Node, Program, Type, Value, Weight
from heddle.lowering.graph import Graph, GraphProgram, State
from heddle.lowering.op import Op
from heddle.lowering.ops import part, table
from heddle.lowering.ops.pointwise.op import BINARY, COMPARE, LOGIC, UNARY
from heddle.lowering.passes.infer_types import graph_dims, infer
from heddle.lowering.passes.stream import stream
from heddle.runtime import lib

Tensors = dict[str, Tensor]
Draw = Callable[[Any], Any]

SIZES = st.sampled_from((1, 2, 3, 5, 7))
SMALL = st.sampled_from((1, 2, 3))
# Ops with a file of tests of their own: how many rows they give follows from the data, which no case here can say.
APART = {"summarise"}
POINTWISE = (*UNARY, *BINARY, *COMPARE, *LOGIC, "clip", "outer", "where")
REDUCTIONS = ("sum", "mean", "max_over", "count")


TYPES = {name: getattr(lib.spmd, name) for name in "RIPS"}


class Silent(lib.Mesh):
    """One of several ranks, in code that asks where it is and tells the others nothing."""

    def _wire(self, axes: tuple[str, ...]) -> Any:
        return None


@dataclass(frozen=True)
class Arg:
    """An operand of the node: `operand` is its name in the signature, `formals` the formal that each dim belongs to."""

    name: str
    operand: str
    dims: tuple[str, ...]
    formals: tuple[str, ...]
    kind: str = "real"
    weight: bool = False


@dataclass(frozen=True)
class Case:
    """A drawn use. `sums` are dims as long as others together; `tied` are dims that must be multiples of another."""

    name: str
    sizes: Mapping[str, int]
    args: tuple[Arg | None, ...]
    attrs: tuple[tuple[str, Any], ...] = ()
    sequence: str | None = None
    lead: tuple[str, ...] = ()
    sums: Mapping[str, tuple[tuple[str, ...], ...]] = field(default_factory=dict)
    tied: Mapping[str, str] = field(default_factory=dict)
    reach: tuple[int, int] = (0, 0)
    place: tuple[int, int] | None = None
    """Of an op that reads one rank's rows of a sequence: which rank of how many."""

    @property
    def op(self) -> Op:
        return table()[self.name]

    @property
    def given(self) -> tuple[Arg, ...]:
        return tuple(a for a in self.args if a is not None)

    def attr(self, name: str) -> Any:
        setting = self.op.setting(name)
        return dict(self.attrs).get(name, setting.default if setting else None)

    def resized(self, **sizes: int) -> Case:
        return replace(self, sizes={**self.sizes, **sizes})

    def size(self, dim: str) -> int:
        if dim in self.sums:
            return sum(math.prod(self.sizes[d] for d in dims) for dims in self.sums[dim])
        return self.sizes[dim]

    def shape(self, dims: tuple[str, ...]) -> tuple[int, ...]:
        return tuple(self.size(d) for d in dims)

    def dims_of(self, formal: str) -> tuple[str, ...]:
        """The dims that a formal stands for; `*` is the leading dims."""
        found = (d for a in self.given for d, f in zip(a.dims, a.formals, strict=True) if f == formal)
        return tuple(dict.fromkeys(found))

    @cached_property
    def dims(self) -> tuple[Dim, ...]:
        names = dict.fromkeys((*self.sizes, *self.sums))
        lead = self.lead
        return tuple(
            Dim(
                d,
                self.size(d),
                d == self.sequence,
                lead if d == self.sequence else (),
                clock=TOKENS if d == self.sequence else None,
                axes=("ranks",) if self.place and d == self.sequence else (),
            )
            for d in names
        )

    @cached_property
    def graph(self) -> Graph:
        """The typed graph: results and bindings are what the room's rule says."""
        inputs = tuple(Value(a.name, Type(a.kind, a.dims)) for a in self.given if not a.weight)
        weights = tuple(Weight(a.name, a.dims, Init("free"), self.name) for a in self.given if a.weight)
        body = Body("case", "case", self.dims, inputs, weights, (), (), ())
        operands = tuple(None if a is None else a.name for a in self.args)
        node = Node((), self.name, operands, self.attrs)
        dims = graph_dims(self.dims)
        typing = infer(node, Graph(body), dims)
        results = tuple(
            Value(f"y{i}", Type(kind, tuple(d.name for d in ds))) for i, (kind, ds) in enumerate(typing.results)
        )
        bindings = tuple((f, tuple(d.name for d in ds)) for f, ds in typing.bindings.items())
        node = replace(node, results=results, bindings=bindings)
        return Graph(replace(body, nodes=(node,), outputs=tuple(r.name for r in results)))

    @property
    def results(self) -> tuple[tuple[str, ...], ...]:
        """Dims of the results, as the room's rule says."""
        return tuple(r.type.dims for r in self.graph.nodes[0].results)

    @cached_property
    def program(self) -> GraphProgram:
        return program_of(self.graph)

    @property
    def state(self) -> State | None:
        """What a stream keeps for it, as the stream pass derives it."""
        return next(iter(self.program.states["case"]), None)

    @cached_property
    def emitted(self) -> Emitted:
        return emit(self)


@dataclass
class Emitted:
    """The text that the op's room prints, ready to run."""

    text: str
    construct: str | None
    slot: str | None
    masks: dict[str, Any]


def program_of(graph: Graph) -> GraphProgram:
    """A graph as a block of some model, behind every pass but `stream`, which derives its state."""
    whole = Program("case", "case", "model", {}, {}, {})
    return stream(GraphProgram(whole, {graph.name: graph}, frozenset({"built", "hoisted", "stacked", "typed"})))


def emit(case: Case) -> Emitted:
    """What the emitter writes for the case's node."""
    masks: dict[str, tuple[str, str]] = {}
    writer = Writer(case.graph, case.program, Shared(masks), inline=False)
    (node,) = case.graph.nodes
    use = Use(case.graph, node, writer)
    text = writer.call(node)
    construct = f"dict({use.own.removeprefix('self.')}={part(node.op, 'cpu').construct(use)})" if use.own else None
    slots = writer.slots()
    made = {name: eval(_code(source), {"lib": lib}) for name, source in masks.values()}
    return Emitted(text, construct, f"lib.Slots({slots[0]})" if slots else None, made)


@lru_cache(4096)
def _code(text: str) -> CodeType:
    return compile(text, "<emitted>", "eval")


def run(
    case: Case,
    tensors: Tensors,
    document: Tensor | None = None,
    at: Any = None,
    state: Any = None,
    training: bool = False,
) -> tuple[Tensor, ...]:
    """The results of the emitted code. It is differentiable in every operand, weights of modules included."""
    code = case.emitted
    rank, ranks = case.place or (0, 1)
    if at is None and case.sequence:
        batch = math.prod(case.size(d) for d in case.lead)
        at = lib.At((batch, case.size(case.sequence) * ranks), None, document=document)
    at = lib.At((1, 1)) if at is None else at
    at.mesh = Silent({"ranks": ranks}, rank)
    weights = {a.name: tensors[a.name] for a in case.given if a.weight}
    names = {"torch": torch, "F": F, "lib": lib, "spmd": lib.spmd, **TYPES, "at": at, "state": lib.STATELESS if state is None else state}
    names |= {"self": _owner(code, weights, training), **code.masks}
    names |= {a.name: tensors[a.name] for a in case.given if not a.weight}
    found = eval(_code(code.text), names)
    return found if isinstance(found, tuple) else (found,)


def _owner(code: Emitted, weights: Tensors, training: bool) -> Any:
    """`self` of the emitted code: the bare weights, or the room's module with weights that gradients flow through."""
    if code.construct is None:
        return SimpleNamespace(**weights, training=training)
    owner = nn.Module()
    for name, module in eval(_code(code.construct), {"lib": lib}).items():
        owner.add_module(name, module)
    owner.double()
    held = {
        id(p): (module, name, p)
        for module in owner.modules()
        for name, p in module._parameters.items()
        if p is not None
    }
    for p in owner.parameters():
        p.data = torch.arange(p.numel(), dtype=p.dtype).view_as(p)
    filled = {key: torch.zeros(p.numel(), dtype=p.dtype) for key, (_, _, p) in held.items()}
    left = dict(weights)
    for path, holder, view in lib.named_logical_parameters(owner):
        weight = left.pop(path)
        assert view.shape == weight.shape
        filled[id(holder)] = filled[id(holder)].index_copy(0, view.reshape(-1).long(), weight.reshape(-1))
    assert not left, f"the module does not own {sorted(left)}"
    for key, (module, name, p) in held.items():
        delattr(module, name)
        setattr(module, name, filled[key].view(p.shape))
    return owner


# --- drawing --------------------------------------------------------------------------------------


def draw_case(draw: Draw, name: str, sizes: Any = SIZES, joined: bool = False) -> Case:
    """A use of an op with drawn dims and settings. `joined` allows results of a product that stand side by side."""
    if name in POINTWISE:
        return _pointwise(draw, name, sizes)
    special = {
        "attend": _attend,
        "attend_ring": _attend_ring,
        "parallel_linear": _parallel_linear,
        "parallel_conv": _parallel_conv,
        "index": _index,
        "slopes": _slopes,
        "coordinate": _coordinate,
        "reshape": _reshape,
        "concat": _concat,
        "dot": _dot,
        "take": _take,
        "convert": _conversion,
        "group_squares": _group_squares,
        "scaled_rows": _scaled_rows,
        "row_sums": _row_sums,
        "centred_squares": _centred_squares,
        "centred_rows": _centred_rows,
        "rows_before": _rows_before,
        "conv_behind": _conv_behind,
        "ssd_leave": _ssd_leave,
        "ssd_before": _ssd_before,
        "ssd_inside": _ssd_inside,
        "ssd_behind": _ssd_behind,
    }
    if name in special:
        return special[name](draw, sizes, joined)
    if name == "dropout":
        return _dropout(draw, sizes)
    if name in REDUCTIONS:
        return _reduction(draw, name, sizes)
    return _by_signature(draw, table()[name], sizes)


# Formals that may stand for several dims; formals that are a multiple of another one.
COMPOUND = {
    "linear": "KN",
    "rms_norm": "D",
    "layer_norm": "D",
    "softmax": "D",
    "log_softmax": "D",
    "causal_conv": "C",
    "embed": "N",
}
TIED = {"ssd": {"h": "g"}}
LACKING = {"rotate": ("cos", "sin")}
"""Operands that are the same along some leading dims."""
# The gradient of an rms norm of a row that stands alone fails (`test_norms_of_one_row_have_gradients`).
LEAST_LEAD = {"rms_norm": 1}


def _by_signature(draw: Draw, op: Op, sizes: Any) -> Case:
    """Operands as the signature writes them."""
    count = 1 if op.coordinates else draw(st.integers(LEAST_LEAD.get(op.name, 0), 2))
    lead = ("batch", "outer")[:count]
    weights = {w.operand for w in op.weights}
    dot = "own." if weights and draw(st.booleans()) else ""
    # `embed` reads a table that it does not own only where a row is one dim (`test_tables_of_others_may_be_compound`).
    simple = op.name == "embed" and not dot
    dims: dict[str, tuple[str, ...]] = {"*": lead}
    for formal in op.signature.formals():
        low = formal.lower()
        several = not simple and formal in COMPOUND.get(op.name, "") and draw(st.booleans())
        dims[formal] = (f"{low}_outer", low) if several else (low,)
    if op.name == "causal_conv":
        dims["J"] = ("taps",)
    size = {d: draw(SMALL if d in ("batch", "outer") else sizes) for ds in dims.values() for d in ds}
    for many, few in TIED.get(op.name, {}).items():
        size[many] = size[few] * draw(SMALL)
    if op.name == "rotate":
        size["d"] = 2 * size["r"] + draw(st.integers(0, 2))
    attrs, absent = SETTINGS.get(op.name, lambda *_: ([], ()))(draw, dims, size)
    args: list[Arg | None] = []
    for operand in op.signature.operands:
        if operand.name in absent:
            args.append(None)
            continue
        formals = (("*",) if operand.leading else ()) + tuple(f.name for f in operand.formals)
        pairs = [(d, f) for f in formals for d in dims[f]]
        owned = operand.name in weights
        kind = op.operand_kinds.get(operand.name, ("real",))[0]
        if operand.name in LACKING.get(op.name, ()):
            own = draw(st.permutations([p for p in pairs if p[1] == "*"]))
            pairs = [*own[: draw(st.integers(0, len(own)))], *(p for p in pairs if p[1] != "*")]
        names = tuple(d for d, _ in pairs), tuple(f for _, f in pairs)
        args.append(Arg(dot + operand.name if owned else operand.name, operand.name, *names, kind, owned))
    reach = {"causal_conv": (size.get("taps", 1) - 1, 0), "next": (0, dict(attrs).get("by", 1))}.get(op.name, (0, 0))
    sequence = "s" if op.coordinates else None
    return Case(op.name, size, tuple(args), tuple(attrs), sequence, lead, tied=TIED.get(op.name, {}), reach=reach)


Settings = tuple[list[tuple[str, Any]], tuple[str, ...]]


def _map(draw: Draw, dims: Any, size: Any) -> Settings:
    absent = () if draw(st.booleans()) else ("bias",)
    return [("map", (dims["K"], dims["N"]))], absent


def _table(draw: Draw, dims: Any, size: Any) -> Settings:
    return [("map", (dims["V"], dims["N"]))], ()


def _over(draw: Draw, dims: Any, size: Any) -> Settings:
    return [("over", dims["D"])], ()


def _rms(draw: Draw, dims: Any, size: Any) -> Settings:
    first = size[dims["D"][0]]
    groups = draw(st.sampled_from([g for g in range(1, first + 1) if first % g == 0]))
    return [("over", dims["D"]), ("groups", groups), ("eps", draw(st.sampled_from((1e-5, 1e-2))))], ()


def _layer(draw: Draw, dims: Any, size: Any) -> Settings:
    absent = () if draw(st.booleans()) else ("bias",)
    return [("over", dims["D"]), ("zero_centred", draw(st.booleans()))], absent


def _conv(draw: Draw, dims: Any, size: Any) -> Settings:
    return [("taps", size["taps"])], () if draw(st.booleans()) else ("bias",)


def _ssd(draw: Draw, dims: Any, size: Any) -> Settings:
    return [("chunk", draw(st.integers(1, size["s"] + 1)))], ()


def _top(draw: Draw, dims: Any, size: Any) -> Settings:
    return [("k", draw(st.integers(1, size["e"]))), ("over", dims["E"])], ()


def _next(draw: Draw, dims: Any, size: Any) -> Settings:
    return [("by", draw(st.integers(1, 3)))], ()


SETTINGS: dict[str, Callable[..., Settings]] = {
    "linear": _map,
    "embed": _table,
    "rms_norm": _rms,
    "layer_norm": _layer,
    "softmax": _over,
    "log_softmax": _over,
    "top_k": _top,
    "causal_conv": _conv,
    "ssd": _ssd,
    "next": _next,
}


def _pointwise(draw: Draw, name: str, sizes: Any) -> Case:
    """One operand has all dims, the other some of them in any order, or is a number."""
    dims = tuple("abc"[: draw(st.integers(0, 3))])
    size = {d: draw(SMALL if d == "a" else sizes) for d in dims}
    if name == "outer":
        other = tuple("de"[: draw(st.integers(0, 2))])
        size |= {d: draw(SMALL) for d in other}
        x, y = Arg("x", "x", dims, ("A",) * len(dims)), Arg("y", "y", other, ("B",) * len(other))
        return Case(name, size, (x, y))
    kind = "mask" if name in LOGIC else "token" if name in ("eq", "ne") else "real"
    wide = Arg("x", "x", dims, ("D",) * len(dims), kind)
    if name == "clip":
        low = draw(st.sampled_from((-0.5, 0.0)))
        bounds = draw(st.sampled_from(((low, 0.75), (low, None), (None, 0.75))))
        return Case(name, size, (wide,), (("low", bounds[0]), ("high", bounds[1])))
    if name in UNARY or name == "logical_not":
        return Case(name, size, (wide,))
    chosen = tuple(draw(st.permutations(dims))[: draw(st.integers(0, len(dims)))])
    if name == "where":
        mask = Arg("mask", "mask", chosen, ("D",) * len(chosen), "mask")
        other = draw(st.sampled_from((replace(wide, name="y", operand="y"), None)))
        return Case(name, size, (mask, wide, other), () if other else (("y", 0.5),))
    number = draw(st.sampled_from((None, None, 2, 0.5))) if kind == "real" else None
    if number is not None:
        first = draw(st.booleans())
        tensor = replace(wide, name="y", operand="y") if first else wide
        return Case(name, size, (None, tensor) if first else (tensor, None), (("x" if first else "y", number),))
    narrow = Arg("y", "y", chosen, ("D",) * len(chosen), kind)
    if draw(st.booleans()):
        wide, narrow = replace(narrow, name="x", operand="x"), replace(wide, name="y", operand="y")
    return Case(name, size, (wide, narrow))


def _compare(left: sx.Expr, operator: str, right: sx.Expr) -> sx.Expr:
    return sx.Binary(operator, left, right)


_KEY, _QUERY = (sx.Member(sx.Name(n), "position") for n in ("key", "query"))
_CAUSAL = _compare(_KEY, "<=", _QUERY)
# Masks with what they say of (query, key) positions; under the last two some rows see nothing.
MASKS: dict[str, tuple[sx.Expr, Callable[[Tensor, Tensor], Tensor]]] = {
    "causal": (_CAUSAL, lambda q, k: k <= q),
    "full": (sx.Constant(True), lambda q, k: (k == k) & (q == q)),
    "window": (
        sx.Binary("and", _CAUSAL, _compare(sx.Binary("-", _QUERY, _KEY), "<", sx.Number(2))),
        lambda q, k: (k <= q) & (q - k < 2),
    ),
    "past": (_compare(_KEY, "<", _QUERY), lambda q, k: k < q),
    "next": (_compare(_KEY, "==", sx.Binary("+", _QUERY, sx.Number(1))), lambda q, k: k == q + 1),
}


def mask_name(mask: sx.Expr) -> str:
    return next(name for name, (known, _) in MASKS.items() if known == mask)


def _attend(draw: Draw, sizes: Any, joined: bool) -> Case:
    """Queries and keys are the rows of one call, so their sequence is one dim."""
    size = {"batch": draw(SMALL), "s": draw(sizes), "k": draw(SMALL), "d": draw(sizes), "e": draw(sizes)}
    size["h"] = size["k"] * draw(SMALL)
    count = draw(st.sampled_from((1, 1, 2)))
    masks = tuple(MASKS[draw(st.sampled_from(tuple(MASKS)))][0] for _ in range(count))
    args = [Arg("q", "q", ("batch", "s", "h", "d"), ("*", "Q", "H", "D"))]
    distance = draw(st.sampled_from((None, None, "bias", "slope")))
    options = ("query",) * (draw(st.integers(0, 2)) == 0) + ((distance,) if distance else ())
    for i in range(count):
        args.append(Arg(f"k{i}", "k", ("batch", "s", "k", "d"), ("*", "S", "K", "D")))
        args.append(Arg(f"v{i}", "v", ("batch", "s", "k", "e"), ("*", "S", "K", "E")))
        if "query" in options:
            args.append(Arg(f"q{i}", "query", ("batch", "s", "h", "d"), ("*", "Q", "H", "D")))
        if "bias" in options:
            size["n"] = size.get("n") or draw(sizes)
            args.append(Arg(f"b{i}", "bias", ("batch", "s", "h", "n"), ("*", "Q", "H", "N")))
        if "slope" in options:
            args.append(Arg(f"s{i}", "slope", ("h",), ("H",)))
    attrs = [("masks", masks)] + ([("options", options)] if options else [])
    if distance:
        attrs.append(("distances", (sx.Binary("-", _QUERY, _KEY),) * count))
    attrs += [("scale", draw(st.sampled_from((0.5, 1.0))))] if draw(st.booleans()) else []
    attrs += [("dropout", 0.25)] if draw(st.booleans()) else []  # which changes nothing but in training
    return Case("attend", size, tuple(args), tuple(attrs), "s", ("batch",), tied={"h": "k"})


def _attend_ring(draw: Draw, sizes: Any, joined: bool) -> Case:
    """On one rank, which has all of the keys."""
    case = _attend(draw, sizes, joined)
    attrs = (*case.attrs, ("axes", ("ranks",)))
    return replace(case, name="attend_ring", attrs=attrs, place=(0, 1))


def _parallel_linear(draw: Draw, sizes: Any, joined: bool) -> Case:
    ins = ("k_outer", "k") if draw(st.booleans()) else ("k",)
    lead = ("batch", "outer")[: draw(st.integers(0, 2))]
    size = {d: draw(SMALL) for d in (*lead, *ins)}
    args: list[Arg | None] = [Arg("x", "x", (*lead, *ins), ("*",) * len(lead) + ("K",) * len(ins))]
    parts = tuple(f"p{i}" for i in range(draw(st.integers(1, 3))))
    outs = {}
    for p in parts:
        outs[p] = (f"{p}_n_outer", f"{p}_n") if draw(st.booleans()) else (f"{p}_n",)
        size |= {d: draw(SMALL) for d in outs[p]}
        n = ("N",) * len(outs[p])
        args.append(Arg(f"{p}.weight", "weights", (*outs[p], *ins), n + ("K",) * len(ins), weight=True))
        args.append(Arg(f"{p}.bias", "biases", outs[p], n, weight=True) if draw(st.booleans()) else None)
    cut = draw(st.integers(0, len(parts))) if joined else 0
    give = ((parts[:cut],) if cut else ()) + tuple((p,) for p in parts[cut:])
    attrs = [("ins", ins), ("parts", parts), ("give", give)]
    sums = {}
    if cut > 1:
        sums["joined"] = tuple(outs[p] for p in parts[:cut])
        attrs.append(("joined", ("joined",)))
    return Case("parallel_linear", size, tuple(args), tuple(attrs), lead=lead, sums=sums)


def _parallel_conv(draw: Draw, sizes: Any, joined: bool) -> Case:
    size = {"batch": draw(SMALL), "s": draw(sizes), "taps": draw(sizes)}
    parts = tuple(f"p{i}" for i in range(draw(st.integers(1, 3))))
    outs = {p: (f"{p}_c_outer", f"{p}_c") if draw(st.booleans()) else (f"{p}_c",) for p in parts}
    size |= {d: draw(SMALL) for ds in outs.values() for d in ds}
    args: list[Arg | None] = [Arg("x", "x", ("batch", "s", "joined"), ("*", "S", "C"))]
    has_bias = draw(st.booleans())
    for p in parts:
        c = ("C",) * len(outs[p])
        args.append(Arg(f"{p}.weight", "weights", (*outs[p], "taps"), (*c, "J"), weight=True))
        args.append(Arg(f"{p}.bias", "biases", outs[p], c, weight=True) if has_bias else None)
    attrs = (("taps", size["taps"]), ("parts", parts))
    sums = {"joined": tuple(outs.values())}
    return Case("parallel_conv", size, tuple(args), attrs, "s", ("batch",), sums, reach=(size["taps"] - 1, 0))


def _reduction(draw: Draw, name: str, sizes: Any) -> Case:
    """Dims that go and dims that stay; along a sequence, for each batch row or for all."""
    kind = draw(st.sampled_from(table()[name].operand_kinds["x"]))
    if draw(st.booleans()):
        lead, over, sequence = (
            ("batch", "outer")[: draw(st.integers(0, 2))],
            ("d_outer", "d")[draw(st.integers(0, 1)) :],
            None,
        )
    else:
        lead, over, sequence = ("batch",), ("s", "d")[: draw(st.integers(1, 2))], "s"
    size = {d: draw(SMALL if d in ("batch", "outer") else sizes) for d in (*lead, *over)}
    if sequence and draw(st.booleans()):
        over, stay = (*lead, *over), ()
    else:
        stay = lead
    settings = [("over", over)] if draw(st.booleans()) or not stay else [("except", stay)]
    x = Arg("x", "x", (*stay, *over), ("*",) * len(stay) + ("D",) * len(over), kind)
    return Case(name, size, (x,), tuple(settings), sequence, lead)


def _dropout(draw: Draw, sizes: Any) -> Case:
    dims = tuple("ab"[: draw(st.integers(0, 2))])
    x = Arg("x", "x", dims, ("D",) * len(dims))
    return Case("dropout", {d: draw(sizes) for d in dims}, (x,), (("rate", draw(st.sampled_from((0.0, 0.25)))),))


def _reshape(draw: Draw, sizes: Any, joined: bool) -> Case:
    """Two dims that become one; that a split is the way back is `test_reshape_there_and_back`."""
    size = {d: draw(sizes) for d in ("batch", "a_outer", "a", "inner")}
    x = Arg("x", "x", ("batch", "a_outer", "a", "inner"), ("*", "A", "A", "*"))
    attrs = (("map", (("a_outer", "a"), ("b",))),)
    return Case("reshape", size, (x,), attrs, lead=("batch", "inner"), sums={"b": (("a_outer", "a"),)})


def _concat(draw: Draw, sizes: Any, joined: bool) -> Case:
    size = {d: draw(sizes) for d in ("batch", "a", "b")}
    x, y = (Arg(name, name, ("batch", d), ("*", f)) for name, d, f in (("x", "a", "A"), ("y", "b", "B")))
    return Case("concat", size, (x, y), (("map", (("a", "b"), ("c",))),), lead=("batch",), sums={"c": (("a",), ("b",))})


def _dot(draw: Draw, sizes: Any, joined: bool) -> Case:
    size = {d: draw(sizes) for d in ("batch", "h", "k", "n")}
    x = Arg("x", "x", ("batch", "h", "k"), ("*", "H", "K"))
    y = Arg("y", "y", ("h", "k", "n"), ("H", "K", "N"))
    return Case("dot", size, (x, y), (("over", ("k",)),), lead=("batch",))


def _take(draw: Draw, sizes: Any, joined: bool) -> Case:
    size = {"batch": draw(SMALL), "s": draw(sizes)}
    x = Arg("x", "x", ("batch", "s"), ("*", "S"))
    return Case("take", size, (x,), (("index", draw(st.integers(0, size["s"] - 1))), ("over", ("s",))), lead=("batch",))


def _index(draw: Draw, sizes: Any, joined: bool) -> Case:
    return Case("index", {"d": draw(sizes)}, (), (("dim", ("d",)),))


def _slopes(draw: Draw, sizes: Any, joined: bool) -> Case:
    return replace(_index(draw, sizes, joined), name="slopes")


def _coordinate(draw: Draw, sizes: Any, joined: bool) -> Case:
    size = {"batch": draw(SMALL), "s": draw(sizes)}
    which = draw(st.sampled_from(("position", "document")))
    return Case("coordinate", size, (), (("dim", ("s",)), ("which", which)), "s", ("batch",))


# --- what a use is taken apart into ---------------------------------------------------------------


def _conversion(draw: Draw, sizes: Any, joined: bool) -> Case:
    """On a mesh of one rank a conversion is the identity, whatever it is of."""
    dims = ("a", "b")[: draw(st.integers(1, 2))]
    size = {d: draw(sizes) for d in dims}
    pairs = [(k, *p.split(" -> ")) for k, ps in lib.spmd.LEGAL.items() if k != "reinterpret" for p in ps]
    kind, src, dst = draw(st.sampled_from(pairs))
    places = draw(st.permutations(range(len(dims))))
    if kind == "all_to_all" and len(dims) == 1:
        kind, src, dst = "convert", "R", "S"
    ends = [places[i % len(dims)] if x == "S" else x for i, x in enumerate((src, dst))]
    attrs = (("kind", kind), ("axes", ("ranks",)), ("src", ends[0]), ("dst", ends[1]), ("to", dims))
    return Case("convert", size, (Arg("x", "x", dims, ("*",) * len(dims)),), attrs)


def _lead(draw: Draw) -> tuple[str, ...]:
    return ("batch", "outer")[: draw(st.integers(0, 2))]


def _over_several(draw: Draw, lead: tuple[str, ...], sizes: Any) -> tuple[tuple[str, ...], dict[str, int]]:
    """Dims of a statistic, and all sizes."""
    over = ("d", "d_inner")[: draw(st.integers(1, 2))]
    return over, {**{d: draw(SMALL) for d in lead}, **{d: draw(sizes) for d in over}}


def _in_runs(draw: Draw, sizes: Any) -> tuple[tuple[str, ...], tuple[str, ...], dict[str, int]]:
    """Leading dims, dims of a statistic of which the first is `g` runs, and all sizes."""
    lead = _lead(draw)
    over, size = _over_several(draw, lead, sizes)
    size["g"] = draw(SMALL)
    return lead, over, {**size, "d": size["g"] * draw(SMALL)}


def _group_squares(draw: Draw, sizes: Any, joined: bool) -> Case:
    lead, over, size = _in_runs(draw, sizes)
    x = Arg("x", "x", (*lead, *over), ("*",) * len(lead) + ("D",) * len(over))
    return Case("group_squares", size, (x,), (("over", over), ("into", ("g",))), lead=lead, tied={"d": "g"})


def _scaled_rows(draw: Draw, sizes: Any, joined: bool) -> Case:
    """`count` is that of all ranks, so it need not be the number of places that are here."""
    lead, over, size = _in_runs(draw, sizes)
    first, many = ("*",) * len(lead), ("D",) * len(over)
    args = (
        Arg("x", "x", (*lead, *over), first + many),
        Arg("weight", "weight", over, many),
        Arg("s", "s", (*lead, "g"), (*first, "G")),
    )
    attrs = (("over", over), ("into", ("g",)), ("eps", draw(EPSILONS)), ("count", draw(st.integers(1, 8))))
    return Case("scaled_rows", size, args, attrs, lead=lead, tied={"d": "g"})


EPSILONS = st.sampled_from((1e-5, 1e-2))


def _centred(draw: Draw, sizes: Any) -> tuple[tuple[str, ...], tuple[str, ...], dict[str, int], list[Any]]:
    lead = _lead(draw)
    over, size = _over_several(draw, lead, sizes)
    return lead, over, size, [("over", over), ("count", draw(st.integers(1, 8)))]


def _row_sums(draw: Draw, sizes: Any, joined: bool) -> Case:
    lead = _lead(draw)
    over, size = _over_several(draw, lead, sizes)
    x = Arg("x", "x", (*lead, *over), ("*",) * len(lead) + ("D",) * len(over))
    return Case("row_sums", size, (x,), (("over", over),), lead=lead)


def _centred_squares(draw: Draw, sizes: Any, joined: bool) -> Case:
    lead, over, size, attrs = _centred(draw, sizes)
    first = ("*",) * len(lead)
    args = Arg("x", "x", (*lead, *over), first + ("D",) * len(over)), Arg("total", "total", lead, first)
    return Case("centred_squares", size, args, tuple(attrs), lead=lead)


def _centred_rows(draw: Draw, sizes: Any, joined: bool) -> Case:
    lead, over, size, attrs = _centred(draw, sizes)
    first, many = ("*",) * len(lead), ("D",) * len(over)
    args = (
        Arg("x", "x", (*lead, *over), first + many),
        Arg("weight", "weight", over, many),
        Arg("bias", "bias", over, many) if draw(st.booleans()) else None,
        Arg("total", "total", lead, first),
        Arg("squares", "squares", lead, first),
    )
    attrs += [("eps", draw(EPSILONS)), ("zero_centred", draw(st.booleans()))]
    return Case("centred_rows", size, args, tuple(attrs), lead=lead)


def _place(draw: Draw) -> tuple[int, int]:
    ranks = draw(st.integers(1, 3))
    return draw(st.integers(0, ranks - 1)), ranks


def _channels(draw: Draw) -> tuple[str, ...]:
    return ("c_outer", "c")[draw(st.integers(0, 1)) :]


def _rows_before(draw: Draw, sizes: Any, joined: bool) -> Case:
    """A sequence may be shorter than the rows that are asked for."""
    channels = _channels(draw)
    size = {"batch": draw(SMALL), "s": draw(sizes), "b": draw(st.integers(0, 4)), **{c: draw(SMALL) for c in channels}}
    x = Arg("x", "x", ("batch", "s", *channels), ("*", "S", *("C",) * len(channels)))
    attrs = (("into", ("b",)), ("count", size["b"]), ("axes", ("ranks",)))
    return Case("rows_before", size, (x,), attrs, "s", ("batch",), place=(0, 1))


def _conv_behind(draw: Draw, sizes: Any, joined: bool) -> Case:
    channels, taps = _channels(draw), draw(sizes)
    size = {"batch": draw(SMALL), "s": draw(sizes), "b": taps - 1, "taps": taps, **{c: draw(SMALL) for c in channels}}
    c = ("C",) * len(channels)
    args = (
        Arg("x", "x", ("batch", "s", *channels), ("*", "S", *c)),
        Arg("before", "before", ("batch", "b", *channels), ("*", "B", *c)),
        Arg("weight", "weight", (*channels, "taps"), (*c, "J")),
        Arg("bias", "bias", channels, c) if draw(st.booleans()) else None,
    )
    return Case("conv_behind", size, args, (("taps", taps),), "s", ("batch",), place=_place(draw))


# (dims, formals) of the operands of a scan and of its parts.
_SCAN = {
    **dict.fromkeys(("u", "y"), (("batch", "s", "h", "p"), "*SHP")),
    "dt": (("batch", "s", "h"), "*SH"),
    **dict.fromkeys(("b", "c"), (("batch", "s", "g", "n"), "*SGN")),
    **dict.fromkeys(("A_log", "D", "dt_bias"), (("h",), "H")),
    "decay": (("batch", "h"), "*H"),
    **dict.fromkeys(("state", "enter"), (("batch", "h", "p", "n"), "*HPN")),
}


def _scan_part(draw: Draw, name: str, sizes: Any, operands: str) -> Case:
    size = {"batch": draw(SMALL), "s": draw(sizes), "g": draw(SMALL), "p": draw(SMALL), "n": draw(SMALL)}
    size["h"] = size["g"] * draw(SMALL)
    # `state` is a name that generated code has taken.
    args = tuple(Arg("left" if o == "state" else o, o, _SCAN[o][0], tuple(_SCAN[o][1])) for o in operands.split())
    attrs = (("chunk", draw(st.integers(1, size["s"] + 1))),) if name == "ssd_inside" else ()
    return Case(name, size, args, attrs, "s", ("batch",), tied=TIED["ssd"], place=_place(draw))


def _ssd_leave(draw: Draw, sizes: Any, joined: bool) -> Case:
    return _scan_part(draw, "ssd_leave", sizes, "u dt b A_log dt_bias")


def _ssd_inside(draw: Draw, sizes: Any, joined: bool) -> Case:
    return _scan_part(draw, "ssd_inside", sizes, "u dt b c A_log D dt_bias")


def _ssd_behind(draw: Draw, sizes: Any, joined: bool) -> Case:
    return _scan_part(draw, "ssd_behind", sizes, "y dt c A_log dt_bias enter")


def _ssd_before(draw: Draw, sizes: Any, joined: bool) -> Case:
    case = _scan_part(draw, "ssd_before", sizes, "decay state")
    size = {d: n for d, n in case.sizes.items() if d in ("batch", "h", "p", "n")}
    return Case("ssd_before", size, case.args, (("axes", ("ranks",)),), lead=("batch",))


# --- values ---------------------------------------------------------------------------------------

POSITIVE = {("log", "x"), ("sqrt", "x"), ("pow", "x"), ("div", "y"), ("floordiv", "y"), ("nll", "s")}
POSITIVE |= {("scaled_rows", "s"), ("centred_rows", "squares")}


def draw_tensors(draw: Draw, case: Case) -> Tensors:
    """Values of every operand, in fp64. Bases of powers, logarithms and divisors are positive and not small."""
    make = torch.Generator().manual_seed(draw(st.integers(0, 1 << 16)))
    found = {}
    for a in case.given:
        shape = case.shape(a.dims)
        if a.kind == "mask":
            found[a.name] = torch.randint(0, 2, shape, generator=make) > 0
        elif a.kind == "real":
            x = torch.randn(shape, generator=make, dtype=torch.float64)
            found[a.name] = x.abs() + 0.25 if (case.name, a.operand) in POSITIVE else x
            if case.name == "top_k":
                found[a.name] = x.round()  # many are equal
        else:
            least, end = (
                (-1, case.size("v"))
                if case.name in ("cross_entropy", "picked")
                else (-1 if case.name == "nll" else 0, case.size("v") if "v" in case.sizes else 11)
            )
            found[a.name] = torch.randint(least, end, shape, generator=make)
    if case.name == "sum_exp":  # near the largest logit, as it is made
        found["m"] = found["logits"].amax(-1) + found["m"].abs()
    return found


def draw_document(draw: Draw, case: Case) -> Tensor | None:
    """int64 [batch, seq]: documents that stand one behind the other; None for a case without coordinates."""
    if case.sequence is None:
        return None
    batch = math.prod(case.size(d) for d in case.lead)
    size = case.size(case.sequence) * (case.place or (0, 1))[1]
    starts = st.lists(st.booleans(), min_size=size, max_size=size)
    return torch.tensor([draw(starts) for _ in range(batch)]).view(batch, -1).cumsum(1)


def cuts(draw: Draw, size: int) -> list[tuple[int, int]]:
    """[0, size) in parts, at any places, single elements included."""
    inner = sorted(draw(st.sets(st.integers(1, size - 1)))) if size > 1 else []
    bounds = [0, *inner, size]
    return list(pairwise(bounds))
