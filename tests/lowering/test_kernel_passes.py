"""Passes for kernels: what goes together, in which order, and that nothing of what is computed changes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from heddle.lowering.afterwards import parts
from heddle.lowering.chains.fused import groups, shape_of, structure
from heddle.lowering.chains.plan import plan
from heddle.lowering.chains.told import told
from heddle.lowering.constants import constants
from heddle.lowering.pipeline import lower
from heddle.lowering.target import TARGETS

from .decoders import decoders, program
from .test_notation import patterns
from .test_passes import faults, run, twin

TRITON = TARGETS["triton"]


def for_kernels(made):
    return lower(made, target=TRITON)


def as_torch(graphs):
    """The same graphs, each node computed by PyTorch."""
    return replace(graphs, target=TARGETS["cpu"], fused={})


def fused_of(body, more=""):
    graphs = for_kernels(twin(body, more))
    return [f.nodes for f in graphs.fused.get("made", ())], graphs


@settings(max_examples=15)
@given(text=decoders() | patterns())
def test_nothing_that_is_computed_changes(text):
    """Sums that move into the next iteration, and nodes that stand elsewhere: the same bits, forward and backward."""
    made = program(text)
    graphs = for_kernels(made)
    assert not faults(as_torch(graphs))
    plain, moved = run(lower(made)), run(as_torch(graphs))
    assert plain.keys() == moved.keys()
    for name, value in plain.items():
        if name == "logits" or name.startswith("loss"):
            assert torch.equal(moved[name], value), name
        # A value that two readers have gets its gradients in another order.
        scale = max(1.0, float(value.abs().max()))
        assert torch.allclose(moved[name], value, rtol=0, atol=100 * 2**-52 * scale), name


@settings(max_examples=25)
@given(text=decoders() | patterns())
def test_kernels_stand_together(text):
    """Each is one run of its block's nodes, in no two, and what it reads stands before it."""
    graphs = for_kernels(program(text))
    for name, fused in graphs.fused.items():
        graph = graphs.graphs[name]
        order = [n.name for n in graph.nodes]
        seen = [n for f in fused for n in f.nodes]
        assert len(seen) == len(set(seen))
        for f in fused:
            first = order.index(f.nodes[0])
            assert tuple(order[first : first + len(f.nodes)]) == f.nodes
            assert all(v in graph.producers or v in graph.values for v in f.inputs)
            assert not set(f.inputs) & set(f.nodes)


def test_a_norm_takes_what_is_around_it():
    nodes, _ = fused_of("h = x + silu(x)\ny = rms_norm(h)\nx = linear(y * h, hidden -> hidden)")
    assert len(nodes) == 1 and len(nodes[0]) == 4


def test_what_waits_for_something_outside_is_apart():
    """`a` is read by a product whose result comes back: one kernel would need its own output."""
    nodes, graphs = fused_of("a = silu(x)\nb = linear(a, hidden -> hidden)\nx = linear(a * b + x, hidden -> hidden)")
    assert all({"a", "x_2"} - set(n) for n in nodes)
    assert [len(n) for n in nodes] == [2]
    assert not faults(as_torch(graphs))


def test_alone_is_a_kernel_what_pytorch_passes_over_more_than_once():
    _, graphs = fused_of("y = relu2(x)\nx = linear(y, hidden -> hidden)")
    (fused,) = graphs.fused["made"]
    # Its derivative is made of its result, which the product keeps.
    assert plan(fused.chain).kept == fused.outputs
    assert fused_of("x = silu(x)")[0] == []


def test_rows_of_two_widths_are_two_kernels():
    nodes, _ = fused_of(
        "y = rms_norm(x)\nz = linear(y, hidden -> [heads, d = 4])\nw = rms_norm(z, over = [heads, d])\n"
        "v = rms_norm(w, over = [d])\nx = linear(v, [heads, d] -> hidden)"
    )
    assert len(nodes) == 3


def test_a_value_of_each_row_and_one_of_each_column():
    """`s` is a number a row, the weight a number a column."""
    _, graphs = fused_of("s = sum(x, over = hidden)\ny = rms_norm(x) * s\nx = linear(y, hidden -> hidden)")
    (fused,) = graphs.fused["made"]
    assert {e for e, _ in fused.given} >= {"x", "s", "weight"}


def test_equal_kernels_are_one_file():
    """Whatever their values are called."""
    _, graphs = fused_of("a = rms_norm(x)\nb = linear(a, hidden -> hidden)\nx = rms_norm(b)")
    assert len({structure(f.chain) for f in graphs.fused["made"]}) == 1
    _, graphs = fused_of("a = rms_norm(x)\nb = linear(a, hidden -> hidden)\nx = rms_norm(b, eps = 1e-3)")
    assert len({structure(f.chain) for f in graphs.fused["made"]}) == 2


LOOP = """
for layer in 3:
    x = x + mlp(ffn = 32)(rms_norm(x))
x = rms_norm(x)
"""


TWO_SUMS = """
for layer in 3:
    h = x + silu(x)
    x = h + mlp(ffn = 32)(rms_norm(h))
x = rms_norm(x)
"""


def test_a_sum_of_what_a_norm_reads_as_well_moves_too():
    _, graphs = fused_of(TWO_SUMS.strip())
    assert [n.attr("part") for n in graphs.model.nodes if n.op == "loop"] == [(0, 1), (1, 3)]


