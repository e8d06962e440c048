"""Long-short attention against full attention at equal width: held-out loss, and time and memory of long sequences.

Loss: both models are trained on the same bytes (the standard library's text, whole files held out) for the same number
of steps, with three seeds. Time: one forward and backward pass over one sequence. Memory: the most bytes of tensors
that live at once, as torch's allocator tells them, beyond weights: of that pass, and of reading a prompt
(512 tokens at a time, without gradients). It is the same on every run; the growth of the process is not, it counts what
the allocator has not given back. Full attention is run by the library's kernel, which keeps no scores, and up to
`--scores` tokens also in the form that keeps them, as the paper's peer did. The state of decoding is what the compiled
model keeps.
Against the kernel, memory of training cannot be better for what attention keeps: it keeps q, k, v and its result, and
long-short attention keeps the same, the normed keys and values, and summaries; all of it grows as the length does. What
autograd keeps is told by the class and the statement that keep it first. Time can be given for memory: both sides are
also run with `recompute mlp`. Seconds of the processor are told beside those of the clock, which others disturb.
Run by `make bench-programs`, on a GPU by `make bench-gpu-programs`; `--json FILE` also writes the numbers.
"""

from __future__ import annotations

import argparse
import json
import linecache
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile

from heddle.benchmarks.cpu import device, finished
from heddle.dsl.layout import Layout, layout_of
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

layout again:
    recompute mlp
"""
NAMES = {"full": "full_small", "long-short": "long_short_small"}
KEPT = "full, scores kept"
AGAIN = ", mlp again"
MEASURED = ("seconds", "processor_seconds", "bytes", "prompt_bytes", "state_bytes")


def model_of(side: str, span: int) -> tuple[Any, Layout | None]:
    """The program and the layout of a side, `AGAIN` behind its name or not."""
    file = load_text(SPEC.replace("{span}", str(span)), folder=shipped_folder() / "transformer_ls")
    layout = layout_of(file, "again") if side.endswith(AGAIN) else None
    return program_of(file, NAMES[side.partition(",")[0]]), layout


def losses(steps: int, seq: int, batch: int, span: int, seeds: int, where: str) -> dict[str, list[float]]:
    """Held-out loss in nats a byte, one a seed."""
    kept, held = split(open_corpus([library_text()], open_tokenizer("bytes")), 0.05)
    found: dict[str, list[float]] = {side: [] for side in NAMES}
    for seed in range(seeds):
        for side in NAMES:
            model = instantiate(build(model_of(side, span)[0]), seed=seed).to(where)
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


def kept_bytes(model: Any, run: Callable[[], object]) -> dict[str, int]:
    """Bytes that autograd keeps of `run`, by the class and the statement of the module that keep a storage first."""
    module, weights = sys.modules[type(model).__module__].__file__, {*model.parameters(), *model.buffers()}
    own = {x.untyped_storage().data_ptr() for x in weights}
    there: dict[int, torch.Tensor] = {}
    found: Counter[str] = Counter()

    def pack(x: torch.Tensor) -> torch.Tensor:
        place = x.untyped_storage().data_ptr()
        if place not in own and place not in there:
            there[place] = x.detach()  # held, so that no other storage comes to its place
            frame = sys._getframe(1)
            while frame.f_code.co_filename != module and frame.f_back is not None:
                frame = frame.f_back
            line = linecache.getline(frame.f_code.co_filename, frame.f_lineno, frame.f_globals)
            block, statement = frame.f_code.co_qualname.partition(".")[0], line.partition(" = ")[0].strip()
            found[f"{block}: {statement}"] += x.untyped_storage().nbytes()
        return x

    with saved_tensors_hooks(pack, lambda x: x):
        run()
    return dict(found.most_common())


def pass_once(side: str, span: int, length: int, rounds: int, where: str) -> dict[str, Any]:
    """Seconds (medians) of a forward and backward pass over one sequence, and the bytes of that and of a prompt."""
    made, layout = model_of(side, span)
    model = instantiate(build(made, layout=layout), seed=0).to(where)
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
            begun, before = time.perf_counter(), time.process_time()
            step()
            finished()
            times.append((time.perf_counter() - begun, time.process_time() - before))
        clock, processor = (statistics.median(t) for t in zip(*times[1:], strict=True))
        kept = kept_bytes(model, lambda: model.losses(tokens))
        return {"seconds": clock, "processor_seconds": processor, "bytes": peak_bytes(step),
                "prompt_bytes": peak_bytes(prompt), "kept": kept}  # fmt: skip


def passes(given: argparse.Namespace) -> dict[str, dict[str, dict[str, Any]]]:
    """`pass_once` of both sides in processes of their own, by length."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for length in given.lengths:
        found[str(length)] = {}
        for side in (*NAMES, *(name + AGAIN for name in NAMES), *[KEPT] * (length <= given.scores)):
            command = [sys.executable, "-m", "heddle.benchmarks.long_context", "--pass", side, str(length)]
            command += ["--far-span", str(given.far_span), "--rounds", str(given.rounds), "--device", given.device]
            told = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            found[str(length)][side] = json.loads(told)
            found[str(length)][side]["state_bytes"] = state_bytes(lower(model_of(side, given.far_span)[0]), length)
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
    for length, sides in long.items():
        report(length, sides)
    found = {} if given.no_loss else held_out(given)
    if given.json:
        about = {"device": device(given.device), "date": time.strftime("%Y-%m-%d"), "torch": torch.__version__}
        settings = {k: v for k, v in vars(given).items() if k not in ("json", "one", "no_loss")}
        given.json.write_text(
            json.dumps({**about, "settings": settings, "losses": found, "long": long}, indent=1) + "\n"
        )


def report(length: str, sides: dict[str, dict[str, Any]]) -> None:
    """Print what was measured at a length, by what factor long-short attention is better, and what is kept."""
    print(f"{length:>6} tokens {'seconds':>25}{'of processor':>14}{'memory':>11}{'prompt':>11}{'decoding state':>17}")
    for side, m in sides.items():
        print(
            f"  {side:28}{m['seconds']:>9.2f}{m['processor_seconds']:>14.2f}{m['bytes'] / 2**20:>7.0f} MiB"
            f"{m['prompt_bytes'] / 2**20:>7.0f} MiB{m['state_bytes'] / 2**10:>13.0f} KiB"
        )
    for mine in ("long-short", "long-short" + AGAIN):
        for other in (name for name in sides if name.startswith("full")):
            ratios = [sides[other][key] / sides[mine][key] for key in MEASURED]
            print(f"  {other} / {mine}: " + ", ".join(f"{r:.2f}x" for r in ratios))
    for side in NAMES:
        kept = {name: size / 2**20 for name, size in sides[side]["kept"].items()}
        print(f"  {side} keeps {sum(kept.values()):.1f} MiB: " + "; ".join(f"{n} {k:.1f}" for n, k in kept.items()))


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
