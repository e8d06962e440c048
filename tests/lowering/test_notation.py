"""A graph printed in the notation of specs is that graph when it is read: behind every pass."""

from __future__ import annotations

import pytest
from hypothesis import given, settings

from heddle.dsl.diagnostics import SpecError
from heddle.dsl.load import load, shipped_folder
from heddle.lowering.graph import GraphProgram
from heddle.lowering.notation import parse_graphs, print_graphs
from heddle.lowering.pipeline import PASSES, lower
from heddle.runtime.check import program_of

from .decoders import decoders, program

STAGES = ("build", *(p.name for p in PASSES))
TINY = sorted(shipped_folder().glob("*/tiny.spec"))


def comes_back(graphs: GraphProgram) -> None:
    text = print_graphs(graphs)
    again = parse_graphs(text)
    assert again == graphs.graphs
    assert print_graphs(graphs.with_graphs({name: again[name] for name in graphs.graphs})) == text


@pytest.mark.parametrize("path", TINY, ids=lambda p: p.parent.name)
@pytest.mark.parametrize("stage", STAGES)
def test_twins_come_back(path, stage):
    comes_back(lower(program_of(load(path)), stage))


@settings(max_examples=20)
@given(text=decoders())
def test_any_decoder_comes_back_behind_every_pass(text):
    made = program(text)
    for stage in STAGES:
        comes_back(lower(made, stage))


def test_a_change_in_the_dump_is_a_change_of_the_graph():
    """The test can fail: every line of a dump matters."""
    graphs = lower(program_of(load(TINY[0])))
    lines = print_graphs(graphs).splitlines()
    missed = []
    for i, line in enumerate(lines):
        if not line.startswith("    ") or line.strip() == "":
            continue
        try:
            same = parse_graphs("\n".join(lines[:i] + lines[i + 1 :]) + "\n") == graphs.graphs
        except (SpecError, ValueError, KeyError, TypeError, StopIteration):
            same = False
        if same:
            missed.append(line)
    assert missed == []
