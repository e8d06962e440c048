"""Whole models on kernels, through the interpreter: the numbers of target `cpu`, for every tiny twin."""

from __future__ import annotations

import functools

import pytest
import torch

import heddle
from heddle.dsl.layout import layout_of
from heddle.dsl.load import load, load_text, shipped_folder
from heddle.lowering.pipeline import lower
from heddle.lowering.target import TARGETS
from heddle.runtime.check import program_of
from heddle.runtime.compile import build, instantiate, module_class
from heddle.runtime.errors import UserError
from heddle.runtime.lib import Gathered, kernels
from heddle.runtime.lib.laid import take_whole
from heddle.runtime.lib.simulated import simulate
from tests.kernels.harness import floor, worst
from tests.specs.published import TWINS
from tests.specs.test_specs import between, more

ROWS, SEQ = 2, 21
STEPS = 256
"""Additions one behind another on the longest way through a twin: widths of a few dozen, over a few layers."""


@functools.cache
def program(name):
    return program_of(load(shipped_folder() / f"{name}.spec"))


def model(name, target, dtype):
    made = instantiate(build(program(name), target), seed=3).cast(torch.float64).eval()
    source = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in made.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=source, dtype=p.dtype))
    return made.cast(dtype)


def inputs(name, documents):
    source = torch.Generator().manual_seed(7)
    tokens = torch.randint(0, 256, (ROWS, SEQ), generator=source)
    document = torch.tensor([[0] * 8 + [1] * 13, [0] * 16 + [1] * 5]) if documents else None
    return tokens, document


def run(name, made, documents):
    """The losses' mean and logits, and every gradient."""
    device = next(made.parameters()).device
    tokens, document = inputs(name, documents)
    given = {n: x.to(device) for n, x in more(name, made, tokens, 11).items()}
    tokens, document = tokens.to(device), None if document is None else document.to(device)
    logits = made(tokens, document, **given)
    losses = made.losses(tokens, document, **given)
    counts = made.counts(tokens, document, **given)
    loss = torch.stack([s / counts[n] for n, s in losses.items()]).sum()
    loss.backward()
    grads = {n: p.grad for n, p in made.named_parameters() if p.grad is not None}
    return {"logits": logits.detach(), "loss": loss.detach(), **grads}


# Rows of one document on a dense model, a hybrid and one that retrieves; packed ones are the harder case.
@pytest.mark.parametrize(
    ("name", "documents"),
    [*((name, True) for name in TWINS), *((f"{name}/tiny", False) for name in ("llama", "nemotron_h", "retro"))],
)
def test_numbers_of_the_cpu(name, documents):
    """No further from fp64 than twice what PyTorch in fp32 is, and the rounding of the widest sum."""
    exact = run(name, model(name, "cpu", torch.float64), documents)
    eager = run(name, model(name, "cpu", torch.float32), documents)
    with kernels.launches() as told:
        found = run(name, model(name, "triton", torch.float32), documents)
    assert told
    assert found.keys() == exact.keys()
    for key in exact:
        worst(found[key], exact[key], eager[key], floor(exact[key], torch.float32, STEPS), key)


DROPPED = """
model dropped(vocab = 32, hidden = 16, heads = 4, rate = 0.3):
    tokens[batch, seq]: token
    embedding = embed(tokens, vocab -> hidden)
    x = dropout(embedding, rate)
    for layer in 1:
        norm1 = rms_norm(x)
        x = x + dropout(attention(norm1, heads), rate)
        norm2 = rms_norm(x)
        x = x + dropout(gated_mlp(norm2, 2 * hidden), rate)
    final = rms_norm(x)
    logits = linear(final, hidden -> vocab)
    return logits

layout grid:
    mesh data = 2, tensor = 2
    shard vocab, heads, ffn over tensor
    shard seq over tensor between blocks
    shard batch over data
"""