def test_the_sum_of_an_iteration_moves_into_the_next():
    _, graphs = fused_of(LOOP.strip())
    loops = [n for n in graphs.model.nodes if n.op == "loop"]
    assert [n.attr("part") for n in loops] == [(0, 1), (1, 3)]
    kernels = sorted(tuple(graphs.graphs[name].producers[n].op for n in f.nodes) for name, fs in graphs.fused.items() for f in fs)
    assert kernels == [("add", "rms_norm"), ("add", "rms_norm"), ("relu2",), ("rms_norm",)]


@pytest.mark.parametrize("why", ["recompute", "one", "kernel"])
def test_a_sum_stays_where_moving_it_does_not_pay(why):
    """`kernel`: one of its terms is made by a kernel, which writes the sum in its place."""
    body = LOOP.replace("in 3", "in 1") if why == "one" else LOOP
    body = body.replace("mlp(ffn = 32)(rms_norm(x))", "silu(mlp(ffn = 32)(rms_norm(x)))") if why == "kernel" else body
    made = twin(body.strip())
    graphs = for_kernels(made)
    if why == "recompute":
        from heddle.lowering.passes.postpone_sums import postpone_sums

        before = lower(made, "stream", target=TRITON)
        nodes = tuple(replace(n, attrs=(*n.attrs, ("recompute", True))) if n.op == "loop" else n for n in before.model.nodes)
        marked = before.with_graphs({**before.graphs, before.model.name: before.model.with_nodes(nodes)})
        assert postpone_sums(marked).graphs == marked.graphs
        return
    assert sum(n.op == "loop" for n in graphs.model.nodes) == 1


def test_dropout_is_part_of_a_kernel():
    """Beside a norm of its rows; each has numbers of its own, which are no values of the graph."""
    nodes, graphs = fused_of("h = x + dropout(silu(x), 0.1)\ny = dropout(rms_norm(h), 0.2)\nx = linear(y * h, hidden -> hidden)")
    assert len(nodes) == 1 and len(nodes[0]) == 6
    (fused,) = graphs.fused["made"]
    assert [n for _, n in fused.drawn] == ["dropout", "y"] and not {n for n, _ in fused.drawn} & {n for n, _ in fused.given}


def test_dropout_has_rows_of_its_last_dim():
    """Numbers count on along it; over [heads, d] a norm of both is a kernel of its own. Nothing at all is none."""
    body = "z = linear(x, hidden -> [heads, d = 4])\nw = rms_norm(dropout(z, 0.1), over = [heads, d])\nx = linear(w, [heads, d] -> hidden)"
    nodes, graphs = fused_of(body)
    assert [len(n) for n in nodes] == [1, 1] and {f.chain.columns for f in graphs.fused["made"]} == {4, 16}
    assert "`rms_norm` has rows of 16" in "\n".join(told(graphs, graphs.graphs["made"]))
    nodes, _ = fused_of("y = dropout(x, 0)\nx = linear(y, hidden -> hidden)")
    assert not nodes


def test_what_is_one_kernel_is_told_and_why_it_ends():
    _, graphs = fused_of("h = x + silu(x)\ny = rms_norm(h)\nx = linear(y, hidden -> hidden)")
    lines = "\n".join(told(graphs, graphs.graphs["made"]))
    assert "one kernel: silu, add, rms_norm of rows of 16" in lines
    assert "moves 2 tiles in place of 7" in lines
    assert "ends with `y`: `linear` works along more than a row" in lines


@settings(max_examples=30)
@given(columns=st.sampled_from((1, 2, 4, 8, 16, 32, 64)), lead=st.integers(0, 2))
def test_rows_end_where_dims_do(columns, lead):
    """A norm over parts of [heads, d] has rows of a part; of another width than divides them there is none."""
    body = f"z = linear(x, hidden -> [heads, d = 16])\nw = rms_norm(z, over = [heads, d], groups = {64 // columns})"
    body += "\nx = linear(w, [heads, d] -> hidden)"
    if 4 % (64 // columns):
        return
    graphs = for_kernels(twin(body))
    (fused,) = graphs.fused["made"]
    assert fused.chain.columns == columns
    graph = graphs.graphs["made"]
    assert shape_of(graph, [graph.producers[n] for n in fused.nodes]).columns == columns


def test_constants_are_in_no_kernel():
    """They are computed once, when the model is made."""
    graphs = for_kernels(program(decoder_with_rope()))
    graph = graphs.model
    apart = constants(graph, graphs)
    for nodes in groups(graph, parts(graph, graphs.emitting), apart):
        assert not {n.name for n in nodes} & set(apart)


def decoder_with_rope():
    return (
        "model made(vocab = 17, hidden = 16, heads = 4):\n    tokens[batch, seq]: token\n"
        "    x = embed(tokens, vocab -> hidden)\n    x = rms_norm(x)\n"
        "    logits = linear(x, hidden -> vocab)\n    return logits\n"
    )


def test_a_rotation_is_a_kernel_of_its_own():
    """Of half as wide rows as its values have; what is around it does not join."""
    graphs = for_kernels(
        program(
            "model made(vocab = 17, hidden = 16, heads = 2):\n    tokens[batch, seq]: token\n"
            "    x = embed(tokens, vocab -> hidden)\n    x = x + attention(rms_norm(x), heads, heads, rotary = rope())\n"
            "    logits = linear(x, hidden -> vocab)\n    return logits\n"
        )
    )
    rotated = [f for fs in graphs.fused.values() for f in fs if f.chain.name == "rotate"]
    assert len(rotated) == 2 and all(len(f.nodes) == 1 and f.chain.columns == 4 for f in rotated)
    lines = [line for g in graphs.callees_first() for line in told(graphs, g)]
    assert any("is a kernel of its own" in line or "works along more than a row" in line for line in lines)
