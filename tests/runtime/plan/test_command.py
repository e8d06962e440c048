"""`heddle plan`: what it prints, what it searches, and what it says of input that cannot be."""

from __future__ import annotations

import json
import re
from itertools import groupby, pairwise

import pytest
from typer.testing import CliRunner

from heddle.runtime.cli import app

SPEC = """
use llama from "llama/llama.spec"

model small = llama(vocab = 256, hidden = 32, ffn = 48, layers = 3, heads = 4, kv_heads = 2)

layout one:
    mesh data = 1

layout tp:
    mesh data = 2, tensor = 2
    shard vocab, heads, kv_heads, ffn over tensor
    shard seq over tensor between blocks
    shard batch over data

layout zero = tp with:
    shard optimizer over data
"""
PIPES = """
layout pipes:
    mesh data = 2, pipe = 3, tensor = 2
    shard vocab, heads, kv_heads, ffn over tensor
    shard batch, optimizer over data
    stages over pipe, microbatches = 4
"""


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    (tmp_path / "a.spec").write_text(SPEC)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*words, code=0):
    result = CliRunner().invoke(app, ["plan", "a.spec", "--seq", "16", *map(str, words)])
    assert result.exception is None or isinstance(result.exception, SystemExit), repr(result.exception)
    assert result.exit_code == code, (result.stdout, result.stderr)
    return result.stdout, result.stderr


def data(*words):
    return json.loads(run("--format", "json", *words)[0])


def test_a_plan_as_data_adds_up():
    found = data("--layout", "tp", "--precision", "bf16", "--batch", 8)
    (stage,) = found["groups"]
    assert found["pipeline"] is None and stage["stages"] == []
    held = stage["bytes"]
    names = ("parameters", "gradients", "optimizer", "constants", "working", "reserved")
    assert held["total"] == sum(held[n] for n in names)
    assert found["microbatches"] == 4 and found["tokens"] == 8 * 16 and found["ranks"] == 4
    assert sum(w["bytes"] for w in stage["weights"]) == held["parameters"]
    for what in ("blocks", "lines"):
        assert sum(row["saved"] for row in stage[what]) == held["saved"]
    assert sum(row["parameters"] for row in stage["blocks"]) == stage["parameters"]
    assert sum(row["parameters"] for row in stage["lines"]) == held["parameters"]
    assert found["seconds"] == pytest.approx(stage["times"]["total"])
    assert found["mfu"] == pytest.approx(found["model_flops"] / (found["seconds"] * 4 * 989.5e12))
    lines = {row["line"] for row in stage["collectives"] if row["phase"] in ("forward", "backward")}
    assert lines and all(".spec:" in line for line in lines)


def test_the_processor_that_plans_is_not_the_one_that_is_planned_for(monkeypatch):
    """On processors without matrix units the CPU's products of bf16 run in fp32, some rows at a time."""
    from heddle.runtime.lib import product

    words = ("--layout", "tp", "--precision", "bf16", "--batch", 8, "--seq", 256)
    found = []
    for tiles in (False, True):
        monkeypatch.setattr(product, "_has_tiles", lambda tiles=tiles: tiles)
        found.append(data(*words))
    assert found[0] == found[1]


def test_micro_batches_repeat_what_a_micro_batch_sends_and_not_the_sums():
    one, four = (data("--layout", "tp", "--batch", n)["groups"][0]["collectives"] for n in (2, 8))
    for a, b in zip(one, four, strict=True):
        assert b["count"] == a["count"] * (1 if a["phase"] == "sync" else 4)


def test_a_layout_on_one_rank_sends_nothing():
    stage = data("--layout", "one")["groups"][0]
    assert stage["collectives"] == []
    assert stage["parameters"] == data("--layout", "one")["parameters"]


def test_a_split_optimizer_leaves_a_part_on_each_rank():
    plain, split = (data("--layout", name)["groups"][0] for name in ("tp", "zero"))
    steps = 4 * len(plain["weights"])  # counts of steps are not split
    assert abs(plain["bytes"]["optimizer"] - 2 * split["bytes"]["optimizer"]) <= 16 * steps
    kinds = {(row["phase"], row["kind"], tuple(row["axes"])) for row in split["collectives"]}
    assert {("sync", "reduce_scatter", ("data",)), ("sync", "all_gather", ("data",))} <= kinds
    assert split["bytes"]["saved"] == plain["bytes"]["saved"]


