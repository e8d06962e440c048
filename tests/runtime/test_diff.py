"""`heddle diff`: a student beside its teacher."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from heddle.dsl.load import load, shipped_folder
from heddle.runtime.check import program_of
from heddle.runtime.cli import app
from heddle.runtime.diff import difference

TINY = ("llama/tiny", "nemotron_h/tiny", "nemotron_h/tiny_moe", "transformer_ls/tiny", "retro/tiny")


def program(name, **over):
    return program_of(load(shipped_folder() / f"{name}.spec"), None, over)


@pytest.mark.parametrize("name", TINY)
def test_a_model_does_not_differ_from_itself(name):
    found = difference(program(name), program(name))
    assert found["settings"] == found["blocks"] == found["dims"] == {} and found["is_part"]
    assert all(a == b for a, b in found["figures"].values())
    weights = found["weights"]
    assert weights["same"] == len(list(program(name).tensors()))
    assert [weights[k]["count"] for k in ("other_shape", "only_first", "only_second")] == [0, 0, 0]


@settings(max_examples=15, deadline=None)
@given(hidden=st.sampled_from((32, 64, 96)), ffn=st.integers(1, 200), layers=st.integers(1, 5))
def test_every_weight_is_told_of_once(hidden, ffn, layers):
    a, b = program("llama/tiny"), program("llama/tiny", hidden=hidden, ffn=ffn, layers=layers, head_dim=16)
    found = difference(a, b)
    names = [{p.name for p in x.tensors()} for x in (a, b)]
    w = found["weights"]
    assert w["same"] + w["other_shape"]["count"] == len(names[0] & names[1])
    assert w["only_first"]["count"] == len(names[0] - names[1]) and w["only_second"]["count"] == len(
        names[1] - names[0]
    )
    assert found["figures"]["parameters"] == [a.num_parameters(), b.num_parameters()]
    assert found["settings"] == {
        k: [a.arguments[k], v] for k, v in (("hidden", hidden), ("ffn", ffn), ("layers", layers)) if a.arguments[k] != v
    }
    assert found["is_part"] == (found["why_not"] is None) == (hidden <= 64 and ffn <= 96 and layers <= 3)


def test_settings_are_shown_as_a_spec_writes_them():
    found = difference(program("llama/tiny"), program("nemotron_h/tiny"))
    settings = found["settings"]
    assert settings["scaling"] == ["by_wavelength(factor = 8, low = 1, high = 4, original = 64)", "-"]
    assert settings["tied"] == [False, "-"] and settings["groups"] == ["-", 2]
    told = CliRunner().invoke(app, ["diff", *(str(shipped_folder() / f"{n}/tiny.spec") for n in ("llama", "nemotron_h"))])
    assert told.exit_code == 0 and " false " in told.stdout and "CallValue" not in told.stdout


def test_published_students_are_cuts_of_their_teachers():
    def at(name):
        return program_of(load(shipped_folder() / f"{name}.spec"))

    found = difference(at("nemotron4/nemotron4_15b"), at("nemotron4/minitron_8b"))
    assert found["is_part"] and found["settings"] == {"hidden": [6144, 4096], "ffn": [24576, 16384]}
    assert found["figures"]["parameters"] == [15_628_775_424, 8_271_699_968]
    other = difference(at("llama/llama31_8b"), at("nemotron4/minitron_8b"))
    assert not other["is_part"] and other["why_not"]


def test_on_the_command_line():
    tiny = str(shipped_folder() / "llama/tiny.spec")
    told = CliRunner().invoke(app, ["diff", tiny, tiny, "--set", "ffn=48"])
    assert told.exit_code == 0 and "is a cut of" in told.stdout and "ffn" in told.stdout
    data = json.loads(CliRunner().invoke(app, ["diff", tiny, tiny, "--set", "ffn=200", "--json"]).stdout)
    assert data["settings"] == {"ffn": [96, 200]} and not data["is_part"]
    assert CliRunner().invoke(app, ["diff", tiny, "nowhere.spec"]).exit_code == 2
