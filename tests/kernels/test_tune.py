"""Locks and tuning: what is measured once decides the constants of kernels' files, and nothing else."""

from __future__ import annotations

import json
import re
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from heddle.codegen.lock import BadLock, Lock, Tuned, read
from heddle.codegen.tiles import class_of, constants_of, key_of, with_constants
from heddle.dsl.diagnostics import SpecError
from heddle.dsl.load import load_text
from heddle.lowering.chains import tiles
from heddle.runtime import tune as tuning
from heddle.runtime.check import program_of
from heddle.runtime.cli import app
from heddle.runtime.compile import build
from heddle.runtime.tune import lock_of, tune

SPEC = """
model made(vocab = 37, hidden = 16):
    tokens[batch, seq]: token
    x = embed(tokens, vocab -> hidden)
    y = rms_norm(x + silu(x))
    logits = linear(y, hidden -> vocab)
    return logits
"""
FILE = '"""Text."""\n\nimport torch\n\nA, BLOCK = 1, (2, 3)\nC = {2: (1, 2)}\nROOM = len("x")\nlow = 3\n\n\ndef f():\n    D = 4\n'


def program():
    return program_of(load_text(SPEC))


# --- constants ------------------------------------------------------------------------------------


def test_constants_are_those_of_the_head_that_are_written_out():
    assert constants_of(FILE) == {"A": 1, "BLOCK": (2, 3), "C": {2: (1, 2)}}


@given(a=st.integers(0, 10**6), block=st.tuples(st.integers(0, 99), st.integers(0, 99)), c=st.integers(1, 9))
def test_what_is_put_in_place_is_read_back_and_nothing_else_changes(a, block, c):
    changed = {"A": a, "BLOCK": block, "C": {c: (a, c)}}
    made = with_constants(FILE, changed)
    assert constants_of(made) == changed
    assert with_constants(made, constants_of(FILE)) == FILE
    assert with_constants(FILE, {}) == FILE


def test_a_constant_that_is_not_there_is_an_error():
    with pytest.raises(KeyError, match="D"):
        with_constants(FILE, {"D": 1})


def test_a_class_is_the_constants_that_results_depend_on():
    assert class_of({"A": 1, "B": 2}, ("B",)) == class_of({"A": 9, "B": 2}, ("B",)) != class_of({"A": 1, "B": 3}, ("B",))


# --- locks ----------------------------------------------------------------------------------------


def lock(**more):
    return Lock(**{"target": "sm_90", "triton": "3.7.1", **more})


def test_a_lock_is_read_as_it_was_written(tmp_path):
    made = lock(kernels={"k": Tuned("norm", {"A": 4, "C": {2: (1, 2)}}, 1.5, 2.0)}, made={"device": "none"})
    path = tmp_path / "my.lock"
    path.write_text(made.text())
    assert read(path, "sm_90", "3.7.0") == made
    assert made.text() == read(path, "sm_90", "3.7.1").text()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda d: d.update(lock=1), "version 1"),
        (lambda d: d.update(target="sm_80"), "target `sm_80`"),
        (lambda d: d.update(triton="3.6.0"), "triton 3.6.0"),
        (lambda d: d.pop("kernels"), "no lock"),
        (lambda d: d["kernels"].update(k={"kernel": "x"}), "no lock"),
        (lambda d: d["kernels"].update(k={"kernel": "x", "constants": {"A": "import os"}, "us": 1, "untuned_us": 1}), "no lock"),
    ],
    ids=["version", "target", "triton", "cut", "kernel", "code"],
)
def test_another_lock_is_refused(tmp_path, change, says):
    data = json.loads(lock().text())
    change(data)
    path = tmp_path / "my.lock"
    path.write_text(json.dumps(data))
    with pytest.raises(BadLock, match=says):
        read(path, "sm_90", "3.7.1")


