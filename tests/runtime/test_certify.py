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
    ],
)
def test_a_layout_holds(mesh: str, more: str) -> None:
    card = certify(*made(mesh, more), seq=8)
    assert card["holds"] and card["numbers"]["close"] is True and card["numbers"]["compared"] > 20
    assert card["proof"]["values"] > 20 and card["proof"]["split"]
    assert card == certify(*made(mesh, more), seq=8)


def test_numbers_that_differ_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients whose sums are forgotten: the proof is about the program, the numbers about what runs."""
    monkeypatch.setattr(module, "sync_gradients", lambda model: None)
    card = certify(*made("data = 2, tensor = 1"), seq=8)
    assert card["numbers"]["close"] is False and not card["holds"]


def test_what_is_too_large_is_not_run_and_says_so() -> None:
    card = certify(*made("data = 32, tensor = 1"), seq=8)
    assert card["holds"] and card["numbers"]["close"] is None and "32 ranks" in card["numbers"]["why"]


@pytest.mark.parametrize(("ranks", "chunks", "batches"), [(1, 1, 1), (4, 1, 4), (2, 3, 4), (4, 2, 8)])
def test_published_schedules_end(ranks: int, chunks: int, batches: int) -> None:
    assert module._ends([order(r, ranks, batches, chunks) for r in range(ranks)], ranks, chunks)


def test_a_schedule_that_waits_for_itself_does_not_end() -> None:
    """The first rank wants a gradient back before it has sent what that is of."""
    orders = [[Action("B", 0), Action("F", 0)], [Action("F", 0), Action("B", 0)]]
    assert not module._ends(orders, 2, 1)