def test_the_mesh_can_be_changed_from_outside():
    assert data("--layout", "tp", "--set", "tp.mesh.data=8", "--set", "layers=1")["mesh"] == {"data": 8, "tensor": 2}


def test_what_does_not_fit_is_said_with_what_would_help(monkeypatch):
    from dataclasses import replace

    from heddle.runtime.plan import devices

    tiny = replace(devices.DEVICES["h100-80g"], memory=400_000, reserved=0)
    monkeypatch.setitem(devices.DEVICES, "h100-80g", tiny)
    found = data("--layout", "tp", "--microbatch", 2)
    assert not found["fits"] and found["over_bytes"] == found["groups"][0]["bytes"]["total"] - 400_000
    assert any("`shard optimizer over data` saves" in line for line in found["helps"])
    assert any("--microbatch 1 saves" in line for line in found["helps"])
    assert any("`mesh tensor = 4` saves" in line for line in found["helps"])
    assert any("`recompute blocks` saves" in line for line in found["helps"])
    out, _ = run("--layout", "tp", "--microbatch", 2)
    assert "does not fit: a rank needs" in out
    rows = data("--layout", "tp", "--search", 4)["candidates"]
    assert any(row["why"].startswith("does not fit: ") for row in rows)


def test_a_search_ranks_what_fits_and_says_why_the_others_lost():
    rows = data("--layout", "tp", "--search", 8, "--batch", 8)["candidates"]
    assert rows[0]["why"] == "the best" and rows[0]["fits"]
    shown = [row["mfu"] for row in rows if row["fits"]]
    assert shown == sorted(shown, reverse=True) and len(shown) > 3
    assert all(row["tokens"] == 8 * 16 for row in rows if row["fits"])
    assert all("of the best one's speed: " in row["why"] for row in rows[1:] if row["fits"])
    assert [row["why"] for row in rows if "mfu" not in row and row["mesh"] == {"data": 1, "tensor": 8}] != []
    assert all(row["why"].startswith("uneven-split: ") for row in rows if "mfu" not in row)
    assert "the best" in run("--layout", "tp", "--search", 8)[0]


def test_tables_and_page(place):
    out, _ = run("--layout", "tp", "--html", "plan.html")
    for words in (
        "optimizer state",
        "layer.*.attention",
        "reduce_scatter",
        "tokens a second",
        "saved for the backward",
    ):
        assert words in out
    page = (place / "plan.html").read_text()
    assert page.startswith("<!doctype html>") and "http" not in page
    assert "ranks 0, 2: heads[0:2]" in page or "ranks 0, 2: kv_heads[0:1]" in page
    run("--layout", "tp", "--html", "again.html")
    assert (place / "again.html").read_text() == page


@pytest.mark.parametrize(("words", "code"), [
    (["--device", "h100-80"], "unknown-device"), (["--layout", "tpp"], "unknown-name"),
    (["--set", "tp.mesh.tensr=2", "--layout", "tp"], "unknown-name"), (["--set", "tp.mesh=2"], "bad-override"),
    (["--set", "one.mesh.data=2", "--layout", "tp"], "bad-override"), (["--precision", "fp8"], "unknown-setting"),
    (["--set", "tp.mesh.tensor=3", "--layout", "tp"], "uneven-split"), (["--batch", "3", "--layout", "tp"], "uneven-batch"),
    (["--html", "no/such/folder.html", "--layout", "tp"], "cannot-write"), (["--set", "width=3"], "no-such-parameter"),
])  # fmt: skip
def test_bad_input_is_a_diagnostic(words, code, place):
    before = sorted(p.name for p in place.iterdir())
    out, err = run(*words, code=2)
    assert f"error[{code}]: " in err and not out
    assert sorted(p.name for p in place.iterdir()) == before
    assert json.loads(run(*words, "--format", "json", code=2)[0])["diagnostics"][0]["code"] == code


def test_what_is_not_planned_yet_says_so(place):
    (place / "a.spec").write_text(f"{SPEC}\nlayout more = tp with:\n    shard gradients over data\n")
    assert "error[not-built-yet]: " in run("--layout", "more", code=2)[1]


