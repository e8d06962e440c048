"""RETRO: the model equals the published equations, forward and every gradient; chunks are isolated as the shift says.

The reference has the letters of Megatron-LM's code and of Wang et al. 2023: ns tokens, chunks of m, l = ns / m of them,
k neighbours of r tokens each. Megatron shifts by padding; here nothing is shifted, coordinates are compared. With
`places` the distances of Borgeaud et al. 2022, B.1.2, which are turned, not added: i - i' + m - 1 where the decoder reads
neighbours, but for the constant; i' - i where these read the chunk.
"""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from heddle.dsl.load import load, load_text, shipped_folder
from heddle.runtime.check import program_of
from heddle.runtime.compile import build, instantiate

SPEC = """
use retro from "retro.spec"

model made = retro({})
"""


def compiled(**sizes):
    text = SPEC.format(
        ", ".join(f"{k} = {str(v).lower() if v is None or isinstance(v, bool) else v}" for k, v in sizes.items())
    )
    program = program_of(load_text(text, folder=shipped_folder() / "retro"))
    model = instantiate(build(program)).cast(torch.float64).eval()
    source = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.5 * torch.randn(p.shape, generator=source, dtype=p.dtype))
    return model


# --- the published equations ------------------------------------------------------------------------


def LN(x: Tensor, p: dict[str, Tensor], name: str) -> Tensor:
    mu = x.mean(-1, keepdim=True)
    var = ((x - mu) ** 2).mean(-1, keepdim=True)
    return (x - mu) / torch.sqrt(var + 1e-5) * p[f"{name}.weight"] + p[f"{name}.bias"]


def R(x: Tensor, place: Tensor, theta: float) -> Tensor:
    """Rows x[t, n, h], as complex numbers of halves, turned by their places (Su et al. 2021); angles are fp32 always."""
    z = torch.complex(*x.chunk(2, -1))
    speed = theta ** -(torch.arange(z.shape[-1], dtype=torch.float32) / z.shape[-1])
    angle = place[:, None] * speed
    z = z * torch.complex(angle.cos().to(x.dtype), angle.sin().to(x.dtype))[:, None]
    return torch.cat((z.real, z.imag), -1)


def Attn(
    x: Tensor, y: Tensor, p: dict[str, Tensor], name: str, places: Any = None, theta: Any = None, seen: Any = None
) -> Tensor:  # fmt: skip
    """Queries x[t, d], keys and values y[s, d] -> [t, d]; places: of queries, and of keys; seen: [t, s]."""
    q, k, v = (
        torch.einsum("td,nhd->tnh", z, p[f"{name}.{i}.weight"]) + p[f"{name}.{i}.bias"]
        for z, i in ((x, "q"), (y, "k"), (y, "v"))
    )
    if theta is not None:
        q, k = (R(z, place, theta) for z, place in zip((q, k), places, strict=True))
    a = torch.einsum("tnh,snh->nts", q, k) / q.shape[-1] ** 0.5
    if seen is not None:
        a = a.masked_fill(~seen, -torch.inf)
    o = torch.einsum("nts,snh->tnh", a.softmax(-1), v)
    return torch.einsum("tnh,dnh->td", o, p[f"{name}.out.weight"]) + p[f"{name}.out.bias"]


def MLP(x: Tensor, p: dict[str, Tensor], name: str) -> Tensor:
    u = x @ p[f"{name}.up.weight"].T + p[f"{name}.up.bias"]
    return u * 0.5 * (1 + torch.erf(u / 2**0.5)) @ p[f"{name}.out.weight"].T + p[f"{name}.out.bias"]


