"""The words of the language: every op is one, and each says what it means."""

from __future__ import annotations

import re
from pathlib import Path

from heddle.dsl.grammar_tables import KEYWORDS
from heddle.dsl.vocabulary import BUILTINS, DISTRIBUTIONS, KINDS, OPS, RESERVED
from heddle.lowering.ops import table

ROOT = Path(__file__).resolve().parents[2]
# Ops that only passes make say so.
INNER = "made by the compiler"


def test_every_op_is_a_word() -> None:
    missing = {name for name, op in table().items() if name not in BUILTINS and INNER not in op.meaning}
    assert missing == set()


def test_what_passes_make_is_no_word() -> None:
    assert not [name for name, op in table().items() if INNER in op.meaning and name in BUILTINS]


def test_each_word_has_a_meaning_of_one_line() -> None:
    for word, (kind, meaning) in BUILTINS.items():
        assert re.fullmatch(r"[a-z][a-z0-9_]*", word)
        assert all(re.fullmatch(r"\S(.*\S)?", text) for text in (kind, meaning))


def test_sets_are_of_words() -> None:
    assert BUILTINS.keys() >= OPS | KINDS | DISTRIBUTIONS


def test_reserved_words_are_those_of_the_grammar() -> None:
    assert set(KEYWORDS) - set(RESERVED) <= {"between", "per", "over"}
    assert set(RESERVED) <= set(KEYWORDS)