def test_a_lock_changes_constants_of_its_kernels_and_no_other_text():
    plain = build(program(), "sm_90").files
    name = next(n for n in plain.kernels if n.endswith("rms_norm"))
    held = lock(kernels={plain.keys[name]: Tuned(name, {"FWD_BLOCK_R": 8})})
    files = build(program(), "sm_90", lock=held).files
    assert files.kernels[name] == with_constants(plain.kernels[name], {"FWD_BLOCK_R": 8}) != plain.kernels[name]
    assert files.model == plain.model
    assert all(files.kernels[n] == plain.kernels[n] for n in plain.kernels if n != name)


def test_a_kernel_whose_text_has_changed_is_not_in_a_lock_any_more():
    plain = build(program(), "sm_90").files
    held = lock(kernels={key_of("an older text"): Tuned("rms_norm", {"FWD_BLOCK_R": 8})})
    assert build(program(), "sm_90", lock=held).files == plain


@pytest.mark.parametrize(
    ("constants", "says"),
    [({"C": 8}, "nothing that tuning changes"), ({"FWD_BLOCK_R": 3}, "a size that it cannot have"),
     ({"FWD_WARPS": 0}, "a size"), ({"FWD_WARPS": "4"}, "a size"), ({"NONE": 1}, "nothing that tuning changes")],
)  # fmt: skip
def test_a_lock_that_was_edited_is_refused_with_the_line_of_its_kernel(constants, says):
    """What it says would be another kernel, or fail inside Triton."""
    plain = build(program(), "sm_90").files
    name = next(n for n in plain.kernels if n.endswith("rms_norm"))
    with pytest.raises(SpecError) as found:
        build(program(), "sm_90", lock=lock(kernels={plain.keys[name]: Tuned(name, constants)}))
    (said,) = found.value.diagnostics
    assert said.code == "bad-lock" and says in said.message and name in said.message
    assert said.primary.span.text.startswith("rms_norm(") and said.help


def test_a_lock_of_another_model_is_told_of(tmp_path):
    path = tmp_path / "my.spec"
    path.write_text(SPEC)
    files = build(program(), "sm_90").files
    held = {key: Tuned(name, {}) for name, key in files.keys.items()}
    mine = tmp_path / "my.sm_90.lock"
    mine.write_text(lock(kernels=held).text())
    words = ["compile", str(path), "--target", "sm_90", "-o", str(tmp_path / "out")]
    assert CliRunner().invoke(app, words).stderr == ""
    said = CliRunner().invoke(app, [*words, "--set", "hidden=24"])
    changed = {n for n, k in files.keys.items() if k not in build(program_of(load_text(SPEC), overrides={"hidden": 24}), "sm_90").files.keys.values()}
    assert said.exit_code == 0 and changed
    assert f"warning[stale-lock]: {len(changed)} of {len(held)} kernels" in said.stderr
    assert all(name in said.stderr for name in changed)


def test_a_lock_beside_the_spec_is_read(tmp_path):
    path = tmp_path / "my.spec"
    path.write_text(SPEC)
    plain = build(program(), "sm_90").files
    name = next(n for n in plain.kernels if n.endswith("rms_norm"))
    (tmp_path / "my.sm_90.lock").write_text(lock(kernels={plain.keys[name]: Tuned(name, {"FWD_BLOCK_R": 8})}).text())
    outs = [
        CliRunner().invoke(app, ["compile", str(path), "--target", t, "-o", str(tmp_path / "out")]) for t in ("sm_90", "sm_80")
    ]
    texts = [(tmp_path / "out" / o.stdout.strip().split("out/")[1]).parent / "kernels" / f"{name}.py" for o in outs]
    assert re.search(r"^FWD_BLOCK_R = 8$", texts[0].read_text(), re.M)
    assert not re.search(r"^FWD_BLOCK_R = 8$", texts[1].read_text(), re.M)


# --- tuning ---------------------------------------------------------------------------------------


class Clock:
    """Times by constants: what a GPU would say, said by a table."""

    def __init__(self, of):
        self.of, self.seen = of, []

    def __call__(self, run):
        package = sys.modules[type(run.block).__module__].__package__
        files = [m for n, m in sys.modules.items() if n.startswith(f"{package}.kernels.")]
        constants = {n: v for m in files for n, v in vars(m).items() if n.isupper()}
        self.seen.append(constants)
        return self.of(constants)


