"""A graph printed in the notation of specs is that graph when it is read: behind every pass."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from heddle.dsl.diagnostics import SpecError
from heddle.dsl.load import load, shipped_folder
from heddle.lowering import notation
from heddle.lowering.graph import GraphProgram
from heddle.lowering.notation import parse_graphs, print_graphs
from heddle.lowering.pipeline import PASSES, lower
from heddle.runtime.check import program_of

from .decoders import decoders, program

STAGES = ("build", *(p.name for p in PASSES))
TINY = sorted(shipped_folder().glob("*/tiny*.spec"))

# --- random patterns -----------------------------------------------------------------------------

BLOCKS = """
block both(heads, ffn):
    x[hidden]
    return attention(x, heads, rotary = rope()) + gated_mlp(x, ffn) / 2

block parts(ffn):
    x[hidden]
    one, two = rms_norm(x), rms_norm(x)
    a = linear(one, hidden -> ffn); b = linear(one, hidden -> ffn, bias = true); c = linear(two, hidden -> ffn)
    unread = linear(one, hidden -> ffn)
    return linear(silu(a) * b + tanh(c), ffn -> hidden)

block chain(ffn):
    x[seq, hidden]
    shared inner = mlp(ffn)
    y = inner(x)
    u = linear(y, hidden -> ffn); v = linear(y, hidden -> ffn)
    uc = causal_conv(u, 3, bias = true); vc = causal_conv(v, 3)
    return inner(linear(silu(uc) * silu(vc), ffn -> hidden))

block stack(heads, number):
    x[hidden]
    for inner in number:
        x = x + attention(rms_norm(x), heads, rotary = rope(theta = 77))
    return x

block pair(heads):
    x[hidden]
    first  = attention(x, heads, rotary = rope(part = 1/2))
    second = attention(x + first, heads, rotary = rope())
    return first - second
"""
KINDS = (
    "attention(heads, kv_heads, rotary = rope())",
    "attention(heads, rotary = rope(part = 1/2, theta = 500), head_norm = rms_norm())",
    "attention(heads, mask = window({n}), bias = true)",
    "attention(heads, mask = causal and (query.position - key.position < {n} or key.position < {n}))",
    "mamba2(heads, hidden / heads, 4, 2, taps = {n}, chunk = {n})",
    "moe(sigmoid_router(3, 2), 6, latent = {n})",
    "mlp(ffn, silu)", "gated_mlp(ffn)", "both(heads, ffn)", "parts(ffn)", "chain(ffn)", "stack(heads, {n})",
    "pair(heads)", "common",
)  # fmt: skip


@st.composite
def patterns(draw: st.DrawFn) -> str:
    """A model named `made` whose layers are kinds in a pattern: blocks side by side, shared ones, loops in loops."""
    kinds = draw(st.lists(st.sampled_from(KINDS), min_size=1, max_size=4, unique=True))
    names = "abcd"[: len(kinds)]
    pattern = draw(st.text(names, min_size=1, max_size=5))
    stated = ", ".join(f'"{c}": {k.format(n=draw(st.integers(2, 4)))}' for c, k in zip(names, kinds))
    norm = draw(st.sampled_from(["rms_norm()", "layer_norm()", "layer_norm(zero_centred = true)"]))
    more = draw(st.sampled_from([
        "x = x + common(x) * common(x / 2)", "for again in kinds[pattern]:\n        x = x - again(norm(x))",
        "far[hidden] = x * (seq.position + 0.5) / 1e6 - 7e-9",
    ]))  # fmt: skip
    tied = draw(st.sampled_from(["", ", weight = embedding.weight"]))
    return f"""{BLOCKS}
model made(vocab = 37, hidden = 16, heads = 4, kv_heads = 2, ffn = 12, pattern = "{pattern}"):
    tokens[batch, seq]: token
    norm = {norm}
    shared common = gated_mlp(ffn)
    kinds = {{{stated}}}
    embedding = embed(tokens, vocab -> hidden)
    x = embedding
    for layer in kinds[pattern]:
        x = x + layer(norm(x))
    {more}
    final = norm(x)
    logits = linear(final, hidden -> vocab{tied})
    init linear, embed: normal(0.3)
    init linear in layer[first(1)]?: normal(0.1)
    return logits
