"""`heddle verify`: it tests what a spec needs, finds what is wrong with it, and says so."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from heddle.codegen.emit import emit_block
from heddle.dsl.load import load, load_text, shipped_folder
from heddle.lowering import alone as parts
from heddle.lowering.pipeline import lower
from heddle.lowering.target import TARGETS
from heddle.runtime import verify as verifying
from heddle.runtime.check import program_of
from heddle.runtime.cli import app
from heddle.runtime.verify import Draw, Expected, block_of, verify

SPEC = """
model made(vocab = 37, hidden = 16, heads = 2):
    tokens[batch, seq]: token
    x = embed(tokens, vocab -> hidden)
    y = rms_norm(x + silu(x))
    q = linear(y, hidden -> [heads, head_dim = 8])
    o = attend(q, (q, q, window(3)))
    x = x + linear(o, [heads, head_dim] -> hidden)
    logits = linear(rms_norm(x), hidden -> vocab)
    return logits
"""


SCAN = """
model made(vocab = 37, hidden = 16):
    tokens[batch, seq]: token
    x = embed(tokens, vocab -> hidden)
    y = rms_norm(x)
    x = x + mamba2(y, heads = 2, head_dim = 8, state = 8, groups = 1, chunk = 32)
    logits = linear(rms_norm(x), hidden -> vocab)
    return logits
"""


def found(examples=3, seed=0, target="triton"):
    program = program_of(load_text(SPEC))
    return list(verify(program, target, examples, seed, torch.device("cpu")))


@pytest.fixture
def plant(monkeypatch):
    """Another text in every kernel that has the old one."""

    def planted(old, new):
        plain = verifying.emit_block
        hits = []

        def emit(*args):
            files = plain(*args)
            hits.extend(name for name, text in files.kernels.items() if old in text)
            return replace(files, kernels={n: t.replace(old, new) for n, t in files.kernels.items()})

        monkeypatch.setattr(verifying, "emit_block", emit)
        return hits

    return planted


def test_every_kernel_of_a_spec_is_there_and_holds():
    rows = found()
    assert [row.ops for row in rows] == [
        ("embed",), ("silu", "add", "rms_norm"), ("attend",), ("add", "rms_norm"), ("linear", "cross_entropy"),
    ]  # fmt: skip
    for row in rows:
        assert row.holds and row.launches and row.draws == 3 and 0 < row.worst <= 1, row
        assert row.line.startswith("<string>:") or row.line


@pytest.mark.parametrize(
    ("old", "new", "ops"),
    [
        ("+ 1e-05", "+ 1e-02", "rms_norm"),
        ("tl.store(h_ptr", "pass  # tl.store(h_ptr", None),
        ("mask=mask_r, other=0.0", "mask=mask_r, other=1.0", None),
        ("tl.sigmoid(x)", "tl.sigmoid(-x)", "silu"),
        ("< hi", "<= hi", "attend"),
    ],
    ids=["epsilon", "no store", "harmless", "a sign", "one key more"],
)
def test_what_is_wrong_is_found(plant, old, new, ops):
    """In the kernel that has it, and in no other."""
    hits = plant(old, new)
    rows = found(examples=6)
    if not hits or ops is None:
        assert all(row.holds for row in rows)
        return
    wrong = [row for row in rows if not row.holds]
    assert wrong and all(ops in row.ops for row in wrong)


def test_the_command_prints_a_table_and_ends_with_what_it_found(tmp_path, plant):
    path = tmp_path / "made.spec"
    path.write_text(SPEC)
    run = CliRunner().invoke(app, ["verify", str(path), "--examples", "1", "--device", "cpu"])
    assert run.exit_code == 0 and "silu, add, rms_norm" in run.stdout and "holds" in run.stdout
    assert plant("+ 1e-05", "+ 1e-02") == []
    run = CliRunner().invoke(app, ["verify", str(path), "--examples", "3", "--device", "cpu", "--json"])
    assert run.exit_code == 1
    rows = json.loads(run.stdout)
    assert [row["holds"] for row in rows].count(False) >= 1
    assert {"kernel", "line", "worst", "error", "eager", "ratio", "shapes"} <= rows[0].keys()


def test_the_same_draws_give_the_same_numbers():
    assert [r.plain() for r in found(2, seed=3)] == [r.plain() for r in found(2, seed=3)]
    assert [r.worst for r in found(2, seed=3)] != [r.worst for r in found(2, seed=4)]


def decaying(old="", new=""):
    """The worst share of a scan, with a fault in its kernel, whose states decay by e^-128 at some rows, hardly at others:
    the exponents of a chunk add up to thousands, and rounding them is most of the error."""
    lowered = lower(program_of(load_text(SCAN)), target=TARGETS["triton"])
    alone = next(a for a in parts.kernels(lowered) if a.nodes[-1].op == "ssd")
    files = emit_block(alone.name, alone.program, "0")
    assert all(old in text for text in files.kernels.values())
    kind = block_of(alone.name, replace(files, kernels={n: t.replace(old, new) if old else t for n, t in files.kernels.items()}))
    plain = replace(alone.program, target=TARGETS["cpu"], fused={}, heads={})
    torchs, worst = block_of(alone.name, emit_block(alone.name, plain, "0")), []
    for dtype in (torch.bfloat16, torch.float32):
        draw = Draw(alone, kind, dtype, random.Random(0), torch.device("cpu"), (1, 33))
        draw.weights["y.A_log"].fill_(math.log(16.0))
        draw.weights["y.dt_bias"].zero_()
        large = torch.rand(draw.inputs[1].shape, generator=torch.Generator().manual_seed(0)) < 0.3
        draw.inputs[1] = torch.where(large, 8.0, -5.0).to(dtype)
        worst += [one.worst for one in Expected.of(draw, torchs).judged(draw.run(kind, dtype)).values()]
    return max(worst)


def test_strong_decays_are_no_fault_and_hide_none():
    assert decaying() <= 1
    assert decaying("tl.minimum(ca[:, None] - ca[None, :], 0.0)", "tl.minimum(ca[:, None] - ca[None, :], -1.0)") > 1


def test_rows_that_see_nothing_have_no_gradient_and_are_no_error(monkeypatch):
    """Attention to chunks that have not begun gives 0 of no input, in a kernel and in PyTorch."""
    monkeypatch.setattr(verifying, "SIZES", (1, 2))
    lowered = lower(program_of(load(shipped_folder() / "retro/tiny.spec")), target=TARGETS["triton"])
    rows = [
        verifying._verified(a, files, 2, random.Random(1), torch.device("cpu"))
        for a, files in verifying.files_of(lowered, None) if a.nodes[-1].op == "attend"
    ]  # fmt: skip
    assert all(row.holds and row.draws == 2 for row in rows)
    assert any(not row.error for row in rows)
