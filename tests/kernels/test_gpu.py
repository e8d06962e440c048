"""Kernels on a GPU: each that shipped specs need, and whole models, against fp64. `make test-gpu` runs these."""

from __future__ import annotations

import functools

import pytest
import torch

from heddle.runtime import verify as verifying
from heddle.runtime.verify import verify
from tests.kernels import test_models
from tests.kernels.harness import floor, worst
from tests.runtime.lib import test_capture
from tests.specs.published import TWINS

pytestmark = pytest.mark.gpu
PUBLISHED = ("nemotron_h/nemotron_h_8b", "llama/llama31_8b", "transformer_ls/enwik8_base", "retro/retro_small")


@pytest.mark.parametrize("name", TWINS)
def test_every_kernel_of_a_twin(name):
    rows = list(verify(test_models.program(name), "triton", 24, 0, torch.device("cuda")))
    assert all(row.launches or row.why_not for row in rows)
    assert not [row.plain() for row in rows if not row.holds]


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_kernel_at_its_published_size(name, monkeypatch):
    """On few rows: the fp64 side keeps every intermediate value."""
    monkeypatch.setattr(verifying, "MORE_SIZES", (100, 257))
    rows = list(verify(test_models.program(name), "triton", 6, 0, torch.device("cuda")))
    assert not [row.plain() for row in rows if not row.holds]


@pytest.mark.parametrize("name", TWINS)
@pytest.mark.parametrize("documents", [False, True])
def test_whole_models(name, documents):
    """Logits, loss and every gradient, no further from fp64 than twice what PyTorch is on this GPU."""

    def run(target, dtype, device):
        return test_models.run(name, test_models.model(name, target, dtype).to(device), documents)

    exact = run("cpu", torch.float64, "cpu")
    eager, found = run("cpu", torch.float32, "cuda"), run("triton", torch.float32, "cuda")
    for key, want in exact.items():
        worst(found[key].cpu(), want, eager[key].cpu(), floor(want, torch.float32, test_models.STEPS), key)


@pytest.mark.parametrize("name", TWINS)
@pytest.mark.parametrize(("rows", "sampling"), test_capture.DRAWS)
@pytest.mark.parametrize(("target", "dtype"), [("cpu", torch.float64), ("triton", torch.float32)])
def test_tokens_under_a_cuda_graph(name, rows, sampling, target, dtype, monkeypatch):
    """Those of decoding op by op, greedy and drawn, also where groups of tokens end."""
    made = test_models.model(name, target, dtype).to("cuda")
    test_capture.alike(name, made, rows, sampling, monkeypatch)


def test_a_stream_on_a_gpu_is_captured_anew():
    """Restored half-way: what was captured before wrote to other memory."""
    made = test_models.model("nemotron_h/tiny", "triton", torch.float32).to("cuda")
    tokens, found = test_capture.drawn(1, 24).to("cuda"), []
    for captured in (False, True):
        stream = made.stream(1, 24)
        with torch.no_grad():
            made.prefill(tokens[:, :2], stream)
            step = made.steps(stream) if captured else functools.partial(made.decode, stream=stream)
            rows = [step(tokens[:, i : i + 1]).clone() for i in range(2, 12)]
            stream.restore(stream.snapshot())
            found.append(torch.cat(rows + [step(tokens[:, i : i + 1]).clone() for i in range(12, 24)], 1))
    worst(found[1], found[0].double(), found[0], floor(found[0].double(), torch.float32, test_models.STEPS))
