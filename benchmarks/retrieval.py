"""A model that reads neighbours from an index against the same model with retrieval off: held-out loss.

The index holds the training files of the standard library's text; a chunk never finds its own file. Whole files are
held out, and look up neighbours in the same index. The side without is the same spec with `neighbors = none`: the
decoder alone. Same bytes, steps and seeds on both sides; the gain is told seed by seed.
Coverage says how much there is to gain: of the 8-byte runs of what follows a chunk of the held-out files, how many
stand in its neighbours and not in its own row before, against as many chunks taken at random.
Run by `make bench-programs`, on a GPU by `make bench-gpu-programs`; `--json FILE` also writes the numbers.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from heddle.benchmarks.cpu import device
from heddle.dsl.load import load_text, shipped_folder
from heddle.examples.demo import library_text
from heddle.runtime.check import program_of
from heddle.runtime.compile import build, instantiate
from heddle.runtime.data import Packed, open_corpus, open_tokenizer, split
from heddle.runtime.lib import Model
from heddle.runtime.retrieval import Feed, Index, Looked, build_index
from heddle.runtime.train import TrainConfig, evaluate, train

SPEC = """
use retro from "retro.spec"

model small = retro(vocab = 256, hidden = 128, ffn = 512, layers = 4, heads = 4, cross = [1, 3], context = 512,
                    encoder_drop = 0)
