"""Long-short attention against full attention at equal width: held-out loss, and time and memory of long sequences.

Loss: both models are trained on the same bytes (the standard library's text, whole files held out) for the same number
of steps, with three seeds. Time: one forward and backward pass over one sequence. Memory: the most bytes of tensors
that live at once, as torch's allocator tells them, beyond weights: of that pass, and of reading a prompt
(512 tokens at a time, without gradients). It is the same on every run; the growth of the process is not, it counts what
the allocator has not given back. Full attention is run by the library's kernel, which keeps no scores, and up to
`--scores` tokens also in the form that keeps them, as the paper's peer did. The state of decoding is what the compiled
model keeps.
Run by `make bench-programs`, on a GPU by `make bench-gpu-programs`; `--json FILE` also writes the numbers.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile

from heddle.benchmarks.cpu import device, finished
from heddle.dsl.load import load_text, shipped_folder
from heddle.examples.demo import library_text
from heddle.lowering.passes.stream import state_bytes
from heddle.lowering.pipeline import lower
from heddle.runtime.check import program_of
from heddle.runtime.compile import build, instantiate
from heddle.runtime.data import Packed, open_corpus, open_tokenizer, split
from heddle.runtime.train import TrainConfig, evaluate, train

SPEC = """
use transformer_ls from "transformer_ls.spec"

## The same model with full causal attention.
model plain(vocab, hidden, ffn, layers, heads):
    tokens[batch, seq]: token
    embedding = embed(tokens, vocab -> hidden)
    x = embedding
    for layer in layers:
        norm1 = layer_norm(x)
        x = x + attention(norm1, heads)
        norm2 = layer_norm(x)
        x = x + mlp(norm2, ffn, gelu, bias = true)
    final  = layer_norm(x)
    logits = linear(final, hidden -> vocab)
    return logits

model full_small = plain(vocab = 256, hidden = 128, ffn = 512, layers = 4, heads = 4)
model long_short_small = transformer_ls(vocab = 256, hidden = 128, ffn = 512, layers = 4, heads = 4,
                                        span = {span}, segment = 16, rank = 1)
"""
NAMES = {"full": "full_small", "long-short": "long_short_small"}
KEPT = "full, scores kept"


def program(side: str, span: int) -> Any:
    file = load_text(SPEC.replace("{span}", str(span)), folder=shipped_folder() / "transformer_ls")
    return program_of(file, NAMES.get(side, NAMES["full"]))


def losses(steps: int, seq: int, batch: int, span: int, seeds: int, where: str) -> dict[str, list[float]]:
    """Held-out loss in nats a byte, one a seed."""
    kept, held = split(open_corpus([library_text()], open_tokenizer("bytes")), 0.05)
    found: dict[str, list[float]] = {side: [] for side in NAMES}
    for seed in range(seeds):
        for side in NAMES:
            model = instantiate(build(program(side, span)), seed=seed).to(where)
            config = TrainConfig(
                steps=steps, batch=batch, seq=seq, lr=2e-3, min_lr=2e-4, warmup=20, seed=seed, save_every=10**6
            )
            with tempfile.TemporaryDirectory() as out:
                train(model, Packed(kept, seq, seed), config, Path(out) / "run")
            found[side].append(evaluate(model, Packed(held, seq), batch, rows=64))
            print(f"seed {seed}  {side:10} {found[side][-1]:.4f} nats a byte", flush=True)
    return found


def peak_bytes(run: Callable[[], object]) -> int:
    """The most bytes that live at once of what `run` allocates."""
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as told:
        run()
    events = told.profiler.kineto_results.events()  # type: ignore[union-attr]
    live = most = 0
    for _, size in sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"):
        live += size
        most = max(most, live)
    return most


def pass_once(side: str, span: int, length: int, rounds: int, where: str) -> dict[str, float]:
    """Seconds (median) of a forward and backward pass over one sequence, and the bytes of that and of a prompt."""
    model = instantiate(build(program(side, span)), seed=0).to(where)
    tokens = torch.randint(0, 256, (1, length), generator=torch.Generator().manual_seed(1)).to(where)

    def step() -> None:
        (loss,) = model.losses(tokens).values()
        loss.backward()
        model.zero_grad()

    def prompt() -> None:
        stream = model.stream(1, length)
        for piece in tokens.split(512, 1):
            model.prefill(piece, stream)

    with sdpa_kernel(SDPBackend.MATH) if side == KEPT else nullcontext():
        times = []
        for _ in range(rounds + 1):
            begun = time.perf_counter()
            step()
            finished()
            times.append(time.perf_counter() - begun)
        return {"seconds": statistics.median(times[1:]), "bytes": peak_bytes(step), "prompt_bytes": peak_bytes(prompt)}


def passes(given: argparse.Namespace) -> dict[str, dict[str, dict[str, float]]]:
    """`pass_once` of both sides in processes of their own, by length."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for length in given.lengths:
        found[str(length)] = {}
        for side in (*NAMES, *[KEPT] * (length <= given.scores)):
            command = [sys.executable, "-m", "heddle.benchmarks.long_context", "--pass", side, str(length)]
            command += ["--far-span", str(given.far_span), "--rounds", str(given.rounds), "--device", given.device]
            told = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            found[str(length)][side] = json.loads(told)
            found[str(length)][side]["state_bytes"] = state_bytes(lower(program(side, given.far_span)), length)
    return found