@pytest.mark.parametrize(("training", "laid"), [(True, True), (False, False)])
def test_zeros_of_the_cpu(training, laid):
    """Drawn in kernels of several ops, of whole rows and on the ranks of a layout; nothing outside of training."""
    loaded = load_text(DROPPED)
    program, source = program_of(loaded), torch.Generator().manual_seed(7)
    tokens = torch.randint(0, 32, (4, 8), generator=source)
    document = (torch.rand(4, 8, generator=source) < 0.2).cumsum(1)
    state = instantiate(build(program), seed=3).state_dict()
    made = build(program, "triton", layout=layout_of(loaded) if laid else None)
    assert made.source.count("lib.drawn(") == 3 and "dropout_add_rms_norm" in made.files.kernels
    kind = module_class(made.source, made.name, made.files.kernels)

    def losses(model, rows, dtype, mesh=None):
        model = model.cast(dtype).train(training)
        model.mesh, model.chance = mesh, 5
        (load_state if mesh is None else take_whole)(model, {n: x.to(dtype) for n, x in state.items()})
        (loss,) = model.losses(tokens[rows], document[rows], gathered=Gathered()).values()
        return loss.detach()

    def load_state(model, state):
        model.load_state_dict(state)

    def rank(mesh):
        place = mesh.place("data")
        return mesh["data"].all_reduce(losses(kind(), slice(2 * place, 2 * place + 2), torch.float32, mesh))

    exact, eager = (losses(instantiate(build(program)), slice(None), d) for d in (torch.float64, torch.float32))
    found = simulate(dict(kind.axes), rank) if laid else [losses(kind(), slice(None), torch.float32)]
    for one in found:
        worst(one, exact, eager, floor(exact, torch.float32, STEPS))


def streamed(name, made):
    """A prompt at once, then greedily token by token: the logits of all rows, and the tokens."""
    tokens, _ = inputs(name, False)
    tokens, prompt, total = tokens[:1], 9, 14
    stream = made.stream(1, total)
    with torch.no_grad():
        rows = [made.prefill(tokens[:, :prompt], stream, **between(name, made, tokens, 0, prompt))]
        chosen = []
        for i in range(prompt, total):
            chosen.append(rows[-1][:, -1:].argmax(-1))
            rows.append(made.decode(chosen[-1], stream, **between(name, made, tokens, i, i + 1)))
    return torch.cat(rows, 1), torch.cat(chosen, 1)


@pytest.mark.parametrize("name", TWINS)
def test_tokens_of_the_cpu(name):
    """What is generated, and the logits on the way: of a prompt, then one by one."""
    (exact, wanted), (eager, _) = (streamed(name, model(name, "cpu", d)) for d in (torch.float64, torch.float32))
    with kernels.launches() as told:
        found, tokens = streamed(name, model(name, "triton", torch.float32))
    assert told
    assert torch.equal(tokens, wanted)
    worst(found, exact, eager, floor(exact, torch.float32, STEPS))


@pytest.mark.parametrize("name", TWINS)
def test_same_bytes(name):
    files = [build(program_of(load(shipped_folder() / f"{name}.spec")), "sm_90").files for _ in range(2)]
    assert files[0] == files[1] and files[0].kernels


def test_no_kernels_on_the_cpu():
    """Passes for kernels leave the graphs of `cpu` as they are."""
    for name in TWINS:
        made = lower(program(name), target=TARGETS["cpu"])
        assert not made.fused and lower(program(name), "stream").graphs == made.graphs


def test_kernels_do_not_compute_fp64():
    path = shipped_folder() / "llama/tiny.spec"
    for dtype in ("fp64", torch.float64):
        with pytest.raises(UserError, match="not fp64") as caught:
            heddle.compile(path, target="triton", dtype=dtype)
        assert caught.value.code == "no-kernels"
    made = heddle.compile(path, target="triton")
    with pytest.raises(TypeError, match="float64"), torch.no_grad():
        made.double()(torch.zeros(1, 3, dtype=torch.int64))
