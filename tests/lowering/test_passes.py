"""Passes: what each changes, what none may change, and that a program is what it was when they are done."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import networkx as nx
import pytest
import torch
from hypothesis import given, settings

from heddle.codegen.emit import emit
from heddle.dsl.diagnostics import InternalError, SpecError
from heddle.dsl.load import load, shipped_folder
from heddle.dsl.program import Node, Program
from heddle.lowering.build import build
from heddle.lowering.graph import STRUCTURE, Graph, GraphProgram, op_of
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


def twin(body: str, more: str = "") -> Program:
    text = f"{more}model made(vocab = {VOCAB}, hidden = 16, heads = 4):\n    tokens[batch, seq]: token\n"
    text += "    x = embed(tokens, vocab -> hidden)\n" + "".join(f"    {line}\n" for line in body.strip().split("\n"))
    return program(text + "    logits = linear(x, hidden -> vocab)\n    return logits\n")


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
    exec(compile(emit(graphs, "test").model, "<made>", "exec"), space)
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
    """Each optional pass alone, and all together, from one set of weights: one function, one gradient.

    Where no product is fused, the same bits.
    """
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
    """The test can fail: a difference the other way round is something else."""
    graphs = lowered(twin("a = linear(x, hidden -> hidden)\nx = silu(a) - x"))
    turned = tuple(replace(n, operands=n.operands[::-1]) if n.op == "sub" else n for n in graphs.model.nodes)
    changed = graphs.with_graphs({**graphs.graphs, "made": graphs.model.with_nodes(turned)})
    assert torch.equal(run(graphs)["logits"], run(graphs)["logits"])
    assert not torch.allclose(run(graphs)["logits"], run(changed)["logits"], rtol=0, atol=1e-6)


# --- what holds behind every pass ----------------------------------------------------------------


def faults(graphs: GraphProgram, all_inputs: bool = False) -> list[str]:
    """What is wrong with graphs, beyond what `verify` says: types, names that resolve nowhere, calls that do not fit.

    `all_inputs`: also those that a body of a loop never reads and takes because another body of it does.
    """
    found: list[str] = []
    for graph in graphs.graphs.values():
        graph.verify()
        check_types(graph)
        body = graph.body
        named = [n for d in body.dims for n in (*d.lead, *d.factors)]
        named += [n for v in body.inputs for n in v.type.dims] + [n for w in body.weights for n in w.dims]
        named += [n for node in graph.nodes if node.op not in STRUCTURE for _, dims in node.bindings for n in dims]
        found += [f"{graph.name}: no dim `{n}`" for n in named if n not in graph.dims]
        missing = [b for i in body.instances for b in i.bodies if b not in graphs.graphs]
        found += [f"{graph.name}: no body `{b}`" for b in missing]
        for things in (body.dims, body.instances, body.weights):
            names = [t.name for t in things]
            found += [f"{graph.name}: two things named `{n}`" for n in set(names) if names.count(n) > 1]
        for node in (n for n in graph.nodes if n.op in STRUCTURE and not missing):
            for callee in graph.bodies_of(node):
                found += misfits(graph, node, graphs.graphs[callee], all_inputs)
    return found


def misfits(graph: Graph, node: Node, callee: Graph, all_inputs: bool) -> list[str]:
    """Where what a call gives is not what the block takes, in number, dims and sizes; and what it gives back."""
    operands = node.operands if node.op != "route" else (node.operands[0], *node.operands[2:])
    pairs = [(graph.values[o or ""], v) for o, v in zip(operands, callee.body.inputs)]
    if node.op == "call":
        pairs += [(r, callee.values[o]) for r, o in zip(node.results, callee.body.outputs)]
    where = f"{graph.name}: `{node.name}` and `{callee.name}`"
    if len(operands) != len(callee.body.inputs):
        return [f"{where}: {len(operands)} values for {len(callee.body.inputs)}"]
    found: list[str] = []
    bound: dict[str, str] = {}
    for ours, theirs in pairs:
        a, b = ours.type.dims, theirs.type.dims
        if node.op == "route" and len(a) > len(b):  # an expert gets the rows that chose it, side by side
            continue
        if node.op == "loop" and theirs.name not in callee.users and not all_inputs:
            continue
        if len(a) != len(b) or any(graph.size(x) != callee.size(y) for x, y in zip(a, b)):
            found.append(f"{where}: {ours.type} for {theirs.type}")
        else:
            found += [f"{where}: `{y}` is two dims" for x, y in zip(a, b) if bound.setdefault(y, x) != x]
    return found


@settings(max_examples=40)
@given(text=any_model)
def test_graphs_are_whole_behind_every_pass(text):
    made = program(text)
    assert faults(build(made)) == []
    for step in PASSES:
        assert faults(lower(made, step.name)) == [], step.name


def test_bodies_of_a_loop_that_hoist_dims_of_one_name_and_two_sizes():
    made = twin(
        'kinds = {"a": attention(heads, rotary = rope()), "b": attention(heads, rotary = rope(part = 1/2))}\n'
        'for layer in kinds["ab"]:\n    x = x + layer(x)'
    )
    assert faults(lower(made, "drop_dead"), all_inputs=True) == []
    assert faults(lower(made, "hoist"), all_inputs=True) == []


@pytest.mark.parametrize("operands", [(), ("wide",)])
def test_a_graph_that_is_not_whole_is_seen(operands):
    """The test can fail: a call with an operand too few, and with one of another size."""
    graphs = lower(twin("wide = linear(x, hidden -> heads)\nx = gated_mlp(x, 8) + linear(wide, heads -> hidden)"))
    nodes = tuple(replace(n, operands=operands) if n.name == "gated_mlp" else n for n in graphs.model.nodes)
    changed = graphs.with_graphs({**graphs.graphs, "made": graphs.model.with_nodes(nodes)})
    assert faults(graphs) == [] and len(faults(changed)) == 1


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
    """Pure: the graphs that went in are as they were; and every node keeps a line of the spec."""
    graphs = build(program(text))
    for step in PASSES:
        before = dict(graphs.graphs)
        after = step(graphs)
        assert graphs.graphs == before and list(graphs.graphs) == list(before)
        graphs = after
        assert all(n.spans and n.spans[0].source.text for g in graphs.graphs.values() for n in g.nodes)


def test_order_of_passes_is_checked():
    with pytest.raises(ValueError, match="needs"):
        check_order((fuse_parallel, *PASSES))


# --- drop_dead -----------------------------------------------------------------------------------


def test_drop_dead_drops_what_nobody_reads_and_keeps_what_states_a_loss():
    made = twin("a = linear(x, hidden -> hidden)\nb = silu(a)\ny[width] = sigmoid_router(x, 3, 1)\nx = x + a")
    before, after = lower(made, "infer_types"), lower(made, "drop_dead")
    assert "silu" in ops_of(before, "made") and "silu" not in ops_of(after, "made")
    assert "call" in ops_of(after, "made"), "the router's loss is asked for, though nobody reads its result"


@settings(max_examples=20)
@given(text=any_model)
def test_drop_dead_drops_just_what_no_result_needs(text):
    """What stays is what the results, and the blocks that state a loss, are made from, by a walk of its own."""
    before, after = (lower(program(text), stage) for stage in ("infer_types", "drop_dead"))
    for name, graph in before.graphs.items():
        wanted = {graph.producers[r].name for r in graph.results if r in graph.producers}
        for node in (n for n in graph.nodes if n.op in STRUCTURE):
            if any(b in before.emitting for b in graph.instance(node.attr("instance")).bodies):
                wanted.add(node.name)
        needed = wanted.union(*(nx.ancestors(graph.topology, n) for n in wanted))
        assert after.graphs[name].nodes == tuple(n for n in graph.nodes if n.name in needed)
        assert replace(after.graphs[name].body, nodes=()) == replace(graph.body, nodes=())


# --- hoist ---------------------------------------------------------------------------------------


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


def of_no_data(graph: Graph) -> list[Node]:
    """Nodes that nothing but numbers and coordinates goes into."""
    data = {v.name for v in graph.body.inputs} | {w.name for w in graph.body.weights}
    for node in graph.nodes:
        drawn = node.op in STRUCTURE or op_of(node).draws(node)
        if drawn or data & set(node.operands) or any(r.type.kind not in ("real", "coordinate") for r in node.results):
            data.update(r.name for r in node.results)
    return [n for n in graph.nodes if n.name not in data]


@settings(max_examples=20)
@given(text=any_model)
def test_hoist_leaves_no_constant_in_a_block_and_none_twice_at_the_root(text):
    before, after = (lower(program(text), stage) for stage in ("settle", "hoist"))
    for name, graph in after.graphs.items():
        if name not in after.roots:
            assert of_no_data(graph) == []
            moved = of_no_data(before.graphs[name])
            assert [n.name for n in graph.nodes] == [n.name for n in before.graphs[name].nodes if n not in moved]
        alike = [repr((n.op, n.operands, n.attrs)) for n in of_no_data(graph)]
        assert len(set(alike)) == len(alike)


# --- fuse_parallel -------------------------------------------------------------------------------


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


@pytest.mark.parametrize(
    ("block", "parts"),
    [
        ("attention(x, heads, 2)", [("q", "k", "v")]),
        ("gated_mlp(x, 8)", [("gate", "up")]),
        ("mlp(x, 8)", []),
        ("mamba2(x, heads, 4, 4, 2)", [("z", "u", "b", "c", "dt")]),
    ],
)
def test_blocks_are_fused_as_their_families_ship_them(block, parts):
    made = lower(twin(f"x = x + {block}"), "fuse_parallel")
    fused = (n for g in made.graphs.values() for n in g.nodes if n.op == "parallel_linear")
    assert [n.attr("parts") for n in fused] == parts


def own_linears(graph: Graph) -> dict[tuple, list[Node]]:
    """Linear maps by what they read and along which dims, of those whose weights are theirs alone."""
    mine = {w.name for w in graph.body.weights}
    found: dict[tuple, list[Node]] = {}
    for node in (n for n in graph.nodes if n.op == "linear"):
        if all(o is None or o in mine and len(graph.users[o]) == 1 for o in node.operands[1:]):
            found.setdefault((node.operands[0], node.attr("map")[0]), []).append(node)
    return found


@settings(max_examples=20)
@given(text=any_model)
def test_fuse_parallel_joins_all_that_can_be_and_nothing_else_in_any_model(text):
    before, after = (lower(program(text), stage) for stage in ("hoist", "fuse_parallel"))
    for name, graph in before.graphs.items():
        fused = {n.operands[0]: n for n in after.graphs[name].nodes if n.op == "parallel_linear"}
        for (x, _), group in own_linears(graph).items():
            if len(group) > 1:
                weights = sorted(o for n in group for o in n.operands[1:] if o)
                assert sorted(o for o in fused.pop(x).operands[1:] if o) == weights
        assert not fused
        assert all(len(group) == 1 for group in own_linears(after.graphs[name]).values())
        assert after.graphs[name].body.weights == graph.body.weights
        assert after.graphs[name].results == graph.results


def test_a_tied_weight_is_not_fused():
    made = lower(
        twin(
            "q = linear(x, hidden -> heads)\nk = linear(x, hidden -> heads, weight = q.weight)\n"
            "x = x + linear(q + k, heads -> hidden)"
        ),
        "fuse_parallel",
    )
    assert "parallel_linear" not in ops_of(made, "made")


def test_an_activation_of_what_is_read_twice_is_not_fused():
    made = lower(
        twin(
            "u = linear(x, hidden -> hidden)\nv = linear(x, hidden -> hidden)\n"
            "uc = causal_conv(u, 3); vc = causal_conv(v, 3)\nx = silu(uc) + uc + silu(vc)"
        )
    )
    (conv,) = (n for n in made.model.nodes if n.op == "parallel_conv")
    assert conv.attr("act") is None and ops_of(made, "made").count("silu") == 2


def test_the_lines_of_all_parts_stay_with_what_is_fused():
    nodes = lower(twin("x = x + mamba2(x, heads, 4, 4, 2, taps = 3)")).graphs["mamba2"].nodes
    (product,) = (n for n in nodes if n.op == "parallel_linear")
    (conv,) = (n for n in nodes if n.op == "parallel_conv")
    assert len(product.spans) == 5 and len({s.line for s in product.spans}) == 4
    assert len(conv.spans) == 3 + 3, "three convolutions, and the activation of each"


# --- stream --------------------------------------------------------------------------------------

BACK = """
block back(x, a, b, out): return linear(x, [a, b] -> out)

