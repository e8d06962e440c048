"""`heddle bisect`: from what a user types to the first op where two runs differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isfinite, lcm
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...dsl.load import load
from ...dsl.program import Program
from ...lowering.graph import GraphProgram
from ..check import proved
from ..compile import build, class_of, instantiate
from ..data import Packed, open_corpus, open_tokenizer
from ..errors import UserError
from ..folder import take_weights
from ..lib import Model
from ..paths import split_entry
from ..plan.step import Feed as Sizes
from ..plan.step import inputs
from ..train.rows import check_cuts
from .finding import Comparison, Found, Row, drawn, written
from .rounding import WIDE
from .running import Feed
from .sides import Side, sides_of

WORST = 5
"""How many of the largest differences that rounding explains are shown."""


def bisect_spec(spec: str, settings: dict[str, Any], first: str, second: str, rows: int | None, seq: int,
                data: Sequence[Path], tokenizer: str, seed: int) -> dict[str, Any]:  # fmt: skip
    """What is known of two runs of a model, as plain data: `equal`, the `first` difference that rounding does not
    explain, and the largest ones before it.

    `data` are texts to read from, where they are given; else tokens are drawn. Raises `SpecError`; UserError:
    unknown-side, uneven-batch, no-data, and what opening a folder of weights raises.
    """
    path, name = split_entry(spec)
    file = load(path)
    a, b = sides_of(first, second, file)
    program = proved(file, name, settings)
    made = written(program, a), written(program, b)
    kinds = [class_of(m) for m in made]
    one = build(program)
    usual_kind = class_of(one)
    seq = min(seq, usual_kind.longest or seq)
    for kind in kinds:
        check_cuts(kind, seq)
    ranks = lcm(*(_ranks(kind) for kind in kinds))
    if rows is not None and rows % ranks:
        near = [n for n in (rows // ranks * ranks, (rows // ranks + 1) * ranks) if n]
        raise UserError(
            "uneven-batch",
            f"{rows} rows do not divide over {ranks} ranks",
            help=f"--rows {' or '.join(map(str, near))} does",
        )
    feed = feed_of(program, usual_kind, one.lowered, rows or lcm(2, ranks), seq, seed, data, tokenizer)
    usual = drawn(program, seed)
    weights = tuple(usual if side.weights is None else _taken(program, side.weights) for side in (a, b))
    found = Comparison(program, (a, b), made, feed, (weights[0], weights[1])).found()
    return to_json(program, a, b, feed, found)


def feed_of(program: Program, kind: type[Model], lowered: GraphProgram, rows: int, seq: int, seed: int,
            data: Sequence[Path] = (), tokenizer: str = "bytes") -> Feed:  # fmt: skip
    """Rows of text, or drawn tokens: of a model that is decoded token by token in documents, so that what keeps these
    apart is looked at, too."""
    source = torch.Generator().manual_seed(seed)
    vocab = kind.vocab or 2
    sizes = (rows, *(n or 1 for n in kind.shape[1:-1]), kind.shape[-1] or seq)
    with torch.device("meta"):
        hollow = kind()
    _, _, blank = inputs(hollow, lowered, Sizes(rows, sizes[-1], documents=False))
    graphs = [lowered.graphs[g] for g in program.objectives.values()] + [lowered.model]
    types = {v.name: v.type.kind for g in graphs for v in g.body.inputs}
    more = {name: _drawn(x, types[name], vocab, source) for name, x in blank.items()}
    if data:
        batch = Packed(open_corpus(list(data), open_tokenizer(tokenizer), vocab=kind.vocab), sizes[-1], seed)
        return Feed(*_first(batch, rows), more)
    tokens = torch.randint(0, vocab, sizes, generator=source)
    in_documents = kind.late is None and not more and len(sizes) == 2
    document = (torch.rand(sizes, generator=source) < 0.15).cumsum(1) if in_documents else None
    return Feed(tokens, document, more)


def _first(data: Packed, rows: int) -> tuple[Tensor, Tensor]:
    if data.num_rows < rows:
        few = f"the data have {data.num_rows} rows of {data.seq} tokens, and {rows} are read"
        raise UserError("no-data", few, help="shorter rows, or more text")
    batch = data.rows(list(range(rows)))
    return batch.tokens, batch.document


def _drawn(like: Tensor, kind: str, vocab: int, source: torch.Generator) -> Tensor:
    """An input besides tokens; of what numbers something that is not tokens, the first."""
    if kind == "token":
        return torch.randint(0, vocab, like.shape, generator=source)
    return torch.randn(like.shape, generator=source).to(like.dtype) if kind == "real" else torch.zeros_like(like)


def _ranks(kind: type[Model]) -> int:
    """Over how many ranks rows are shared."""
    size = 1
    for axis in kind.rows:
        size *= kind.axes[axis]
    return size


def _taken(program: Program, folder: Path) -> dict[str, Tensor]:
    """The weights of a model folder, fp64."""
    model = instantiate(build(program), seed=None)
    take_weights(model, folder)
    return {name: x.detach().to(WIDE) for name, x in model.state_dict().items()}


# --- as data ------------------------------------------------------------------------------------------


def to_json(program: Program, a: Side, b: Side, feed: Feed, found: Found) -> dict[str, Any]:
    """Plain data."""
    first = found.first
    rows = [*found.values, *found.gradients]
    before = rows[: rows.index(first)] if first is not None else rows
    worst = sorted((r for r in before if r.difference), key=lambda r: -r.share)[:WORST]
    return {
        "model": program.name, "a": _named(a), "b": _named(b), "tokens": list(feed.tokens.shape), "equal": found.equal,
        "values": len(found.values), "gradients": len(found.gradients),
        "weights": _largest(found.weights), "first": None if first is None else row_json(first),
        "before": [row_json(r) for r in worst], "left_out": list(found.left_out),
    }  # fmt: skip


def _largest(weights: Mapping[str, float]) -> dict[str, Any]:
    """How many weights differ, and the first of them."""
    name = next(iter(weights), None)
    return {"count": len(weights), "first": name, "difference": None if name is None else weights[name]}


def _named(side: Side) -> str:
    layout = f",layout={side.layout.name}" if side.layout is not None else ""
    weights = f",weights={side.weights}" if side.weights is not None else ""
    return f"{side.target},{side.dtype}{layout}{weights}"


def row_json(row: Row) -> dict[str, Any]:
    """Plain data; a difference is None where shapes differ, or one side has no number."""
    return {
        "value": str(row.key), "op": row.op, "spec": row.spec, "gradient_of": None if row.of is None else str(row.of),
        "difference": _finite(row.difference), "allowed": row.allowed, "size": row.size,
        "a_error": _finite(row.errors[0]), "b_error": _finite(row.errors[1]), "carried": _finite(row.carried),
    }  # fmt: skip


def _finite(x: float | None) -> float | None:
    return None if x is None or not isfinite(x) else x
