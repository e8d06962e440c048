"""The command line: exit codes, what is printed where, and that no input brings a traceback or a partial file."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import pytest
from typer.testing import CliRunner

from heddle.dsl.load import shipped_folder
from heddle.runtime.cli import app
from heddle.runtime.lib import capture
from tests.runtime.lib.recorder import Recorder

GOOD = """
model tiny(vocab = 256, hidden = 32, heads = 2, layers = 2):
    tokens[batch, seq]: token
    embedding = embed(tokens, vocab -> hidden)
    x = embedding
    for layer in layers:
        norm1 = rms_norm(x)
        x = x + attention(norm1, heads, rotary = rope())
        norm2 = rms_norm(x)
        x = x + gated_mlp(norm2, 2 * hidden)
    final = rms_norm(x)
    logits = linear(final, hidden -> vocab)
    return logits
"""
TEXT = "the warp is held on the loom, and the weft is drawn through. " * 60
NEMOTRON = shipped_folder() / "nemotron_h/tiny.spec"


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """Each test stands in a folder with a good spec and a text."""
    (tmp_path / "good.spec").write_text(GOOD)
    (tmp_path / "a.txt").write_text(TEXT)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*words, code=0):
    """(stdout, stderr); only the exception that carries the exit code may reach the runner."""
    result = CliRunner().invoke(app, [str(w) for w in words])
    assert result.exception is None or isinstance(result.exception, SystemExit), repr(result.exception)
    assert result.exit_code == code, (result.stdout, result.stderr)
    assert "Traceback" not in result.stdout + result.stderr
    return result.stdout, result.stderr


def process(*words):
    line = [sys.executable, "-m", "heddle.runtime.cli", *map(str, words)]
    return subprocess.run(line, capture_output=True, text=True, timeout=60)


def files(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def train(*words, steps=3, code=0):
    return run("train", "good.spec", "--data", "a.txt", "-o", "run", "--steps", steps, "--batch", 2, "--seq", 32,
               "--held-out", 0, *words, code=code)  # fmt: skip


# --- check ---------------------------------------------------------------------------------------


def test_check_a_good_file():
    out, err = run("check", "good.spec")
    assert out.startswith("good.spec: fine: tiny (")
    assert not err
    for flag in (["--json"], ["--format", "json"]):
        data = json.loads(run("check", "good.spec", *flag)[0])
        assert data["files"][0]["models"]["tiny"]["parameters"] > 10_000


def test_check_shows_every_error_of_every_file(place):
    (place / "one.spec").write_text(
        GOOD.replace("rms_norm(x)\n    logits", "rms_nrm(x)\n    logits").replace("embed(", "emed(")
    )
    (place / "two.spec").write_text("model m(:\n")
    out, err = run("check", "one.spec", "two.spec", "good.spec", "none.spec", code=2)
    assert not out
    for word in ("rms_nrm", "emed", "two.spec:1:", "none.spec", "unknown-name"):
        assert word in err
    data = json.loads(run("check", "one.spec", "two.spec", "none.spec", "--format", "json", code=2)[0])
    codes = [d["code"] for d in data["diagnostics"]]
    assert codes.count("unknown-name") == 2
    assert "no-such-file" in codes


def test_exit_codes_of_a_process(place):
    (place / "bad.spec").write_text(GOOD.replace("heads = 2", "heads = 3"))
    assert process("check", "good.spec").returncode == 0
    bad = process("check", "bad.spec")
    assert bad.returncode == 2
    assert not bad.stdout
    assert "not-exact" in bad.stderr
    assert process("chek").returncode == 2
    assert process("check", "good.spec", "--nonsense").returncode == 2


def test_our_own_fault_is_exit_code_1():
    code = ("import heddle.runtime.doctor as d, sys; d.examine = lambda: 1 // 0; sys.argv = ['heddle', 'doctor'];"
            "from heddle.runtime.cli import main; main()")  # fmt: skip
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.returncode == 1
    assert "internal error: ZeroDivisionError" in result.stderr
    assert "Traceback" not in result.stderr


def test_checking_does_not_import_torch(capsys):
    code = "import sys; from heddle.runtime.cli import app; app(['check', sys.argv[1]], standalone_mode=False); "
    code += "sys.exit(3 * ('torch' in sys.modules))"
    begun = time.perf_counter()
    result = subprocess.run([sys.executable, "-c", code, str(NEMOTRON)], capture_output=True, text=True, timeout=60)
    with capsys.disabled():
        print(f" [heddle check {NEMOTRON.name}: {time.perf_counter() - begun:.2f} s]", end="")
    assert result.returncode == 0, result.stderr


# --- bad specs -----------------------------------------------------------------------------------

BAD = {
    "unknown name": (GOOD.replace("rms_norm(x)\n    logits", "rms_nrom(x)\n    logits"), "unknown-name", ["rms_nrom", "rms_norm"]),
    "arity": (GOOD.replace("embed(tokens, vocab -> hidden)", "embed(tokens, vocab -> hidden, 1, 2, 3)"), "", ["embed"]),
    "type": (GOOD.replace("heads = 2", 'heads = "two"'), "", []),
    "type of an argument": (GOOD.replace("rms_norm(x)\n    logits", "rms_norm(3)\n    logits"), "", []),
    "dim mismatch": (GOOD.replace("final = rms_norm(x)", "final = x + linear(x, hidden -> 48)"), "dim-mismatch", ["32", "48"]),
    "indivisible heads": (GOOD.replace("heads = 2", "heads = 5"), "not-exact", ["32 / 5"]),
    "indivisible kv_heads": (GOOD.replace("norm1, heads", "norm1, 4, 3"), "indivisible-heads", ["4", "3"]),
    "missing argument": (GOOD.replace("gated_mlp(norm2, 2 * hidden)", "gated_mlp(norm2)"), "missing-argument", ["ffn"]),
    "duplicate names": (GOOD + GOOD, "duplicate-name", ["tiny"]),
    "use cycle": ('use tiny from "bad.spec"\n' + GOOD.replace("tiny", "other"), "use-cycle", ["bad.spec"]),
    "path escape": ('use x from "../../outside.spec"\n' + GOOD, "path-escape", ["outside.spec"]),
    "absolute path": ('use x from "/etc/passwd"\n' + GOOD, "path-escape", ["/etc/passwd"]),
    "tabs": (GOOD.replace("        norm2", "\t    norm2"), "tabs", []),
    "not utf-8": (GOOD.replace("tiny", "t\xefny").encode("latin-1"), "not-text", ["0xef"]),
    "empty": ("", "nothing-declared", []),
    "spaces": (" \n\n \n", "nothing-declared", []),
    "zero bytes": ("\0" * 50, "", []),
    "megabyte line": (GOOD.replace("2 * hidden", "2 * hidden" + " + 0 * hidden" * 90_000 + " )"), "", []),
    "megabyte name": (GOOD.replace("rms_norm(x)\n    logits", "r" * 1_000_000 + "(x)\n    logits"), "", []),
    "nested brackets": (GOOD.replace("2 * hidden", "(" * 20_000 + "hidden" + ")" * 20_000), "", []),
    "nested blocks": (GOOD + "".join("    " * i + "if true:\n" for i in range(1, 3000)), "", []),
    "endless recursion": ("block a():\n    x[n]\n    return a(x)\n\n" + GOOD.replace("rms_norm(x)\n    logits", "a(x)\n    logits"),
                          "recursion", ["a"]),
    "huge number": (GOOD.replace("hidden = 32", "hidden = 10 ** 10 ** 10"), "", []),
    "many digits": (GOOD.replace("hidden = 32", "hidden = " + "9" * 100_000), "", []),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_specs(place, case):
    text, code, words = BAD[case]
    (place / "bad.spec").write_bytes(text if isinstance(text, bytes) else text.encode())
    before = files(place)
    begun = time.perf_counter()
    out, err = run("check", "bad.spec", code=2)
    assert time.perf_counter() - begun < 10
    assert not out
    assert "bad.spec" in err
    assert "error[" in err
    assert code in err
    assert all(w in err for w in words), err[:2000]
    assert len(err) < 20_000 or case == "megabyte name"  # a name is shown whole
    data = json.loads(run("check", "bad.spec", "--format", "json", code=2)[0])
    assert data["diagnostics"]
    run("compile", "bad.spec", "-o", "build", code=2)
    assert files(place) == before


@pytest.mark.parametrize("form", ["product", "literal"])
def test_a_pattern_of_ten_million_layers(place, form):
    pattern = '10000000 * "M"' if form == "product" else '"' + "M" * 10_000_000 + '"'
    text = NEMOTRON.read_text().replace('"M-M*-"', pattern)
    (place / "bad.spec").write_text(text)
    (place / "nemotron_h.spec").write_text(NEMOTRON.with_name("nemotron_h.spec").read_text())
    begun = time.perf_counter()
    result = process("check", "bad.spec")
    assert time.perf_counter() - begun < 20
    assert result.returncode == 2, result.stderr[-500:]
    assert "too-large" in result.stderr
    assert len(result.stderr) < 20_000


def test_a_missing_file_names_its_neighbour():
    assert "good.spec" in run("check", "god.spec", code=2)[1]
    run("check", ".", code=2)


# --- show, explain, doctor -----------------------------------------------------------------------


def test_show():
    data = json.loads(run("show", "good.spec", "--json", "--paths")[0])
    assert data["parameters"] == sum(b["parameters"] for b in data["blocks"])
    assert (
        data["parameters"]
        == json.loads(run("check", "good.spec", "--json")[0])["files"][0]["models"]["tiny"]["parameters"]
    )
    assert {w["path"] for w in data["weights"]} >= {"embedding.weight", "layer.1.attention.q.weight"}
    assert data["state_bytes"] > 0
    assert "embedding" in run("show", "good.spec")[0]
    wide = json.loads(run("show", "good.spec:tiny", "--json", "--set", "hidden=64")[0])
    assert wide["arguments"]["hidden"] == 64
    assert wide["parameters"] > 2 * data["parameters"]


@pytest.mark.parametrize(
    ("pair", "words"),
    [("hiden=64", ["hiden", "hidden"]), ("hidden", ["bad-override"]), ("=3", ["bad-override"]), ("hidden=", ["bad-override"]),
     ("hidden=(", ["bad-override"]), ("hidden=M*-", ["bad-override", "quotes"]), ("heads=5", ["not-exact", "32 / 5"]),
     ("hidden=-4", []), ("hidden=0", []), ('hidden="x"', []), ("layers=1.5", [])],
)  # fmt: skip
def test_bad_overrides(pair, words):
    out, err = run("show", "good.spec", "--set", pair, code=2)
    assert not out
    assert all(w in err for w in ["error[", *words]), err


def test_a_model_that_is_not_there_names_the_nearest():
    assert "tiny" in run("show", "good.spec:tinny", code=2)[1]


def test_explain(place):
    assert "dim-mismatch" in run("explain", "dim-mismatch")[0]
    err = run("explain", "dim-mismatsh", code=2)[1]
    assert "unknown-code" in err
    assert "dim-mismatch" in err
    fused = run("explain", "good.spec", "--after", "fuse_parallel")[0]
    assert fused
    assert fused != run("explain", "good.spec", "--after", "build")[0]
    assert "fuse_parallel" in run("explain", "good.spec", "--after", "fuse_paralel", code=2)[1]


def test_doctor():
    report = json.loads(run("doctor", "--json")[0])
    assert report["works"] == "fine"
    assert report["packages"]["torch"]
    assert "fine" in run("doctor")[0]


# --- fmt, compile --------------------------------------------------------------------------------


def test_fmt(place):
    (place / "ugly.spec").write_text(
        GOOD.replace(" = rms_norm( x )", "=rms_norm(x)").replace("hidden = 32", "hidden=32")
    )
    run("fmt", "--check", "ugly.spec", code=2)
    assert "hidden=32" in (place / "ugly.spec").read_text()
    assert "formatted" in run("fmt", "ugly.spec")[0]
    assert "hidden = 32" in (place / "ugly.spec").read_text()
    assert run("fmt", "--check", "ugly.spec")[0] == ""


def test_compiling_twice_gives_the_same_path_and_bytes(place):
    first = run("compile", "good.spec", "-o", "one")[0].strip()
    before = files(place / "one")
    assert run("compile", "good.spec", "-o", "one")[0].strip() == first
    assert files(place / "one") == before
    second = process("compile", "good.spec:tiny", "-o", "two").stdout.strip()
    assert second == first.replace("one/", "two/")
    assert files(place / "two") == before
    assert {p.name for p in before} == {"model.py", "plan.json"}
    other = run("compile", "good.spec", "-o", "one", "--set", "hidden=64")[0].strip()
    assert other != first
    assert "cpu" in run("compile", "good.spec", "--target", "loom", code=2)[1]


def test_an_output_that_cannot_be_written(place):
    (place / "file").write_text("mine")
    before = files(place)
    for words in (["compile", "good.spec", "-o", "file/x"], ["compile", "good.spec", "-o", "file"],
                  ["train", "good.spec", "--data", "a.txt", "-o", "file/x", "--steps", "1", "--seq", "8"],
                  ["train", "good.spec", "--data", "a.txt", "-o", "file", "--steps", "1", "--seq", "8", "--held-out", "0"]):  # fmt: skip
        if "train" in words and "0" not in words:
            words += ["--held-out", "0"]
        assert "cannot-write" in run(*words, code=2)[1]
    assert files(place) == before


# --- train, generate -----------------------------------------------------------------------------


def test_train_generate_resume(place, monkeypatch):
    train()
    spoken = run("generate", "run", "--prompt", "the warp", "--max-new-tokens", 5)[0]
    assert spoken.startswith("the warp")
    with monkeypatch.context() as patch:  # a device that captures steps, and finds a reason not to
        patch.setitem(capture.CAPTURES, "cpu", lambda device: Recorder())
        patch.setattr(capture.Watch, "_reason", lambda self, func, given, made: "is looked at")
        ask = "generate", "run", "--prompt", "the warp", "--max-new-tokens", 5
        text, said = run(*ask)
        assert text == spoken and "note: Tiny: not every step is captured in a CUDA graph: good.spec:4  " in said
        assert run(*ask, "--no-graph") == (spoken, "")
    sampled = [
        run("generate", "run", "--prompt", "a", "--temperature", 1, "--top-k", 9, "--seed", s)[0] for s in (1, 1, 2)
    ]
    assert sampled[0] == sampled[1] != sampled[2]
    before = files(place / "run")
    assert "already-there" in train(code=2)[1]
    assert "already-there" in train("--set", "hidden=64", code=2)[1]
    assert "other-run" in train("--resume", "--set", "hidden=64", code=2)[1]
    assert "other-run" in train("--resume", "--accumulate", 2, code=2)[1]
    now = files(place / "run")
    assert {n: b for n, b in now.items() if "board" not in n.parts} == {
        n: b for n, b in before.items() if "board" not in n.parts
    }
    train("--resume", steps=6)
    records = [json.loads(line) for line in (place / "run/log.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records] == list(range(1, 7))
    assert not list((place / "run").rglob(".*"))


@pytest.mark.parametrize(
    ("words", "shown"),
    [(["--schedule", "cosin"], "cosine"), (["--dtype", "fp8"], "bf16"), (["--clip", "0"], "clip"), (["--steps", "0"], "steps"),
     (["--seq", "1000000"], "no-data"), (["--data", "none"], "no-such-file"), (["--resume"], "nothing-to-resume"),
     (["--tokenizer", "none.json"], "no-such-file"), (["--tokenizer", "good.spec"], "bad-tokenizer"),
     (["--set", "vocab=64"], "token-out-of-range"), (["--lr", "nan"], "lr"), (["--lr", "1e30", "--warmup", "0"], "not-finite"),
     (["--device", "gpu"], "unknown-device"), (["--device", "cuda:7"], "there is no GPU 7")],
    ids=lambda v: "-".join(v).strip("-") if isinstance(v, list) else "",
)  # fmt: skip
def test_bad_settings_of_training(words, shown):
    assert shown in train(*words, steps=8, code=2)[1]


def test_documents_longer_than_learned_positions(place):
    learned = GOOD.replace("    x = embedding\n", "    x = embedding + embed(seq.position, 16 -> hidden)\n")
    (place / "good.spec").write_text(learned.replace("rope()", "identity"))
    said = train(code=2)[1]
    assert "out-of-range" in said and "--seq 16" in said
    assert not (place / "run").exists()
    train("--seq", 16)
    said = run("generate", "run", "--prompt", "the warp", "--max-new-tokens", 10, code=2)[1]
    assert "bad-prompt" in said and "up to 16" in said
    assert len(run("generate", "run", "--prompt", "the warp", "--max-new-tokens", 9)[0]) >= 9
    (place / "a.txt").unlink()
    (place / "a.txt").mkdir()
    for i in range(9):  # rows of 32 that hold short documents
        (place / f"a.txt/{i}.txt").write_text(TEXT[: 10 + i % 6])
    run("train", "good.spec", "--data", "a.txt", "-o", "short", "--steps", 2, "--seq", 32, "--batch", 1, "--held-out", 0)


def test_bad_folders_and_prompts(place):
    assert "no-such-file" in run("generate", "none", "--prompt", "x", code=2)[1]
    (place / "empty").mkdir()
    assert "not-a-model" in run("generate", "empty", "--prompt", "x", code=2)[1]
    (place / "empty/model.json").write_text("{")
    assert "not-a-model" in run("generate", "empty", "--prompt", "x", code=2)[1]
    (place / "empty/model.json").write_text("[]")
    assert "not-a-model" in run("generate", "empty", "--prompt", "x", code=2)[1]
    (place / "empty/model.json").unlink()
    (place / "empty/model.spec").write_text(GOOD)
    assert "no-weights" in run("generate", "empty", "--prompt", "x", code=2)[1]
    train(steps=1)
    assert "bad-prompt" in run("generate", "run", "--prompt", "", code=2)[1]
    assert "bad-prompt" in run("generate", "run", "--prompt", "x", "--temperature", 1, "--top-p", 0, code=2)[1]
    assert json.loads(run("generate", "none", "--prompt", "x", "--format", "json", code=2)[0])["diagnostics"][0]["code"]


# --- Hugging Face --------------------------------------------------------------------------------


def test_import_and_export(place):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, bos_token_id=None, eos_token_id=None)  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(place / "hf")
    run("import", "hf", "-o", "ours")
    run("export", "ours", "-o", "back")
    assert (place / "back/model.safetensors").read_bytes()
    run("generate", "ours", "--prompt", "\x01\x02", "--max-new-tokens", 3)
    err = run("import", "none", "-o", "x", code=2)[1]
    assert "error[" in err
    assert not (place / "x").exists()
    (place / "hf/config.json").write_text("{")
    assert "broken-config" in run("import", "hf", "-o", "x", code=2)[1]
    assert not (place / "x").exists()
