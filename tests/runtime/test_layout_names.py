"""Under a layout a module has names of its own; whatever a spec is made of may have them, too, or a line says not."""

from __future__ import annotations

import re

import pytest

from heddle.dsl.diagnostics import SpecError
from heddle.dsl.layout import layout_of
from heddle.dsl.load import load_text, shipped_folder
from heddle.runtime.check import program_of

from .laid_out import alone, difference, on_mesh, start
from .test_layouts import BOUND, batch_of

WORDS = ("spmd", "I", "P", "R", "S", "site", "mesh", "axes", "stored", "partial", "pipe", "at", "start", "rank")
# N stands for the name.
KINDS = {
    "dim": "wide = linear(x, hidden -> N)\n    x = x + linear(relu2(wide), N -> hidden)",
    "value": "N = x / 2\n    y = mlp(N, ffn)\n    x = x + y + N",
    "weight": "N = linear(x, hidden -> hidden)\n    x = x + N * N",
    "block": "N = mlp(x, ffn)\n    x = x + N",
    "loop": "for N in 2:\n        x = x + mlp(x, ffn)",
}
TEXT = """
model made(vocab = 8, hidden = 4, WIDTH = 6):
    tokens[batch, seq]: token
    embedding = embed(tokens, vocab -> hidden)
    x = embedding
    LINES
    final = rms_norm(x)
    logits = linear(final, hidden -> vocab)
    init linear, embed: normal(0.3)
    return logits

layout two:
    mesh data = 2, tensor = 2
    shard vocab, WIDTH? over tensor
    shard seq over tensor between blocks
    shard batch over data
"""


def spec(kind: str, word: str) -> str:
    lines = re.sub(r"\bN\b", word, KINDS[kind])
    return TEXT.replace("LINES", lines).replace("WIDTH", word if kind == "dim" else "ffn")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("word", WORDS)
def test_any_name_means_what_it_means_or_is_refused(kind: str, word: str) -> None:
    try:
        loaded = load_text(spec(kind, word), folder=shipped_folder())
        program, layout = program_of(loaded), layout_of(loaded)
        model = start(program)
    except SpecError as error:
        assert all(d.code == "not-built-yet" and d.primary.span.source.text for d in error.diagnostics)
        assert kind not in ("dim", "value"), word  # only what becomes an attribute of a module
        return
    state = {k: v.clone() for k, v in model.state_dict().items()}
    batch = batch_of({"data": 2}, 4, 0, 8, False, False, False)
    ranks, _ = on_mesh(program, layout, state, batch)
    far = difference(alone(model, batch), ranks)
    assert max(far.values()) < BOUND, far