def main() -> None:
    """Measure and print."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--steps", type=int, default=1000)
    options.add_argument("--seq", type=int, default=512)
    options.add_argument("--batch", type=int, default=4)
    options.add_argument("--span", type=int, default=128, help="of the trained models")
    options.add_argument("--far-span", type=int, default=512, help="of the long sequences")
    options.add_argument("--seeds", type=int, default=3)
    options.add_argument("--lengths", type=int, nargs="*", default=[4096, 16384])
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--scores", type=int, default=4096, help="up to so many tokens with scores that are kept")
    options.add_argument("--device", default="cpu")
    options.add_argument("--no-loss", action="store_true", help="time and memory only")
    options.add_argument("--json", type=Path)
    options.add_argument("--pass", nargs=2, dest="one", help=argparse.SUPPRESS)
    given = options.parse_args()
    if given.one:
        print(json.dumps(pass_once(given.one[0], given.far_span, int(given.one[1]), given.rounds, given.device)))
        return
    long = passes(given)
    print(f"{'length':>8}  {'':18}{'forward + backward':>20}{'memory':>12}{'prompt':>12}{'decoding state':>17}")
    for length, sides in long.items():
        for side, m in sides.items():
            print(
                f"{length:>8}  {side:18}{m['seconds']:>18.2f} s{m['bytes'] / 2**20:>8.0f} MiB"
                f"{m['prompt_bytes'] / 2**20:>8.0f} MiB"
                f"{m['state_bytes'] / 2**10:>13.0f} KiB"
            )
        b = sides["long-short"]
        for side, a in sides.items():
            if side != "long-short":
                print(f"{'':8}  {'ratio, ' + side.removeprefix('full, '):18}" + f"{a['seconds'] / b['seconds']:>19.2f}x"
                      f"{a['bytes'] / b['bytes']:>11.2f}x{a['prompt_bytes'] / b['prompt_bytes']:>11.2f}x"
                      f"{a['state_bytes'] / b['state_bytes']:>16.1f}x", flush=True)  # fmt: skip
    found = {} if given.no_loss else held_out(given)
    if given.json:
        about = {"device": device(given.device), "date": time.strftime("%Y-%m-%d"), "torch": torch.__version__}
        settings = {k: v for k, v in vars(given).items() if k not in ("json", "one", "no_loss")}
        given.json.write_text(
            json.dumps({**about, "settings": settings, "losses": found, "long": long}, indent=1) + "\n"
        )


def held_out(given: argparse.Namespace) -> dict[str, list[float]]:
    """`losses`, printed."""
    found = losses(given.steps, given.seq, given.batch, given.span, given.seeds, given.device)
    middle = {side: statistics.median(v) for side, v in found.items()}
    for side, v in found.items():
        print(f"{side:10} held-out loss {middle[side]:.4f} nats a byte ({min(v):.4f} - {max(v):.4f})")
    more = middle["long-short"] / middle["full"] - 1
    print(f"long-short against full attention: {100 * more:+.2f} % loss (at most +2 % wanted)")
    return found


if __name__ == "__main__":
    main()