def test_what_is_recomputed_is_not_saved_and_costs_more_work(place):
    (place / "a.spec").write_text(f"{SPEC}\nlayout more = tp with:\n    recompute blocks\n")
    plain, again = (data("--layout", name)["groups"][0] for name in ("tp", "more"))
    assert again["bytes"]["saved"] < plain["bytes"]["saved"] / 2
    assert again["bytes"]["working"] < plain["bytes"]["working"]
    assert plain["flops"] < again["flops"] < 1.34 * plain["flops"]


def test_parameters_that_are_stored_in_parts_are_gathered(place):
    """For each pass anew, where nothing else is said; or once, and then they are kept for the backward pass."""
    (place / "a.spec").write_text(
        f"{SPEC}\nlayout more = tp with:\n    shard parameters over data\n"
        "\nlayout kept = tp with:\n    shard parameters over data between microbatches\n"
    )
    plain, parts, kept = (data("--layout", name)["groups"][0] for name in ("tp", "more", "kept"))
    for what in ("parameters", "optimizer"):
        assert parts["bytes"][what] == kept["bytes"][what] < 0.6 * plain["bytes"][what]

    def gathers(stage):
        rows = (r for r in stage["collectives"] if (r["kind"], r["axes"]) == ("all_gather", ["data"]))
        return {phase: sum(r["count"] for r in mine) for phase, mine in groupby(rows, lambda r: r["phase"])}

    # Each of 9 weights of 3 layers, and those of the model; the table's numbers are in no gradient.
    assert gathers(kept) == {"forward": 9 * 3 + 3} and gathers(parts) == {"forward": 30, "backward": 29}
    whole = plain["bytes"]["parameters"] - sum(w["bytes"] for w in plain["weights"] if w["path"] == "embedding.weight")
    assert kept["bytes"]["saved"] - parts["bytes"]["saved"] == whole
    assert parts["bytes"]["saved"] == plain["bytes"]["saved"]


def test_a_file_without_a_layout(place):
    (place / "a.spec").write_text(SPEC.partition("layout one")[0])
    assert "error[unknown-name]: `a.spec` has no layout" in run(code=2)[1]


# --- pipelines -----------------------------------------------------------------------------------


@pytest.fixture
def pipes(place):
    (place / "a.spec").write_text(SPEC + PIPES)
    return place


def test_a_plan_of_stages_as_data_adds_up(pipes):
    found = data("--layout", "pipes")
    line, groups = found["pipeline"], found["groups"]
    assert (line["axis"], line["schedule"], line["stages"], found["microbatches"]) == ("pipe", "1f1b", 3, 4)
    assert [g["ranks"]["runs"] for g in groups] == [[[0, 2], [6, 2]], [[2, 2], [8, 2]], [[4, 2], [10, 2]]]
    whole = data("--layout", "tp")["groups"][0]
    assert sum(g["parameters"] for g in groups) == whole["parameters"]
    assert [s["holds"] for g in groups for s in g["stages"]] == [
        ["embedding", "layer 0"], ["layer 1"], ["layer 2", "final", "logits"],
    ]  # fmt: skip
    assert found["tokens"] == 2 * 4 * 16 and found["batch"] == 8
    assert found["seconds"] == max(g["times"]["total"] for g in groups) >= line["seconds"]
    for group, row, waiting in zip(groups, line["timeline"], line["waiting"], strict=True):
        (stage,) = group["stages"]
        assert stage["parameters"] == group["parameters"] and stage["parameter_bytes"] == group["bytes"]["parameters"]
        assert group["bytes"]["saved"] == stage["in_flight"] * stage["saved"] < group["bytes"]["working"]
        assert stage["flops"] == group["flops"] > 0
        assert sum(r["saved"] for r in group["blocks"]) == sum(r["saved"] for r in group["lines"]) == (
            group["bytes"]["saved"]
        )  # fmt: skip
        assert [kind for kind, *_ in row].count("F") == [kind for kind, *_ in row].count("B") == 4
        assert all(a[4] <= b[3] for a, b in pairwise(row))
        work = sum(stop - start for *_, start, stop in row)
        assert work + waiting == pytest.approx(line["seconds"]) and group["times"]["waiting"] == waiting
        assert work == pytest.approx(4 * sum(stage["seconds"].values()))
        for message in group["collectives"]:
            if message["phase"] in ("forward", "backward"):
                assert ".spec:" in message["line"], message
            assert message["kind"] != "receive"
    sent = [r for g in groups for r in g["collectives"] if r["kind"] == "send"]
    assert all(r["line"] == "a.spec:22" for r in sent)
    # A node has eight ranks: 6 and 7 are in the first, and send to 8 and 9, which are not.
    assert [r["inside_node"] for r in sent] == [False, True, False, True]


