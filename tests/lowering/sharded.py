"""Tiny twins laid out, and what a changed sharded program computes: by simulated ranks, against one device, in fp64."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from heddle.codegen.emit import emit
from heddle.dsl.layout import layout_of
from heddle.dsl.load import load_text, shipped_folder
from heddle.lowering.graph import GraphProgram
from heddle.lowering.pipeline import PASSES, lower
from heddle.runtime.check import program_of
from heddle.runtime.opinion.ask import ask
from heddle.runtime.opinion.said import Opinion
from tests.runtime.laid_out import Batch, Outcome, alone, difference, on_mesh, start

from .mutants import Mutant

HARMLESS = 1e-9
"""What may be rounding, of numbers that are about 1, in fp64."""
LAST = next(i for i, step in enumerate(PASSES) if step.name == "prove_placement")


@dataclass(frozen=True)
class Twin:
    """A spec under a layout: `spec` is a shipped file, or the text of one."""

    spec: str
    layout: str
    seq: int = 8
    rows: int = 4

    def __str__(self) -> str:
        name = self.spec if self.is_file else self.spec.partition("model ")[2].partition("(")[0]
        return f"{name} [{' '.join(self.layout.split())}]"

    @property
    def is_file(self) -> bool:
        return self.spec.endswith(".spec")

    @cached_property
    def loaded(self) -> Any:
        text, folder = self.spec, shipped_folder()
        if self.is_file:
            folder = (shipped_folder() / self.spec).parent
            text = (shipped_folder() / self.spec).read_text(encoding="utf-8")
        lines = "".join(f"    {line.strip()}\n" for line in self.layout.strip().splitlines())
        return load_text(f"{text}\n\nlayout drawn:\n{lines}", folder=folder)

    @cached_property
    def program(self) -> Any:
        return program_of(self.loaded)

    @cached_property
    def sharded(self) -> GraphProgram:
        """Behind the shard pass, not proved yet."""
        return lower(self.program, until="shard", layout=layout_of(self.loaded))

    @cached_property
    def model(self) -> Any:
        model = start(self.program)
        source = torch.Generator().manual_seed(1)
        for weight in model.parameters():
            if weight.dim() == 1:
                weight.data.add_(torch.randn(weight.shape, generator=source, dtype=torch.float64) * 0.3)
        return model

    @cached_property
    def state(self) -> dict[str, torch.Tensor]:
        return {k: v.clone() for k, v in self.model.state_dict().items()}

    @cached_property
    def batch(self) -> Batch:
        source = torch.Generator().manual_seed(2)
        vocab = self.model.vocab or 8
        tokens = torch.randint(0, vocab, (self.rows, self.seq), generator=source)
        more = {"neighbors": (self.rows, self.seq // 4, 2, 8)} if "neighbors" in self.model.inputs else {}
        drawn = {name: torch.randint(0, vocab, shape, generator=source) for name, shape in more.items()}
        document = None if more else (torch.rand(self.rows, self.seq, generator=source) < 0.2).cumsum(1)
        # One row is short, so that ranks have different numbers of places.
        valid = None if more else torch.arange(self.seq) < torch.tensor([self.seq] * (self.rows - 1) + [3])[:, None]
        return Batch(tokens, document, valid, drawn)

    @cached_property
    def one(self) -> Outcome:
        self.state  # noqa: B018 (before the step changes the weights)
        return alone(self.model, self.batch)

    def far(self, mutant: Mutant) -> float:
        """How far a mutant is from one device, in its loss, any gradient or the norm; infinite where it fails."""
        changed = self.sharded if mutant.norm is not None else mutant.program
        try:
            ranks = self.ranks(changed)
        except Exception:
            return math.inf
        if mutant.norm is not None:
            return self._norm_far(mutant.norm, ranks)
        one = difference(self.one, ranks)
        worst = max((x for k, x in one.items() if not k.endswith(" steps")), default=0.0)
        return math.inf if math.isnan(worst) else worst

    def lowered(self, graphs: GraphProgram) -> GraphProgram:
        """A sharded program, proved or not, behind all passes."""
        for step in PASSES[LAST + 1 :]:
            graphs = step(graphs)
        for graph in graphs.graphs.values():
            graph.verify()
        return graphs

    def ranks(self, graphs: GraphProgram) -> list[Any]:
        """What each rank gives."""
        graphs = self.lowered(graphs)
        source = emit(graphs, "test").model
        self.one  # noqa: B018
        found, _ = on_mesh(self.program, graphs.layout, self.state, self.batch, source=source)  # type: ignore[arg-type]
        return found

    @cached_property
    def opinion(self) -> tuple[GraphProgram, Opinion]:
        """The program without a mistake, and what spmd_types says of it."""
        good = self.lowered(self.sharded)
        return good, ask(good, *self._rows_of_a_rank(good))

    def said(self, mutant: Mutant) -> str:
        """What spmd_types says of a mutant: "accepted", "refused", or "fails" where it does not run to its end."""
        good, _ = self.opinion
        try:
            found = ask(self.lowered(mutant.program), *self._rows_of_a_rank(good), good=self.opinion)
        except Exception:
            return "fails"
        return "fails" if found.accepted is None else "accepted" if found.accepted else "refused"

    def _rows_of_a_rank(self, good: GraphProgram) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        first = good.model.dims[good.model.body.inputs[0].type.dims[0]]
        rows = self.rows // good.laid.mesh.size(first.axes)
        return self.batch.tokens[:rows], {name: x[:rows] for name, x in self.batch.more.items()}

    def _norm_far(self, norm: tuple[str, str, Any], ranks: list[Any]) -> float:
        """The norm as ranks would have it that sum the squares of one weight over other axes than its own."""
        graph, weight, splits = norm
        paths = {p.name for p in self.program.parameters() if (p.body, p.weight.name) == (graph, weight)}
        worst = 0.0
        for mesh, _, _ in ranks:
            total = 0.0
            for path, (own, _) in ranks[0][1][2].items():
                used = splits if path in paths else own
                axes = tuple(a for a in mesh.axes if any(a in s for s in used))
                total += sum(float(ranks[r][1][2][path][1].square().sum()) for r in mesh.members(*axes))
            worst = max(worst, abs(math.sqrt(total) - float(self.one.norm)))
        return worst


BIASED = """
model biased(vocab = 32, hidden = 16, heads = 4, ffn = 12):
    tokens[batch, seq]: token
    embedding = embed(tokens, vocab -> hidden)
    norm = layer_norm()
    norm1 = norm(embedding)
    x = embedding + attention(norm1, heads, bias = true, out_bias = true)
    norm2 = norm(x)
    x = x + mlp(norm2, ffn, gelu, bias = true)
    final = norm(x)
    logits = linear(final, hidden -> vocab, weight = embedding.weight)
    return logits
