"""Out of memory is told as a diagnostic: with the line that asked, what was asked for, and what needs less."""

from __future__ import annotations

import pytest
import torch
from triton.runtime.errors import OutOfResources
from typer.testing import CliRunner

from heddle.runtime.cli import app
from heddle.runtime.exhausted import diagnosed, is_out_of_memory
from heddle.runtime.lib import Linear, kernels

SPEC = """\
model small(vocab = 256, hidden = 32):
    tokens[batch, seq]: token
    x = embed(tokens, vocab -> hidden)
    x = x + mlp(x, 48)
    y = rms_norm(x)
    logits = linear(y, hidden -> vocab)
    return logits
"""
GPU = "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 79.11 GiB of which 1 GiB is free."
CPU = "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate {} bytes."


@pytest.fixture
def train(tmp_path, monkeypatch):
    """What `heddle train` says for the target triton."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.spec").write_text(SPEC)
    (tmp_path / "text.txt").write_text("warp and weft " * 40)
    words = "train small.spec --data text.txt --seq 8 --batch 1 --steps 1 --held-out 0 --device cpu --target triton -o run"
    return lambda: CliRunner().invoke(app, words.split())


def out_of_memory_in(monkeypatch, kernel):
    plain = kernels.launch

    def launch(which, *args, **how):
        if which.fn.__name__.endswith(kernel):
            raise torch.OutOfMemoryError(GPU)
        plain(which, *args, **how)

    monkeypatch.setattr(kernels, "launch", launch)


@pytest.mark.parametrize(
    ("kernel", "line"),
    [("rms_norm_fwd_kernel", "y = rms_norm(x)"), ("rms_norm_bwd_kernel", "y = rms_norm(x)"),
     ("embed_runs_kernel", "x = embed(tokens, vocab -> hidden)")],
    ids=["forward", "backward", "a gradient of a room"],
)  # fmt: skip
def test_a_kernel_that_lacks_memory_names_its_line(train, monkeypatch, kernel, line):
    out_of_memory_in(monkeypatch, kernel)
    said = train()
    number = SPEC.split("\n").index(f"    {line}") + 1
    assert said.exit_code == 2
    assert "error[out-of-memory]: out of memory: 2.50 GiB more are asked for, the device has 79.11 GiB" in said.stderr
    assert f"small.spec:{number}:" in said.stderr and f" {number} | {line}" in said.stderr
    assert "--batch" in said.stderr and "recompute" in said.stderr and "heddle plan" in said.stderr


def test_a_kernel_that_is_too_large_for_the_device_names_its_line(train, monkeypatch):
    """Of another GPU than its target is: no fewer rows help, another target does."""
    plain = kernels.launch

    def launch(which, *args, **how):
        if which.fn.__name__.endswith("rms_norm_bwd_kernel"):
            raise OutOfResources(232_448, 65_536, "shared memory")
        plain(which, *args, **how)

    monkeypatch.setattr(kernels, "launch", launch)
    said = train()
    wanted = "out of memory: one program of a kernel asks for 232,448 of shared memory, the device has 65,536"
    assert said.exit_code == 2 and f"error[out-of-memory]: {wanted}" in said.stderr
    assert "y = rms_norm(x)" in said.stderr and "`triton`" in said.stderr and "--batch" not in said.stderr


def test_an_op_of_pytorch_inside_a_block_names_its_line_and_the_call(train, monkeypatch):
    def lacks(*args, **how):
        raise torch.OutOfMemoryError(GPU)

    monkeypatch.setattr(Linear, "forward", lacks)
    said = train()
    assert said.exit_code == 2 and "internal" not in said.stderr
    first, _, rest = said.stderr.partition(":::")
    assert "blocks.spec:" in first and "x = x + mlp(x, 48)" in rest and "called here" in rest


def test_the_backward_pass_of_pytorch_says_so_without_a_line(train, monkeypatch):
    def lacks(*args, **how):
        raise torch.OutOfMemoryError(GPU)

    monkeypatch.setattr(torch.Tensor, "backward", lacks)
    monkeypatch.setattr(torch.autograd, "backward", lacks)
    monkeypatch.setattr(torch.autograd, "grad", lacks)
    said = train()
    assert said.exit_code == 2 and said.stderr.startswith("error[out-of-memory]") and "-->" not in said.stderr


def test_what_is_no_lack_of_memory_stays_as_it_is(train, monkeypatch):
    assert not is_out_of_memory(RuntimeError("shapes differ")) and not is_out_of_memory(KeyError("x"))
    assert is_out_of_memory(MemoryError()) and is_out_of_memory(RuntimeError(CPU.format(2**40)))
    assert "1,024.00 GiB" in str(diagnosed(RuntimeError(CPU.format(2**40))))

    def broken(*args, **how):
        raise RuntimeError("shapes differ")

    monkeypatch.setattr(Linear, "forward", broken)
    assert isinstance(train().exception, RuntimeError)
