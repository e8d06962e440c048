"""The lines of `make bench-gpu`: what each runs, and what is wanted of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from heddle.dsl.load import File, load, shipped_folder
from heddle.dsl.program import Program
from heddle.runtime.check import program_of

HERE = Path(__file__).resolve().parent / "gpu.spec"


@dataclass(frozen=True)
class Wanted:
    """`what` of a line is to be at least `least`: "copy share", "matmul share", "ratio to PEER" (its time over ours),
    "memory ratio to PEER"."""

    what: str
    least: float

    def found(self, row: Mapping[str, Any]) -> float | None:
        """What a line's row says of it; None where that is not known."""
        kind, _, peer = self.what.partition(" to ")
        if kind == "ratio":
            return row["peers"].get(peer)
        if kind == "memory ratio":
            ours, theirs = (row["memory"].get(side) for side in ("ours", peer))
            return theirs / ours if ours and theirs is not None else None
        found: float | None = row[kind.replace(" ", "_")]
        return found


@dataclass(frozen=True)
class Line:
    """One line: of `model`, the kernel of these ops on a row of `tokens`, in `documents` of so many; or, without ops,
    what `whole` names. `minutes`: about how long it takes on a GPU."""

    name: str
    model: str
    wanted: tuple[Wanted, ...]
    ops: tuple[str, ...] = ()
    documents: tuple[int, ...] | None = None
    whole: str | None = None
    tokens: int = 8192
    minutes: float = 1.0

    def source(self) -> tuple[File, str | None]:
        """The file of the model, `gpu.spec` or a shipped one, and its name there."""
        shipped = shipped_folder() / f"{self.model}.spec"
        return (load(shipped), None) if shipped.is_file() else (load(HERE), self.model)

    def program(self) -> Program:
        """The model."""
        return program_of(*self.source())


EIGHT = "nemotron_h/nemotron_h_8b"
# One row of 8192 tokens, packed as text is: documents of many lengths.
PACKED = (2900, 411, 1733, 64, 1024, 977, 700, 383)


def _attend(name: str, model: str, peer: str, least: float, documents: tuple[int, ...] | None = None) -> Line:
    return Line(f"attend: {name}", model, (Wanted(f"ratio to {peer}", least),), ("attend",), documents, minutes=1.2)


# What is least known comes first: minutes on a GPU are few.
LINES = (
    Line("residual + RMSNorm", EIGHT, (Wanted("copy share", 0.9), Wanted("ratio to liger", 1.0)), ("add", "rms_norm")),
    Line("gated norm", EIGHT, (Wanted("copy share", 0.9), Wanted("ratio to fla", 1.0)), ("silu", "mul", "rms_norm")),
    Line("ssd", EIGHT, (Wanted("ratio to mamba_ssm", 1.5),), ("ssd",), minutes=1.5),
    Line("causal conv", EIGHT, (Wanted("copy share", 0.85),), ("parallel_conv",)),
    _attend("window", "windowed", "flex", 1.2),
    _attend("several sources", "summaries", "flex", 1.2),
    _attend("documents", EIGHT, "flex", 1.2, PACKED),
    _attend("causal, by the library", EIGHT, "eager", 0.97),
    Line("linear + cross entropy", EIGHT, (Wanted("ratio to liger", 1.0), Wanted("memory ratio to liger", 1.0)),
         ("linear", "cross_entropy")),
    Line("decode, 8 B, batch 1", EIGHT, (Wanted("copy share", 0.75),), whole="decode", tokens=1024, minutes=2.0),
    Line("train step, hybrid of 1 B", "hybrid_1b", (Wanted("ratio to transformers", 1.3), Wanted("matmul share", 0.5)),
         whole="train", tokens=4096, minutes=3.0),
)  # fmt: skip
"""Lines by how much is to be learned of them. A ratio to `eager` of attention that the library computes is to itself:
0.97 allows for noise."""


def within(
    lines: tuple[Line, ...], minutes: float | None, run: Callable[[Line], None], now: Callable[[], float]
) -> list[Line]:
    """Run lines for so many minutes, by a clock of seconds; those that are left out. A line for which there is not
    enough time is left out, and a shorter one behind it may still run."""
    end = None if minutes is None else now() + 60 * minutes
    left = []
    for line in lines:
        if end is not None and now() + 60 * line.minutes > end:
            left.append(line)
        else:
            run(line)
    return left