"""
_TP = "shard vocab?, heads?, kv_heads?, ffn?, groups? over tensor\n"
_SP = "shard seq over tensor between blocks\n"
BASES = (
    Twin("nemotron_h/tiny.spec", f"mesh data = 1, tensor = 2\n{_TP}{_SP}"),
    Twin("nemotron_h/tiny_moe.spec", f"mesh data = 2, tensor = 2\n{_TP}shard batch over data"),
    Twin("nemotron_h/tiny.spec", f"mesh tensor = 4\n{_TP}{_SP}"),
    Twin("nemotron_h/tiny.spec", f"mesh context = 2, tensor = 2\n{_TP}shard seq over context"),
    Twin("nemotron_h/tiny.spec", f"mesh context = 2, tensor = 2\n{_TP}shard seq over context\n"
         "attend: exchange(heads)\nmamba2: exchange(heads)"),
    Twin("transformer_ls/tiny_released.spec", f"mesh context = 2, tensor = 2\n{_TP}shard seq over context\n"
         "attend: ring"),
    Twin("nemotron_h/tiny.spec", f"mesh data = 2, tensor = 2\n{_TP}shard batch, parameters over data"),
    Twin("transformer_ls/tiny_released.spec", f"mesh data = 1, tensor = 2\n{_TP}{_SP}"),
    Twin("retro/tiny.spec", f"mesh data = 2, tensor = 2\n{_TP}{_SP}shard batch over data", seq=16),
    Twin(BIASED, f"mesh data = 2, tensor = 2\n{_TP}{_SP}shard batch over data"),
)  # fmt: skip
"""What mistakes are made in."""