def test_a_batch_makes_the_micro_batches_of_the_stages(pipes):
    assert data("--layout", "pipes", "--batch", 8) == data("--layout", "pipes")
    _, err = run("--layout", "pipes", "--batch", 12, code=2)
    assert "error[uneven-batch]: the stages are for 4 micro-batches a step, and a batch of 12 rows makes 6" in err
    assert "--batch 8 does, or `microbatches = 6` in `pipes`" in err


def test_a_search_ranks_pipelines_too(pipes):
    rows = data("--layout", "pipes", "--search", 6, "--batch", 12)["candidates"]
    fit = [row for row in rows if row["fits"]]
    assert {row["mesh"]["pipe"] for row in fit} == {1, 2, 3}
    assert all(row["tokens"] == 12 * 16 for row in fit)
    assert any("waiting for other stages" in row["why"] for row in fit)
    (deep,) = (row["why"] for row in rows if row["mesh"]["pipe"] == 6)
    assert deep.startswith("stages-do-not-fit")
    few = data("--layout", "pipes", "--search", 2)["candidates"]
    assert few and all(row["tokens"] == 4 * 16 * row["mesh"]["data"] for row in few)


def test_deeper_pipelines_help_what_does_not_fit(pipes, monkeypatch):
    from dataclasses import replace

    from heddle.runtime.plan import devices

    tiny = replace(devices.DEVICES["h100-80g"], memory=100_000, reserved=0)
    monkeypatch.setitem(devices.DEVICES, "h100-80g", tiny)
    found = data("--layout", "pipes", "--set", "pipes.mesh.pipe=1", "--set", "layers=4")
    assert any("`mesh pipe = 2` saves" in line for line in found["helps"])
    found = data("--layout", "pipes", "--set", "layers=3")
    assert not found["fits"] and all("mesh pipe" not in line for line in found["helps"])  # 3 layers, 6 stages


def test_tables_and_page_of_a_pipeline(pipes):
    out, _ = run("--layout", "pipes", "--html", "plan.html")
    for words in ("3 stages over `pipe`, 1f1b", "flight", "wait", "the fullest, ranks 0 .. 1, 6 .. 7", "waiting"):
        assert words in out
    page = (pipes / "plan.html").read_text()
    assert "http" not in page and page.count("<details") == 3
    found = data("--layout", "pipes")
    titles = re.findall(r"<title>(forward|backward) of micro-batch (\d+) on stage (\d+): ", page)
    boxes = [(kind, str(batch), str(stage)) for row in found["pipeline"]["timeline"] for kind, batch, stage, *_ in row]
    assert [(kind[0].upper(), batch, stage) for kind, batch, stage in titles] == boxes
    bars = re.findall(r"<td>rank (\d+)</td>", page)
    assert bars == [str(rank) for rank in range(12)]
    assert "ranks 2, 8: kv_heads[0:1]" in page  # of those that have the second stage
    run("--layout", "pipes", "--html", "again.html")
    assert (pipes / "again.html").read_text() == page


def test_a_long_timeline_scrolls_and_shows_its_beginning(pipes):
    (pipes / "a.spec").write_text(SPEC + PIPES.replace("microbatches = 4", "microbatches = 1200"))
    run("--layout", "pipes", "--html", "plan.html")
    page = (pipes / "plan.html").read_text()
    assert "The schedule with the numbers of micro-batches, its beginning; it scrolls." in page
    assert 3 * 2 * 1200 < page.count("<rect") < 3 * 2 * 1200 + 6500


def test_a_page_of_a_schedule_in_which_gradients_of_weights_come_later(place):
    (place / "a.spec").write_text(
        f"{SPEC}\nlayout late:\n    mesh pipe = 2\n    stages over pipe, schedule = zero_bubble, microbatches = 4\n"
    )
    found = data("--layout", "late", "--html", "late.html")
    assert {box[0] for row in found["pipeline"]["timeline"] for box in row} == {"F", "B", "W"}
    assert set(found["groups"][0]["stages"][0]["seconds"]) == {"F", "B", "W"}
    page = (place / "late.html").read_text()
    assert "gradients of weights" in page and "<th>of weights</th>" in page
