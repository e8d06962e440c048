"""What kernels do not hold is said with its line, and computed right all the same; memory may lie in any way."""

from __future__ import annotations

import pytest
import torch
from typer.testing import CliRunner

from heddle.dsl.load import load_text
from heddle.dsl.pages import explain
from heddle.lowering.ops.attend.triton import MOST_WIDTH
from heddle.lowering.ops.causal_conv.triton import MOST_TAPS
from heddle.lowering.ops.ssd.triton import MAX_HEAD_DIM, MAX_STATE
from heddle.runtime.check import program_of
from heddle.runtime.cli import app
from heddle.runtime.compile import build, instantiate
from heddle.runtime.lib import kernels
from tests.kernels.harness import LAYOUTS, floor, laid, worst

HEAD = """
model made(vocab = 37, hidden = 16):
    tokens[batch, seq]: token
    x = embed(tokens, vocab -> hidden)
    y = rms_norm(x)
"""
TAIL = """
    logits = linear(rms_norm(x), hidden -> vocab)
    return logits
"""
ATTEND = """
    q = linear(y, hidden -> [heads = 2, head_dim = {width}])
    o = attend(q, (q, q, {mask}){more})
    x = x + linear(o, [heads, head_dim] -> hidden)
"""
SCAN = """
    x = x + mamba2(y, heads = 2, head_dim = {width}, state = {state}, groups = 1, taps = {taps})
"""


def attend(width=8, mask="causal", more=""):
    return HEAD + ATTEND.format(width=width, mask=mask, more=more) + TAIL


def scan(width=8, state=8, taps=4):
    return HEAD + SCAN.format(width=width, state=state, taps=taps) + TAIL


@pytest.mark.parametrize(
    ("spec", "op", "line", "reason"),
    [
        (attend(width=320), "attend", "attend(q", "its keys are 320 wide, a tile holds at most 256"),
        (attend(more=", dropout = 0.5"), "attend", "attend(q", "dropout of weights needs them one by one"),
        (attend(mask="key.position <= query.position or key.position == 0"), "attend", "attend(q", "one interval of keys"),
        (scan(state=512), "ssd", "ssd(silu", "a state of 512 is more than the 256"),
        (scan(width=160), "ssd", "ssd(silu", "a head_dim of 160 is more than the 128"),
        (scan(taps=17), "causal_conv", "causal_conv(u", "17 taps are more than the 16"),
    ],
    ids=["head_dim", "dropout", "mask", "state", "wide heads", "taps"],
)
def test_what_a_kernel_does_not_hold_is_said_with_its_line(spec, op, line, reason):
    (said,) = build(program_of(load_text(spec)), "sm_90").files.without
    assert said.code == "without-kernel" and said.severity == "warning"
    assert f"`{op}`" in said.message and "sm_90" in said.message and "explain without-kernel" in said.help
    assert said.primary.span.text.startswith(line) and reason in said.primary.text
    callers = [label.span.text for label in said.secondary]  # of a block of the library: the user's own line
    assert not callers if op == "attend" else [c[:8] for c in callers] == ["mamba2(y"]


@pytest.mark.parametrize("spec", [attend(), scan(width=128, state=256, taps=16)], ids=["attend", "scan"])
def test_what_a_kernel_holds_is_not_warned_of(spec):
    assert build(program_of(load_text(spec)), "sm_90").files.without == ()


def test_the_page_lists_what_kernels_hold():
    page = explain("without-kernel") or ""
    for said in (
        f"at most {MOST_WIDTH} wide", f"`head_dim` at most {MAX_HEAD_DIM}", f"`state` at most {MAX_STATE}", f"at most {MOST_TAPS} taps",
    ):  # fmt: skip
        assert said in page


def test_explain_warns_and_lists_what_pytorch_computes(tmp_path):
    path = tmp_path / "made.spec"
    path.write_text(attend(width=320))
    run = CliRunner().invoke(app, ["explain", str(path), "--target", "triton"])
    assert run.exit_code == 0 and "made.spec:8:9" in run.stderr and "320 wide" in run.stderr
    assert "PyTorch computes `linear`: no kernels are written for it" in run.stdout
    assert CliRunner().invoke(app, ["explain", str(path)]).stderr == ""  # `cpu` promises none


def run(model, dtype, how="contiguous"):
    """Logits and gradients of weights that lie in memory in some way."""
    model = model.cast(dtype).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.data = laid(p.data, how) if p.dim() != 1 or how != "transposed" else p.data
    tokens = torch.randint(0, 37, (2, 26), generator=torch.Generator().manual_seed(1))
    tokens = tokens[:, ::2] if how == "strided" else tokens[:, ::2].contiguous()
    logits = model(tokens)
    loss = (logits * torch.linspace(-1, 1, logits.numel(), dtype=dtype).view_as(logits)).sum()
    leaves = dict(model.named_parameters())
    return {"logits": logits.detach()} | dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))


@pytest.mark.parametrize("spec", [attend(width=320), scan(state=264)], ids=["attend", "scan"])
def test_what_pytorch_computes_in_place_of_a_kernel_is_right(spec):
    """Inside a model whose other kernels are there."""
    program = program_of(load_text(spec))
    exact, eager = (run(instantiate(build(program)), d) for d in (torch.float64, torch.float32))
    with kernels.launches() as told:
        found = run(instantiate(build(program, "triton")), torch.float32)
    assert told
    for name, want in exact.items():
        worst(found[name], want, eager[name], floor(want, torch.float32, 1024), name)


@pytest.mark.parametrize(
    ("spec", "ways"), [(attend(), LAYOUTS[1:]), (scan(), ("strided", "offset"))], ids=["attend", "scan"]
)
def test_weights_and_tokens_may_lie_in_memory_in_any_way(spec, ways):
    """Strided, sliced, transposed, and not aligned to 16 bytes, with NaN in all places around them."""
    program = program_of(load_text(spec))
    exact, eager = (run(instantiate(build(program)), d) for d in (torch.float64, torch.float32))
    artifact = build(program, "triton")
    for how in ways:
        for name, got in run(instantiate(artifact), torch.float32, how).items():
            worst(got, exact[name], eager[name], floor(exact[name], torch.float32, 256), f"{how}: {name}")
