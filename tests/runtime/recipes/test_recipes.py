"""Recipes: planned whole before anything runs, every result made once, stopped and changed runs do what is left."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from heddle.dsl.diagnostics import SpecError
from heddle.dsl.load import load, load_text, shipped_folder
from heddle.runtime.cli import app
from heddle.runtime.compress import Scores, prune
from heddle.runtime.errors import UserError
from heddle.runtime.folder import load as load_folder
from heddle.runtime.recipes import planned, run_recipe
from heddle.runtime.recipes import run as module

SHIPPED = sorted((shipped_folder() / "minitron").glob("*.spec"))
TINY = shipped_folder() / "minitron" / "tiny.spec"
PUBLISHED = {
    "minitron_8b": {"teacher": 15_628_775_424, "student": 8_271_699_968},
    "minitron_4b": {"teacher": 8_271_699_968, "student": 4_190_509_056},
    "llama31_4b": {"teacher": 8_030_261_248, "tuned.0": 4_512_746_496, "tuned.1": 4_540_469_248},
    "mistral_nemo_8b": {"teacher": 12_247_782_400, "student": 8_414_105_600},
    "nemotron_h_47b": {"teacher": 56_324_350_464, "student": 46_791_554_816},
    "nano_9b_v2": {"teacher": 12_310_001_152, "student": 8_888_227_328},
}
"""Parameters of teachers and students, from the facts sheet (sections 1.1 and 2.2)."""


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_a_recipe_is_at_most_25_lines(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 25 and text.count("\nrecipe ") == 1


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes_are_planned(name):
    """The whole plan at published size: each cut is checked to be one, no weight is made."""
    plan = planned(load(shipped_folder() / f"minitron/{name}.spec"))
    made = {s.name: s.made.spec.program.num_parameters() for s in plan.steps if s.made.spec}
    assert {k: made[k] for k in PUBLISHED[name]} == PUBLISHED[name]
    assert set(plan.returned) <= set(made)


# --- running ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    work = tmp_path_factory.mktemp("recipes")
    (work / "texts").mkdir()
    for i in range(8):
        (work / f"texts/{i}.txt").write_text(f"the warp and the weft, {i} times over and under. " * (i + 8))
    run(work, work / "whole")
    return work


def run(work, out, **settings):
    """Run the tiny recipe; gives what it said."""
    said: list[str] = []
    run_recipe(load(TINY), None, [work / "texts"], out, settings, held_out=0.3, say=said.append)
    return said


def content(folder: Path) -> dict[str, bytes]:
    """The bytes of every result; boards and logs tell of times."""
    kept = ("model.safetensors", "scores.safetensors", "report.json", "step.json")
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.name in kept}


def again(said):
    """The steps that were not there."""
    return [
        line.split(":")[0]
        for line in said
        if line.endswith((": train", ": importance", ": prune", ": report", ": load"))
    ]


def test_every_result_is_a_folder_and_a_model_folder_opens(work):
    out = work / "whole"
    names = {"teacher", "right", "scores", "wide", "deep", "tuned.0", "tuned.1", "sizes"}
    assert {p.name for p in out.iterdir()} == names
    for name in ("right", "wide", "tuned.0", "tuned.1"):
        load_folder(out / name)
    rows = json.loads((out / "sizes/report.json").read_text())
    assert [r["model"] for r in rows] == ["right", "wide", "deep"] and all(0 < r["held_out"] < 10 for r in rows)
    told = CliRunner().invoke(app, ["generate", str(out / "tuned.1"), "--prompt", "the ", "--max-new-tokens", "3"])
    assert told.exit_code == 0


def test_a_second_run_does_nothing_and_another_folder_gets_the_same_bytes(work, tmp_path):
    before = content(work / "whole")
    assert again(run(work, work / "whole")) == []
    assert content(work / "whole") == before
    run(work, tmp_path / "other")
    assert content(tmp_path / "other") == before


@pytest.mark.parametrize("stop", ["right", "scores", "wide", "tuned.1"])
def test_a_run_that_is_stopped_goes_on_to_the_same_bytes(work, tmp_path, monkeypatch, stop):
    """Before a step leaves anything, and, where it trains, behind its first steps."""
    real = module.Runner.run

    def stopped(self, step):
        if step.name == stop:
            raise KeyboardInterrupt
        real(self, step)

    monkeypatch.setattr(module.Runner, "run", stopped)
    with pytest.raises(KeyboardInterrupt):
        run(work, tmp_path / "cut")
    monkeypatch.setattr(module.Runner, "run", real)
    done = {p.name for p in (tmp_path / "cut").iterdir()}
    assert stop not in done
    left = again(run(work, tmp_path / "cut"))
    assert stop in left and not done & set(left)
    assert content(tmp_path / "cut") == content(work / "whole")


def test_training_that_is_stopped_goes_on_bit_for_bit(work, tmp_path, monkeypatch):
    """The signal comes in the middle of a run: what it saved is taken up."""
    from heddle.runtime.train import loop

    real, count = loop._Run._one_step, [0]

    def counted(self):
        real(self)
        count[0] += 1
        if count[0] == 6:  # the second step of the second model
            import os
            import signal

            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(loop._Run, "_one_step", counted)
    with pytest.raises(KeyboardInterrupt):
        run(work, tmp_path / "cut")
    monkeypatch.setattr(loop._Run, "_one_step", real)
    assert not (tmp_path / "cut/right/step.json").is_file() and (tmp_path / "cut/right/checkpoints").is_dir()
    assert again(run(work, tmp_path / "cut"))[0] == "right"
    ours, theirs = (
        load_file(sorted((p / "right/checkpoints").iterdir())[-1] / "model.safetensors")
        for p in (tmp_path / "cut", work / "whole")
    )
    assert all((ours[k] == theirs[k]).all() for k in theirs)


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        ({"sizes.rows": 2}, ["sizes"]),
        ({"scores.samples": 4}, ["scores", "wide", "tuned.0", "sizes"]),
        ({"tuned.1.lr": 1e-4}, ["tuned.1"]),
        ({"right.seed": 5}, ["right", "scores", "wide", "deep", "tuned.0", "tuned.1", "sizes"]),
    ],
)
def test_a_change_makes_what_depends_on_it_again_and_nothing_else(work, tmp_path, change, wanted):
    out = shutil.copytree(work / "whole", tmp_path / "out")
    assert again(run(work, out, **change)) == wanted
    assert again(run(work, out, **change)) == []


# --- what is wrong is said before anything runs -----------------------------------------------------

TEXT = """
use llama from "llama/llama.spec"
use nemotron_h from "nemotron_h/nemotron_h.spec"

