"""Layouts that are wrong in the ways that large frameworks were: each is a finding that names the value and the factor.

The classes are those of bug reports (gradients of experts and of biases in torchtitan, norm weights and doubled sums of
auxiliary losses in Megatron-LM, losses over local tokens). Each is first shown to change a number.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest

from heddle.dsl.program import Node, Value
from heddle.lowering.graph import Graph, GraphProgram
from heddle.lowering.placement.laid import Stored
from heddle.lowering.placement.prove import Finding, prove

from .mutants import Mutant
from .sharded import BIASED, HARMLESS, Twin

HYBRID = Twin("nemotron_h/tiny.spec", "mesh tensor = 4\nshard vocab, heads, kv_heads, groups, ffn over tensor")
SEQUENCE = Twin("nemotron_h/tiny.spec", "mesh tensor = 2\nshard vocab, heads, kv_heads, groups, ffn over tensor\n"
                "shard seq over tensor between blocks")  # fmt: skip
EXPERTS = Twin("nemotron_h/tiny_moe.spec", "mesh data = 2, tensor = 2\nshard vocab, heads, kv_heads, ffn over tensor\n"
               "shard batch over data")  # fmt: skip
DENSE = Twin(BIASED, "mesh data = 2, tensor = 2\nshard vocab, heads, kv_heads?, ffn over tensor\nshard batch over data")


# --- changing a program by hand -----------------------------------------------------------------------


def node(graph: Graph, name: str) -> Node:
    return next(n for n in graph.nodes if any(r.name == name for r in n.results))


def conversions(graph: Graph, of: str) -> list[Node]:
    """The conversions of a value."""
    return [n for n in graph.nodes if n.op == "convert" and n.operands == (of,)]


def changed(program: GraphProgram, graph: str, nodes: Any, **body: Any) -> GraphProgram:
    made = program.graphs[graph].with_nodes(tuple(nodes), **body)
    return program.with_graphs({**program.graphs, graph: made})


def without(program: GraphProgram, graph: str, name: str) -> GraphProgram:
    """A conversion left out: who read its result reads what it was of."""
    (before,) = node(program.graphs[graph], name).operands
    nodes = [
        replace(n, operands=tuple(before if o == name else o for o in n.operands))
        for n in program.graphs[graph].nodes
        if n.name != name
    ]
    body = program.graphs[graph].body
    emits = tuple((k, label, before if v == name else v) for k, label, v in body.emits)
    return changed(program, graph, nodes, outputs=tuple(before if o == name else o for o in body.outputs), emits=emits)


def stored(program: GraphProgram, graph: str, weight: str, change: Callable[[Stored], Stored]) -> GraphProgram:
    own = program.laid.weights[graph]
    weights = {**program.laid.weights, graph: {**own, weight: change(own[weight])}}
    return replace(program, laid=replace(program.laid, weights=weights))


def summed(program: GraphProgram, graph: str, label: str, axes: tuple[str, ...]) -> GraphProgram:
    sums = {**program.laid.sums, graph: {**program.laid.sums[graph], label: axes}}
    return replace(program, laid=replace(program.laid, sums=sums))


def stated(
    program: GraphProgram, graph: str, value: str, atom: str, kind: str = "all_reduce", src: str = "P", dst: str = "I"
) -> GraphProgram:
    """What a block states, in another place (summed over the ranks of a factor) before it is stated."""
    own = program.graphs[graph]
    made = node(own, value)
    total = Value(f"{value}_total", made.results[0].type)
    attrs = (("kind", kind), ("axes", (atom,)), ("src", src), ("dst", dst), ("to", total.type.dims))
    at = own.nodes.index(made) + 1
    nodes = (*own.nodes[:at], Node((total,), "convert", (value,), attrs, (), made.spans), *own.nodes[at:])
    emits = tuple((k, label, total.name if v == value else v) for k, label, v in own.body.emits)
    return changed(program, graph, nodes, emits=emits)


# --- the corpus -----------------------------------------------------------------------------------


def norm_without_its_reduction() -> Mutant:
    """The grouped norm of a state space block, whose groups are split further: each rank has its own mean square."""
    program = HYBRID.sharded
    (total,) = conversions(program.graphs["mamba2"], "group_squares")
    return Mutant("norm", "", without(program, "mamba2", total.name))


def norm_that_was_not_taken_apart() -> Mutant:
    """The same, as if a rank's part were a group: an op that is right by itself, of something else."""
    program = HYBRID.sharded
    graph, whole = program.graphs["mamba2"], program.laid.whole["mamba2"]
    old = node(graph, "norm")
    local = replace(node(whole, "norm"), results=old.results, operands=old.operands[:2])
    bindings = (("D", old.bound("D")),)
    attrs = tuple((k, old.bound("D") if k == "over" else 1 if k == "groups" else v) for k, v in local.attrs)
    local = replace(local, attrs=attrs, bindings=bindings)
    nodes = [local if n is old else n for n in graph.nodes if not n.name.startswith("group_squares")]
    dims = tuple(d for d in graph.body.dims if "runs" not in d.name)
    return Mutant("norm", "", changed(program, "mamba2", nodes, dims=dims))


