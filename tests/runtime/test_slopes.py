"""Scores that fall with distance (ALiBi), through the language, the op, streams, layouts and kernels."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, example, given, reject, settings
from hypothesis import strategies as st
from torch import Tensor

from heddle.dsl.diagnostics import SpecError
from heddle.dsl.load import load_text
from heddle.runtime import lib
from heddle.runtime.check import program_of
from heddle.runtime.compile import build, instantiate
from heddle.runtime.lib import kernels
from tests.kernels.harness import floor, worst

from .test_layouts import AGAIN, WAYS, check, layouts

SPEC = """
block learned(heads):
    param steep[heads] = 0.3
    return steep * (key.position - query.position)

model bent(vocab = 32, hidden = 24, heads = 8, kv_heads = {kv_heads}, layers = 2):
    tokens[batch, seq]: token
    embedding = embed(tokens, vocab -> hidden)
    x = embedding
    for layer in layers:
        norm1 = rms_norm(x)
        x = x + attention(norm1, heads, kv_heads, head_dim = 4, mask = {mask}, scores = {scores})
        norm2 = rms_norm(x)
        x = x + mlp(norm2, hidden)
    final = rms_norm(x)
    logits = linear(final, hidden -> vocab)
    return logits
"""


def text_of(scores: str = "alibi(heads)", mask: str = "causal", kv_heads: int = 8) -> str:
    return SPEC.replace("{scores}", scores).replace("{mask}", mask).replace("{kv_heads}", str(kv_heads))


def started(text: str, target: str = "cpu", seed: int = 1) -> Any:
    model = instantiate(build(program_of(load_text(text)), target), seed=seed).double().eval()
    source = torch.Generator().manual_seed(seed)
    for weight in model.parameters():
        weight.data.add_(torch.randn(weight.shape, generator=source, dtype=torch.float64) * 0.3)
    return model


@pytest.mark.parametrize(
    ("heads", "wanted"),
    [
        (1, {0: 2**-8}),
        (8, {i: 2.0 ** -(i + 1) for i in range(8)}),
        (6, {0: 0.25, 3: 2**-8, 4: 0.5, 5: 0.125}),
        (112, {0: 0.9170040432, 63: 0.00390625, 64: 0.9576032807, 65: 0.8781260802, 111: 0.0163167779}),
    ],
)
def test_slopes_are_the_published_ones(heads: int, wanted: dict[int, float]) -> None:
    found = lib.slopes(heads)
    assert len(found) == heads and found.dtype == torch.float32
    for place, slope in wanted.items():
        assert abs(float(found[place]) - slope) < 1e-7


def by_hand(model: Any, tokens: Tensor) -> Tensor:
    """As BLOOM has it: slope times the position of the key alone, which after the softmax is the same."""
    weights = {path: view for path, _, view in model.named_logical_parameters()}

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-5) * weight

    x, n = weights["embedding.weight"][tokens], tokens.shape[1]
    for i in range(2):
        w = {k.removeprefix(f"layer.{i}."): v for k, v in weights.items()}
        y = norm(x, w["norm1.weight"])
        q, k, v = (torch.einsum("btd,hed->bhte", y, w[f"attention.{p}.weight"]) for p in "qkv")
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
        score = q @ k.mT / 2 + lib.slopes(8).double()[:, None, None] * torch.arange(n)
        score = score.masked_fill(~torch.ones(n, n, dtype=torch.bool).tril(), -torch.inf)
        x = x + torch.einsum("bhte,dhe->btd", score.softmax(-1) @ v, w["attention.out.weight"])
        y = norm(x, w["norm2.weight"])
        x = x + ((y @ w["mlp.up.weight"].T).relu() ** 2) @ w["mlp.out.weight"].T
    return norm(x, weights["final.weight"]) @ weights["logits.weight"].T


@pytest.mark.parametrize("kv_heads", [8, 2])
def test_it_is_the_published_model(kv_heads: int) -> None:
    model = started(text_of(kv_heads=kv_heads))
    tokens = torch.randint(0, 32, (2, 13), generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(model(tokens), by_hand(model, tokens), rtol=0, atol=1e-10)


def streamed(model: Any, tokens: Tensor, widths: list[int]) -> Tensor:
    stream = model.stream(len(tokens), tokens.shape[1])
    parts = []
    with torch.no_grad():
        for i, part in enumerate(tokens.split(widths, 1)):
            parts.append((model.decode if i else model.prefill)(part, stream))
    return torch.cat(parts, 1)


@settings(max_examples=5, deadline=None)
@given(
    widths=st.lists(st.integers(1, 6), min_size=2, max_size=5), mask=st.sampled_from(["causal", "window(4)"]),
    scores=st.sampled_from(["alibi(heads)", "learned(heads)"]),
)  # fmt: skip
def test_token_by_token_it_is_the_whole(widths: list[int], mask: str, scores: str) -> None:
    model = started(text_of(scores, mask, 2))
    tokens = torch.randint(0, 32, (2, sum(widths)), generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(streamed(model, tokens, widths), model(tokens).detach(), rtol=0, atol=1e-10)


@settings(max_examples=4, deadline=None, suppress_health_check=list(HealthCheck), phases=[Phase.explicit, Phase.generate])
@given(
    drawn=layouts(), ways=st.sampled_from(WAYS), kv_heads=st.sampled_from([2, 8]), seed=st.integers(0, 2**16),
    mask=st.sampled_from(["causal", "window(5)"]), scores=st.sampled_from(["alibi(heads)", "learned(heads)"]),
    packed=st.booleans(), padded=st.booleans(), more=st.sampled_from(["", AGAIN]),
)  # fmt: skip
@example(drawn=(dict(data=1, context=2, tensor=2), ["heads", "kv_heads"], False), ways=WAYS[1], kv_heads=8, seed=1,
         mask="causal", scores="learned(heads)", packed=True, padded=False, more="")  # fmt: skip
@example(drawn=(dict(data=1, context=4, tensor=1), [], False), ways=WAYS[5], kv_heads=2, seed=2,
         mask="causal", scores="learned(heads)", packed=True, padded=True, more="")  # fmt: skip
def test_any_layout_equals_one_device(
    drawn: Any, ways: tuple[str, ...], kv_heads: int, seed: int, mask: str, scores: str, packed: bool, padded: bool,
    more: str,
) -> None:  # fmt: skip
    """Slopes are split with the heads that they are of, whoever has which."""
    ways = tuple(w.partition(",")[0] if w.startswith("recompute") else w for w in ways)
    try:
        check(text_of(scores, mask, kv_heads), drawn, 16, seed, packed, padded, 1, ways=ways, more=more)
    except SpecError as error:
        assert {d.code for d in error.diagnostics} == {"uneven-split"}
        reject()


ROOT = """
model one(vocab = 32, hidden = 16, heads = 4):
    tokens[batch, seq]: token
    x = embed(tokens, vocab -> hidden)
    q = linear(x, hidden -> [heads, head_dim = 4])
    k = linear(x, hidden -> [heads, head_dim])
    o = attend(q, (k, k, causal), bias = {bias})
    x = x + linear(o, [heads, head_dim] -> hidden)
    logits = linear(x, hidden -> vocab)
    return logits