"""
CACHE = (("k", (2, 4)), ("v", (2, 4)))


@pytest.mark.parametrize(
    ("layer", "states"),
    [
        ("attention(x, heads, 2)", [("cache", None, CACHE)]),
        ("attention(x, heads, 2, mask = window(5))", [("cache", 4, CACHE)]),
        ("attention(x, heads, 2, mask = window(1))", [("cache", 0, CACHE)]),
        (
            "attention(x, heads, 2, mask = causal and (window(3) or query.position - key.position < 7))",
            [("cache", 6, CACHE)],
        ),
        ("attention(x, heads, 2, mask = causal and query.document == key.document)", [("cache", None, CACHE)]),
        ("attention(x, heads, 2, mask = causal and key.position // 4 == query.position // 4)", [("cache", 3, CACHE)]),
        ("causal_conv(x, 4)", [("window", 3, (("row", (16,)),))]),
        (
            "back(causal_conv(linear(x, hidden -> [heads, vocab]), 1), heads, vocab, hidden)",
            [("window", 0, (("row", (4, VOCAB)),))],
        ),
        (
            "mamba2(x, heads, 8, 3, 2, taps = 3)",
            [
                ("window", 2, (("row", (4 * 8 + 2 * 3 * 2,)),)),
                ("fold", None, (("h", (4,)), ("p", (8,)), ("g", (2,)), ("n", (3,)))),
            ],
        ),
        ("mlp(x, 8)", []),
        ("x * mean(x, over = hidden)", []),
    ],
)
def test_states_follow_from_roles(layer, states):
    """A window is rows, a scan one state, attention the keys that a mask may still let see; the rest keeps nothing."""
    found = lower(twin(f"x = x + {layer}", BACK))
    made = [s for graph in found.callees_first() for s in found.states[graph.name]]
    assert [(s.kind, s.keep, s.rows) for s in made] == states


@settings(max_examples=20)
@given(text=any_model)
def test_states_belong_to_what_reads_along_the_sequence(text):
    graphs = lower(program(text))
    assert set(graphs.states) == set(graphs.graphs)
    for name, graph in graphs.graphs.items():
        kept = {s.node for s in graphs.states[name]}
        assert kept == {n.name for n in graph.nodes if n.op in ("attend", "ssd", "causal_conv", "parallel_conv")}
        assert all(s.keep is None or s.keep >= 0 for s in graphs.states[name])


@pytest.mark.parametrize(
    ("layer", "said", "shown"),
    [
        ("attention(x, heads, mask = full)", "every later key", "attend(qr, (kr, v, mask)"),
        ("attention(x, heads, mask = query.position - key.position > -3)", "2 keys ahead", "attend(qr, (kr, v, mask)"),
        ("attention(x, heads, mask = not window(4))", "every later key", "attend(qr, (kr, v, mask)"),
        ("mean(x, over = seq)", "reads the whole sequence", "mean(x, over = seq)"),
        ("max_over(x, over = seq)", "reads the whole sequence", "max_over(x, over = seq)"),
    ],
)
def test_what_looks_ahead_cannot_be_sampled_from(layer, said, shown):
    with pytest.raises(SpecError) as caught:
        require_causal(lower(twin(f"x = x + {layer}")))
    (found,) = caught.value.diagnostics
    span = found.primary.span
    assert found.code == "not-causal" and said in found.message
    assert span.source.text[span.start : span.end].startswith(shown)


def test_all_that_looks_ahead_is_said_at_once():
    with pytest.raises(SpecError) as caught:
        require_causal(lower(twin("first = attention(x, heads, mask = full)\nx = x + first + mean(x, over = seq)")))
    assert [d.code for d in caught.value.diagnostics] == ["not-causal"] * 2


def test_a_loss_may_look_ahead():
    """The router's balance is a mean over the sequence, and only training asks for it."""
    require_causal(lower(twin("x = x + moe(x, sigmoid_router(3, 2), 6)")))


def test_what_nobody_reads_may_look_ahead():
    require_causal(lower(twin("unread = mean(x, over = seq)")))
    require_causal(lower(twin("unread = attention(x, heads, mask = full)")))
