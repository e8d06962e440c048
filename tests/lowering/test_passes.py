"""Passes: what each changes, what none may change, and that a program is what it was when they are done."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import pytest
import torch
from hypothesis import given, settings

from heddle.codegen.emit import emit_module
from heddle.dsl.diagnostics import InternalError, SpecError
from heddle.dsl.load import load, shipped_folder
from heddle.dsl.program import Node, Program
from heddle.lowering.build import build
from heddle.lowering.graph import STRUCTURE, Graph, GraphProgram
from heddle.lowering.passes import Pass
from heddle.lowering.passes.drop_dead import drop_dead
from heddle.lowering.passes.fuse_parallel import fuse_parallel
from heddle.lowering.passes.hoist import hoist
from heddle.lowering.passes.infer_types import check_types, infer_types
from heddle.lowering.passes.stream import require_causal
from heddle.lowering.pipeline import PASSES, check_order, lower
from heddle.runtime.check import program_of

from .decoders import VOCAB, decoders, program
from .test_notation import patterns

OPTIONAL = (drop_dead, hoist, fuse_parallel)
any_model = decoders() | patterns()


def ops_of(graphs: GraphProgram, name: str) -> list[str]:
    return [n.op for n in graphs.graphs[name].nodes]


def lowered(made: Program, without: tuple[Pass, ...] = ()) -> GraphProgram:
    """The graphs behind all passes but some."""
    graphs = build(made)
    for step in PASSES:
        graphs = graphs if step in without else step(graphs)
    return graphs


# --- what is computed ----------------------------------------------------------------------------


def run(graphs: GraphProgram) -> dict[str, torch.Tensor]:
    """Logits, losses and gradients by the paths of the spec, in fp64, from one set of weights."""
    space: dict = {"__name__": "made"}
    exec(compile(emit_module(graphs, "test"), "<made>", "exec"), space)
    model = space["Model"]().initialise(1).cast(torch.float64).eval()
    tokens = torch.randint(0, VOCAB, (2, 9), generator=torch.Generator().manual_seed(0))
    document = torch.tensor([[0] * 4 + [1] * 5, [0] * 9])
    logits = model(tokens, document=document)
    losses = model.losses(tokens, document)
    (sum(losses.values()) + (logits**2).mean()).backward()
    grads = {}
    for path, holder, view in model.named_logical_parameters():
        place = view.storage_offset()
        full = holder.grad if holder.grad is not None else torch.zeros_like(holder)
        grads[path] = torch.as_strided(full.contiguous(), view.shape, view.stride(), place).clone()
    return {"logits": logits.detach(), **{f"loss {n}": v.detach() for n, v in losses.items()}, **grads}


@settings(max_examples=20)
@given(text=any_model)
def test_no_pass_changes_what_is_computed(text):
    """Each optional pass alone, and all together, from one set of weights: one function, one gradient. Without a fused
    product the numbers are the same bits."""
    made = program(text)
    plain = run(lowered(made, OPTIONAL))
    assert len(plain) > 5
    for without in [*combinations(OPTIONAL, 2), ()]:
        full = run(lowered(made, without))
        assert plain.keys() == full.keys()
        for name, value in plain.items():
            if fuse_parallel in without:
                assert torch.equal(full[name], value), name
            # Sums of at most a few hundred products of order one: a thousand roundings.
            scale = max(1.0, float(value.abs().max()))
            assert torch.allclose(full[name], value, rtol=0, atol=1000 * 2**-52 * scale), name


def test_a_pass_that_changes_a_value_is_seen():
    """The test can fail: a reader that takes its other operand computes something else."""
    made = twin("a = linear(x, hidden -> hidden)\nx = silu(a) - x")
    graphs = lowered(made)
    turned = tuple(replace(n, operands=n.operands[::-1]) if n.op == "sub" else n for n in graphs.model.nodes)
    changed = graphs.with_graphs({**graphs.graphs, "made": graphs.model.with_nodes(turned)})
    assert torch.equal(run(graphs)["logits"], run(lowered(made))["logits"])
    assert not torch.equal(run(graphs)["logits"], run(changed)["logits"])


# --- what holds behind every pass ----------------------------------------------------------------


def faults(graphs: GraphProgram) -> list[str]:
    """What is wrong with graphs, beyond what `verify` says: names that resolve nowhere, calls that do not fit."""
    found: list[str] = []
    for graph in graphs.graphs.values():
        graph.verify()
        check_types(graph)
        body = graph.body
        named = [n for d in body.dims for n in (*d.lead, *d.factors)]
        named += [n for v in body.inputs for n in v.type.dims] + [n for w in body.weights for n in w.dims]
        named += [n for node in graph.nodes if node.op not in STRUCTURE for _, dims in node.bindings for n in dims]
        found += [f"{graph.name}: no dim `{n}`" for n in named if n not in graph.dims]
        found += [f"{graph.name}: `{i.name}` has no body `{b}`" for i in body.instances for b in i.bodies
                  if b not in graphs.graphs]  # fmt: skip
        for things in (body.dims, body.instances, body.weights):
            names = [t.name for t in things]
            found += [f"{graph.name}: two things named `{n}`" for n in set(names) if names.count(n) > 1]
        for node in graph.nodes:
            if node.op in STRUCTURE:
                for callee in graph.instance(node.attr("instance")).bodies:
                    found += misfits(graph, node, graphs.graphs[callee])
    return found


def misfits(graph: Graph, node: Node, callee: Graph) -> list[str]:
    """Where what a call gives is not what the block takes: in number, dims and sizes; and what it gives back."""
    operands = node.operands if node.op != "route" else (node.operands[0], *node.operands[2:])
    given = [graph.values[o or ""].type.dims for o in operands]
    taken = [v.type.dims for v in callee.body.inputs]
    if node.op != "route" and node.op != "loop":
        given += [r.type.dims for r in node.results]
        taken += [callee.values[o].type.dims for o in callee.body.outputs[: len(node.results)]]
    where = f"{graph.name}: `{node.name}` and `{callee.name}`"
    if len(given) != len(taken):
        return [f"{where}: {len(given)} values for {len(taken)}"]
    found, bound = [], {}
    for ours, theirs in zip(given, taken):
        if node.op == "route" and len(ours) > len(theirs):  # an expert gets the rows that chose it, side by side
            continue
        if len(ours) != len(theirs) or any(graph.size(a) != callee.size(b) for a, b in zip(ours, theirs)):
            found.append(f"{where}: [{', '.join(ours)}] for [{', '.join(theirs)}]")
        else:
            found += [f"{where}: `{b}` is two dims" for a, b in zip(ours, theirs) if bound.setdefault(b, a) != a]
    return found


@settings(max_examples=20)
@given(text=any_model)
def test_graphs_are_whole_behind_every_pass(text):
    made = program(text)
    assert faults(build(made)) == []
    for step in PASSES:
        assert faults(lower(made, step.name)) == [], step.name


def test_a_graph_that_is_not_whole_is_seen():
    """The test can fail: a call with an operand too few, and one of another size."""
    graphs = lower(twin("x = mlp(x, 8)\nwide = linear(x, hidden -> 24)\nx = gated_mlp(x, 8) + mean(wide)"))
    for operands in ((), ("wide",)):
        nodes = tuple(replace(n, operands=operands) if n.name == "gated_mlp" else n for n in graphs.model.nodes)
        changed = graphs.with_graphs({**graphs.graphs, "made": graphs.model.with_nodes(nodes)})
        assert faults(graphs) == [] and len(faults(changed)) == 1


@pytest.mark.parametrize("step", PASSES, ids=lambda p: p.name)
@settings(max_examples=12)
@given(text=any_model)
def test_a_second_time_changes_nothing(step, text):
    before = lower(program(text), step.name)
    after = step(before)
    assert after.graphs == before.graphs and after.states == before.states


@settings(max_examples=10)
@given(text=any_model)
def test_equal_texts_give_equal_graphs(text):
    first, second = lower(program(text)), lower(program(text))
    assert first.graphs == second.graphs and first.states == second.states and first.history == second.history
    assert list(first.graphs) == list(second.graphs)


@settings(max_examples=10)
@given(text=any_model)
def test_a_pass_leaves_what_it_was_given(text):
    """Pure: the graphs that went in are as they were, and every node keeps a line of the spec."""
    made = program(text)
    graphs = build(made)
    for step in PASSES:
        before = dict(graphs.graphs)
        after = step(graphs)
        assert graphs.graphs == before and list(graphs.graphs) == list(before)
        graphs = after
        assert all(n.spans and n.spans[0].source.text for g in graphs.graphs.values() for n in g.nodes)


def test_spans_of_all_parts_stay_with_what_is_fused():
    graphs = lower(twin("x = x + mamba2(x, heads, 4, 4, 2, taps = 3)"))
    (product,) = (n for n in graphs.graphs["mamba2"].nodes if n.op == "parallel_linear")
    (conv,) = (n for n in graphs.graphs["mamba2"].nodes if n.op == "parallel_conv")
    assert len(product.spans) == 5 and len({s.line for s in product.spans}) == 4
    assert len(conv.spans) == 3 + 3, "three convolutions, and the activation of each"


def test_order_of_passes_is_checked():
    with pytest.raises(ValueError, match="needs"):
        check_order((fuse_parallel, *PASSES))


def test_a_wrong_type_is_found():
    """The test can fail: a type that no op gives is an internal error."""
    made = build(program_of(load(shipped_folder() / "llama" / "tiny.spec")))
    graph = next(g for g in made.graphs.values() if any(n.op == "add" for n in g.nodes))
    nodes = tuple(
        replace(n, results=(replace(n.results[0], type=replace(n.results[0].type, kind="coordinate")),))
        if n.op == "add"
        else n
        for n in graph.nodes
    )
    with pytest.raises(InternalError, match="its op says"):
        infer_types(made.with_graphs({**made.graphs, graph.name: graph.with_nodes(nodes)}))


# --- each pass for itself ------------------------------------------------------------------------


def twin(body: str, more: str = "") -> Program:
    text = f"{more}model made(vocab = {VOCAB}, hidden = 16, heads = 4):\n    tokens[batch, seq]: token\n"
    text += "    x = embed(tokens, vocab -> hidden)\n" + "".join(f"    {line}\n" for line in body.strip().split("\n"))
    return program(text + "    logits = linear(x, hidden -> vocab)\n    return logits\n")


def test_drop_dead_drops_what_nobody_reads_and_keeps_what_states_a_loss():
    made = twin("a = linear(x, hidden -> hidden)\nb = silu(a)\ny[width] = sigmoid_router(x, 3, 1)\nx = x + a")
    before, after = lower(made, "infer_types"), lower(made, "drop_dead")
    assert "silu" in ops_of(before, "made") and "silu" not in ops_of(after, "made")
    assert "call" in ops_of(after, "made"), "the router's loss is asked for, though nobody reads its result"


def test_hoist_computes_rotations_once_for_all_layers():
    made = lower(program_of(load(shipped_folder() / "llama" / "tiny.spec")), "hoist")
    places = {g.name: [n.op for n in g.nodes if n.op in ("cos", "coordinate")] for g in made.graphs.values()}
    assert places.pop("llama") == ["coordinate", "cos"]
    objectives = set(made.program.objectives.values())
    assert all(not found for name, found in places.items() if name not in objectives)


def test_hoist_leaves_what_is_drawn_anew():
    """`dropout` of a constant is no constant."""
    made = lower(
        twin("place = index(hidden)\ny = dropout(place, 0.5)\nz = dropout(place, 0.5)\nx = x + y + z"), "hoist"
    )
    assert ops_of(made, "made").count("dropout") == 2


def test_fuse_parallel_joins_what_reads_one_input_and_nothing_else():
    made = lower(
        twin(
            "q = linear(x, hidden -> heads)\nk = linear(x, hidden -> heads)\no = linear(silu(x), hidden -> heads)\n"
            "x = x + linear(q + k + o, heads -> hidden)"
        ),
        "fuse_parallel",
    )
    assert ops_of(made, "made").count("parallel_linear") == 1
    (fused,) = (n for n in made.model.nodes if n.op == "parallel_linear")
    assert fused.attr("parts") == ("q", "k")


def test_a_tied_weight_is_not_fused():
    made = lower(
        twin(
            "q = linear(x, hidden -> heads)\nk = linear(x, hidden -> heads, weight = q.weight)\n"
            "x = x + linear(q + k, heads -> hidden)"
        ),
        "fuse_parallel",
    )
    assert "parallel_linear" not in ops_of(made, "made")


@pytest.mark.parametrize(
    ("layer", "kinds"),
    [("attention(x, heads)", [("cache", None)]), ("attention(x, heads, mask = window(5))", [("cache", 4)]),
     ("mamba2(x, heads, 4, 4, 2, taps = 3)", [("window", 2), ("fold", None)]), ("mlp(x, 8)", [])],
)  # fmt: skip
def test_states_follow_from_roles(layer, kinds):
    states = [s for found in lower(twin(f"x = x + {layer}")).states.values() for s in found]
    assert [(s.kind, s.keep) for s in states] == kinds


def test_what_looks_ahead_cannot_be_sampled_from():
    for layer, said in (
        ("attention(x, heads, mask = full)", "every later key"),
        ("attention(x, heads, mask = query.position - key.position > -3)", "2 keys ahead"),
        ("mean(x, over = seq)", "reads the whole sequence"),
    ):
        with pytest.raises(SpecError) as caught:
            require_causal(lower(twin(f"x = x + {layer}")))
        (found,) = caught.value.diagnostics
        assert found.code == "not-causal" and said in found.message and found.primary.span.source.text


def test_equal_layers_are_one_graph_however_many():
    few, many = (lower(twin(f"for layer in {n}:\n    x = x + mlp(x, 8)")) for n in (2, 3000))
    assert list(few.graphs) == list(many.graphs)
    assert [len(g.nodes) for g in few.graphs.values()] == [len(g.nodes) for g in many.graphs.values()]
    assert sum(n.op in STRUCTURE for n in many.model.nodes) == 1