"""


def test_what_is_known_when_a_model_is_made_is_split_when_it_runs() -> None:
    """Only a rank that runs knows which slopes are its own; they stand in no block here."""
    check(ROOT.replace("{bias}", "alibi(heads)"), (dict(data=1, context=1, tensor=2), ["heads"], False), 8, 1, False, False, 1)


@pytest.mark.parametrize(
    ("bias", "code", "said"),
    [
        ("alibi(3)", "dim-mismatch", "`heads` is 4 in one operand of `attend`, but 3 in another"),
        ("k * (key.position - query.position)", "dim-mismatch", "`attend` wants `heads` = 4 where this has `head_dim` = 4"),
        ("3", "wrong-type", "a score bias is a tensor that a distance picks from or is times, this is a number"),
        ("key.position - query.position", "not-built-yet", "score biases of this kind are not built yet"),
        ("slopes(heads) + (key.position - query.position)", "not-built-yet", "score biases and masks made of tensors"),
        ("slopes(heads) * (key.position <= query.position)", "not-built-yet", "score biases and masks made of tensors"),
    ],
)
def test_what_is_no_slope_is_told(bias: str, code: str, said: str) -> None:
    with pytest.raises(SpecError) as caught:
        program_of(load_text(ROOT.replace("{bias}", bias)))
    (found,) = caught.value.diagnostics
    assert found.code == code and said in found.message


def test_kernels_have_the_numbers_of_the_cpu() -> None:
    """Logits, every gradient, and tokens one by one."""
    text = text_of("learned(heads)", kv_heads=2).replace("layers = 2", "layers = 1")
    tokens = torch.randint(0, 32, (2, 19), generator=torch.Generator().manual_seed(3))
    document = (torch.arange(19) >= torch.tensor([[4], [9]])).long()

    def run(target: str, dtype: torch.dtype) -> dict[str, Tensor]:
        model = started(text, target).cast(dtype)
        found = {"tokens": streamed(model, tokens[:1], [16, 1, 2]), "logits": model(tokens, document).detach()}
        model.losses(tokens, document)["lm"].backward()
        return found | {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    exact, eager = run("cpu", torch.float64), run("cpu", torch.float32)
    with kernels.launches() as told:
        found = run("triton", torch.float32)
    assert {"attend_forward_kernel", "attend_grad_q_kernel", "attend_split_kernel"} <= {x.kernel.fn.__name__ for x in told}
    for name, value in exact.items():
        worst(found[name], value, eager[name], floor(value, torch.float32, 256), name)