"""


# --- there and back ------------------------------------------------------------------------------


def comes_back(graphs: GraphProgram) -> None:
    text = print_graphs(graphs)
    again = parse_graphs(text)
    assert again == graphs.graphs
    assert print_graphs(graphs.with_graphs({name: again[name] for name in graphs.graphs})) == text


@pytest.mark.parametrize("path", TINY, ids=lambda p: f"{p.parent.name}-{p.stem}")
@pytest.mark.parametrize("stage", STAGES)
def test_twins_come_back(path, stage):
    comes_back(lower(program_of(load(path)), stage))


@settings(max_examples=12)
@given(text=decoders() | patterns())
def test_any_decoder_comes_back_behind_every_pass(text):
    made = program(text)
    for stage in STAGES:
        comes_back(lower(made, stage))


@pytest.mark.parametrize("number", ["0", "-1", "2.5", "1e-30", "-1e300", "123456789012345678901", "1/3", "0.1 + 0.2"])
def test_numbers_come_back_to_the_last_bit(number):
    """As operands, settings, and starts of weights."""
    text = f"""
model made(vocab = 5, hidden = 4):
    tokens[batch, seq]: token
    x = embed(tokens, vocab -> hidden)
    x = clip(x * ({number}), low = {number})
    param gain[hidden] = {number}
    logits = linear(x + gain, hidden -> vocab)
    return logits
"""
    comes_back(lower(program(text)))


@cache
def dump(name: str) -> tuple[str, GraphProgram]:
    graphs = lower(program_of(load(shipped_folder() / f"{name}.spec")))
    return print_graphs(graphs), graphs


@pytest.mark.parametrize("name", ["llama/tiny", "nemotron_h/tiny_moe"])
def test_a_change_in_the_dump_is_a_change_of_the_graph(name):
    """The test can fail: every line of a dump matters."""
    text, graphs = dump(name)
    missed = []
    for block in re.split(r"\n(?=block )", text):
        lines = block.splitlines()
        for i, line in enumerate(lines):
            try:
                read = parse_graphs("\n".join(lines[:i] + lines[i + 1 :]) + "\n")
                same = all(graphs.graphs[name] == graph for name, graph in read.items())
            except (SpecError, ValueError):
                same = False
            if same and line.strip():
                missed.append(line)
    assert missed == []


def test_a_printer_that_forgets_is_seen(monkeypatch):
    """The test can fail: without the schedules of loops, the graphs do not come back."""
    _, graphs = dump("llama/tiny")
    comes_back(graphs)
    honest = notation._instance_call
    monkeypatch.setattr(notation, "_instance_call", lambda i: honest(replace(i, schedule=None)))
    with pytest.raises(AssertionError):
        comes_back(graphs)


# --- text that is no dump ------------------------------------------------------------------------

WORDS = re.compile(r"\w+|\s+|[^\w\s]")


@settings(max_examples=60)
@given(
    where=st.floats(0, 1, exclude_max=True),
    change=st.sampled_from(["", "none", "7", "[", "]", "=", "seq", "dim", "x", "-", "{} {}", "{}_", '"{}"', "({})"]),
)
def test_a_damaged_dump_is_refused_with_its_line_or_read(where, change):
    """One word is gone or another: never an error that says nothing of the text."""
    text, _ = dump("nemotron_h/tiny_moe")
    words = WORDS.findall(text)
    place = int(where * len(words))
    words[place] = change.format(words[place], words[place])
    damaged = "".join(words)
    try:
        read = parse_graphs(damaged, "damaged")
    except SpecError as error:
        assert all(d.primary.span.source.name == "damaged" for d in error.diagnostics)
    except ValueError as error:
        line = int(re.match(r"damaged:(\d+):\d+: ", str(error))[1])
        assert 1 <= line <= damaged.count("\n") + 1
    else:
        for graph in read.values():
            graph.verify()


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("model m(vocab = 2): return vocab\n", 1),
        ("block a(): return x\n", 1),
        ('block a(of = "a"):\n    return x\n', 1),
        ('block a(of = "a"):\n    seq = dim(none)\n    x[seq]: real\n    y: real[seq] = nothing(x)\n    return y\n', 4),
        ('block a(of = "a"):\n    seq = dim(none)\n    x[seq]: real\n    y: real[seq] = silu(z)\n    return y\n', 4),
        ('block a(of = "a"):\n    seq = dim(none)\n    x[seq]: real\n    y: real[keys] = silu(x)\n    return y\n', 1),
        ('block a(of = "a"):\n    seq = dim(none)\n    x[seq]: real\n    x: real[seq] = silu(x)\n    return x\n', 1),
        ('block a(of = "a"):\n    seq = dim(none)\n    x[seq]: real\n    return x\n' * 2, 5),
    ],
    ids=["a model", "no block", "no such result", "no such op", "no such value", "no such dim", "twice", "same name"],
)
def test_what_is_no_dump_is_said_with_its_line(text, line):
    with pytest.raises(ValueError, match=rf"^damaged:{line}:\d+: "):
        parse_graphs(text, "damaged")
