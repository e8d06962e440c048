"""Whole models of `make bench-gpu`: a training step against transformers, and decoding against the memory's rate."""

from __future__ import annotations

import gc
import itertools
import os
import tempfile
from collections import Counter
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from statistics import median, quantiles
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from safetensors.torch import save_file

from heddle.benchmarks.gpu_lines import Line
from heddle.lowering.cost import flops_per_token
from heddle.lowering.passes.stream import state_bytes
from heddle.runtime.bench import training_step
from heddle.runtime.compile import Artifact, build, class_of, instantiate
from heddle.runtime.counted import Watched, count
from heddle.runtime.errors import said
from heddle.runtime.folder import write_spec
from heddle.runtime.huggingface import export_folder
from heddle.runtime.kernel_estimate import Counts, side_of
from heddle.runtime.lib import kernels
from heddle.runtime.lib.kernels import Launch
from heddle.runtime.plan.devices import Device
from heddle.runtime.plan.uncompiled import uncompiled
from heddle.runtime.timing import in_turn
from heddle.runtime.train import TrainConfig

ROUNDS, CLOSE = 10, 0.05
"""Rounds of a step; and the largest difference of logits that bf16 explains, as a share of the largest."""
STEPPED = 46
"""Bytes a weight that a step of AdamW moves, weights bf16 and all else fp32: a gradient read (2) and written wide (4);
read for the norm (4); scaled (8); read beside moments and the master (16), which are written (12)."""


# --- a training step --------------------------------------------------------------------------------------------------


def train(line: Line, target: str, rates: tuple[float, float]) -> dict[str, Any]:
    """A step in bf16 with fp32 masters, ours and theirs: eager and compiled, with what it finds of fast kernels."""
    program, tokens = line.program(), line.tokens
    artifact = build(program, target)
    ours = instantiate(artifact, device="cuda").train().cast(torch.bfloat16)
    given = torch.randint(0, int(program.arguments["vocab"]), (2, tokens), device="cuda")
    row = _row("train step", 3 * flops_per_token(artifact.lowered, tokens) * given.numel())
    runs: dict[str, Callable[[], object]] = {"ours": training_step(ours, given, TrainConfig(dtype="bf16"))}
    try:
        from heddle.benchmarks.cpu import their_step

        theirs = same_of_transformers(ours, line).to("cuda").train()
        with torch.no_grad():
            a, b = ours(given[:1, :256]).float(), theirs(given[:1, :256]).logits.float()
        difference = float((a - b).abs().max() / b.abs().max())
        row["errors"]["transformers"] = difference
        if not difference <= CLOSE:
            row["notes"]["transformers"] = f"wrong: its logits are {difference:.2f} of the largest away"
        else:
            row["notes"]["transformers"] = metadata.version("transformers")
            runs["transformers, eager"] = their_step(theirs, given, low=True)
            runs["transformers"] = their_step(torch.compile(theirs), given, low=True)
    except Exception as why:  # another package's failure is its result
        row["notes"]["transformers"] = f"fails: {said(why)}"
    return _timed(row, runs, rates)


def same_of_transformers(model: Any, line: Line) -> Any:
    """Their class with our weights, which stay fp32 there and are computed with in bf16."""
    import transformers

    with tempfile.TemporaryDirectory() as folder:
        mine = Path(folder) / "ours"
        mine.mkdir()
        write_spec(mine, *line.source())
        save_file({n: x.contiguous().cpu() for n, x in model.state_dict().items()}, mine / "model.safetensors")
        out = export_folder(mine, Path(folder) / "theirs")
        return transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)


# --- decoding ---------------------------------------------------------------------------------------------------------