def bias_before_the_sum() -> Mutant:
    """A replicated bias that every rank adds to its part of a sum: counted once a rank (torchtitan #4245)."""
    program = DENSE.sharded
    graph = program.graphs["mlp"]
    (given,) = conversions(graph, "out.bias")
    return Mutant("bias", "", without(program, "mlp", given.name))


def auxiliary_loss_summed_twice() -> Mutant:
    """The balance of experts, summed over ranks in the block, and again with the other losses (Megatron-LM #7452)."""
    return Mutant("aux", "", stated(EXPERTS.sharded, "sigmoid_router", "balance", "data"))


def norm_of_gradients_without_a_shard() -> Mutant:
    """A split weight of which each rank adds its own squares only (Megatron-LM #5916)."""
    splits = ((), ())
    made = stored(SEQUENCE.sharded, "mlp", "up.weight", lambda s: replace(s, splits=splits))
    return Mutant("gradient norm", "", made, ("mlp", "up.weight", splits))


def loss_over_local_tokens() -> Mutant:
    """A rank's loss divided by the number of its own tokens (Megatron-LM #2206)."""
    program = DENSE.sharded
    return Mutant("loss", "", summed(stated(program, "next_token", "lm", "data"), "next_token", "loss:lm", ()))


def loss_that_is_replicated() -> Mutant:
    """A loss of which each rank starts the gradient, and all are summed: once a rank."""
    return Mutant("loss", "", stated(DENSE.sharded, "next_token", "lm", "tensor", "convert", "I", "R"))


def gradient_below_experts_without_its_sum() -> Mutant:
    """What enters the experts taken as invariant where each rank goes on with a part (torchtitan #4054)."""
    program = EXPERTS.sharded
    (entering,) = conversions(program.graphs["moe"], "routing")
    return Mutant("experts", "", without(program, "moe", entering.name))


def norm_weight_without_its_sum() -> Mutant:
    """The weight of a norm over rows that ranks share: each has the gradient of its rows (Megatron-LM #7452)."""
    made = stored(SEQUENCE.sharded, "layer_mlp", "rms_norm.weight", lambda s: replace(s, sync=()))
    return Mutant("sync", "", made)


def shared_keys_without_their_sum() -> Mutant:
    """Fewer key heads than ranks: those that share one have each a part of its gradient."""
    made = stored(HYBRID.sharded, "attention", "k.weight", lambda s: replace(s, sync=()))
    return Mutant("sync", "", made)


def tied_table_summed_by_one_use() -> Mutant:
    """A table that is the head, too, split over the vocabulary: its gradient over data is owed once."""
    made = stored(DENSE.sharded, "biased", "embedding.weight", lambda s: replace(s, sync=()))
    return Mutant("sync", "", made)


CORPUS: dict[str, tuple[Twin, Callable[[], Mutant], str, str | None, str]] = {
    "norm without its reduction": (HYBRID, norm_without_its_reduction, "norm", "tensor.1", "P"),
    "norm that was not taken apart": (HYBRID, norm_that_was_not_taken_apart, "norm", "tensor.1", "split along dim 2"),
    "bias before the sum": (DENSE, bias_before_the_sum, "out", "tensor", "I"),
    "auxiliary loss summed twice": (EXPERTS, auxiliary_loss_summed_twice, "balance", "data", "['data']"),
    "norm of gradients without a shard": (SEQUENCE, norm_of_gradients_without_a_shard, "up.weight", None, "((), ())"),
    "loss over local tokens": (DENSE, loss_over_local_tokens, "lm", "data", "those of one rank"),
    "loss that is replicated": (DENSE, loss_that_is_replicated, "lm", "tensor", "R"),
    "gradient below experts": (EXPERTS, gradient_below_experts_without_its_sum, "some", "tensor", "I"),
    "norm weight without its sum": (SEQUENCE, norm_weight_without_its_sum, "rms_norm", "tensor", "I"),
    "shared keys without their sum": (HYBRID, shared_keys_without_their_sum, "k", "tensor.1", "I"),
    "tied table without its sum": (DENSE, tied_table_summed_by_one_use, "embedding", "data", "I"),
}
"""Name -> twin, how it is made, and of the finding: the value, the factor, and what was found."""


@cache
def made(name: str) -> Mutant:
    return CORPUS[name][1]()


@pytest.mark.parametrize("name", CORPUS)
def test_it_is_a_mistake(name: str) -> None:
    """Another number comes out, silently: no rank fails."""
    far = CORPUS[name][0].far(made(name))
    assert HARMLESS < far < float("inf")


@pytest.mark.parametrize("name", CORPUS)
def test_it_is_found(name: str) -> None:
    _, _, value, factor, found = CORPUS[name]
    findings = prove(made(name).program)
    assert findings, "accepted"

    def fits(f: Finding) -> bool:
        return f.value == value and f.factor == factor and found in f.found and f.to_json()["spec"] is not None

    assert any(fits(f) for f in findings), "\n".join(map(str, findings))
