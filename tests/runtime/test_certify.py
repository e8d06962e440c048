"""The card of a layout: both opinions, and that each can say no."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from typer.testing import CliRunner

from heddle.codegen.emit import Files
from heddle.dsl.layout import layout_of
from heddle.dsl.load import load_text, shipped_folder
from heddle.runtime import certify as module
from heddle.runtime import compile as compiling
from heddle.runtime.certify import certify
from heddle.runtime.check import program_of
from heddle.runtime.cli import app
from heddle.runtime.lib.schedules import Action, order
from heddle.runtime.opinion.said import Opinion
from heddle.runtime.opinion.uses import Uses
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


@pytest.mark.parametrize(
    ("file", "accepted"),
    [("transformer_ls/enwik8_base.spec", None), ("lra/retrieval.spec", True)],
    ids=["asks for a number", "several sequences for a row"],
)
def test_models_that_run_hold_whether_spmd_types_can_read_them_or_not(file: str, accepted: bool | None) -> None:
    path = shipped_folder() / file
    layout = "layout drawn:\n    mesh data = 2, tensor = 2\n    shard heads? over tensor\n    shard batch over data\n"
    laid = load_text(f"{path.read_text(encoding='utf-8')}\n\n{layout}", folder=path.parent)
    card = certify(program_of(laid), layout_of(laid), seq=16)
    assert card["opinion"]["accepted"] is accepted and card["numbers"]["close"] is None
    assert card["run"]["ends"] is True and card["holds"]


# --- modules that do not run ------------------------------------------------------------------------

LARGE = "data = 32, tensor = 1"  # more ranks than are simulated
PLANTED = {
    "shape": ("lib.silu_mul(up, gate)", "lib.silu_mul(up[..., 1:], gate)"),
    "name": ("lib.silu_mul(up, gate)", "lib.silu_mul(up, gates)"),
    "arguments": ("lib.silu_mul(up, gate)", "lib.silu_mul(up, gate, 1)"),
}  # fmt: skip


@pytest.fixture
def plant(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Another statement in what is generated, in place of one."""

    def planted(old: str, new: str) -> None:
        made = compiling.emit

        def emit(*args: Any, **more: Any) -> Files:
            files = made(*args, **more)
            if "axes = {" not in files.model:  # one device is right
                return files
            return replace(files, model=files.model.replace(old, new))

        monkeypatch.setattr(compiling, "emit", emit)

    return planted


@pytest.mark.parametrize("asked", [True, False], ids=["spmd", "alone"])
@pytest.mark.parametrize("fault", ["shape", "name", "arguments"])
@pytest.mark.parametrize("mesh", [LARGE, "data = 2, tensor = 2"], ids=["large", "small"])
def test_a_module_that_cannot_be_run_does_not_hold(
    mesh: str, fault: str, asked: bool, plant: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Whoever else gives no answer: spmd_types ends in the same error or is not there, and numbers are not run."""
    plant(*PLANTED[fault])
    if not asked:
        monkeypatch.setattr(module, "is_installed", lambda: False)
    card = certify(*made(mesh), seq=8)
    print_card(card)
    assert not card["holds"] and card["run"]["ends"] is False and card["numbers"]["close"] is None
    assert "blocks.spec:14  return linear(act(gate) * up, ffn -> hidden, bias)" in card["run"]["line"]
    assert "DOES NOT COME TO ITS END: " in capsys.readouterr().out
    if asked:
        assert card["opinion"]["accepted"] is not True


@pytest.mark.parametrize("stages", [1, 2])
def test_what_one_stage_alone_has_is_run(stages: int, plant: Any) -> None:
    """A fault in the head, which only the last stage has."""
    mesh, more = "pipe = 2, data = 16, tensor = 1", "    stages over pipe, microbatches = 2\n"
    layout = made(*((mesh, more) if stages > 1 else (LARGE,)))
    assert certify(*layout, seq=8)["holds"]
    plant("final = lib.rms_norm(x, self.final.weight,", "final = lib.rms_norm(x, self.final.weight[1:],")
    assert not certify(*layout, seq=8)["holds"]


def test_an_error_in_the_backward_pass_alone_is_seen(plant: Any) -> None:
    plant("final = lib.rms_norm(x,", "x.register_hook(lambda grad: grad[1:])\n        final = lib.rms_norm(x,")
    card = certify(*made(LARGE), seq=8)
    assert card["opinion"]["accepted"] is True  # it reads the forward pass alone
    assert not card["holds"] and card["run"]["ends"] is False


def test_the_command_ends_with_1_for_a_module_that_cannot_be_run(plant: Any, tmp_path: Any) -> None:
    plant(*PLANTED["shape"])
    spec = tmp_path / "my.spec"
    spec.write_text(SPEC.replace("{mesh}", LARGE).replace("{more}", ""), encoding="utf-8")
    done = CliRunner().invoke(app, ["certify", str(spec)])
    assert done.exit_code == 1 and "DOES NOT COME TO ITS END: RuntimeError: " in done.output


def test_a_checker_that_fails_of_its_own_is_no_fault_of_the_module(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise AttributeError("of the checker")

    monkeypatch.setattr(Uses, "_why_not", fail)
    card = certify(*made(LARGE), seq=8)
    assert card["opinion"]["accepted"] is None and "of the checker" in card["opinion"]["why"]
    assert card["run"]["ends"] is True and card["holds"]


def test_what_depends_on_numbers_holds_where_something_else_has_run_it(
    plant: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    plant("embedding = lib.embed_part(", "float(self.logits.weight.detach().sum())\n        embedding = lib.embed_part(")
    plant("embedding = lib.embed(", "float(self.logits.weight.detach().sum())\n        embedding = lib.embed(")
    card = certify(*made(LARGE), seq=8)
    assert card["run"]["ends"] is None and card["opinion"]["accepted"] is True and card["holds"]
    monkeypatch.setattr(module, "is_installed", lambda: False)
    card = certify(*made(LARGE), seq=8)
    print_card(card)
    assert card["opinion"]["accepted"] is None and not card["holds"]
    assert "run: one step, on shapes alone, was not run to its end: " in capsys.readouterr().out
    assert certify(*made("data = 2, tensor = 2"), seq=8)["holds"]  # its numbers are run


# --- schedules --------------------------------------------------------------------------------------


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize(("ranks", "chunks", "batches"), [(1, 1, 1), (4, 1, 4), (2, 3, 4), (4, 2, 8)])
def test_published_schedules_end(ranks: int, chunks: int, batches: int, parts: int) -> None:
    assert module._ends([order(r, ranks, batches, chunks, parts) for r in range(ranks)], ranks, chunks)


def test_a_schedule_that_waits_for_itself_does_not_end() -> None:
    """The first rank wants a gradient back before it has sent what that is of."""
    orders = [[Action("B", 0), Action("F", 0)], [Action("F", 0), Action("B", 0)]]
    assert not module._ends(orders, 2, 1)
    assert not module._ends([[Action("F", 0), Action("W", 0), Action("B", 0)]], 1, 1)