def decode(line: Line, target: str, rates: tuple[float, float]) -> dict[str, Any]:
    """A token of one sequence behind a short prompt, greedy, in bf16: `tokens` of them less half as many, so that the
    prompt, and what is made once, do not count."""
    program, tokens = line.program(), line.tokens
    artifact = build(program, target)
    with torch.device("cuda"):
        model = class_of(artifact)()
    model.cast(torch.bfloat16)
    for weight in model.parameters():
        weight.data.normal_(0, 0.02)
    prompt = torch.randint(0, int(program.arguments["vocab"]), (1, 64), device="cuda")
    row = _row("decode", flops_per_token(artifact.lowered, tokens))
    row["bytes"] = _read(artifact, tokens)

    def run(new: int) -> Callable[[], object]:
        return lambda: model.generate(prompt, new)

    long, short = in_turn([run(tokens), run(tokens // 2)], rounds=3)
    each = [(a - b) / (tokens - tokens // 2) for a, b in itertools.product(long, short)]
    row["seconds"], row["low"], row["high"] = median(each), min(each), max(each)
    return _shared(row, rates)


def _read(artifact: Artifact, length: int) -> int:
    """Bytes that a token reads and writes: weights in bf16 but for the table of embeddings, of which it reads a row;
    what is kept of half of `length` tokens, on the mean."""
    program, lowered = artifact.program, artifact.lowered
    looked_up = {o for n in lowered.model.nodes if n.op == "embed" for o in n.operands[1:]}
    others = {o for n in lowered.model.nodes if n.op != "embed" for o in n.operands}
    table = sum(_count(lowered.model, o) for o in looked_up - others if o is not None)
    state = state_bytes(lowered, 0)  # of folds, which are read and written
    return 2 * (program.num_parameters() - table) + 2 * state + (state_bytes(lowered, length) - state) // 2


def _count(graph: Any, value: str) -> int:
    total = 1
    for dim in graph.values[value].type.dims:
        total *= graph.size(dim) or 1
    return total


# --- rows, and estimates ----------------------------------------------------------------------------------------------


def _row(name: str, flops: float) -> dict[str, Any]:
    return {"kernel": name, "ops": (), "bytes": 0, "flops": flops, "seconds": 0.0, "low": None, "high": None,
            "copy_share": None, "matmul_share": None, "peers": {}, "notes": {}, "errors": {}, "memory": {},
            "estimated": False}  # fmt: skip


def _timed(row: dict[str, Any], runs: dict[str, Callable[[], object]], rates: tuple[float, float]) -> dict[str, Any]:
    times = dict(zip(runs, in_turn(list(runs.values()), ROUNDS), strict=True))
    row["seconds"] = median(times["ours"])
    row["low"], _, row["high"] = quantiles(times["ours"])
    row["peers"] = {name: median(t) / row["seconds"] for name, t in times.items() if name != "ours"}
    gc.collect()
    torch.cuda.empty_cache()
    return _shared(row, rates)


def _shared(row: dict[str, Any], rates: tuple[float, float]) -> dict[str, Any]:
    if row["bytes"]:
        row["copy_share"] = row["bytes"] / row["seconds"] / rates[0]
    row["matmul_share"] = row["flops"] / row["seconds"] / rates[1]
    return row


def estimated(line: Line, target: str, device: Device) -> dict[str, Any]:
    """What ours would take; theirs is not known without a GPU."""
    program, tokens, whole = line.program(), line.tokens, line.whole
    artifact = build(program, target)
    memory = device.memory_rate * device.reached[1]
    with uncompiled(), Watched(1.0) as mode:
        model = class_of(artifact)()
        model.cast(torch.bfloat16).train()
        model.chance = 0
        with mode.section("", "") as section, kernels.launches() as told:
            if whole == "train":
                given = torch.zeros(2, tokens, dtype=torch.int64)
                torch.stack(list(model.losses(given).values())).sum().backward()
            else:
                model.eval()
                stream = model.stream(1, tokens)
                with torch.inference_mode():
                    model.prefill(torch.zeros(1, tokens // 2, dtype=torch.int64), stream)
        if whole == "decode":
            with mode.section("", "") as section, kernels.launches() as told, torch.inference_mode():
                model.prefill(torch.zeros(1, 1, dtype=torch.int64), stream)
    side = side_of(Counts(_counted(told), section.ledger), device)
    if whole == "train":
        row = _row("train step", 3 * flops_per_token(artifact.lowered, tokens) * 2 * tokens)
        row["seconds"] = side.seconds + STEPPED * program.num_parameters() / memory
    else:
        row = _row("decode", flops_per_token(artifact.lowered, tokens))
        row["seconds"], row["bytes"] = side.seconds, _read(artifact, tokens)
    row["estimated"], row["sides"] = True, {"ours": vars(side)}
    return _shared(row, (memory, device.flops["bf16"] * device.reached[0]))


def _counted(told: list[Launch]) -> list[list[Any]]:
    """Launches that are alike do the same, and one of them is looked at."""
    kinds: dict[Any, Launch] = {}
    times: Counter[Any] = Counter()
    for one in told:
        shapes = tuple((tuple(a.shape), a.stride(), a.dtype) if isinstance(a, torch.Tensor) else a for a in one.args)
        key = (one.kernel, one.grid, shapes)
        kinds.setdefault(key, one)
        times[key] += 1
    return [[counted] for key, one in kinds.items() for counted in [count(one)] * times[key]]


MEASURES: dict[str, Callable[[Line, str, tuple[float, float]], dict[str, Any]]] = {"train": train, "decode": decode}
"""Whole models by what a line calls them."""
