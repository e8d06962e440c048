"""A generated module of data 2 x tensor 2 against one written by hand: the same weights, four processes, gloo, in turn.

A step is forward, backward and whole gradients of a dense decoder, with and without split sequences. First loss and
gradients of both sides are compared; then pairs of steps are timed, each side first in every other pair. Ratios are our
time over that of the hand-written module, pair by pair; printed are median, minimum and maximum, and the collectives of
both sides as torch.distributed sees them, each by kind and bytes.
Run as `python -m heddle.benchmarks.layout_overhead`; `--json FILE` writes it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from heddle.benchmarks.cpu import device
from heddle.benchmarks.megatron_style import Decoder
from heddle.dsl.layout import layout_of
from heddle.dsl.load import load_text, shipped_folder
from heddle.runtime.check import program_of
from heddle.runtime.compile import Artifact, build, instantiate
from heddle.runtime.distributed import axes_of, groups
from heddle.runtime.lib import Gathered
from heddle.runtime.lib.laid import global_counts, laid_parameters
from heddle.runtime.lib.processes import Processes
from heddle.runtime.train.config import TrainConfig
from heddle.runtime.train.divided import Divided
from heddle.runtime.train.rows import sum_of_parts

SIZES = dict(vocab=8192, hidden=512, ffn=1536, layers=4, heads=8, kv_heads=4, head_dim=64)
RANKS, MOST, CLOSE = 4, 1.05, 1e-5
SPLIT = {"tensor": "", "tensor, split sequences": "    shard seq over tensor between blocks\n"}
LAYOUT = """
layout laid:
    mesh data = 2, tensor = 2
    shard vocab, heads, kv_heads, ffn over tensor
    shard batch over data
"""


def artifact(split: str) -> Artifact:
    """The decoder under a layout."""
    arguments = ", ".join(f"{k} = {v}" for k, v in SIZES.items())
    text = f'use llama from "llama/llama.spec"\n\nmodel dense = llama({arguments})\n{LAYOUT}{split}'
    file = load_text(text, folder=shipped_folder())
    return build(program_of(file), layout=layout_of(file))


KINDS = {
    "all_reduce": "all_reduce", "all_reduce_": "all_reduce", "allreduce_": "all_reduce",
    "all_gather_into_tensor": "all_gather", "_allgather_base_": "all_gather",
    "reduce_scatter_tensor": "reduce_scatter", "_reduce_scatter_base_": "reduce_scatter",
    "wait_tensor": None, "barrier": None,
}  # fmt: skip
"""What torch.distributed calls collectives, where it gives their result and where it writes it."""


class Counted(TorchDispatchMode):
    """Counts what torch.distributed is asked for inside: (kind, bytes put in)."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[tuple[str, int]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            name = func._schema.name.partition("::")[2]
            given = args[1] if name.endswith("_base_") else args[0]  # the output stands before the input
            tensor = given[0] if isinstance(given, (list, tuple)) else given
            if (kind := KINDS[name]) is not None:
                self.found[kind, tensor.numel() * tensor.element_size()] += 1
        return func(*args, **(kwargs or {}))


def generated(made: Artifact, mesh: Processes) -> tuple[Any, Callable[[Tensor], Tensor]]:
    """Our model and its step, as `heddle train` takes it up to the optimizer."""
    model = instantiate(made, seed=0, mesh=mesh)
    optimizer = Divided(model.train(), TrainConfig())

    def step(tokens: Tensor) -> Tensor:
        optimizer.summed.clear()
        counts = global_counts(model, model.counts(tokens))
        sums = model.losses(tokens, gathered=Gathered())
        part = torch.stack([s / counts[n].clamp(min=1) for n, s in sums.items()]).sum()
        part.backward()
        optimizer.gather()
        optimizer.reduce()
        return part.detach()

    return model, step


def far(a: Tensor, b: Tensor) -> float:
    """The largest difference, relative to the largest number."""
    return float((a - b).abs().max() / b.abs().max().clamp_min(1e-30))


