"""Students by width and by depth, pruned and distilled, against the same students from scratch at equal tokens.

For a dense teacher and for a hybrid one: train it, measure what matters in it on training data, cut it to about half by
width and by depth, and train each student on the same tokens three ways: pruned and distilled (logits of the teacher,
Muralidharan et al. 2024), pruned and trained on next tokens, and from random weights. Whole files are held out.

At this size and budget the weights that are kept do the work, not the teacher's logits: in `results/compression.json`
both pruned students are far below the one from scratch in every seed, and the pruned one that trains on next tokens is
mostly as good as the distilled one, or better: the teacher itself has seen few tokens. Width and depth differ a little
in parameters.
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

import torch

from heddle.benchmarks.cpu import device
from heddle.dsl.load import File, load_text, shipped_folder
from heddle.examples.demo import library_text
from heddle.runtime.check import program_of
from heddle.runtime.compile import build, instantiate
from heddle.runtime.compress import importance, layer_importance, prune
from heddle.runtime.data import Packed, open_corpus, open_tokenizer, split
from heddle.runtime.lib import Model
from heddle.runtime.train import TrainConfig, evaluate, train

SPECS = {
    "dense": """
use llama from "llama/llama.spec"

model teacher = llama(vocab = 256, hidden = 160, ffn = 480, layers = 6, heads = 8, kv_heads = 4,
                      head_dim = 20)
""",
    "hybrid": """
use nemotron_h from "nemotron_h/nemotron_h.spec"

model teacher = nemotron_h(vocab = 256, hidden = 160, pattern = "M-M*-M-M*-", heads = 8, kv_heads = 4, head_dim = 20,
                           ssm_heads = 10, ssm_head_dim = 32, state = 32, groups = 2, ffn = 480)
""",
}
STUDENTS: dict[str, dict[str, dict[str, Any]]] = {
    "dense": {"width": {"hidden": 112, "ffn": 320}, "depth": {"layers": 3}},
    "hybrid": {"width": {"hidden": 112, "ffn": 320, "ssm_heads": 8}, "depth": {"pattern": "M-M*-"}},
}
WAYS = ("pruned and distilled", "pruned", "from scratch")


def trained(model: Model, rows: Packed, steps: int, given: Any, seed: int, out: Path) -> None:
    config = TrainConfig(
        steps=steps, batch=given.batch, seq=given.seq, lr=2e-3, min_lr=2e-4, warmup=20, seed=seed, save_every=10**6
    )
    train(model, rows, config, out)


def students(family: str, file: File, seed: int, kept: Any, held: Any, given: Any, work: Path) -> dict[str, float]:
    """Held-out losses in nats a byte by "student, way", and the teacher's."""
    others = Packed(held, given.seq)
    teacher = instantiate(build(program_of(file)), seed=seed)
    trained(teacher, Packed(kept, given.seq, seed), given.teacher_steps, given, seed, work / "teacher")
    found = {"teacher": evaluate(teacher, others, given.batch, rows=64)}
    batches = [Packed(kept, given.seq, seed).rows(list(range(i, i + 8))).tokens for i in range(0, 128, 8)]
    scores = importance(teacher, batches).with_layers(layer_importance(teacher, batches, "bi"))
    for kind, over in STUDENTS[family].items():
        plain = program_of(file, None, over)
        weights = prune(teacher.program, teacher.state_dict(), plain, scores)
        for way in WAYS:
            program = plain
            if way == WAYS[0]:
                program = program_of(file, None, over, "distil", lent={"teacher": (file, None, {})})
            model = instantiate(build(program), seed=seed)
            if way != WAYS[2]:
                model.load_state_dict(weights)
            if program is not plain:
                model.lend(teacher=teacher)
            # The rows behind those of the teacher: nobody has seen them.
            trained(model, Packed(kept, given.seq, seed + 1000), given.steps, given, seed, work / kind / way)
            judge = instantiate(build(plain), seed=None)
            judge.load_state_dict(model.state_dict())
            found[f"{kind}, {way}"] = evaluate(judge, others, given.batch, rows=64)
            print(f"{family:7} seed {seed}  {kind:6} {way:22} {found[f'{kind}, {way}']:.4f} nats a byte", flush=True)
    return found


def main() -> None:
    """Measure and print."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--teacher-steps", type=int, default=400)
    options.add_argument("--steps", type=int, default=120)
    options.add_argument("--seq", type=int, default=256)
    options.add_argument("--batch", type=int, default=4)
    options.add_argument("--seeds", type=int, default=3)
    options.add_argument("--only", choices=tuple(SPECS), help="one family; of a file with --json the rest stays")
    options.add_argument("--json", type=Path)
    given = options.parse_args()
    kept, held = split(open_corpus([library_text()], open_tokenizer("bytes")), 0.05)
    result: dict[str, dict[str, list[float]]] = {}
    for family, text in SPECS.items():
        if given.only not in (None, family):
            continue
        file = load_text(text, folder=shipped_folder())
        sizes = {"teacher": program_of(file).num_parameters()}
        sizes |= {k: program_of(file, None, over).num_parameters() for k, over in STUDENTS[family].items()}
        print(f"{family}: " + ", ".join(f"{k} {n:,} parameters" for k, n in sizes.items()), flush=True)
        losses: dict[str, list[float]] = {}
        for seed in range(given.seeds):
            with tempfile.TemporaryDirectory() as folder:
                for name, loss in students(family, file, seed, kept, held, given, Path(folder)).items():
                    losses.setdefault(name, []).append(loss)
        result[family] = losses
    for family, losses in result.items():
        for name, v in losses.items():
            print(f"{family:7} {name:30} {statistics.median(v):.4f} nats a byte ({min(v):.4f} - {max(v):.4f})")
    if given.json:
        about = {"device": device(), "date": time.strftime("%Y-%m-%d"), "torch": torch.__version__}
        settings = {k: v for k, v in vars(given).items() if k not in ("json", "only")}
        if given.only is not None and given.json.is_file():
            before = json.loads(given.json.read_text())
            if before["settings"] != settings:
                raise SystemExit(f"`{given.json}` was made with other settings: {before['settings']}")
            result = {**before["losses"], **result}
        given.json.write_text(json.dumps({**about, "settings": settings, "losses": result}, indent=1) + "\n")


if __name__ == "__main__":
    main()
