"""A model that reads neighbours from an index against the same model with retrieval off: held-out loss.

The index holds the training files of the standard library's text; a chunk never finds its own file. Whole files are
held out, and look up neighbours in the same index. The side without is the same spec with `neighbors = none`: the
decoder alone. Same bytes, steps and seeds on both sides.
Run by `make bench-programs`; `--json FILE` also writes the numbers.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
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
from heddle.runtime.retrieval import Feed, Index, Looked, build_index
from heddle.runtime.train import TrainConfig, evaluate, train

SPEC = """
use retro from "retro.spec"

model small = retro(vocab = 256, hidden = 128, ffn = 512, layers = 4, heads = 4, cross = [1, 3], context = 512,
                    encoder_drop = 0)
"""
SIDES: dict[str, dict[str, Any]] = {"with its index": {}, "retrieval off": {"neighbors": None}}


def main() -> None:
    """Measure and print."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--steps", type=int, default=400)
    options.add_argument("--seq", type=int, default=512)
    options.add_argument("--batch", type=int, default=4)
    options.add_argument("--seeds", type=int, default=3)
    options.add_argument("--json", type=Path)
    given = options.parse_args()
    words = open_tokenizer("bytes")
    kept, held = split(open_corpus([library_text()], words), 0.05)
    file = load_text(SPEC, folder=shipped_folder() / "retro")
    programs = {side: program_of(file, None, over) for side, over in SIDES.items()}
    for side, program in programs.items():
        print(f"{side:16} {program.num_parameters():>10,} parameters")
    found: dict[str, list[float]] = {side: [] for side in SIDES}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
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
        for seed in range(given.seeds):
            for side, program in programs.items():
                model = instantiate(build(program), seed=seed)
                rows, others = Packed(kept, given.seq, seed), Packed(held, given.seq)
                if "neighbors" in model.inputs:
                    feed = Feed(model, "neighbors", index, "bytes", words)
                    rows.given["neighbors"] = Looked(feed, rows, work / "looked")
                    others.given["neighbors"] = Looked(feed, others, work / "looked-held-out")
                config = TrainConfig(
                    steps=given.steps, batch=given.batch, seq=given.seq, lr=2e-3, min_lr=2e-4, warmup=20, seed=seed,
                    save_every=10**6,
                )  # fmt: skip
                train(model, rows, config, work / f"{seed} {side}")
                found[side].append(evaluate(model, others, given.batch, rows=64))
                print(f"seed {seed}  {side:16} {found[side][-1]:.4f} nats a byte", flush=True)
    middle = {side: statistics.median(v) for side, v in found.items()}
    for side, v in found.items():
        print(f"{side:16} held-out loss {middle[side]:.4f} nats a byte ({min(v):.4f} - {max(v):.4f})")
    with_, without = (middle[side] for side in SIDES)
    print(f"retrieval changes the loss by {100 * (with_ / without - 1):+.2f} % (below 0 wanted)")
    if given.json:
        about = {"device": device(), "date": time.strftime("%Y-%m-%d"), "torch": torch.__version__}
        settings = {k: v for k, v in vars(given).items() if k != "json"}
        given.json.write_text(json.dumps({**about, "settings": settings, "losses": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