"""
SIDES: dict[str, dict[str, Any]] = {"with its index": {}, "retrieval off": {"neighbors": None}}


def model_and_data(
    side: str, seed: int, work: Path, given: argparse.Namespace, look_up: bool = True
) -> tuple[Model, Packed, Packed]:
    """A model, the rows that it is trained on and those that are held out, with neighbours where it reads any. These
    are looked up once, into `work`."""
    words = open_tokenizer("bytes")
    kept, held = split(open_corpus([library_text()], words), 0.05)
    program = program_of(load_text(SPEC, folder=shipped_folder() / "retro"), None, SIDES[side])
    model = instantiate(build(program), seed=seed)
    rows, others = Packed(kept, given.seq, seed), Packed(held, given.seq)
    if look_up and "neighbors" in model.inputs:
        feed = Feed(model, "neighbors", Index(work / "index"), "bytes", words)
        rows.given["neighbors"] = Looked(feed, rows, work / "looked")
        others.given["neighbors"] = Looked(feed, others, work / "looked-held-out")
    return model, rows, others


def one(side: str, seed: int, work: Path, given: argparse.Namespace) -> float:
    """Train one side, and give its held-out loss in nats a byte."""
    model, rows, others = model_and_data(side, seed, work, given)
    config = TrainConfig(
        steps=given.steps, batch=given.batch, seq=given.seq, lr=2e-3, min_lr=2e-4, warmup=20, seed=seed,
        save_every=10**6,
    )  # fmt: skip
    train(model.to(given.device), rows, config, work / f"{seed} {side}")
    return evaluate(model, others, given.batch, rows=given.rows)


def coverage(work: Path, given: argparse.Namespace, rows: int = 60) -> dict[str, float]:
    """Shares of the 8-byte runs behind held-out chunks: in the row before; new in neighbours, in random chunks."""
    model, _, others = model_and_data(next(iter(SIDES)), 0, work, given, look_up=False)
    feed = Feed(model, "neighbors", Index(work / "index"), "bytes", open_tokenizer("bytes"))
    source = np.random.default_rng(0)
    every, found = 0, {"in its row before": 0, "new in neighbours": 0, "new in random chunks": 0}
    for number in source.choice(others.num_rows, min(rows, others.num_rows), replace=False):
        row = others.rows([int(number)]).tokens[0].numpy()
        ends = np.arange(feed.index.chunk, len(row) - feed.index.chunk + 1, feed.index.chunk)
        near = feed.find(np.stack([row[e - feed.index.chunk : e] for e in ends]).astype(np.int32))
        by_chance = source.integers(len(feed.index.chunks), size=near.shape)
        for end, a, b in zip(ends, feed.rows(near).numpy(), feed.rows(by_chance).numpy(), strict=True):
            wanted, before = runs_of(row[end : end + feed.index.chunk]), runs_of(row[:end])
            every += len(wanted)
            found["in its row before"] += len(wanted & before)
            found["new in neighbours"] += len((wanted & set().union(*map(runs_of, a))) - before)
            found["new in random chunks"] += len((wanted & set().union(*map(runs_of, b))) - before)
    return {name: count / every for name, count in found.items()}


def runs_of(tokens: np.ndarray, width: int = 8) -> set[bytes]:
    """All runs of so many bytes."""
    text = tokens.clip(0, 255).astype(np.uint8).tobytes()
    return {text[i : i + width] for i in range(len(text) - width + 1)}


def build_text_index(work: Path) -> None:
    """The index of the training files."""
    words = open_tokenizer("bytes")
    kept, _ = split(open_corpus([library_text()], words), 0.05)
    starts = np.concatenate([[0], kept.ends[:-1]])
    (work / "text.jsonl").write_text(
        "".join(
            json.dumps({"text": words.decode(kept.tokens[s:e].tolist())}) + "\n"
            for s, e in zip(starts, kept.ends, strict=True)
        ),
        encoding="utf-8",
    )
    begun = time.perf_counter()
    index = Index(build_index([work / "text.jsonl"], work / "index"))
    print(f"{len(index.chunks):,} chunks indexed in {time.perf_counter() - begun:.0f} s", flush=True)


def losses(work: Path, given: argparse.Namespace) -> dict[str, list[float]]:
    """Held-out loss of each side in nats a byte, one a seed."""
    begun = time.perf_counter()
    model_and_data(next(iter(SIDES)), 0, work, given)
    print(f"neighbours looked up in {time.perf_counter() - begun:.0f} s", flush=True)
    found: dict[str, list[float]] = {side: [] for side in SIDES}
    with ProcessPoolExecutor(given.jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        runs = {(s, side): pool.submit(one, side, s, work, given) for s in range(given.seeds) for side in SIDES}
        for (seed, side), run in runs.items():
            found[side].append(run.result())
            print(f"seed {seed}  {side:16} {found[side][-1]:.4f} nats a byte", flush=True)
    for side, v in found.items():
        print(f"{side:16} held-out loss {statistics.median(v):.4f} nats a byte ({min(v):.4f} - {max(v):.4f})")
    gains = [100 * (a / b - 1) for a, b in zip(*(found[side] for side in SIDES), strict=True)]
    print(f"retrieval changes the loss by {statistics.median(gains):+.2f} % "
          f"({min(gains):+.2f} - {max(gains):+.2f} of one seed; below 0 wanted)")  # fmt: skip
    return found


def main() -> None:
    """Measure and print."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--steps", type=int, default=400)
    options.add_argument("--seq", type=int, default=512)
    options.add_argument("--batch", type=int, default=4)
    options.add_argument("--seeds", type=int, default=3)
    options.add_argument("--rows", type=int, default=64, help="of the held-out files")
    options.add_argument("--jobs", type=int, default=1, help="runs at a time")
    options.add_argument("--device", default="cpu")
    options.add_argument("--no-loss", action="store_true", help="coverage only")
    options.add_argument("--json", type=Path)
    given = options.parse_args()
    file = load_text(SPEC, folder=shipped_folder() / "retro")
    for side, over in SIDES.items():
        print(f"{side:16} {program_of(file, None, over).num_parameters():>10,} parameters")
    with tempfile.TemporaryDirectory() as folder:
        build_text_index(Path(folder))
        there = coverage(Path(folder), given)
        print("runs of 8 bytes behind a chunk: " + ", ".join(f"{100 * v:.1f} % {name}" for name, v in there.items()))
        found = {} if given.no_loss else losses(Path(folder), given)
    if given.json:
        about = {"device": device(given.device), "date": time.strftime("%Y-%m-%d"), "torch": torch.__version__}
        settings = {k: v for k, v in vars(given).items() if k not in ("json", "no_loss")}
        told = {**about, "settings": settings, "coverage": there, "losses": found}
        given.json.write_text(json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    main()
