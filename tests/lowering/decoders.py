"""Random decoders as text: known blocks in any order, side by side, shared, in loops, with adapters."""

from __future__ import annotations

from hypothesis import strategies as st

from heddle.dsl.load import load_text, shipped_folder
from heddle.dsl.program import Program
from heddle.runtime.check import program_of

VOCAB = 37
LAYERS = (
    "y{i} = attention(norm{i}, heads, kv_heads, rotary = rope())",
    "y{i} = attention(norm{i}, heads, mask = window({n}), bias = true)",
    "y{i} = attention(norm{i}, heads, rotary = rope(part = 1/2), head_norm = rms_norm(), out_bias = true)",
    "y{i} = mlp(norm{i}, ffn, silu)",
    "y{i} = gated_mlp(norm{i}, ffn)",
    "y{i} = attention(norm{i}, heads); m{i} = mlp(norm{i}, ffn, gelu, bias = true); y{i} = y{i} + m{i}",
    "y{i} = mamba2(norm{i}, heads, hidden / heads, 4, 2, taps = {n})",
    "y{i} = tail(norm{i})",
    "y{i} = dropout(tail(norm{i}), 0.25) * 0.5 - norm{i} / 3",
    "y{i} = clip(norm{i} + x, low = -1, high = 1) * max(x - norm{i}, 0.5)",
    "y{i} = moe(norm{i}, sigmoid_router(3, {k}), 6, ffn)",
)


@st.composite
def decoders(draw: st.DrawFn) -> str:
    """A model named `made`, small enough to run at once."""
    norm = draw(st.sampled_from(["rms_norm()", "layer_norm()", "layer_norm(zero_centred = true)"]))
    body = []
    for i in range(draw(st.integers(1, 3))):
        line = draw(st.sampled_from(LAYERS)).format(i=i, n=draw(st.integers(2, 4)), k=draw(st.integers(1, 3)))
        body += [f"norm{i} = norm(x)", line, f"x = x + y{i}"]
    if draw(st.booleans()):
        body = [f"for layer in {draw(st.integers(1, 3))}:", *(f"    {line}" for line in body)]
    tied = ", weight = embedding.weight" if draw(st.booleans()) else ""
    lines = ["tokens[batch, seq]: token", f"norm = {norm}", "embedding = embed(tokens, vocab -> hidden)",
             "shared tail = gated_mlp(ffn)", "x = embedding + tail(embedding)", *body, "final = norm(x)",
             f"logits = linear(final, hidden -> vocab{tied})", "init linear, embed: normal(0.3)",
             "init linear in layer[first(1)]?: normal(0.1)", "return logits"]  # fmt: skip
    text = f"model plain(vocab = {VOCAB}, hidden = 16, heads = 4, kv_heads = 2, ffn = 12):\n"
    text += "".join(f"    {line}\n" for line in lines)
    rules = draw(st.sampled_from(["", "linear?: lora(it, rank = 2)", "attention?: adapter(it, width = 3)",
                                  "q in attention?, mlp.up in layer[last(1)]?: lora(it, rank = 2)"]))  # fmt: skip
    return text + (f"\nmodel made = plain with:\n    {rules}\n" if rules else "\nmodel made = plain()\n")


def program(text: str, model: str = "made") -> Program:
    return program_of(load_text(text, folder=shipped_folder()), model)
