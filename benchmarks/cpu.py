"""Heddle against transformers on this CPU or GPU: the same weights, one process, in turn.

A 17 M hybrid (hidden 512, eight layers) runs forward, a training step (fp32, and bf16 compute with fp32 masters) and
greedy decoding on both sides (bf16 compute is autocast on theirs). Ratios are transformers' time over ours, pair by
pair; printed are median, minimum and maximum. On a GPU theirs runs without the kernels of mamba-ssm, as it does where
these are not installed.
Run by `make bench`, on a GPU by `make bench-gpu-programs`; `--json FILE` also writes the numbers.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers

from heddle.runtime.bench import training_step
from heddle.runtime.folder import load
from heddle.runtime.huggingface import import_folder
from heddle.runtime.train import TrainConfig

TARGETS = {"forward": 1.2, "train step, fp32": 1.4, "train step, bf16 compute": 2.5, "greedy decode": 3.0}


def peers(folder: Path) -> tuple[torch.nn.Module, Callable[[], torch.nn.Module]]:
    """The class of transformers with random weights, and a function that loads ours from the same weights."""
    config = transformers.NemotronHConfig(
        vocab_size=4096, hidden_size=512, intermediate_size=1664,
        num_attention_heads=8, num_key_value_heads=2, head_dim=64,
        layers_block_type=["linear_attention", "mlp", "linear_attention", "full_attention",
                           "mlp", "linear_attention", "mlp", "linear_attention"],
        mamba_num_heads=16, mamba_head_dim=64, ssm_state_size=64, n_groups=2, chunk_size=128, time_step_min=1e-30,
    )  # fmt: skip
    torch.manual_seed(0)
    theirs = transformers.NemotronHForCausalLM(config).eval()
    theirs.save_pretrained(folder / "hf")
    import_folder(folder / "hf", folder / "ours")
    return theirs, lambda: load(folder / "ours")


def finished() -> None:
    """Wait for what runs on a GPU."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def pairs(ours: Callable[[], object], theirs: Callable[[], object], rounds: int) -> list[tuple[float, float]]:
    """Times of both sides in turn, behind one uncounted round."""
    found = []
    for i in range(rounds + 1):
        times = []
        for side in (ours, theirs):
            begun = time.perf_counter()
            side()
            finished()
            times.append(time.perf_counter() - begun)
        if i:
            found.append((times[0], times[1]))
    return found


def their_step(model: torch.nn.Module, tokens: torch.Tensor, low: bool = False) -> Callable[[], None]:
    """A step of theirs; `low`: bf16 compute with fp32 weights, by autocast."""
    adam = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        with torch.autocast(tokens.device.type, torch.bfloat16, enabled=low):
            loss = model(tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adam.step()
        adam.zero_grad(set_to_none=True)

    return step


def measure(rounds: int, batch: int, seq: int, new: int, where: str) -> dict[str, list[tuple[float, float]]]:
    """Pairs of times by job."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        theirs, load_ours = peers(Path(folder))
        theirs.to(where)

        def make() -> torch.nn.Module:
            return load_ours().to(where)

        ours = make()
        tokens = torch.randint(0, 4096, (batch, seq), generator=torch.Generator().manual_seed(1)).to(where)
        with torch.no_grad():
            a, b = ours(tokens), theirs(tokens).logits
            print(
                f"{sum(p.numel() for p in ours.parameters()) / 1e6:.1f} M parameters; "
                f"largest relative difference of logits {float((a - b).abs().max() / b.abs().max()):.1e}"
            )
            found["forward"] = pairs(lambda: ours(tokens), lambda: theirs(tokens), rounds)
        prompt = tokens[:1, :16]
        mask = torch.ones_like(prompt)
        found["greedy decode"] = pairs(
            lambda: ours.generate(prompt, new),
            lambda: theirs.generate(
                prompt, attention_mask=mask, max_new_tokens=new, min_new_tokens=new, do_sample=False
            ),
            max(2, rounds // 2),
        )
        theirs.train()
        found["train step, fp32"] = pairs(
            training_step(make().train(), tokens, TrainConfig()), their_step(theirs, tokens), rounds
        )
        low = make().train().cast(torch.bfloat16)
        found["train step, bf16 compute"] = pairs(
            training_step(low, tokens, TrainConfig(dtype="bf16")), their_step(theirs, tokens, low=True), rounds
        )
    return found


def device(where: str = "cpu") -> str:
    """The GPU's own name, or the processor's, where the system tells it."""
    if where != "cpu":
        return torch.cuda.get_device_name(where)
    about = Path("/proc/cpuinfo")
    lines = about.read_text().splitlines() if about.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]}, {len(names)} cores" if names else platform.processor()


def main() -> None:
    """Measure and print."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--rounds", type=int, default=7)
    options.add_argument("--batch", type=int, default=4)
    options.add_argument("--seq", type=int, default=512)
    options.add_argument("--new", type=int, default=64)
    options.add_argument("--device", default="cpu")
    options.add_argument("--json", type=Path)
    given = options.parse_args()
    transformers.logging.set_verbosity_error()
    print(
        f"torch {torch.__version__}, transformers {transformers.__version__}, {torch.get_num_threads()} threads, "
        f"{device(given.device)}"
    )
    found = measure(given.rounds, given.batch, given.seq, given.new, given.device)
    wanted = given.device == "cpu"
    print(f"{'job':28}{'heddle':>10}{'transformers':>14}{'ratio':>8}  (min - max)" + "   target" * wanted)
    rows = {}
    for job, target in TARGETS.items():
        ratios = sorted(b / a for a, b in found[job])
        mine, other = (statistics.median(p[i] for p in found[job]) for i in (0, 1))
        ratio = statistics.median(ratios)
        rows[job] = {"heddle_s": mine, "transformers_s": other, "ratio": ratio, "min": ratios[0], "max": ratios[-1]}
        print(
            f"{job:28}{mine:>9.3f}s{other:>13.3f}s{ratio:>7.2f}x  ({ratios[0]:.2f} - {ratios[-1]:.2f})"
            + f"   >= {target}x" * wanted
        )
    if given.json:
        given.json.write_text(
            json.dumps(
                {
                    "device": device(given.device),
                    "date": time.strftime("%Y-%m-%d"),
                    "torch": torch.__version__,
                    "transformers": transformers.__version__,
                    "threads": torch.get_num_threads(),
                    "jobs": rows,
                },
                indent=1,
            )
            + "\n"
        )


if __name__ == "__main__":
    main()
