"""The main job, on any machine: a spec becomes a model that trains on text and writes some.

The text is the Python standard library's own source, which every machine has; whole files are held out. Run by `make
demo`.
"""

from __future__ import annotations

import argparse
import sys
import sysconfig
import time
from pathlib import Path

import torch
from rich.console import Console

from heddle.dsl.load import load, shipped_folder
from heddle.runtime.check import check_file
from heddle.runtime.compile import build, instantiate, write
from heddle.runtime.data import Packed, open_corpus, open_tokenizer, split
from heddle.runtime.folder import write_spec
from heddle.runtime.running import generate_text
from heddle.runtime.show import summary
from heddle.runtime.tables import print_summary
from heddle.runtime.train import TrainConfig, evaluate, train

SPEC = shipped_folder() / "nemotron_h" / "demo.spec"


def main() -> None:
    """Check, compile, train, evaluate, generate."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--out", type=Path, default=Path("runs/demo"))
    options.add_argument(
        "--minutes", type=float, default=4.0, help="bound on training time, in minutes of this machine"
    )
    options.add_argument("--steps", type=int, default=None, help="steps instead: the same numbers on every machine")
    given = options.parse_args()
    out = fresh(given.out)
    console = Console(highlight=False)

    console.rule("check")
    file = load(SPEC)
    program = check_file(file).programs["demo"]
    print_summary(summary(program, length=512))

    console.rule("compile")
    artifact = build(program)
    module = write(artifact, out / "build") / "model.py"
    console.print(f"source: {module} ({len(artifact.source.splitlines())} lines)")

    console.rule("train")
    words = open_tokenizer("bytes")
    kept, held = split(open_corpus([library_text()], words), 0.05)
    console.print(
        f"{len(kept.tokens):,} bytes to train on, {len(held.tokens):,} held out, "
        f"{kept.num_documents} and {held.num_documents} files"
    )
    config = TrainConfig(steps=1, batch=8, seq=512, lr=3e-3, min_lr=3e-4, warmup=40, schedule="wsd", save_every=10_000)
    model = instantiate(artifact)
    steps = given.steps or steps_within(model, Packed(kept, config.seq), config, given.minutes * 60)
    write_spec(out, file, program.name)
    (out / "tokenizer.txt").write_text("bytes\n", encoding="utf-8")
    rows, others = Packed(kept, config.seq), Packed(held, config.seq)
    report = train(model, rows, config.model_copy(update={"steps": steps}), out, others)
    if report.stopped:
        sys.exit(130)
    loss = evaluate(model, others, config.batch, rows=256)

    console.rule("generate")
    generate_text(out, "def main(", 300, temperature=0.7, top_k=None, top_p=0.95, seed=0)

    console.rule("done")
    console.print(f"held-out loss {loss:.3f} nats a byte after {report.seconds:.0f} s and {report.step} steps")
    console.print(
        f"artifact    {module}\ncheckpoint  {report.checkpoint}\nlog         {out / 'log.jsonl'}\n"
        f"go on       heddle generate {out} --prompt 'class '"
    )


def fresh(out: Path) -> Path:
    """`out`, or `out-2`, `out-3`, ... if there is a run already."""
    n, found = 1, out
    while found.exists():
        n += 1
        found = out.with_name(f"{out.name}-{n}")
    found.mkdir(parents=True)
    return found


def library_text() -> Path:
    """The standard library's sources as one JSON-lines file would be long: a folder of files, tests left out."""
    source = Path(sysconfig.get_paths()["stdlib"])
    target = Path("runs") / "stdlib"
    if not target.is_dir():
        target.mkdir(parents=True)
        for path in sorted(source.glob("*.py")) + sorted(p for p in source.glob("*/*.py") if wanted(p)):
            try:
                text = path.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                continue
            (target / f"{path.parent.name}.{path.name}").write_text(text, encoding="utf-8")
    return target


def wanted(path: Path) -> bool:
    return not any(
        part in ("site-packages", "test", "tests", "idlelib", "__pycache__", "turtledemo", "encodings")
        for part in path.parts
    )


def steps_within(model: torch.nn.Module, rows: Packed, config: TrainConfig, seconds: float) -> int:
    """How many steps fit into a time, from a few steps on a copy of nothing: gradients only, no update."""
    from heddle.runtime.data import Cursor

    batch, _ = rows.batch(Cursor(), config.batch)
    times = []
    for _ in range(4):
        begun = time.perf_counter()
        sum(model.losses(batch.tokens, batch.document).values()).backward()
        model.zero_grad(set_to_none=True)
        times.append(time.perf_counter() - begun)
    each = 1.08 * sorted(times[1:])[1]
    return max(50, int(seconds / each))


if __name__ == "__main__":
    main()
