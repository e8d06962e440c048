"""The words of the language: every op is one, and each says what it means."""

from __future__ import annotations

import re
from pathlib import Path

from heddle.dsl.grammar_tables import KEYWORDS
from heddle.dsl.vocabulary import BUILTINS, DISTRIBUTIONS, KINDS, OPS, RESERVED
from heddle.lowering.ops import table

ROOT = Path(__file__).resolve().parents[2]
# Ops that only passes make.
INNER = re.compile(r"parallel_\w+|coordinate|\w+_rotated|rotated_\w+")


def test_every_op_is_a_word() -> None:
    missing = {name for name in table() if name not in BUILTINS and not INNER.fullmatch(name)}
    assert missing == set()


def test_each_word_has_a_meaning_of_one_line() -> None:
    for word, (kind, meaning) in BUILTINS.items():
        assert re.fullmatch(r"[a-z][a-z0-9_]*", word)
        assert all(re.fullmatch(r"\S(.*\S)?", text) for text in (kind, meaning))


def test_sets_are_of_words() -> None:
    assert BUILTINS.keys() >= OPS | KINDS | DISTRIBUTIONS


def test_reserved_words_are_those_of_the_grammar() -> None:
    assert set(KEYWORDS) - set(RESERVED) <= {"between", "per", "over"}
    assert set(RESERVED) <= set(KEYWORDS)
