"""A model that reads neighbours from an index against the same model with retrieval off: held-out loss.

The text is the standard library's, as tokens of a BPE that is learnt from the training documents. A document is
`--lines` lines of a file, or a whole file (`--lines 0`); a twentieth of all are held out, as many are for choosing
settings (`--choose` measures on those), and the index holds the rest, which is also what is trained on. A chunk never
finds its own document. Of whole files that are held out little stands in others (`results/retrieval_files.json`).
The sides see the same tokens, in the same order, for as many steps:
  with its index      RETRO (Borgeaud et al. 2022); a row of a neighbour sees the row before it, and has a place
  its index off       the first side's weights without neighbours, the paper's Retro[Off]
  trained without     `neighbors = none`: the decoder alone
  without places      with `--plain`: the first side as InstructRetro has it; rows of a neighbour see all of it, and
                      have no place
To copy what followed the same words, a model must find in a row of a neighbour also the row before. Nothing but this
rewards an encoder for looking one row back: among all rows it hardly learns to in so few steps, among two it does.
The gain is told seed by seed. Coverage says what there is to gain: of the runs of 8 bytes of what follows a held-out
chunk, how many stand in the row before, and which of the others in its neighbours, or in as many chunks by chance.
An earlier form, of bytes and whole files, is `results/retrieval_bytes*.json`: no gain beyond the spread of seeds.
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
from heddle.runtime.data import Corpus, Packed, Tokenizer, open_corpus, open_tokenizer, split
from heddle.runtime.lib import Model
from heddle.runtime.retrieval import Feed, Index, Looked, build_index
from heddle.runtime.train import TrainConfig, evaluate, train

SPEC = """
use retro from "retro.spec"

model small = retro(vocab = {vocab}, hidden = {hidden}, ffn = 4 * {hidden}, layers = {layers}, heads = 4, cross = [1],
                    context = max({seq}, 2 * {chunk}), chunk = {chunk}, near = {near}, depth = 1, encoder_drop = 0,
                    rotary = rope(1000), {read}std = {hidden} ^ -0.5)