def rank(me: int, folder: str, name: str, rounds: int, shape: tuple[int, int]) -> None:
    """One process: checks, counts, times; the first writes what was found."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", ".*deprecated", FutureWarning)  # names that torch 2.13 has new ones for
    store = dist.FileStore(f"{folder}/store", RANKS)
    dist.init_process_group("gloo", store=store, rank=me, world_size=RANKS)
    made = artifact(SPLIT[name])
    mesh = Processes(axes_of(made), groups(made, ()))
    model, ours = generated(made, mesh)
    data, tensor = (mesh[axis].wire.group for axis in ("data", "tensor"))  # type: ignore[union-attr]
    peer = Decoder(SIZES, data, tensor, bool(SPLIT[name]))
    peer.take({p.path: p.view for p in laid_parameters(model)})
    peer.buffer()
    source = torch.Generator().manual_seed(mesh.place("data"))
    tokens = torch.randint(0, SIZES["vocab"], shape, generator=source)
    found: dict[str, Any] = {"difference": compared(model, ours, peer, tokens)}
    for side, step in (("heddle", ours), ("hand-written", peer.step)):
        with Counted() as counted:
            step(tokens)
        found[side] = {f"{kind} of {size} bytes": n for (kind, size), n in sorted(counted.found.items())}
    found["pairs"] = timed(lambda: ours(tokens), lambda: peer.step(tokens), rounds)
    if me == 0:
        Path(folder, "found.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def compared(model: Any, ours: Callable[[Tensor], Tensor], peer: Decoder, tokens: Tensor) -> dict[str, float]:
    """How far loss and gradients are apart, the worst of all ranks. Raises AssertionError where they do not agree."""
    own_loss = sum_of_parts(model, {"lm": ours(tokens).double()})
    their_loss = peer.step(tokens).double()
    dist.all_reduce(their_loss, group=peer.data)
    own = {p.path: p for p in laid_parameters(model)}
    gradients = [far(g.reshape(own[path].view.shape), own[path].holder.grad) for path, g in peer.places(True)]
    assert len(gradients) == len(own)
    worst = torch.tensor([far(own_loss, their_loss), max(gradients)])
    dist.all_reduce(worst, dist.ReduceOp.MAX)
    assert float(worst.max()) < CLOSE, worst
    return {"loss": float(worst[0]), "gradients": float(worst[1])}


def timed(ours: Callable[[], Any], theirs: Callable[[], Any], rounds: int) -> list[dict[str, tuple[float, float]]]:
    """Pair by pair: seconds of both sides until the last rank is done, and processor seconds of this rank."""
    found = []
    for i in range(rounds + 2):
        seconds, spent = {}, {}
        for side in (ours, theirs) if i % 2 else (theirs, ours):
            dist.barrier()
            begun, used = time.perf_counter(), time.process_time()
            side()
            spent[side] = time.process_time() - used
            dist.barrier()
            seconds[side] = time.perf_counter() - begun
        if i > 1:
            found.append({name: (of[ours], of[theirs]) for name, of in (("seconds", seconds), ("processor", spent))})
    return found


def measure(name: str, rounds: int, shape: tuple[int, int]) -> dict[str, Any]:
    """Four processes under one layout."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(rank, (folder, name, rounds, shape), RANKS)
        found: dict[str, Any] = json.loads(Path(folder, "found.json").read_text())
    pairs = found.pop("pairs")
    for clock in ("seconds", "processor"):
        both = [p[clock] for p in pairs]
        ratios = sorted(a / b for a, b in both)
        ours, theirs = (statistics.median(p[i] for p in both) for i in (0, 1))
        found[clock] = {"heddle": ours, "hand-written": theirs, "ratio": statistics.median(ratios),
                        "min": ratios[0], "max": ratios[-1]}  # fmt: skip
    return found


def main() -> None:
    """Measure and print."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--rounds", type=int, default=20)
    options.add_argument("--batch", type=int, default=2)
    options.add_argument("--seq", type=int, default=256)
    options.add_argument("--json", type=Path)
    given = options.parse_args()
    print(f"{'layout':26}{'heddle':>9}{'by hand':>10}{'ratio':>8}  (min - max)   processor   gradients   collectives")
    rows = {}
    for name in SPLIT:
        row = rows[name] = measure(name, given.rounds, (given.batch, given.seq))
        wall, counts = row["seconds"], [sum(row[side].values()) for side in ("heddle", "hand-written")]
        spread, gradients = f"({wall['min']:.2f} - {wall['max']:.2f})", row["difference"]["gradients"]
        print(f"{name:26}{wall['heddle']:>8.3f}s{wall['hand-written']:>9.3f}s{wall['ratio']:>7.3f}x  {spread:14}"
              f"{row['processor']['ratio']:>8.3f}x{gradients:>12.0e}   {counts[0]} and {counts[1]}",
              flush=True)  # fmt: skip
    print(f"wanted: at most {MOST:g}x; load of this machine: {os.getloadavg()[0]:.1f}")
    if given.json:
        about = {"device": device(), "date": time.strftime("%Y-%m-%d"), "torch": torch.__version__}
        about |= {"load": os.getloadavg()[0], "sizes": SIZES, "tokens": [given.batch, given.seq], "limit": MOST}
        given.json.write_text(json.dumps({**about, "layouts": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
