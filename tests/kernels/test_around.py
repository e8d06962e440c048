"""Whole models on kernels inside what PyTorch puts around a module: torch.compile, and FSDP2 over two processes.

CUDA graphs: tests/runtime/lib/test_capture.py. The processes run this file: `python -m tests.kernels.test_around FOLDER`.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

from heddle.runtime.compile import Artifact, instantiate
from heddle.runtime.lib import kernels
from heddle.runtime.lib.constant import constant
from tests.kernels.hybrid import VOCAB, hybrid

ROOT = Path(__file__).resolve().parents[2]
RANKS = 2


def tokens():
    return torch.randint(0, VOCAB, (RANKS, 7), generator=torch.Generator().manual_seed(1))


def step(model, loss_of):
    """The loss, every gradient, and the weights behind a step of AdamW."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    loss = loss_of(model, tokens())
    loss.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters()}
    optimizer.step()
    return loss.detach(), grads, {n: p.detach().clone() for n, p in model.named_parameters()}


def test_a_constant_has_the_mark_of_torch() -> None:
    """Which is set without loading the compiler."""
    ours, theirs = (lambda: 1), (lambda: 1)
    assert vars(constant(ours)) == vars(torch.compiler.assume_constant_result(theirs)) != {}


def test_a_training_step_in_bf16_is_that_of_torch_compile():
    """One graph, of packed documents: the same kernels run, so the numbers are the same to the last bit."""
    artifact, document = hybrid(), torch.tensor([[0, 0, 0, 0, 1, 1, 1], [0, 1, 1, 1, 1, 1, 1]])

    def loss_of(model, tokens):
        (loss,) = model.losses(tokens, document).values()
        return loss

    (loss, grads, weights), (again, same_grads, same_weights) = (
        step(instantiate(artifact, seed=3).cast(torch.bfloat16), how)
        for how in (loss_of, torch.compile(loss_of, backend="aot_eager", fullgraph=True, dynamic=False))
    )
    assert torch.equal(loss, again) and loss.isfinite()
    for name, grad in grads.items():
        assert torch.equal(grad, same_grads[name]) and torch.equal(weights[name], same_weights[name]), name
        assert grad.abs().max() > 0, name


def test_fsdp2(tmp_path):
    """Each layer's weights in parts on two ranks, each rank with a row of its own: losses are those of unwrapped modules,
    gradients their sum, to the last bit."""
    line = [sys.executable, "-m", "tests.kernels.test_around", str(tmp_path)]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert sorted(p.name for p in tmp_path.glob("holds.*")) == [f"holds.{number}" for number in range(RANKS)]


def rank(number: int, folder: str, artifact: Artifact) -> None:
    """One process: a step of a wrapped module against that of a plain one."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=number, world_size=RANKS)
    plain, wrapped = (instantiate(artifact, seed=3) for _ in range(2))
    mesh = init_device_mesh("cpu", (RANKS,))
    for module in (*wrapped.layer, wrapped):
        fully_shard(module, mesh=mesh)
    register_fsdp_forward_method(wrapped, "losses")
    mine, losses = tokens()[number : number + 1], []
    for model in (plain, wrapped):
        with kernels.launches() as told:
            (loss,) = model.losses(mine).values()
            loss.backward()
        losses.append(loss.detach())
        assert len(told) > 20
    assert torch.equal(*losses)
    own = dict(plain.named_parameters())
    for name, part in wrapped.named_parameters():
        total = own[name].grad.clone()
        dist.all_reduce(total)
        assert part.to_local().shape[0] * RANKS == own[name].shape[0], name
        assert not torch.equal(total, RANKS * own[name].grad), name  # ranks differ
        assert torch.equal(part.grad.full_tensor() * RANKS, total), name  # FSDP2 gives the mean
    dist.destroy_process_group()
    Path(folder, f"holds.{number}").touch()


if __name__ == "__main__":
    mp.start_processes(rank, (sys.argv[1], hybrid()), nprocs=RANKS, start_method="fork")  # one import for both