"""
READ = "places = 1000, seen = window(2), "
INDEX, OFF, WITHOUT, PLAIN = "with its index", "its index off", "trained without", "without places"
SHARE = 0.05
"""Of the documents, what is held out, and what is for choosing."""


# --- text -------------------------------------------------------------------------------------------


def write_text(work: Path, given: argparse.Namespace) -> None:
    """The documents of each part as JSON lines, the tokenizer, and the index of those that are trained on."""
    words = open_tokenizer("bytes")
    files = open_corpus([library_text()], words)
    documents = []
    for start, end in zip([0, *files.ends[:-1]], files.ends, strict=True):
        lines = words.decode(files.tokens[start:end].tolist()).splitlines(keepends=True)
        size = given.lines or len(lines)
        documents += ["".join(lines[i : i + size]) for i in range(0, len(lines), size)]
    rest, held = split(Corpus.of([words.encode(d) for d in documents]), SHARE)
    kept, choosing = split(rest, 2 * SHARE)  # a document's side is a number between 0 and 1
    for name, part in (("kept", kept), ("held", held), ("choosing", choosing)):
        each = [words.decode(part.tokens[s:e].tolist()) for s, e in zip([0, *part.ends[:-1]], part.ends, strict=True)]
        (work / f"{name}.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in each), encoding="utf-8")
    learn_tokenizer(work, given.vocab)
    begun = time.perf_counter()
    texts, tokenizer = [work / "kept.jsonl"], str(work / "tokenizer.json")
    index = Index(build_index(texts, work / "index", tokenizer, given.chunk, factory=given.factory))
    print(f"{len(index.chunks):,} chunks of {kept.num_documents:,} documents indexed in "
          f"{time.perf_counter() - begun:.0f} s; {held.num_documents} documents are held out", flush=True)  # fmt: skip


def learn_tokenizer(work: Path, vocab: int) -> None:
    """A BPE of bytes (Radford et al. 2019) of the documents that are trained on; of 256 tokens, the bytes."""
    from tokenizers import Tokenizer as Made
    from tokenizers import decoders, models, pre_tokenizers, trainers

    made = Made(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    with (work / "kept.jsonl").open(encoding="utf-8") as lines:
        made.train_from_iterator((json.loads(line)["text"] for line in lines), trainer)
    made.save(str(work / "tokenizer.json"))


def coverage(work: Path, given: argparse.Namespace, rows: int = 60) -> dict[str, float]:
    """Shares of the runs of 8 bytes behind held-out chunks: in the row before; new in neighbours, in random chunks."""
    _, others, feed = data(model_of(INDEX, 0, given), INDEX, 0, work, given, look_up=False)
    source = np.random.default_rng(0)
    every, found = 0, {"in its row before": 0, "new in neighbours": 0, "new in random chunks": 0}
    for number in source.choice(others.num_rows, min(rows, others.num_rows), replace=False):
        row = others.rows([int(number)]).tokens[0].numpy()
        ends = np.arange(given.chunk, len(row) - given.chunk + 1, given.chunk)
        near = feed.find(np.stack([row[e - given.chunk : e] for e in ends]).astype(np.int32))
        by_chance = source.integers(len(feed.index.chunks), size=near.shape)
        for end, a, b in zip(ends, feed.rows(near).numpy(), feed.rows(by_chance).numpy(), strict=True):
            wanted, before = runs_of(row[end : end + given.chunk], feed.words), runs_of(row[:end], feed.words)
            every += len(wanted)
            found["in its row before"] += len(wanted & before)
            for name, texts in (("new in neighbours", a), ("new in random chunks", b)):
                found[name] += len((wanted & set().union(*(runs_of(t, feed.words) for t in texts))) - before)
    return {name: count / every for name, count in found.items()}


def runs_of(tokens: np.ndarray, words: Tokenizer, width: int = 8) -> set[bytes]:
    """All runs of so many bytes of a text."""
    text = words.decode(tokens.tolist()).encode()
    return {text[i : i + width] for i in range(len(text) - width + 1)}


# --- models -----------------------------------------------------------------------------------------


def model_of(side: str, seed: int, given: argparse.Namespace) -> Model:
    """A fresh model."""
    sizes = {name: getattr(given, name) for name in ("vocab", "hidden", "layers", "seq", "chunk", "near")}
    text = SPEC.format(**sizes, read="" if side == PLAIN else READ)
    file = load_text(text, folder=shipped_folder() / "retro")
    over: dict[str, Any] = {"neighbors": None} if side in (WITHOUT, OFF) else {}
    return instantiate(build(program_of(file, None, over)), seed=seed)


def data(
    model: Model, side: str, seed: int, work: Path, given: argparse.Namespace, look_up: bool = True
) -> tuple[Packed, Packed, Feed]:
    """The rows that are trained on and those that are measured, with neighbours where the model reads any. These are
    looked up once, into `work`. `model` reads neighbours if any model does."""
    name = str(work / "tokenizer.json")
    words = open_tokenizer(name)
    kept, held = (open_corpus([work / f"{n}.jsonl"], words) for n in ("kept", "choosing" if given.choose else "held"))
    rows, others = Packed(kept, given.seq, seed), Packed(held, given.seq)
    feed = Feed(model, "neighbors", Index(work / "index"), name, words)
    if side != WITHOUT and look_up:
        rows.given["neighbors"] = Looked(feed, rows, work / "looked")
        others.given["neighbors"] = Looked(feed, others, work / "looked-measured")
    return rows, others, feed


def one(side: str, seed: int, work: Path, given: argparse.Namespace) -> dict[str, float]:
    """Train one side, and give its loss in nats a token on what is measured; of the first side also without its
    index."""
    torch.set_num_threads(1)
    model = model_of(side, seed, given)
    rows, others, _ = data(model if side != WITHOUT else model_of(INDEX, seed, given), side, seed, work, given)
    config = TrainConfig(
        steps=given.steps, batch=given.batch, seq=given.seq, lr=given.lr, min_lr=given.lr / 10, warmup=20, seed=seed,
        save_every=10**6,
    )  # fmt: skip
    train(model.to(given.device), rows, config, work / f"{seed} {side}")
    count = given.rows or others.num_rows
    found = {side: evaluate(model, others, given.batch, rows=count)}
    if side == INDEX:
        alone = model_of(OFF, seed, given).to(given.device)
        states = model.state_dict()
        alone.load_state_dict({name: states[name] for name in alone.state_dict()})
        others.given.clear()
        found[OFF] = evaluate(alone, others, given.batch, rows=count)
    return found


def losses(work: Path, given: argparse.Namespace) -> dict[str, list[float]]:
    """Loss of each side in nats a token, one a seed."""
    begun = time.perf_counter()
    data(model_of(INDEX, 0, given), INDEX, 0, work, given)
    print(f"neighbours looked up in {time.perf_counter() - begun:.0f} s", flush=True)
    found: dict[str, list[float]] = {}
    with ProcessPoolExecutor(given.jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        sides = (INDEX, WITHOUT, *[PLAIN] * given.plain)
        runs = {(s, side): pool.submit(one, side, s, work, given) for s in range(given.seeds) for side in sides}
        for (seed, _), run in runs.items():
            for side, loss in run.result().items():
                found.setdefault(side, []).append(loss)
                print(f"seed {seed}  {side:16} {loss:.4f} nats a token", flush=True)
    for side, v in found.items():
        print(f"{side:16} {statistics.median(v):.4f} nats a token ({min(v):.4f} - {max(v):.4f})")
    for side in (name for name in found if name != WITHOUT):
        gains = [100 * (a / b - 1) for a, b in zip(found[side], found[WITHOUT], strict=True)]
        print(f"{side}, against {WITHOUT}: {statistics.median(gains):+.2f} % "
              f"({min(gains):+.2f} - {max(gains):+.2f} of one seed; below 0 is better)")  # fmt: skip
    return found


def main() -> None:
    """Measure and print."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--vocab", type=int, default=1024, help="tokens of the BPE; 256: bytes")
    options.add_argument("--lines", type=int, default=100, help="of a document; 0: whole files")
    options.add_argument("--chunk", type=int, default=16)
    options.add_argument("--near", type=int, default=2)
    options.add_argument("--factory", default="IVF1024,PQ32", help="of the index, a word of Faiss; Flat: exact")
    options.add_argument("--hidden", type=int, default=64)
    options.add_argument("--layers", type=int, default=3)
    options.add_argument("--steps", type=int, default=4000)
    options.add_argument("--seq", type=int, default=128)
    options.add_argument("--batch", type=int, default=8)
    options.add_argument("--lr", type=float, default=4e-3)
    options.add_argument("--seeds", type=int, default=3)
    options.add_argument("--rows", type=int, default=0, help="that are measured; 0: all")
    options.add_argument("--jobs", type=int, default=2, help="runs at a time, of one thread each")
    options.add_argument("--device", default="cpu")
    options.add_argument("--plain", action="store_true", help="also the form without places")
    options.add_argument("--choose", action="store_true", help="measure on what is for choosing settings")
    options.add_argument("--no-loss", action="store_true", help="coverage only")
    options.add_argument("--json", type=Path)
    given = options.parse_args()
    for side in (INDEX, WITHOUT):
        count = sum(p.numel() for p in model_of(side, 0, given).parameters())
        print(f"{side:16} {count:>10,} parameters")
    with tempfile.TemporaryDirectory() as folder:
        write_text(Path(folder), given)
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
