"""On a GPU: the same numbers as on the CPU, forward and backward, fed in pieces, trained, resumed, by several ranks."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from heddle.runtime.cli import app
from tests.runtime.train.gang import free_port, write_project
from tests.runtime.train.test_layout_runs import CHANCE, EXPERTS, LLAMA
from tests.specs.published import TWINS
from tests.specs.test_specs import more, twin

pytestmark = pytest.mark.gpu
CONTEXT = {"retro/tiny": 64}
"""How long rows are at most, where positions are learned."""


def drawn(name, model, rows, seq, documents, seed):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 256, (rows, seq), generator=generator)
    if not documents:
        return tokens, None, more(name, model, tokens, seed)
    # Groups of tokens begin anew with each document, so a document is as long as whole groups of every clock are.
    ends = torch.randint(1, max(2, seq // 8), (rows,), generator=generator) * 8
    document = (torch.arange(seq) >= ends[:, None]).long()
    return tokens, document, more(name, model, tokens, seed)


def gradients(model, tokens, document, given, device):
    model.to(device).zero_grad()
    here = {n: x.to(device) for n, x in given.items()}
    losses = model.losses(tokens.to(device), None if document is None else document.to(device), **here)
    counts = model.counts(tokens.to(device), None if document is None else document.to(device), **here)
    loss = torch.stack([s / counts[n] for n, s in losses.items()]).sum()
    loss.backward()
    return loss.detach().cpu(), {n: p.grad.to("cpu", copy=True) for n, p in model.named_parameters() if p.grad is not None}


def rounding(model):
    """fp64: sums in another order differ by the rounding of a few hundred terms. Angles of rotations are fp32 wherever
    they are worked out, and two libraries' sines differ by a few units in the last place."""
    rotates = any(node.op == "rotate" for graph in model.artifact.lowered.graphs.values() for node in graph.nodes)
    return 64 * 2.0**-24 if rotates else 1e-10


def far(a, b):
    return float((a.double() - b.double()).abs().max() / b.double().abs().max().clamp_min(1e-30))


@pytest.mark.parametrize("name", TWINS)
@settings(max_examples=4)
@given(rows=st.integers(1, 3), seq=st.sampled_from([8, 24, 64, 136]), documents=st.booleans(), seed=st.integers(0, 99))
def test_losses_and_gradients_are_those_of_the_cpu(name, rows, seq, documents, seed):
    model = twin(name)
    case = drawn(name, model, rows, min(seq, CONTEXT.get(name, seq)), documents, seed)
    loss, wanted = gradients(model, *case, "cpu")
    try:
        got, found = gradients(model, *case, "cuda")
    finally:
        model.cpu()
    assert far(got, loss) < rounding(model)
    assert found.keys() == wanted.keys()
    largest = max(float(g.abs().max()) for g in wanted.values())
    for path, gradient in wanted.items():
        assert float((found[path] - gradient).abs().max()) < rounding(model) * largest, path


@pytest.mark.parametrize("name", TWINS)
def test_low_precision_is_as_near_as_on_the_cpu(name):
    """bf16 against fp64: kernels round in other places, but not worse than a few times as the CPU's do."""
    from heddle.runtime.compile import build, instantiate
    from tests.specs.test_specs import program

    wide, low = (instantiate(build(program(name)), seed=3) for _ in range(2))
    wide.cast(torch.float64)
    low.cast(torch.bfloat16)
    tokens, document, given = drawn(name, wide, 2, 64, True, 1)
    loss, gradient = gradients(wide, tokens, document, given, "cpu")
    near = {}
    for device in ("cpu", "cuda"):
        got, found = gradients(low, tokens, document, given, device)
        norm = torch.stack([(found[p].double() - g).norm() for p, g in gradient.items()]).norm()
        near[device] = far(got, loss), float(norm / torch.stack([g.norm() for g in gradient.values()]).norm())
    unit = 2.0**-8
    assert near["cuda"][0] <= 3 * near["cpu"][0] + unit, near
    assert near["cuda"][1] <= 3 * near["cpu"][1] + unit, near


@pytest.mark.parametrize("name", TWINS)
@settings(max_examples=3)
@given(pieces=st.lists(st.sampled_from([1, 2, 5, 16]), min_size=2, max_size=5), seed=st.integers(0, 99))
def test_fed_in_pieces_is_the_whole(name, pieces, seed):
    model = twin(name)
    tokens = torch.randint(0, 256, (2, sum(pieces)), generator=torch.Generator().manual_seed(seed))
    given = more(name, model, tokens, seed)
    with torch.no_grad():
        wanted = model(tokens, **given)
    try:
        model.to("cuda")
        stream, got, fed = model.stream(2, 64), [], 0
        for width in pieces:
            piece = tokens[:, fed : fed + width].cuda()
            rows = {n: slice(model.follows[n].groups(fed), model.follows[n].groups(fed + width)) for n in given}
            got.append(model.prefill(piece, stream, **{n: x[:, rows[n]].cuda() for n, x in given.items()}).cpu())
            fed += width
    finally:
        model.cpu()
    assert far(torch.cat(got, 1), wanted) < rounding(model)


