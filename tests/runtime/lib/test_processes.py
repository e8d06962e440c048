"""Meshes of real processes (gloo): the numbers of the simulation, errors that say where, and what torch.compile traces.

Each process runs this file, which is why nothing of the tests is imported here by a relative name.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from heddle.runtime.lib import Mesh, spmd
from heddle.runtime.lib.processes import Processes
from heddle.runtime.lib.simulated import simulate
from heddle.runtime.lib.spmd import LEGAL, I, P, R, S, V

Axes = dict[str, int]
GROUPS = ["data", "tensor", ("data", "tensor"), ("tensor", "data"), ()]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.int64]


def numbers(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Small whole numbers: sums are exact in every dtype and order."""
    return torch.randint(-3, 4, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def conversions(mesh: Mesh) -> dict[str, Tensor]:
    """Every conversion of every group, forward and backward, by name. Whether the tensors mean something does not matter."""
    made = {}
    for axes in GROUPS:
        group = mesh[axes]
        for name, pairs in LEGAL.items():
            for pair in pairs:
                for rows in (False, True) if "S" in pair else (False,):
                    src, dst = (kind(letter, rows, at) for at, letter in enumerate(pair.split(" -> ")))
                    n = group.size
                    x = numbers(mesh.rank, *((n, n, 2) if rows else (2 * n, n, 4))).requires_grad_()
                    y = getattr(spmd, name)(x.transpose(0, 1).contiguous().transpose(0, 1), group, src=src, dst=dst)
                    g = numbers(10 + mesh.rank, *y.shape[::-1]).permute(*range(y.dim())[::-1])  # not contiguous
                    (grad,) = torch.autograd.grad(y, x, g)
                    made |= {f"{axes} {name} {src} {dst}": y.detach(), f"{axes} {name} {src} {dst} backward": grad}
    return made


def kind(letter: str, rows: bool, at: int) -> spmd.Placement:
    return (V if rows else S(at)) if letter == "S" else {"R": R, "I": I, "P": P, "V": V}[letter]


def primitives(mesh: Mesh) -> dict[str, Tensor]:
    """What has no gradient, in each dtype; two messages on their way at once, both ways."""
    made = {}
    for axes in GROUPS:
        group = mesh[axes]
        for dtype in DTYPES:
            x = numbers(mesh.rank, group.size, 2 * group.size, dtype=dtype)
            got = {
                "sum": group.all_reduce(x),
                "max": group.all_reduce(x, "max"),
                "gather": group.all_gather(x),
                "scalar": group.all_gather(x[0, 0]),
                "join": group.all_gather_into(x, 1),
                "scatter": group.reduce_scatter(x, 1),
                "exchange": group.all_to_all(x, 1, 0),
                "broadcast": group.broadcast(x, group.size - 1),
            }
            for op in ("sum", "max"):
                got[f"{op} in place"] = x.clone()
                group.all_reduce_(got[f"{op} in place"], op)
            for peer in range(group.size):
                if peer != group.rank:
                    group.send(x + 1, peer)
                    group.send(x + 2, peer)
            for peer in range(group.size):
                if peer != group.rank:
                    got |= {f"from {peer}, {i}": group.receive(x, peer) for i in range(2)}
            for far in range(1, group.size):  # in a circle, and between two ranks both ways at once
                to, from_ = (group.rank + far) % group.size, (group.rank - far) % group.size
                got[f"swap {far}"] = group.swap(x + far, to, x, from_)
            group.barrier()
            made |= {f"{axes} {dtype} {name}": value for name, value in got.items()}
    return made


class Sharded(nn.Module):
    """Two layers as generated code shards them, with most kinds of conversions."""

    def __init__(self, mesh: Mesh) -> None:
        super().__init__()
        self.mesh = mesh
        self.up, self.down = (nn.Parameter(numbers(mesh.rank + i, 4, 4)) for i in (20, 30))

    def forward(self, x: Tensor) -> Tensor:
        """x [batch, seq/tensor, 4] -> the loss."""
        tensor, both = self.mesh["tensor"], self.mesh["tensor", "data"]
        up = spmd.convert(self.up, self.mesh["data"], src=I, dst=R)
        wide = spmd.all_gather(x, tensor, src=S(1), dst=R) @ up
        y = spmd.reduce_scatter(wide.relu() @ self.down, tensor, src=P, dst=S(1))
        largest = spmd.all_max(y.amax(-1), tensor)
        heads = spmd.all_to_all(y, tensor, src=S(1), dst=S(-1)) / (1 + largest.abs().sum())
        rows = spmd.all_gather(heads.sum((0, 1)), tensor, src=V, dst=R)
        loss = heads.square().sum() + (rows * (1 + tensor.rank)).sum()
        return spmd.all_reduce(spmd.reinterpret(loss, both, src=V, dst=P), both, src=P, dst=I)


def losses(mesh: Mesh, compiled: Callable[[nn.Module], nn.Module] = lambda module: module) -> dict[str, Tensor]:
    module = Sharded(mesh)
    x = numbers(40 + mesh.rank, 2, 2, 4).requires_grad_()
    loss = compiled(module)(x)
    loss.backward()
    assert x.grad is not None and module.up.grad is not None and module.down.grad is not None
    return {"loss": loss.detach(), "x": x.grad, "up": module.up.grad, "down": module.down.grad}


def work(mesh: Mesh, has_compiled: bool = True) -> dict[str, Tensor]:
    """All of it, and the module once more as one graph of torch.compile."""
    compiled = losses(mesh, lambda m: torch.compile(m, fullgraph=True, backend="aot_eager") if has_compiled else m)
    again = {f"compiled {name}": value for name, value in compiled.items()}
    return conversions(mesh) | primitives(mesh) | losses(mesh) | again


def main(rank: str, ranks: str, given: str) -> None:
    """One process."""
    folder, axes = Path(given).absolute(), {"data": int(ranks) // 2, "tensor": 2}
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=int(rank), world_size=int(ranks))
    mesh = Processes(axes, GROUPS, timeout=120.0)
    torch.save(work(mesh, ranks == "2"), folder / f"{rank}.pt")  # tracing is the slow part
    if ranks == "2":
        fail(mesh, Processes(axes, ["tensor"], timeout=2.0), folder)
    else:
        dist.barrier()
        dist.destroy_process_group()


def fail(mesh: Mesh, impatient: Mesh, folder: Path) -> None:
    """Rank 1 first does not take part, then is no more; rank 0 writes what it is told by the library."""
    if mesh.rank == 1:
        while not (folder / "forgotten").exists():
            time.sleep(0.1)
        os._exit(0)
    for name, one in (("forgotten", impatient), ("gone", mesh)):
        with pytest.raises(RuntimeError) as error:
            spmd.all_reduce(torch.ones(2), one["tensor"], src=P, dst=R)
        (folder / name).write_text(str(error.value))
    os._exit(0)


@pytest.mark.parametrize("ranks", [2, 4])
def test_processes_give_the_numbers_of_the_simulation(tmp_path: Path, ranks: int) -> None:
    """In every group, also those in another order than the processes; compiled too. What fails says where."""
    commands = [[sys.executable, __file__, str(rank), str(ranks), str(tmp_path)] for rank in range(ranks)]
    processes = [subprocess.Popen(c, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for c in commands]
    try:
        said = [process.communicate(timeout=400)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert not any(process.returncode for process in processes), said
    for rank, wanted in enumerate(simulate({"data": ranks // 2, "tensor": 2}, lambda mesh: work(mesh, False))):
        got = torch.load(tmp_path / f"{rank}.pt")
        assert set(got) == set(wanted)
        for name, value in got.items():
            assert value.dtype == wanted[name].dtype
            # Whole numbers are exact; the module divides, and the order of gloo's sums is its own.
            torch.testing.assert_close(value, wanted[name], rtol=1e-12, atol=1e-12)
    for name in ("forgotten", "gone") if ranks == 2 else ():
        assert re.match(r"all_reduce along `tensor` on rank 0 failed: \S", (tmp_path / name).read_text())


def test_groups_are_listed_when_the_mesh_is_made() -> None:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=5, world_size=8, store=FakeStore())
    try:
        mesh = Processes({"data": 4, "tensor": 2, "pipe": 1}, ["tensor", ("data", "tensor"), "pipe"])
        assert (mesh.rank, mesh.coordinates) == (5, {"data": 2, "tensor": 1, "pipe": 0})
        assert mesh["tensor"].rank == 1 and mesh["data", "tensor"].rank == 5 and mesh["pipe"].wire is None
        with pytest.raises(ValueError, match=r"`data` was made with the mesh; there are: `tensor`, `data` x `tensor`, `pipe`"):
            mesh["data"]
        with pytest.raises(ValueError, match="has 4 ranks, and there are 8"):
            Processes({"data": 4}, [])
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
