"""The tables that the parser runs on are those of the grammar."""

from __future__ import annotations

import pytest

from heddle.dsl import grammar_tables
from heddle.dsl.nodes import NESTING, Nodes
from heddle.dsl.tables import HERE, source_text
from heddle.dsl.tables import grammar_tables as build

GRAMMAR = (HERE / "grammar.lark").read_text(encoding="utf-8")


def test_tables_are_in_step_with_the_grammar() -> None:
    committed = (HERE / "grammar_tables.py").read_text(encoding="utf-8")
    assert source_text(build(GRAMMAR)) == committed, "run `python -m heddle.dsl.tables`"


def test_a_changed_grammar_would_be_noticed() -> None:
    changed = GRAMMAR.replace('mesh: "mesh" setting', 'mesh: "grid" setting')
    assert changed != GRAMMAR
    assert source_text(build(changed)) != source_text(build(GRAMMAR))


def test_a_conflict_is_refused() -> None:
    from lark.exceptions import GrammarError

    with pytest.raises(GrammarError):
        build(GRAMMAR.replace("?sum: term |", "?sum: term | sum |"))


def test_every_rule_has_its_method() -> None:
    methods = {method.removeprefix("?") for _, _, method, _ in grammar_tables.RULES if not method.startswith("?")} - {
        ""
    }
    assert {m for m in methods if not callable(getattr(Nodes, m, None))} == set()
    assert methods >= NESTING


def test_only_a_single_child_passes() -> None:
    """`?rule` is for choices: one that makes a node has a name behind `->`."""
    assert {length for _, length, method, _ in grammar_tables.RULES if method.startswith("?")} == {1}