def curve(folder):
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [(x["step"], x["loss"], x["norm"]) for x in lines if "loss" in x]


def run(words):
    ended = CliRunner().invoke(app, words)
    assert ended.exit_code == 0, ended.output
    return ended.output


def assert_same_curve(a, b):
    """fp64, but for the angles of rotations: see `rounding`."""
    assert [x[0] for x in a] == [x[0] for x in b]
    for mine, other in zip(a, b):
        assert mine[1:] == pytest.approx(other[1:], rel=64 * 2.0**-24)


@pytest.mark.parametrize("spec", [LLAMA, EXPERTS, CHANCE], ids=["dense", "experts", "dropout"])
def test_a_run_trains_resumes_and_writes_as_on_the_cpu(spec, tmp_path):
    words = write_project(tmp_path, spec)
    run([*words, "-o", str(tmp_path / "cpu"), "--steps", "6", "--device", "cpu"])
    run([*words, "-o", str(tmp_path / "gpu"), "--steps", "3", "--device", "cuda"])
    run([*words, "-o", str(tmp_path / "gpu"), "--steps", "5", "--resume"])  # auto: there is a GPU
    run([*words, "-o", str(tmp_path / "gpu"), "--steps", "6", "--resume", "--device", "cpu"])
    assert_same_curve(curve(tmp_path / "gpu"), curve(tmp_path / "cpu"))
    prompt = ["--prompt", "the warp", "--max-new-tokens", "20"]
    texts = [run(["generate", str(tmp_path / "cpu"), *prompt, "--device", d]) for d in ("cpu", "cuda:0")]
    assert texts[0] == texts[1]


RANK = """
import sys
import torch.distributed as dist
from heddle.runtime.cli import app
from heddle.runtime.lib.processes import _Connection

# NCCL wants a GPU for each rank. Here all ranks share one, and what they tell each other goes by way of the CPU.
start = dist.init_process_group
dist.init_process_group = lambda backend, **more: start("gloo", **more)
for name in ("reduce", "reduce_", "gather", "scatter", "exchange", "broadcast", "send", "receive"):
    def by_way_of_the_cpu(self, x, *rest, real=getattr(_Connection, name)):
        there = x.cpu()
        got = real(self, there, *rest)
        if real.__name__ == "reduce_":
            x.copy_(there)
        return None if got is None else got.to(x.device)
    setattr(_Connection, name, by_way_of_the_cpu)
app(sys.argv[1:])
"""


RUNS = {"tensor": (LLAMA, "narrow", 2), "data": (LLAMA, "both", 2), "pipe": (EXPERTS, "pipe", 4)}


@pytest.mark.parametrize("case", RUNS)
def test_several_ranks_are_one_process(case, tmp_path):
    spec, layout, size = RUNS[case]
    words = [*write_project(tmp_path, spec), *["--accumulate", "2"] * (case == "pipe")]
    run([*words, "-o", str(tmp_path / "one"), "--steps", "3", "--device", "cpu"])
    about = {**os.environ, "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    more = ["-o", str(tmp_path / "two"), "--steps", "3", "--device", "cuda:0", "--layout", layout, "--timeout", "60"]
    ranks = [
        subprocess.Popen([sys.executable, "-c", RANK, *words, *more], env={**about, "RANK": str(i), "LOCAL_RANK": str(i)},
                         stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for i in range(size)
    ]  # fmt: skip
    said = [rank.communicate(timeout=120)[0] for rank in ranks]
    assert not any(rank.returncode for rank in ranks), said
    assert_same_curve(curve(tmp_path / "two"), curve(tmp_path / "one"))


def test_nccl_carries_what_is_on_the_gpu_and_gloo_the_rest():
    """One GPU has one rank: its group goes through NCCL's code all the same."""
    import torch.distributed as dist

    from heddle.runtime.lib.processes import _Connection

    dist.init_process_group("cpu:gloo,cuda:nccl", rank=0, world_size=1, store=dist.HashStore())
    try:
        wire = _Connection(dist.new_group([0]), (0,), "along `data` on rank 0")
        for device in ("cpu", "cuda"):
            x = torch.randn(3, 4, device=device)
            assert wire.reduce(x.clone(), "sum").equal(x) and wire.gather(x).equal(x[None])
            assert wire.scatter(x[None]).equal(x) and wire.broadcast(x.clone(), 0).equal(x)
            if device == "cuda":
                assert wire.exchange(x[None]).equal(x[None])
        wire.barrier()
    finally:
        dist.destroy_process_group()
