"""Transformer-LS: each block equals the published equations, forward and every gradient; it is causal, and bounded."""

from __future__ import annotations

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from heddle.dsl.load import load, load_text, shipped_folder
from heddle.lowering.passes.stream import state_bytes
from heddle.lowering.pipeline import lower
from heddle.runtime.check import program_of
from heddle.runtime.compile import build, instantiate

SPEC = """
use long_short, long_short_xl from "transformer_ls.spec"

model one(vocab, hidden, heads, span, rank, segment = none, reach = none):
    tokens[batch, seq]: token
    x = embed(tokens, vocab -> hidden)
    y = long_short_xl(x, heads, hidden / heads, span, rank, segment, reach) if reach else long_short(x, heads, hidden / heads, span, rank, segment)
    return y

model made = one({})
"""


def compiled(**sizes):
    text = SPEC.format(", ".join(f"{k} = {v}" for k, v in sizes.items()))
    program = program_of(load_text(text, folder=shipped_folder() / "transformer_ls"))
    model = instantiate(build(program)).cast(torch.float64)
    source = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.5 * torch.randn(p.shape, generator=source, dtype=p.dtype))
    return program, model


def norm(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    """LayerNorm over all heads together: x[.., n, hd]."""
    mu = x.mean((-2, -1), keepdim=True)
    return (x - mu) / torch.sqrt(((x - mu) ** 2).mean((-2, -1), keepdim=True) + 1e-5) * w + b


def reference(x: Tensor, p: dict[str, Tensor], span: int, rank: int, segment: int | None, reach: int | None) -> Tensor:
    """One sequence x[T, d] -> [T, d]. Paper: Zhu et al. 2021, eq. 2-6; with `reach` the released autoregressive form."""
    T = len(x)
    _, hd, d = p["q.weight"].shape
    Q, K, V = (torch.einsum("td,nhd->tnh", x, p[f"{i}.weight"]) for i in "qkv")
    scores = torch.einsum("td,nrd->tnr", x, p["say.weight"]) + p.get("say.bias", torch.zeros(()))
    c = segment or T
    near = [norm(y, p["near.weight"], p["near.bias"]) for y in (K, V)]
    far: list[list[Tensor]] = [[], []]
    for s in range(math.ceil(T / c)):
        rows = slice(s * c, min(T, (s + 1) * c))
        P = torch.softmax(scores[rows], 0)  # over the positions of a segment
        for y, out in zip((K, V), far):
            out.append(norm(torch.einsum("tnr,tnh->rnh", P, y[rows]), p["far.weight"], p["far.bias"]))
    q = Q * hd**-0.5
    u, w = p.get("u", torch.zeros(())), p.get("w", torch.zeros(()))

    def e(distance: int) -> Tensor:
        # Constants of a module are fp32 whatever its weights are.
        f = 10000.0 ** -(torch.arange(d // 2, dtype=torch.float32) / (d // 2))
        return torch.cat((torch.sin(distance * f), torch.cos(distance * f))).to(x.dtype)

    out = []
    for t in range(T):
        if segment:
            window = range(max(0, t - span + 1), t + 1)
        else:
            start, beside = t // span * span, max(1, span // 2)
            window = range(max(0, start - beside), min(T, start + span + beside))
        seen = [s for s in range(len(far[0])) if not segment or s < t // c and (not reach or t // c - s <= reach)]
        logits, values = [], []
        for j in window:
            short = ((q[t] + u) * near[0][j]).sum(-1)
            if reach:
                short = short + ((q[t] + w) * (p["near_place.weight"] @ e(t - j))).sum(-1)
            logits.append(short)
            values.append(near[1][j])
        for s in seen:
            for r in range(rank):
                long = (q[t] * far[0][s][r]).sum(-1)
                if reach:
                    delta = (t // c) * rank - 1 - (s * rank + r)
                    long = long + (q[t] * (p["far_place.weight"] @ e(delta) + p["far_place.bias"])).sum(-1)
                logits.append(long)
                values.append(far[1][s][r])
        a = torch.softmax(torch.stack(logits), 0)
        out.append((a[..., None] * torch.stack(values)).sum(0))
    return torch.einsum("tnh,dnh->td", torch.stack(out), p["out.weight"])


sizes = st.fixed_dictionaries({"heads": st.integers(1, 3), "span": st.integers(1, 5), "rank": st.integers(1, 3)})


def agree(form, shape, length, seed):
    hidden = 2 * shape["heads"] * (1 + seed % 2)
    _, model = compiled(vocab=9, hidden=hidden, **shape, **form)
    tokens = torch.randint(0, 9, (2, length), generator=torch.Generator().manual_seed(seed))
    up = torch.randn(2, length, hidden, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + 1))
    named = {name: view for name, _, view in model.named_logical_parameters()}
    found = model(tokens)
    ours = torch.autograd.grad(found, list(model.parameters()), up, allow_unused=True)
    ours = {id(p): g for p, g in zip(model.parameters(), ours)}

    leaves = {name: view.detach().clone().requires_grad_() for name, view in named.items()}
    own = {name.removeprefix("y."): leaf for name, leaf in leaves.items()}
    args = (shape["span"], shape["rank"], form.get("segment"), form.get("reach"))
    wanted = torch.stack([reference(leaves["x.weight"][row], own, *args) for row in tokens])
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-10)
    theirs = torch.autograd.grad(wanted, list(leaves.values()), up, allow_unused=True)
    # The gradient of a weight that lies beside others in one parameter is a part of that parameter's.
    model.zero_grad()
    (model(tokens) * up).sum().backward()
    for (name, holder, view), there in zip(model.named_logical_parameters(), theirs, strict=True):
        grad = torch.zeros_like(holder) if holder.grad is None else holder.grad
        mine = grad.as_strided(view.shape, view.stride(), view.storage_offset())
        torch.testing.assert_close(
            mine, torch.zeros_like(mine) if there is None else there, rtol=0, atol=1e-9, msg=name
        )


@settings(max_examples=8)
@given(shape=sizes, segment=st.integers(1, 5), length=st.integers(1, 14), seed=st.integers(0, 99))
def test_the_causal_form_is_the_papers(shape, segment, length, seed):
    agree({"segment": segment}, shape, length, seed)


@settings(max_examples=6)
@given(shape=sizes, length=st.integers(1, 12), seed=st.integers(0, 99))
def test_the_form_that_sees_both_ways_is_the_papers(shape, length, seed):
    agree({}, shape, length, seed)


@settings(max_examples=8)
@given(
    shape=sizes, segment=st.integers(1, 4), reach=st.integers(1, 4), length=st.integers(1, 14), seed=st.integers(0, 99)
)
def test_the_released_form_has_transformer_xl_distances(shape, segment, reach, length, seed):
    agree({"segment": segment, "reach": reach}, shape, length, seed)


@settings(max_examples=10)
@given(
    form=st.sampled_from(({}, {"reach": 2})), length=st.integers(2, 40), which=st.integers(0, 39),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_the_future_never_changes_the_past(form, length, which, seed):
    """Of the paper's form and of the released one."""
    _, model = compiled(vocab=9, hidden=8, heads=2, span=3, rank=2, segment=4, **form)
    which %= length
    tokens = torch.randint(0, 9, (1, length), generator=torch.Generator().manual_seed(seed))
    other = tokens.clone()
    other[0, which] = (other[0, which] + 1) % 9
    with torch.no_grad():
        assert torch.equal(model(tokens)[:, :which], model(other)[:, :which])


def test_tiles_of_queries_change_nothing():
    """Long sequences are attended a tile of queries at a time; packed documents, too."""
    _, model = compiled(vocab=9, hidden=8, heads=2, span=40, rank=1, segment=16)
    tokens = torch.randint(0, 9, (1, 700), generator=torch.Generator().manual_seed(2))
    document = (torch.arange(700) >= 333).long()[None]
    with torch.no_grad():
        whole = model(tokens, document=document)
        alone = torch.cat([model(tokens[:, :333]), model(tokens[:, 333:])], 1)
        torch.testing.assert_close(whole, alone, rtol=0, atol=1e-12)
        stream = model.stream(1, 700)
        parts = torch.cat([model.prefill(piece, stream) for piece in tokens[:, :333].split(50, 1)], 1)
        torch.testing.assert_close(parts, whole[:, :333], rtol=0, atol=1e-12)


def test_the_decoding_state_is_bounded():
    """The released form keeps a window and the summaries of `reach` segments; the paper's a row for each segment."""
    released = lower(compiled(vocab=9, hidden=8, heads=2, span=4, rank=2, segment=4, reach=3)[0])
    assert state_bytes(released, 100) == state_bytes(released, 100_000)
    paper = lower(compiled(vocab=9, hidden=8, heads=2, span=4, rank=2, segment=16)[0])
    grown = state_bytes(paper, 16_000) - state_bytes(paper, 1_600)
    assert grown == 14_400 // 16 * 2 * (2 * 2 * 4) * 2  # segments, rank, keys and values, bf16


# --- Long Range Arena ---------------------------------------------------------------------------------


def classifier(span, rank, heads, layers, family="lra", objective="classify"):
    text = f'use {family} from "lra.spec"\nmodel made = {family}(vocab = 9, classes = 3, context = 20, '
    text += f"span = {span}, rank = {rank}, hidden = {4 * heads}, ffn = 6, layers = {layers}, heads = {heads})\n"
    program = program_of(load_text(text, folder=shipped_folder() / "lra"), objective=objective)
    model = instantiate(build(program)).cast(torch.float64)
    source = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.5 * torch.randn(p.shape, generator=source, dtype=p.dtype))
    return model


def affine(x: Tensor, p: dict[str, Tensor], name: str) -> Tensor:
    w, b = p[f"{name}.weight"], p[f"{name}.bias"]
    return torch.tensordot(x, w, (list(range(1, x.dim())), list(range(b.dim(), w.dim())))) + b


def scored(x: Tensor, p: dict[str, Tensor]) -> Tensor:
    """The head of both models: x[d] -> scores [classes]."""
    return affine(affine(x[None], p, "linear").relu(), p, "scores")[0]


def lra_reference(tokens: Tensor, weights: dict[str, Tensor], span: int, layers: int) -> Tensor:
    """One sequence int64[T] -> what its class token becomes [d]; the released code for Long Range Arena, its class
    token in the last layer (`cls_last_layer`)."""
    p = {name.removeprefix("read."): w for name, w in weights.items()}

    def lin(x: Tensor, name: str) -> Tensor:
        return affine(x, p, name)

    def ln(x: Tensor, name: str) -> Tensor:
        return norm(x[:, None], p[f"{name}.weight"], p[f"{name}.bias"])[:, 0]

    def ls(X: Tensor, at: str, cls: Tensor | None) -> Tensor:
        n = f"{at}landmarks"
        near, far = ((p[f"{n}.{i}.weight"], p[f"{n}.{i}.bias"]) for i in ("near", "far"))
        Q = lin(X, f"{n}.query_of")
        K, V = norm(lin(X, f"{n}.key_of"), *near), norm(lin(X, f"{n}.value_of"), *near)
        P = torch.softmax(lin(X, f"{n}.say"), 0)  # over positions
        K_c, V_c = (norm(torch.einsum("tnr,tnh->rnh", P, y), *far) for y in (K, V))
        if cls is not None:
            K_cls, V_cls = lin(cls, f"{n}.key_of"), lin(cls, f"{n}.value_of")
            K_c, V_c = torch.cat((norm(K_cls, *far), K_c)), torch.cat((norm(V_cls, *far), V_c))
        T, hd = len(X), Q.shape[-1]
        C = []
        for t in range(T):
            start, beside = t // span * span, max(1, span // 2)
            window = slice(max(0, start - beside), min(T, start + span + beside))
            k, v = torch.cat((K_c, K[window])), torch.cat((V_c, V[window]))
            a = torch.softmax((Q[t] * k).sum(-1) / hd**0.5, 0)
            C.append((a[..., None] * v).sum(0))
        C = torch.stack(C)
        if cls is None:
            return lin(C, f"{n}.out")
        Q_cls = lin(cls, f"{n}.query_of")
        k, v = torch.cat((K_cls, C)), torch.cat((V_cls, C))
        a = torch.softmax((Q_cls * k).sum(-1) / hd**0.5, 0)
        return lin((a[..., None] * v).sum(0, keepdim=True), f"{n}.out")

    def mlp(x: Tensor, at: str) -> Tensor:
        u = lin(x, f"{at}mlp.up")
        return lin(u * 0.5 * (1 + torch.erf(u / 2**0.5)), f"{at}mlp.out")

    X = p["word.weight"][tokens] + p["position.weight"][: len(tokens)]
    for i in range(layers - 1):
        at = f"layer.{i}."
        X = X + ls(ln(X, f"{at}norm1"), at, None)
        X = X + mlp(ln(X, f"{at}norm2"), at)
    cls = p["summary.weight"][0]
    cls = cls + ls(ln(X, "norm1"), "", cls)
    cls = cls + mlp(ln(cls, "norm2"), "")
    return ln(cls, "final")[0]


@settings(max_examples=6)
@given(
    span=st.integers(1, 4), rank=st.integers(1, 3), heads=st.integers(1, 2), layers=st.integers(1, 3),
    length=st.integers(1, 9), padding=st.integers(0, 3), seed=st.integers(0, 99),
)  # fmt: skip
def test_the_classifier_is_the_released_one(span, rank, heads, layers, length, padding, seed):
    """Padding behind a sequence is seen by nobody; the loss is the labels' cross entropy; every gradient."""
    model = classifier(span, rank, heads, layers)
    source = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 9, (2, length + padding), generator=source)
    valid = (torch.arange(length + padding) < length).expand(2, -1)
    label = torch.randint(0, 3, (2,), generator=source)
    p = {name: view.detach().clone().requires_grad_() for name, _, view in model.named_logical_parameters()}
    wanted = torch.stack([scored(lra_reference(t[:length], p, span, layers), p) for t in tokens])
    judge(model, tokens, valid, label, wanted, p)


def judge(model, tokens, valid, label, wanted, p):
    """Scores, loss, count and every gradient are those of the reference."""
    with torch.no_grad():
        found = model(tokens, valid=valid)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-9)
    (loss,) = model.losses(tokens, valid=valid, label=label).values()
    theirs = torch.nn.functional.cross_entropy(wanted, label, reduction="sum")
    torch.testing.assert_close(loss, theirs, rtol=0, atol=1e-9)
    assert model.counts(tokens, label=label) == {"ce": len(label)}
    loss.backward()
    grads = torch.autograd.grad(theirs, list(p.values()), materialize_grads=True)
    for (name, holder, view), there in zip(model.named_logical_parameters(), grads, strict=True):
        grad = torch.zeros_like(holder) if holder.grad is None else holder.grad
        mine = grad.as_strided(view.shape, view.stride(), view.storage_offset())
        torch.testing.assert_close(mine, there, rtol=0, atol=1e-8 * max(1, float(there.abs().max())), msg=name)


@settings(max_examples=6)
@given(
    span=st.integers(1, 4), rank=st.integers(1, 3), heads=st.integers(1, 2), layers=st.integers(1, 3),
    lengths=st.lists(st.integers(1, 9), min_size=2, max_size=6).filter(lambda x: len(x) % 2 == 0),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_the_classifier_of_pairs_is_the_released_one(span, rank, heads, layers, lengths, seed):
    """Two documents, each of its own length, through one reader."""
    model = classifier(span, rank, heads, layers, "lra_pair", "classify_pair")
    source = torch.Generator().manual_seed(seed)
    batch, longest = len(lengths) // 2, max(lengths)
    tokens = torch.randint(0, 9, (batch, 2, longest), generator=source)
    valid = torch.arange(longest) < torch.tensor(lengths).view(batch, 2, 1)
    label = torch.randint(0, 3, (batch,), generator=source)
    p = {name: view.detach().clone().requires_grad_() for name, _, view in model.named_logical_parameters()}
    of = iter(lengths)
    each = [[lra_reference(t[: next(of)], p, span, layers) for t in pair] for pair in tokens]
    wanted = torch.stack([scored(torch.cat((a, b, a * b, a - b)), p) for a, b in each])
    judge(model, tokens, valid, label, wanted, p)


def test_the_released_retrieval_model_has_its_parameters():
    """Counted from the released classes: embeddings, the class token, two layers, a norm, the head of four vectors."""
    d, f, r = 64, 128, 254
    layer = 2 * (2 * d) + 4 * (d * d + d) + 2 * (2 * d) + (d * 2 * r + 2 * r) + (d * f + f) + (f * d + d)
    wanted = 512 * d + 4096 * d + d + 2 * layer + 2 * d + (4 * d * f + f) + (f * 2 + 2)
    assert program_of(load(shipped_folder() / "lra" / "retrieval.spec")).num_parameters() == wanted
