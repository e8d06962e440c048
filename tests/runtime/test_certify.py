"""The card of a layout: both opinions, and that each can say no."""

from __future__ import annotations

from typing import Any

import pytest

from heddle.dsl.layout import layout_of
from heddle.dsl.load import load_text
from heddle.runtime import certify as module
from heddle.runtime.certify import certify
from heddle.runtime.check import program_of
from heddle.runtime.lib.schedules import Action, order
from heddle.runtime.opinion.said import Opinion
from heddle.runtime.tables import print_card

SPEC = """
use llama from "llama/llama.spec"

model small = llama(vocab = 32, hidden = 16, ffn = 24, layers = 4, heads = 4, kv_heads = 2, head_dim = 4)

layout laid:
    mesh {mesh}
    shard vocab, heads, kv_heads, ffn over tensor
    shard batch over data
{more}"""


def made(mesh: str, more: str = "") -> Any:
    file = load_text(SPEC.replace("{mesh}", mesh).replace("{more}", more))
    return program_of(file), layout_of(file)


@pytest.mark.parametrize(
    ("mesh", "more"),
    [
        ("data = 2, tensor = 2", "    shard seq over tensor between blocks\n"),
        (
            "pipe = 2, tensor = 2, data = 1",
            "    stages over pipe, schedule = interleaved(chunks = 2), microbatches = 4\n",
        ),
        ("pipe = 2, tensor = 2, data = 1", "    stages over pipe, schedule = zero_bubble, microbatches = 2\n"),
    ],
)
def test_a_layout_holds(mesh: str, more: str) -> None:
    card = certify(*made(mesh, more), seq=8)
    assert card["holds"] and card["numbers"]["close"] is True and card["numbers"]["compared"] > 20
    assert card["proof"]["values"] > 20 and card["proof"]["split"]
    assert card["opinion"]["accepted"] is True and card["opinion"]["read"]["linear"]
    assert card == certify(*made(mesh, more), seq=8)


def test_numbers_that_differ_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients whose sums are forgotten: the proof is about the program, the numbers about what runs."""
    monkeypatch.setattr(module, "sync_gradients", lambda model: None)
    card = certify(*made("data = 2, tensor = 1"), seq=8)
    assert card["numbers"]["close"] is False and not card["holds"]


def test_a_second_opinion_that_refuses_is_said(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(module, "ask", lambda *a, **k: Opinion(False, "expected P, got R"))
    card = certify(*made("data = 2, tensor = 1"), seq=8)
    print_card(card)
    assert not card["holds"] and "REFUSES IT: expected P, got R" in capsys.readouterr().out


def test_without_spmd_types_the_card_says_that_it_was_not_asked(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(module, "is_installed", lambda: False)
    card = certify(*made("data = 2, tensor = 1"), seq=8)
    print_card(card)
    assert card["holds"] and card["opinion"]["accepted"] is None
    assert "spmd_types: not asked (spmd_types is not installed" in capsys.readouterr().out


def test_what_is_trusted_is_not_covered(capsys: Any) -> None:
    card = certify(*made("data = 2, tensor = 2"), seq=8)
    print_card(card)
    said = capsys.readouterr().out
    assert f"covered: {card['opinion']['conversions']} conversions, " in said
    assert "not covered: " in said and "2 attend" in said and "(it reads where its rows stand)" in said


def test_what_is_too_large_is_not_run_and_says_so() -> None:
    card = certify(*made("data = 32, tensor = 1"), seq=8)
    assert card["holds"] and card["numbers"]["close"] is None and "32 ranks" in card["numbers"]["why"]


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize(("ranks", "chunks", "batches"), [(1, 1, 1), (4, 1, 4), (2, 3, 4), (4, 2, 8)])
def test_published_schedules_end(ranks: int, chunks: int, batches: int, parts: int) -> None:
    assert module._ends([order(r, ranks, batches, chunks, parts) for r in range(ranks)], ranks, chunks)


def test_a_schedule_that_waits_for_itself_does_not_end() -> None:
    """The first rank wants a gradient back before it has sent what that is of."""
    orders = [[Action("B", 0), Action("F", 0)], [Action("F", 0), Action("B", 0)]]
    assert not module._ends(orders, 2, 1)
    assert not module._ends([[Action("F", 0), Action("W", 0), Action("B", 0)]], 1, 1)