def Encoder(x: Tensor, H_u: Tensor, p: dict[str, Tensor], name: str, c: dict[str, Any]) -> Tensor:
    """One neighbour x[r, d] of the chunk that H_u[m, d] is the state of."""
    theta, i_, i = c["places"], torch.arange(len(x)), torch.arange(len(H_u))
    every = torch.ones(len(x), len(x)).bool()
    seen = {"full": every, "window(2)": every.tril() & every.triu(-1)}[c["seen"]]
    for layer in range(c["depth"]):
        at = f"{name}.layer.{layer}"
        n = LN(x, p, f"{at}.norm1")
        x = x + Attn(n, n, p, f"{at}.attention", places=(i_, i_), theta=theta, seen=seen)
        if layer == 0:
            a = LN(x, p, f"{at}.norm2")
            x = (a if c["normed"] else x) + Attn(a, H_u, p, f"{at}.read", places=(i_, i), theta=theta)
        x = x + MLP(LN(x, p, f"{at}.norm3"), p, f"{at}.mlp")
    return x


def reference(tokens: Tensor, neighbors: Tensor, p: dict[str, Tensor], c: dict[str, Any]) -> Tensor:
    """One sequence int64[ns], its neighbours int64[l, k, r] -> logits [ns, vocab]; m divides ns."""
    ns, m = len(tokens), c["chunk"]
    l, k, r = neighbors.shape  # noqa: E741
    theta = c["places"]
    h = p["word.weight"][tokens] + p["position.weight"][:ns]
    causal = torch.ones(ns, ns).tril().bool()
    E = None
    for i in range(c["layers"]):
        at = f"layer.{i}"
        n = LN(h, p, f"{at}.norm1")
        h = h + Attn(n, n, p, f"{at}.attention", seen=causal)
        if i in c["cross"]:
            a = LN(h, p, f"{at}.norm2")
            if E is None:
                context = p["word.weight"][neighbors] + p["position.weight"][:r]
                name = f"{at}.retro_encoder"
                E = [
                    torch.cat([Encoder(context[u, j], a[u * m : (u + 1) * m], p, name, c) for j in range(k)])
                    for u in range(l)
                ]
            pad = (ns - 1) % m
            q = torch.cat((a[pad:], a.new_zeros(m - 1, a.shape[1]))).view(l, m, -1)
            places = torch.arange(m), torch.arange(r).repeat(k)
            out = torch.cat([Attn(q[u], E[u], p, f"{at}.read", places=places, theta=theta) for u in range(l)])
            out = torch.cat((out.new_zeros(pad, out.shape[1]), out))[:ns]
            h = c["gate"] * out + h
        h = h + MLP(LN(h, p, f"{at}.norm3"), p, f"{at}.mlp")
    return LN(h, p, "final") @ p["word.weight"].T


# --- laws -------------------------------------------------------------------------------------------

SHAPES = st.fixed_dictionaries({
    "heads": st.integers(1, 2),
    "chunk": st.integers(1, 5),
    "near": st.integers(1, 3),
    "length": st.integers(1, 6),
    "depth": st.integers(1, 2),
    "normed": st.booleans(),
    "places": st.sampled_from((None, 50)),
    "seen": st.sampled_from(("full", "window(2)")),
    "cross": st.sampled_from(([0], [1], [0, 2], [1, 2])),
})  # fmt: skip


