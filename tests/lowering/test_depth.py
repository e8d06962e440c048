"""Depth is a number: what the compiler holds, does and writes for a layer, it holds, does and writes once."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import cache

import pytest

from heddle.codegen.emit import emit
from heddle.dsl.load import load_text, shipped_folder
from heddle.dsl.program import Program
from heddle.lowering.graph import Graph, GraphProgram
from heddle.lowering.pipeline import PASSES, lower
from heddle.runtime.check import program_of
from heddle.runtime.compile import build

KINDS = """
model deep(pattern, vocab = 16, hidden = 8, heads = 2):
    tokens[batch, seq]: token
    shared one = mlp(6)
    kinds = {"a": attention(heads, rotary = rope()), "-": mlp(12), "m": mamba2(heads, 4, 4, 1, taps = 3), "s": one,
             "E": moe(sigmoid_router(3, 1), 5)}
    x = embed(tokens, vocab -> hidden)
    for layer in kinds[pattern]:
        x = x + layer(rms_norm(x))
    logits = linear(x, hidden -> vocab)
    return logits
"""
PLAIN = """
block layers(number):
    x[hidden]
    for inner in number:
        x = x + mlp(rms_norm(x), 12)
    return x

model deep(number, vocab = 16, hidden = 8):
    tokens[batch, seq]: token
    x = embed(tokens, vocab -> hidden)
    for layer in 3:
        x = layers(x, number)
    logits = linear(x, hidden -> vocab)
    return logits
"""
SHALLOW, DEEP = 4, 4000


def patterned(depth: int, kinds: str) -> Program:
    """A program whose pattern has `depth` characters; each kind stands in it."""
    return program_of(load_text(KINDS, folder=shipped_folder()), "deep", {"pattern": (kinds * depth)[:depth]})


def plain(depth: int) -> Program:
    return program_of(load_text(PLAIN, folder=shipped_folder()), "deep", {"number": depth})


@cache
def made(family: str, depth: int) -> Program:
    return plain(depth) if family == "plain" else patterned(depth, family)


families = pytest.mark.parametrize("family", ["plain", "a", "a-m", "-sE", "Em-a"])


def sizes(graphs: GraphProgram) -> dict[str, tuple[int, int, int]]:
    return {g.name: (len(g.nodes), len(g.body.weights), len(g.body.dims)) for g in graphs.graphs.values()}


def calls(run: Callable[[], object]) -> Counter[str]:
    """How often each function of the compiler's three lower floors is called."""
    found: Counter[str] = Counter()

    def note(frame, event, _):
        if event == "call":
            module = frame.f_globals.get("__name__", "")
            if module.startswith(("heddle.lowering", "heddle.codegen")):
                found[f"{module}.{frame.f_code.co_qualname}"] += 1

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        run()
    finally:
        sys.setprofile(before)
    return found


@families
@pytest.mark.parametrize("stage", ["build", *(p.name for p in PASSES)])
def test_graphs_are_as_many_and_as_large_behind_every_pass(family, stage):
    few, many = (lower(made(family, depth), stage) for depth in (SHALLOW, DEEP))
    assert sizes(few) == sizes(many)
    assert few.states == many.states


@families
def test_lowering_does_the_same_work(family):
    """Counted, not timed: as many calls of as many functions, whatever the depth."""
    few, many = (made(family, depth) for depth in (SHALLOW, DEEP))
    first = calls(lambda: lower(few))
    assert first == calls(lambda: lower(many))
    assert first.total() > 100, "the count sees the passes"


@families
def test_graphs_differ_in_their_schedules_only(family):
    few, many = (lower(made(family, depth)).graphs for depth in (SHALLOW, DEEP))
    assert list(few) == list(many)
    assert any(few[name] != many[name] for name in few)
    for name in few:
        assert without_schedules(few[name]) == without_schedules(many[name])


def without_schedules(graph: Graph) -> Graph:
    instances = tuple(replace(i, schedule=i.schedule and ()) for i in graph.body.instances)
    return graph.with_nodes(graph.nodes, instances=instances)


@families
def test_source_grows_by_the_pattern_only(family):
    """The same lines, but for the kinds of the layers as a list, one word a layer."""
    few, many = (build(made(family, depth)).source for depth in (SHALLOW, DEEP))
    assert stripped(few) == stripped(many)


def stripped(source: str) -> list[str]:
    """The lines without the counts of a loop and without the list of its kinds."""
    kept, inside = [], False
    for line in source.splitlines():
        if line.strip() == ")":
            inside = False
        if not inside:
            kept.append(line if "range(" not in line else line.split("range(")[0])
        if line.endswith("kind in ("):
            inside = True
    return kept


def test_the_count_of_calls_sees_work_that_grows():
    """The test can fail: the table of initial values has to look at the weights of every layer."""
    few, many = (calls(lambda p=p: emit(lower(p), "test").model) for p in map(plain, (1, 2)))
    assert few.total() < many.total()
