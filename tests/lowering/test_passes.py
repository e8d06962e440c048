"""Passes: what each changes, what none may change, and that a program is what it was when they are done."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings

from heddle.codegen.emit import emit_module
from heddle.dsl.diagnostics import InternalError, SpecError
from heddle.dsl.load import load, shipped_folder
from heddle.dsl.program import Program
from heddle.lowering.build import build
from heddle.lowering.graph import STRUCTURE, GraphProgram
from heddle.lowering.passes.drop_dead import drop_dead
from heddle.lowering.passes.fuse_parallel import fuse_parallel
from heddle.lowering.passes.hoist import hoist
from heddle.lowering.passes.infer_types import check_types, infer_types
from heddle.lowering.passes.stream import require_causal
from heddle.lowering.pipeline import PASSES, check_order, lower
from heddle.runtime.check import program_of

from .decoders import VOCAB, decoders, program

OPTIONAL = (drop_dead, hoist, fuse_parallel)


def ops_of(graphs: GraphProgram, name: str) -> list[str]:
    return [n.op for n in graphs.graphs[name].nodes]


def run(graphs: GraphProgram, made: Program) -> dict[str, torch.Tensor]:
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
@given(text=decoders())
def test_passes_do_not_change_what_is_computed(text):
    """The module of the graphs as they were built, and as every pass leaves them: one function, one gradient."""
    made = program(text)
    plain = run(lower(made, "settle"), made)
    full = run(lower(made), made)
    assert plain.keys() == full.keys() and len(plain) > 5
    for name, value in plain.items():
        # Sums of at most a few hundred products of order one: a thousand roundings.
        scale = max(1.0, float(value.abs().max()))
        assert torch.allclose(full[name], value, rtol=0, atol=1000 * 2**-52 * scale), name


@settings(max_examples=20)
@given(text=decoders())
def test_types_hold_behind_every_pass(text):
    made = program(text)
    for step in PASSES:
        for graph in lower(made, step.name).graphs.values():
            graph.verify()
            if step.name not in ("fuse_parallel", "stream"):
                check_types(graph)


@pytest.mark.parametrize("step", OPTIONAL, ids=lambda p: p.name)
@settings(max_examples=15)
@given(text=decoders())
def test_a_second_time_changes_nothing(step, text):
    before = lower(program(text), step.name)
    assert step(before).graphs == before.graphs


@settings(max_examples=10)
@given(text=decoders())
def test_equal_texts_give_equal_graphs(text):
    assert lower(program(text)).graphs == lower(program(text)).graphs


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