def inputs(shape, length, seed, batch=2):
    """Tokens, and neighbours of the chunks that are complete."""
    source = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 11, (batch, length), generator=source)
    sizes = (batch, length // shape["chunk"], shape["near"], shape["length"])
    return tokens, torch.randint(0, 11, sizes, generator=source)


def made(shape, context):
    return compiled(vocab=11, hidden=4 * shape["heads"], ffn=6, layers=3, context=context, encoder_drop=0, **shape)


@settings(max_examples=12)
@given(shape=SHAPES, length=st.integers(1, 14), seed=st.integers(0, 99))
def test_the_model_is_the_published_one(shape, length, seed):
    """Tokens behind the last whole chunk see its neighbours; to the reference these are the start of a padded chunk."""
    model = made(shape, 24)
    tokens, neighbors = inputs(shape, length, seed)
    named = {name: view.detach().clone().requires_grad_() for name, _, view in model.named_logical_parameters()}
    m = shape["chunk"]
    more = -length % m
    padded = torch.nn.functional.pad(tokens, (0, more))
    nowhere = torch.zeros(2, len(padded[0]) // m - neighbors.shape[1], *neighbors.shape[2:], dtype=torch.int64)
    near = torch.cat((neighbors, nowhere), 1)
    c = {**shape, "layers": 3, "gate": 1}
    wanted = torch.stack([reference(t, n, named, c)[:length] for t, n in zip(padded, near, strict=True)])
    found = model(tokens, neighbors=neighbors)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-9)
    up = torch.randn(found.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    theirs = torch.autograd.grad(wanted, list(named.values()), up, materialize_grads=True)
    model.zero_grad()
    (found * up).sum().backward()
    for (name, holder, view), there in zip(model.named_logical_parameters(), theirs, strict=True):
        grad = torch.zeros_like(holder) if holder.grad is None else holder.grad
        mine = grad.as_strided(view.shape, view.stride(), view.storage_offset())
        bound = 1e-9 * max(1.0, float(there.abs().max()))
        torch.testing.assert_close(mine, there, rtol=0, atol=bound, msg=name)


@settings(max_examples=12)
@given(shape=SHAPES, length=st.integers(2, 16), which=st.integers(0, 15), seed=st.integers(0, 99))
def test_neighbours_of_a_chunk_change_nothing_before_its_last_token(shape, length, which, seed):
    model = made(shape, 24)
    tokens, neighbors = inputs(shape, length, seed, batch=1)
    if not neighbors.shape[1]:
        return
    u, m = which % neighbors.shape[1], shape["chunk"]
    other = neighbors.clone()
    other[:, u] = (other[:, u] + 1) % 11
    with torch.no_grad():
        a, b = model(tokens, neighbors=neighbors), model(tokens, neighbors=other)
    assert torch.equal(a[:, : u * m + m - 1], b[:, : u * m + m - 1])
    assert not torch.equal(a[:, u * m + m - 1], b[:, u * m + m - 1])


@settings(max_examples=8)
@given(shape=SHAPES, length=st.integers(2, 16), which=st.integers(0, 15), seed=st.integers(0, 99))
def test_the_future_never_changes_the_past(shape, length, which, seed):
    """Through the encoder neither, which reads whole chunks in both directions."""
    model = made(shape, 24)
    tokens, neighbors = inputs(shape, length, seed, batch=1)
    t = which % length
    other = tokens.clone()
    other[0, t] = (other[0, t] + 1) % 11
    with torch.no_grad():
        a, b = model(tokens, neighbors=neighbors), model(other, neighbors=neighbors)
    assert torch.equal(a[:, :t], b[:, :t])


@settings(max_examples=6)
@given(shape=SHAPES, length=st.integers(1, 12), seed=st.integers(0, 99))
def test_gated_off_it_is_the_decoder_alone_with_the_same_weights(shape, length, seed):
    """InstructRetro's use of a RETRO checkpoint (Wang et al. 2024): without neighbours nothing of the encoder is there."""
    model = made(shape, 24)
    sizes = {**shape, "vocab": 11, "hidden": 4 * shape["heads"], "ffn": 6, "layers": 3, "context": 24}
    off, alone = compiled(**sizes, gate=0, encoder_drop=0), compiled(**sizes, neighbors="none")
    state = model.state_dict()
    off.load_state_dict(state)
    assert set(alone.state_dict()) <= set(state) and not any("encoder" in n for n in alone.state_dict())
    alone.load_state_dict({n: state[n] for n in alone.state_dict()})
    tokens, neighbors = inputs(shape, length, seed)
    with torch.no_grad():
        assert torch.equal(off(tokens, neighbors=neighbors), alone(tokens))


@settings(max_examples=6)
@given(shape=SHAPES, prompt=st.integers(1, 9), new=st.integers(1, 8), seed=st.integers(0, 99))
def test_generation_asks_for_neighbours_when_a_chunk_is_complete(shape, prompt, new, seed):
    """What is retrieved on the fly is what a full pass over all tokens is given; each chunk is asked for once."""
    model = made(shape, 24)
    tokens, _ = inputs(shape, prompt, seed)
    m, asked = shape["chunk"], []

    def retrieve(so_far: Tensor, groups: range) -> Tensor:
        """Neighbours that are a function of the chunk."""
        asked.extend(groups)
        assert so_far.shape[1] >= groups.stop * m
        chunks = so_far[:, groups.start * m : groups.stop * m].unflatten(1, (len(groups), m)).sum(2)
        grid = torch.arange(shape["near"] * shape["length"]).view(shape["near"], shape["length"])
        return (chunks[:, :, None, None] * 3 + grid) % 11

    whole = model.generate(tokens, new, given={"neighbors": retrieve})
    assert asked == list(range((prompt + new - 1) // m))
    with torch.no_grad():
        logits = model(whole[:, :-1], neighbors=retrieve(whole, range((prompt + new - 1) // m)))
    assert torch.equal(logits[:, prompt - 1 :].argmax(-1), whole[:, prompt:])


@settings(max_examples=6, deadline=None)
@given(shape=SHAPES, length=st.integers(1, 17), seed=st.integers(0, 99))
def test_the_encoder_works_only_where_a_chunk_ends(shape, length, seed):
    """Decoding token by token, rows of neighbours go through each of its layers with the last token of their chunk, and
    through the keys that the decoder reads; all other steps give them none."""
    model, m = made(shape, 24), shape["chunk"]
    tokens, neighbors = inputs(shape, length, seed)
    worked: dict[str, int] = {}
    counted = re.compile(r"retro_encoder\.layer\.\d+$|^layer\.\d+\.read\.k_v$")
    for name, module in model.named_modules():
        if counted.search(name):
            module.register_forward_hook(lambda _, given, out, name=name: worked.update({name: given[0].numel()}))
    stream, rows = model.stream(2, length), 2 * shape["near"] * shape["length"] * 4 * shape["heads"]
    for t in range(length):
        worked.clear()
        ends = (t + 1) % m == 0
        group = neighbors[:, (t + 1) // m - ends : (t + 1) // m]
        with torch.no_grad():
            model.prefill(tokens[:, t : t + 1], stream, neighbors=group)
        assert len(worked) == shape["depth"] + len(shape["cross"])
        assert set(worked.values()) == {rows if ends else 0}


# --- published sizes --------------------------------------------------------------------------------

SIZES = {
    "retro_small": (148e6, 126e6),
    "retro_medium": (410e6, 357e6),
    "retro_xl": (1.5e9, 1.3e9),
    "retro_xxl": (9.5e9, 8.3e9),
    "instruct_retro_878m": (878e6, 823e6),
    "instruct_retro_2b": (2.5e9, 2.25e9),
    "instruct_retro_9b": (9.5e9, 8.5e9),
    "instruct_retro_24b": (24e9, None),  # printed as 22B, which the other sizes' rules do not give
    "instruct_retro_48b": (48e9, 43e9),
}
"""Parameters of RETRO and of its decoder alone: Wang et al. 2023 (Table 9) and 2024 (Table 4), as rounded there."""


@pytest.mark.parametrize("name", SIZES)
def test_published_sizes(name):
    """As printed, to the digits printed; what retrieval adds is 4 d^2 for each reading layer and for the encoder's own
    reading, and 4 d^2 + m d f for each of its layers (m matrices in a feed-forward), beside biases and norms."""
    path = shipped_folder() / "retro" / f"{name if name.startswith('retro') else 'instruct_retro'}.spec"
    program = program_of(load(path), name)
    alone = program_of(load(path), name, {"neighbors": None})
    for made, published in zip((program, alone), SIZES[name], strict=True):
        assert published is None or abs(made.num_parameters() / published - 1) < 0.025
    settings = program.arguments
    d, f, reads, bias = settings["hidden"], settings["ffn"], len(settings["cross"]), settings["bias"]
    matrices = 3 if settings["gated"] else 2
    added = 4 * d * d * (reads + 1) + 2 * (4 * d * d + matrices * d * f)
    vectors = 2 * d * (reads + 5) + bias * (4 * d * (reads + 3) + 2 * (d + f))
    assert program.num_parameters() - alone.num_parameters() == added + vectors
