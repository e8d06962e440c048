"""The step `search`: all candidates of a budget, ranked by what they do behind a short training; the best cut goes on."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from heddle.dsl.diagnostics import SpecError
from heddle.dsl.load import load_text, shipped_folder
from heddle.runtime.compress import candidates
from heddle.runtime.data import Packed, open_corpus, open_tokenizer, split
from heddle.runtime.folder import load as load_folder
from heddle.runtime.recipes import planned, run_recipe
from heddle.runtime.train import evaluate

TEXT = """
use llama from "llama/llama.spec"

model big = llama(vocab = 256, hidden = 32, ffn = 48, layers = 2, heads = 4, kv_heads = 2, head_dim = 8)

recipe find(data):
    teacher = train(big, data, steps = 3, batch = 2, seq = 16)
    scores  = importance(teacher, data, samples = 4, length = 16)
    best    = search({})
    student = train(best, data, objective = distil(it, teacher), steps = 2, batch = 2, seq = 16)
    sizes   = report([best, student], data, seq = 16, rows = 4)
    return student
"""
GRID = "{hidden: [24, 28], ffn: [32, 40, 48]}"
SEARCH = (
    f"teacher, data, to = big, by = scores, grid = {GRID}, target = 25e3, tolerance = 0.06, steps = 3, batch = 2, "
    "seq = 16, rows = 4"
)


def file(tmp_path, search=SEARCH):
    (tmp_path / "r.spec").write_text(TEXT.replace("{}", search))
    return load_text(TEXT.replace("{}", search), folder=shipped_folder())


def test_the_plan_has_every_candidate_of_the_budget(tmp_path):
    spec = file(tmp_path)
    plan = planned(spec)
    wanted = candidates(spec, "big", {"hidden": [24, 28], "ffn": [32, 40, 48]}, target=25e3, tolerance=0.06)
    steps = {s.name: s for s in plan.steps}
    assert 1 < len(wanted) < 6
    for i, one in enumerate(wanted):
        assert steps[f"best.{i}.cut"].made.spec.overrides == one.arguments
        assert steps[f"best.{i}"].made.spec.program.num_parameters() == one.parameters
    assert f"best.{len(wanted)}" not in steps and len(steps["student"].made.choices) == len(wanted)


def test_the_best_goes_on(tmp_path):
    from heddle.dsl.load import load

    (tmp_path / "texts").mkdir()
    for i in range(8):
        (tmp_path / f"texts/{i}.txt").write_text(f"the warp and the weft, {i} times over and under. " * (i + 8))
    file(tmp_path)
    said: list[str] = []

    def run(**settings):
        said.clear()
        run_recipe(load(tmp_path / "r.spec"), None, [tmp_path / "texts"], tmp_path / "out", settings, held_out=0.3,
                   say=said.append)  # fmt: skip
        return {line.split(":")[0] for line in said if line.endswith((": train", ": prune", ": search", ": report"))}

    run()
    out = tmp_path / "out"
    rows = json.loads((out / "best/ranking.json").read_text())
    _, held = split(open_corpus([tmp_path / "texts"], open_tokenizer("bytes")), 0.3)
    for row in rows:
        model = load_folder(out / f"best.{row['candidate']}")
        assert row["held_out"] == pytest.approx(evaluate(model, Packed(held, 16), 4, rows=4), rel=1e-12)
        assert row["settings"].items() <= model.program.arguments.items()
    losses = [row["held_out"] for row in rows]
    assert len(rows) > 1 and losses == sorted(losses)
    first = rows[0]["candidate"]
    cut, best = (load_file(out / name / "model.safetensors") for name in (f"best.{first}.cut", "best"))
    assert cut.keys() == best.keys() and all(torch.equal(cut[k], best[k]) for k in cut)
    student = load_folder(out / "student")
    assert {k: student.program.arguments[k] for k in rows[0]["settings"]} == rows[0]["settings"]
    assert run() == set()
    assert run(**{"student.steps": 3}) == {"student", "sizes"}
    assert run(**{"best.rows": 3}) == {"best", "student", "sizes"}


@pytest.mark.parametrize(
    ("search", "code", "word"),
    [
        (SEARCH.replace("hidden:", "hiden:"), "no-such-parameter", "hidden"),
        (SEARCH.replace("[24, 28]", "24"), "wrong-type", "a list of values"),
        (SEARCH.replace("25e3", "9e3"), "out-of-range", "the nearest has"),
        (SEARCH.replace("25e3", "big"), "wrong-type", "a number of parameters"),
        (SEARCH.replace("[24, 28]", "[24, 40]").replace("0.06", "0.9"), "not-a-part", "40"),
        (SEARCH.replace("steps = 3, ", ""), "missing-argument", "tokens"),
        (SEARCH.replace("by = scores, ", ""), "no-scores", "hidden"),
        (SEARCH.replace("grid =", "gird ="), "no-such-parameter", "grid"),
    ],
)
def test_what_is_wrong_is_said_when_planning(tmp_path, search, code, word):
    with pytest.raises(SpecError) as caught:
        planned(file(tmp_path, search))
    found = caught.value.diagnostics[0]
    shown = f"{found.message} {found.help} {' '.join(label.text for label in (found.primary, *found.secondary))}"
    assert found.code == code and word in shown and found.primary.span.text