model big   = llama(vocab = 256, hidden = 32, ffn = 48, layers = 2, heads = 4, kv_heads = 2, head_dim = 8)
model wider = big(ffn = 64)
model odd   = big(heads = 3, kv_heads = 3)
model words = big(vocab = 200)
model many  = big(heads = 16)
model mixed = nemotron_h(vocab = 256, hidden = 32, pattern = "M*-", heads = 2, kv_heads = 1, head_dim = 16,
                         ssm_heads = 8, ssm_head_dim = 8, state = 8, groups = 2, ffn = 48)
model uneven = mixed(ssm_heads = 7)

recipe wrong(data):
    teacher = train(big, data, steps = 2)
    other   = train(mixed, data, steps = 2)
    {}
    return teacher
"""
WRONG = {
    "cut = prune(teacher, to = wider, by = importance(teacher, data))": ("not-a-part", "64"),
    "cut = prune(teacher, to = odd, by = importance(teacher, data))": ("not-a-part", "3"),
    "cut = prune(other, to = uneven, by = importance(other, data))": ("not-exact", "7"),
    "cut = prune(teacher, to = big, keep = {nothing: [0]})": ("unknown-dim", "nothing"),
    "cut = prune(teacher, to = mixed)": ("not-a-part", ""),
    "cut = prune(teacher, to = teacher)": ("wrong-type", "a model of a spec"),
    "cut = prune(big, to = big)": ("wrong-type", "with weights"),
    "cut = prune(teacher)": ("missing-argument", "to"),
    "a = train(many, data, steps = 2)\n    b = prune(a, to = big, by = importance(a, data), merge_heads = true)": (
        "cannot-cut", "at least half"),
    "cut = prune(teacher, to = big, merge_heads = 2)": ("wrong-type", "`true`, `false`"),
    "cut = distil(teacher, data)": ("unknown-name", "objective = distil(it, ...)"),
    "cut = prun(teacher)": ("unknown-name", "prune"),
    "cut = prune(teacher, onto = big)": ("no-such-parameter", "onto"),
    "cut = train(words, data, objective = distil(it, teacher), steps = 2)": ("dim-mismatch", "vocab"),
    "cut = train(big, data)": ("missing-argument", "tokens"),
    "cut = train(big, data, steps = teacher)": ("wrong-type", "a number"),
    "cut = train(big, data, lr = cosin(1), steps = 2)": ("unknown-name", "cosine"),
    "cut = train(big, data, objective = distill(it, teacher), steps = 2)": ("unknown-name", "distil"),
    "cut = importance(techer, data)": ("unknown-name", "teacher"),
    "teacher = train(big, data, steps = 3)": ("bound-twice", "teacher"),
    "cut = train(big, data, steps = 0)": ("out-of-range", "`steps` of `train` gives 0, it must be at least 1"),
    "cut = train(big, data, tokens = 0)": ("out-of-range", "`tokens` of `train`"),
    "cut = train(big, data, steps = 2.5)": ("out-of-range", "`steps` of `train` gives 2.5"),
    "cut = train(big, data, steps = 2, lr = cosine(-1))": ("out-of-range", "`lr` of `train` gives -1"),
    "cut = train(big, data, steps = 2, dtype = mean)": ("wrong-type", "`bf16`"),
    "cut = train(big, data, steps = 2, objective = distil(it, big))": ("wrong-type", "with weights"),
    "cut = train(big, data, steps = 2, seq = 4000)": ("no-data", "too few for one row of 4000"),
    "cut = importance(teacher, data, batch = bi)": ("wrong-type", "`l2`"),
    "cut = importance(teacher, data, depth = l2)": ("wrong-type", "`hidden_mse`"),
    "cut = importance(teacher, data, length = 4000)": ("no-data", "4000"),
    "cut = report(teacher, data)": ("no-data", "held out"),
    "cut = load(big, \"nowhere\")": ("no-such-file", "nowhere"),
    "cut = load(big, \"nowhere\", map = mean)": ("wrong-type", "`huggingface`"),
    "cut = train(words, data, steps = 2)": ("token-out-of-range", "200"),
    "cut = train(later, data, steps = 2)": ("unknown-name", "later"),
    "cut = train(cut, data, steps = 2)": ("unknown-name", "cut"),
}


@pytest.mark.parametrize("line", WRONG)
def test_a_wrong_recipe_is_a_diagnostic_and_nothing_is_written(line, tmp_path):
    code, word = WRONG[line]
    file = load_text(TEXT.replace("{}", line), folder=shipped_folder())
    (tmp_path / "a.txt").write_text("text " * 400 + "\u0fff", encoding="utf-8")
    with pytest.raises((SpecError, UserError)) as caught:
        run_recipe(file, None, [tmp_path / "a.txt"], tmp_path / "out", held_out=0)
    if isinstance(caught.value, UserError):  # of the data, which no line of the recipe names
        assert caught.value.code == code == "token-out-of-range" and not (tmp_path / "out").exists()
        return
    found = caught.value.diagnostics[0]
    assert found.primary.span.text
    shown = f"{found.message} {found.help} {' '.join(label.text for label in (found.primary, *found.secondary))}"
    assert found.code == code and word in shown
    assert not (tmp_path / "out").exists()


def test_heads_that_go_may_be_merged_into_those_that_stay(work, tmp_path):
    """As `prune` does it by hand, of the same scores; without, other weights."""
    line = "by   = importance(teacher, data, samples = 4, length = 32)\n    cut = prune(teacher, to = two, by = by{})"
    text = TEXT.replace("steps = 2)", "steps = 2, seq = 32, batch = 2)")
    text = text.replace("model odd ", "model two = big(heads = 2)\nmodel odd ")
    made = {}
    for name, more in (("plain", ""), ("merged", ", merge_heads = true")):
        (tmp_path / f"{name}.spec").write_text(text.replace("{}", line.replace("{}", more)))
        run_recipe(load(tmp_path / f"{name}.spec"), None, [work / "texts"], tmp_path / "out", {}, held_out=0.3, say=str)
        made[name] = load_file(tmp_path / "out/cut/model.safetensors")
    teacher, student = load_folder(tmp_path / "out/teacher"), load_folder(tmp_path / "out/cut")
    scores = Scores.load(tmp_path / "out/by/scores.safetensors")
    for name, merged in (("plain", False), ("merged", True)):
        wanted = prune(teacher.program, teacher.state_dict(), student.program, scores, merge_heads=merged)
        assert all(torch.equal(wanted[k], made[name][k]) for k in wanted)
    assert not torch.equal(made["plain"]["layer.0.attention.q.weight"], made["merged"]["layer.0.attention.q.weight"])


@pytest.mark.parametrize(
    ("settings", "code"),
    [({"sices.rows": 2}, "unknown-name"), ({"sizes.row": 2}, "no-such-parameter"), ({"step": 2}, "no-such-parameter")],
)
def test_settings_of_nothing_are_named(settings, code):
    with pytest.raises(SpecError) as caught:
        planned(load(TINY), None, settings)
    assert caught.value.diagnostics[0].code == code


def test_on_the_command_line(work, monkeypatch):
    monkeypatch.chdir(work)

    def invoke(*words):
        return CliRunner().invoke(app, ["run", str(TINY), *words])

    told = invoke("--plan", "-o", "planned")
    wide = "wide: prune(model = right, to = tiny_wide, by = scores, merge_heads = false)  [30,936"
    assert told.exit_code == 0 and wide in told.stdout
    assert not (work / "planned").exists()
    told = invoke("--data", "texts", "--held-out", "0.3", "-o", "whole", "--set", "sizes.rows=4")
    assert told.exit_code == 0 and "teacher: there already" in told.stdout
    for words, code in ((("-o", "x"), "no-data"), (("-o", "x", "--data", "none"), "no-such-file")):
        told = invoke(*words)
        assert told.exit_code == 2 and f"error[{code}]" in told.output and not (work / "x").exists()