NORM = "silu_add_rms_norm"
GRID = {"FWD_BLOCK_R": (8,), "FWD_WARPS": (2,)}


@pytest.fixture(autouse=True)
def few(monkeypatch):
    """Two candidates: each is built."""
    plain = tuning.grid_of
    monkeypatch.setattr(tuning, "grid_of", lambda *of: (GRID, plain(*of)[1]))


def found(of, budget=600.0, keep_bits=False):
    clock = Clock(of)
    cpu = torch.device("cpu")
    made = tune(program(), "sm_90", cpu, (1, 32), torch.bfloat16, budget, keep_bits, NORM, timer=clock)
    return list(made), clock


def test_the_fastest_that_is_right_wins():
    """Two constants that help each other, one that does not."""
    made, _ = found(lambda c: 100.0 / (1 + (c.get("FWD_BLOCK_R") == 8) + (c.get("FWD_WARPS") == 2)))
    (norm,) = made
    assert norm.tuned.constants == {"FWD_BLOCK_R": 8, "FWD_WARPS": 2}
    assert norm.tuned.us == pytest.approx(100 / 3) and norm.tuned.untuned_us == 100.0
    files = build(program(), "sm_90", lock=lock_of(made, "sm_90", {})).files
    assert constants_of(files.kernels[norm.tuned.kernel])["FWD_BLOCK_R"] == 8


def test_noise_does_not_win():
    made, _ = found(lambda c: 100.0 - (c.get("FWD_BLOCK_R") == 8))
    assert all(not f.tuned.constants for f in made)


def test_bits_are_kept_where_it_is_asked():
    made, clock = found(lambda c: 100.0 / (1 + (c.get("FWD_WARPS") == 2)), keep_bits=True)
    assert all(not f.tuned.constants for f in made)
    assert any("numerics class" in t.why_not for f in made for t in f.tried)
    assert len({c.get("FWD_WARPS") for c in clock.seen if "FWD_WARPS" in c}) == 1


def test_a_candidate_that_is_wrong_does_not_win(monkeypatch):
    """However fast: one whose file has a fault beside its constants."""
    def planted(text, constants):
        made = with_constants(text, constants)
        return made.replace("+ 1e-05", "+ 1e-01") if constants.get("FWD_BLOCK_R") == 8 else made

    monkeypatch.setattr(tuning, "with_constants", planted)
    made, _ = found(lambda c: 100.0 / (1 + (c.get("FWD_BLOCK_R") == 8)))
    (norm,) = made
    assert "FWD_BLOCK_R" not in norm.tuned.constants
    assert any("wrong" in t.why_not or "bits" in t.why_not for t in norm.tried)


def test_no_time_no_tries():
    made, _ = found(lambda c: 1.0, budget=0.0)
    assert made and all(not f.tried and not f.tuned.constants for f in made)


def test_tuning_wants_a_gpu(tmp_path):
    path = tmp_path / "my.spec"
    path.write_text(SPEC)
    run = CliRunner().invoke(app, ["tune", str(path), "--target", "sm_90"])
    assert run.exit_code == 2 and "unknown-device" in run.stderr and not (tmp_path / "my.sm_90.lock").exists()
    run = CliRunner().invoke(app, ["tune", str(path), "--target", "triton", "--device", "cpu"])
    assert run.exit_code == 2 and "no-kernels" in run.stderr


def test_each_constant_has_values_that_its_kernel_may_have():
    """What is tried of a chain: halves and doubles; its columns stay."""
    text = build(program(), "sm_90").files.kernels[NORM]
    grid = tiles.tuned(constants_of(text))
    assert {n.split("_", 1)[1] for n in grid} == {"BLOCK_R", "WARPS", "PROGRAMS"}
    assert all(v & (v - 1) == 0 and v != constants_of(text)[n] for n, values in grid.items() for v in values)
    assert tiles.numerics(constants_of(text), ["bwd"]) == ("BWD_BLOCK_R", "BWD_BLOCK_C", "BWD_WARPS", "BWD_PROGRAMS")
    assert set(tiles.numerics(constants_of(text), ["fwd", "bwd"])) == {n for n in constants_of(text) if "WD_" in n}
