"""Students on disk: pruned folders go to Hugging Face and are the same there; candidates count as their specs do."""

from __future__ import annotations

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from heddle.dsl.load import load, shipped_folder
from heddle.runtime.compress import candidates, prune
from heddle.runtime.compress.command import prune_folder
from heddle.runtime.errors import UserError
from heddle.runtime.folder import load as load_folder
from heddle.runtime.folder import write_spec
from heddle.runtime.huggingface import export_folder

from .models import error_of, module, shipped, tokens

STUDENTS = {
    "llama/tiny": {"hidden": 48, "ffn": 41, "heads": 2, "head_dim": 16, "layers": 2},
    "mistral/tiny": {"hidden": 40, "ffn": 33, "heads": 2, "kv_heads": 1, "layers": 2},
    "nemotron4/tiny": {"hidden": 56, "ffn": 90, "heads": 2, "layers": 1},
    "nemotron_h/tiny": {"hidden": 48, "ffn": 50, "heads": 2, "ssm_heads": 4, "ssm_head_dim": 12, "pattern": "M-*-"},
    "nemotron_h/tiny_moe": {"hidden": 48, "experts": 4, "expert_ffn": 10, "always_ffn": 30, "latent": 20, "pattern": "ME*"},
}  # fmt: skip
TEXT = "the warp is held on the loom, and the weft is drawn through over and under. "


def teacher_folder(name, folder):
    """A model folder with random weights in fp32, and text beside it."""
    made = module(shipped(name)).to(torch.float32)
    folder.mkdir()
    write_spec(folder, load(shipped_folder() / f"{name}.spec"), made.program.name)
    save_file({k: v.contiguous() for k, v in made.state_dict().items()}, folder / "model.safetensors")
    (folder.parent / "text.txt").write_text(TEXT * 20, encoding="utf-8")
    return folder


@pytest.mark.parametrize("name", STUDENTS)
def test_a_pruned_folder_is_the_same_in_transformers(name, tmp_path):
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    transformers = pytest.importorskip("transformers")
    transformers.logging.set_verbosity_error()
    teacher = teacher_folder(name, tmp_path / "teacher")
    spec = str(shipped_folder() / f"{name}.spec")
    out = prune_folder(teacher, spec, STUDENTS[name], tmp_path / "student", [tmp_path / "text.txt"], 8, 16, 4)
    student = load_folder(out)
    assert {k: student.program.arguments[k] for k in STUDENTS[name]} == STUDENTS[name]
    export_folder(out, tmp_path / "hf")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", experts_implementation="eager").eval()
    theirs.config._experts_implementation = "eager"
    for part in theirs.modules():
        if hasattr(part, "time_step_limit"):  # they clamp step sizes in prefill, the papers and we do not
            part.time_step_limit = (0.0, float("inf"))
    ids = tokens(256)
    with torch.no_grad():
        a, b = student(ids), theirs(ids, attention_mask=torch.ones_like(ids)).logits
    assert float((a - b).abs().max() / b.abs().max()) < 2e-5


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    teacher = teacher_folder("llama/tiny", tmp_path / "teacher")
    spec = str(shipped_folder() / "llama/tiny.spec")
    before = sorted(p.name for p in tmp_path.iterdir())
    found = error_of(lambda: prune_folder(teacher, spec, {"ffn": 200}, tmp_path / "out"))
    assert found.code == "not-a-part" and sorted(p.name for p in tmp_path.iterdir()) == before
    prune_folder(teacher, spec, {"layers": 1}, tmp_path / "out", keep={"layer": [2]})
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["model.json", "model.safetensors", "spec"]
    assert json.loads((tmp_path / "out/model.json").read_text())["overrides"] == {"layers": 1}
    ours, theirs = load_file(tmp_path / "out/model.safetensors"), load_file(teacher / "model.safetensors")
    assert torch.equal(ours["layer.0.attention.q.weight"], theirs["layer.2.attention.q.weight"])
    with pytest.raises(UserError):
        prune_folder(teacher, spec, {"layers": 1}, tmp_path / "out", keep={"layer": [2]})


def test_prune_on_the_command_line(tmp_path, monkeypatch):
    from typer.testing import CliRunner

    from heddle.runtime.cli import app

    teacher_folder("llama/tiny", tmp_path / "teacher")
    monkeypatch.chdir(tmp_path)
    spec = str(shipped_folder() / "llama/tiny.spec")
    given = ["prune", "teacher", spec, "--set", "layers=2", "--set", "ffn=40"]
    told = CliRunner().invoke(app, [*given, "--keep", "layer=0,2", "--keep", "gated_mlp.ffn=56..95", "-o", "out"])
    assert told.exit_code == 0, told.output
    ours, theirs = load_file("out/model.safetensors"), load_file("teacher/model.safetensors")
    assert torch.equal(ours["layer.1.gated_mlp.up.weight"], theirs["layer.2.gated_mlp.up.weight"][56:])
    for keep in ("layer", "layer=", "layer=a", "=1"):
        assert CliRunner().invoke(app, [*given, "--keep", keep, "-o", "other"]).exit_code == 2


GRID = {"layers": [32, 31, 30, 29], "heads": [32, 48], "expansion": [2.5, 3, 3.5, 4],
        "hidden": [4096, 4608, 5120, 5632, 6144]}  # fmt: skip
WINNERS = """(32,32,12800,5120)(32,32,13824,4608)(32,48,11520,4608)(32,48,16384,4096)(31,32,12800,5120)(31,32,16128,4608)
(31,48,13824,4608)(31,48,16384,4096)(30,32,12800,5120)(30,32,16128,4608)(30,48,13824,4608)(30,48,16384,4096)
(29,32,12800,5120)(29,32,16128,4608)(29,48,13824,4608)"""
"""Layers, heads, ffn and hidden of Table 19 (Muralidharan et al. 2024)."""


def test_the_published_candidates_are_those_of_the_grid():
    file = load(shipped_folder() / "nemotron4/nemotron4_15b.spec")
    derive = {"ffn": lambda chosen: int(chosen["expansion"] * chosen["hidden"])}
    found = candidates(file, None, GRID, least=7.85e9, most=8.50e9, derive=derive)
    rows = {tuple(c.arguments[k] for k in ("layers", "heads", "ffn", "hidden")) for c in found}
    published = {tuple(map(int, row.split(","))) for row in WINNERS.replace("\n", "")[1:-1].split(")(")}
    assert len(published) == 15 and rows == published
    wider = candidates(file, None, GRID, target=8.27e9, derive=derive)
    assert len(wider) == 20 and {c.parameters for c in wider} > {c.parameters for c in found}
    assert all(c.program.num_parameters() == c.parameters for c in found)


def test_a_search_needs_a_budget_and_names_that_are_there():
    file = load(shipped_folder() / "llama/tiny.spec")
    with pytest.raises(UserError):
        candidates(file, None, {"hidden": [32]})
    with pytest.raises(UserError):
        candidates(file, None, {"hiden": [32]}, target=1e5)


def test_a_student_of_a_student_is_a_student():
    """Cutting in two steps by lists is cutting once by the lists combined."""
    teacher, middle, small = shipped("llama/tiny"), shipped("llama/tiny", ffn=50), shipped("llama/tiny", ffn=20)
    weights = module(teacher).state_dict()
    first, second = list(range(3, 53)), list(range(0, 40, 2))
    twice = prune(middle, prune(teacher, weights, middle, keep={"ffn": first}), small, keep={"ffn": second})
    once = prune(teacher, weights, small, keep={"ffn": [first[i] for i in second]})
    assert all(torch.equal(twice[k], once[k]) for k in once)
