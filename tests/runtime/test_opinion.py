"""The second opinion on layouts: spmd_types accepts all that the compiler lays out, and can say no."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from heddle.dsl.layout import layout_of
from heddle.dsl.load import load_text, shipped_folder
from heddle.lowering.placement.prove import prove
from heddle.runtime.check import program_of
from heddle.runtime.compile import build
from heddle.runtime.opinion.ask import ask
from heddle.runtime.opinion.said import Opinion
from tests.lowering.mutants import mutants
from tests.lowering.sharded import BASES

pytest.importorskip("spmd_types")
TWINS = sorted(str(p.relative_to(shipped_folder())) for p in shipped_folder().glob("*/tiny*.spec"))
TWINS += ["lra/listops.spec", "lra/text.spec"]
BOTH = ("nemotron_h/tiny.spec", "retro/tiny.spec")
TENSOR = "shard vocab?, heads?, kv_heads?, ffn?, groups? over tensor"
SEQUENCE = "shard seq over tensor between blocks"
LAYOUTS = [
    ["mesh data = 2, context = 2, tensor = 2", TENSOR, SEQUENCE, "shard seq over context", "shard batch over data"],
    ["mesh data = 2, tensor = 4", TENSOR, SEQUENCE, "shard batch, parameters over data"],  # tensor is factored
]


def opinion(text: str, rules: list[str], folder: Any, device: str = "cpu") -> Opinion:
    file = load_text(f"{text}\n\nlayout drawn:\n" + "".join(f"    {rule}\n" for rule in rules), folder=folder)
    made = build(program_of(file), layout=layout_of(file))
    more = {"neighbors": torch.zeros(2, 4, 2, 8, dtype=torch.int64)} if "neighbors" in text else {}
    return ask(made.lowered, torch.zeros(2, 16, dtype=torch.int64), more, device=device)


@pytest.mark.parametrize("file", TWINS)
def test_the_whole_zoo_is_accepted(file: str) -> None:
    path = shipped_folder() / file
    text = path.read_text(encoding="utf-8") + ("\n# neighbors" if file.startswith("retro") else "")
    for rules in LAYOUTS if file in BOTH else LAYOUTS[:1]:
        if file.startswith("retro"):  # its encoder reads a chunk of the decoder's states, which nothing cuts
            rules = [r.replace("context = 2", "context = 1") for r in rules if "over context" not in r]
        said = opinion(text, rules, path.parent)
        assert said.accepted is True, f"{file} {rules}: {said.why}"
        assert said.conversions > 5 and said.read["linear"] > 4 and "linear" not in said.trusted
        assert set(said.why_not) == set(said.trusted)


def test_stages_and_what_is_too_large_to_hold_are_read_too() -> None:
    text = (
        'use llama from "llama/llama.spec"\n\n'
        "model large = llama(vocab = 131072, hidden = 8192, ffn = 32768, layers = 40, heads = 64, kv_heads = 8)\n"
    )
    rules = ["mesh pipe = 2, data = 2, tensor = 8", TENSOR, SEQUENCE, "shard batch over data", "recompute attend"]
    for more in ([], ["stages over pipe, schedule = interleaved(chunks = 2), microbatches = 4"]):
        mesh = rules if more else [rules[0].replace("pipe = 2, ", ""), *rules[1:]]
        assert opinion(text, [*mesh, *more], shipped_folder(), "meta").accepted is True


@pytest.mark.parametrize("kind", ["drop", "double", "dst type"])
def test_mistakes_of_conversions_are_refused(kind: str) -> None:
    """Each of a kind in one program, where the proof refuses it, too. What does not even run is no answer."""
    base = BASES[0]
    assert base.opinion[1].accepted is True
    said = {str(m): base.said(m) for m in mutants(base.sharded) if m.kind == kind and prove(m.program)}
    assert [name for name, what in said.items() if what == "accepted"] == []
    assert sum(what == "refused" for what in said.values()) > len(said) / 2


def test_it_says_what_is_wrong() -> None:
    base = BASES[0]
    wrong = next(m for m in mutants(base.sharded) if m.kind == "drop" and "attention" in str(m))
    good, _ = base.opinion
    said = ask(base.lowered(wrong.program), base.batch.tokens, good=base.opinion)
    assert said.accepted is False and "einsum on axis" in said.why
    assert ask(good, base.batch.tokens).to_json()["accepted"] is True


def test_a_loss_that_is_no_sum_where_it_is_taken_for_one_is_refused() -> None:
    base = BASES[1]
    for kind in ("sum dropped", "sum added"):
        some = [m for m in mutants(base.sharded) if m.kind == kind and ".loss:" in str(m)]
        assert some and all(base.said(m) == "refused" for m in some), kind


def test_weights_are_read_as_they_are_stored() -> None:
    """A gradient sum that is not owed any more makes the weight another type, which does not fit its uses."""
    base = BASES[0]
    some = [m for m in mutants(base.sharded) if m.kind == "sync dropped"]
    assert some and all(base.said(m) == "refused" for m in some)
