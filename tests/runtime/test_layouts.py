"""Any layout equals one device: loss, every gradient, the norm, and the weights after three steps, in fp64 to 1e-10."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, example, given, reject, settings
from hypothesis import strategies as st

from heddle.dsl.diagnostics import SpecError
from heddle.dsl.layout import layout_of
from heddle.dsl.load import load_text, shipped_folder
from heddle.runtime.check import program_of
from heddle.runtime.compile import build, module_class
from heddle.runtime.lib.laid import part, take_whole
from heddle.runtime.lib.simulated import simulate
from tests.lowering.mutants import Mutant
from tests.lowering.sharded import BIASED, Twin

from .laid_out import Batch, alone, difference, losses, on_mesh, start

BOUND = 1e-10
LONG = not settings.default.derandomize
"""`make soak`: 500 cases, with those of pipelines."""
TWINS = [
    "llama/tiny.spec", "mistral/tiny.spec", "nemotron4/tiny.spec", "nemotron_h/tiny.spec", "nemotron_h/tiny_moe.spec",
    "transformer_ls/tiny.spec", "transformer_ls/tiny_released.spec", "retro/tiny.spec",
]  # fmt: skip
MESHES = [
    dict(data=d, context=c, tensor=t) for d in (1, 2) for c in (1, 2, 4) for t in (1, 2, 4) if 1 < d * c * t <= 8
]  # fmt: skip
AGAIN = "    recompute blocks\n"
PARTS = "    shard parameters over data\n"
DIMS = ("vocab", "heads", "kv_heads", "groups", "ffn")


# How uses along a split sequence are computed, where their dims divide; none: bytes decide.
WAYS = ((), ("attend?: exchange(heads)",), ("attend?: all_gather",),
        ("attend?: exchange(heads)", "mamba2?: exchange(heads, groups)"), ("attend?: ring",),
        ("attend?: ring(order = zigzag)",), ("attend?: ring", "recompute attend?, ssd?, causal_conv?"))  # fmt: skip


def text_of(mesh: dict[str, int], dims: list[str], between: bool, ways: tuple[str, ...] = ()) -> str:
    """A layout in the language."""
    lines = [f"    mesh {', '.join(f'{a} = {n}' for a, n in mesh.items())}"]
    if dims:
        lines.append(f"    shard {', '.join(f'{d}?' for d in dims)} over tensor")
    lines.append("    shard seq over context")
    if between:
        lines.append("    shard seq over tensor between blocks")
    lines.append("    shard batch over data")
    lines += [f"    {way}" for way in ways]
    return "\n\nlayout drawn:\n" + "\n".join(lines) + "\n"


@st.composite
def layouts(draw: Any, meshes: Any = MESHES) -> tuple[dict[str, int], list[str], bool]:
    """A mesh, dims over its tensor axis (heads bring what they share), and whether the residual stream is split, too."""
    mesh = draw(st.sampled_from(list(meshes)))
    dims = [d for d in DIMS if draw(st.booleans())]
    if "heads" in dims:
        dims = [d for d in DIMS if d in dims or d in ("kv_heads", "groups")]
    elif "kv_heads" in dims or "groups" in dims:
        dims = [d for d in dims if d not in ("kv_heads", "groups")]
    return mesh, dims, draw(st.booleans())


def batch_of(mesh: dict[str, int], seq: int, seed: int, vocab: int, retro: bool, packed: bool, padded: bool) -> Batch:
    source = torch.Generator().manual_seed(seed)
    rows = 2 * mesh["data"]
    tokens = torch.randint(0, vocab, (rows, seq), generator=source)
    document = (torch.rand(rows, seq, generator=source) < 0.2).cumsum(1) if packed and not retro else None
    valid = (
        (torch.arange(seq) < torch.randint(1, seq + 1, (rows, 1), generator=source)) if padded and not retro else None
    )
    more = {"neighbors": torch.randint(0, vocab, (rows, seq // 4, 2, 8), generator=source)} if retro else {}
    return Batch(tokens, document, valid, more)


def check(
    file: str, drawn: Any, seq: int, seed: int, packed: bool, padded: bool, steps: int = 3,
    ways: tuple[str, ...] = (), more: str = "", chance: int | None = None,
) -> None:
    """`file` is a shipped one, or the text of a spec. With `chance` random numbers are drawn, the same for all."""
    mesh, dims, between = drawn
    retro = file.startswith("retro")
    path = shipped_folder() / (file if file.endswith(".spec") else "none.spec")
    text = path.read_text(encoding="utf-8") if file.endswith(".spec") else file
    loaded = load_text(text + text_of(mesh, dims, between, ways) + more, folder=path.parent)
    program, layout = program_of(loaded), layout_of(loaded)
    model = start(program, seed).train(chance is not None)
    model.chance = chance
    state = {k: v.clone() for k, v in model.state_dict().items()}
    batch = batch_of(mesh, seq, seed, model.vocab or 8, retro, packed, padded)
    one = alone(model, batch, steps)
    ranks, _ = on_mesh(program, layout, state, batch, steps=steps, chance=chance)
    far = difference(one, ranks)
    worst = sorted((k for k in far if not far[k] < BOUND), key=far.__getitem__)[-3:]
    where = f"{file} on {mesh}, {dims} over tensor, between = {between}, {ways}, {more}"
    assert not worst, f"{where}: {[(k, far[k]) for k in worst]}"


# A case takes a second: it is found, not made small.
@settings(
    max_examples=320 if LONG else 24, deadline=None, suppress_health_check=list(HealthCheck), phases=[Phase.explicit, Phase.generate]
)
@given(
    file=st.sampled_from(TWINS), drawn=layouts(), seed=st.integers(0, 2**16), seq=st.sampled_from([8, 16, 24]),
    packed=st.booleans(), padded=st.booleans(), more=st.sampled_from(["", AGAIN, PARTS, PARTS + AGAIN]),
)  # fmt: skip
def test_any_layout_equals_one_device(
    file: str, drawn: Any, seed: int, seq: int, packed: bool, padded: bool, more: str
) -> None:
    check(file, drawn, seq, seed, packed, padded, more=more)


@settings(
    max_examples=100 if LONG else 10, deadline=None, suppress_health_check=list(HealthCheck), phases=[Phase.explicit, Phase.generate]
)
@given(
    file=st.sampled_from([t for t in TWINS if not t.startswith("retro")]), ways=st.sampled_from(WAYS[1:]),
    drawn=layouts([m for m in MESHES if m["context"] > 1]), seed=st.integers(0, 2**16), seq=st.sampled_from([16, 32]),
    packed=st.booleans(), padded=st.booleans(),
)  # fmt: skip
def test_every_way_of_a_split_sequence_equals_one_device(
    file: str, ways: tuple[str, ...], drawn: Any, seed: int, seq: int, packed: bool, padded: bool
) -> None:
    try:
        check(file, drawn, seq, seed, packed, padded, ways=ways)
    except SpecError as error:
        assert {d.code for d in error.diagnostics} == {"uneven-split"}
        reject()


CHANCE = """
block chances(heads, mask = causal):
    x[seq, hidden]
    q = linear(x, hidden -> [heads, head_dim = 4])
    k = linear(x, hidden -> [heads, head_dim])
    v = linear(x, hidden -> [heads, head_dim])
    o = attend(q, (k, v, mask), dropout = 0.3)
    some = dropout(o, 0.5)
    return linear(some, [heads, head_dim] -> hidden)

model one(vocab = 32, hidden = 16):
    tokens[batch, seq]: token
    embedding = embed(tokens, vocab -> hidden)
    x = embedding + chances(rms_norm(embedding), heads = 8)
    final = rms_norm(x)
    logits = linear(final, hidden -> vocab)
    return logits
"""


@pytest.mark.parametrize("mesh", ["context = 4", "context = 2, tensor = 2", "tensor = 2, context = 2"])
@pytest.mark.parametrize("way", ["exchange(heads)", "ring(order = zigzag)", "all_gather"])
def test_random_zeros_are_the_same_wherever_heads_and_positions_are(mesh: str, way: str) -> None:
    """Behind an exchange a rank has some heads of all positions: their places count, not the rank's."""
    rules = f"layout drawn:\n    mesh {mesh}\n    shard seq over context\n    attend: {way}\n"
    rules += "    shard heads over tensor\n" * ("tensor" in mesh)
    loaded = load_text(f"{CHANCE}\n{rules}")
    program, tokens = program_of(loaded), torch.randint(0, 32, (2, 16), generator=torch.Generator().manual_seed(1))
    model = start(program).train()
    model.chance, state = 7, {k: v.clone() for k, v in model.state_dict().items()}
    batch = Batch(tokens, None, None, {})
    wanted = sum(losses(model, batch)[0].values()).detach()
    kind = module_class((made := build(program, layout=layout_of(loaded))).source, made.name)

    def rank(where: Any) -> Any:
        laid = kind().double().train()
        laid.mesh, laid.chance = where, 7
        take_whole(laid, state)
        (loss,) = losses(laid, batch)[0].values()
        return where["context"].all_reduce(loss.detach())

    assert all(abs(float(loss - wanted)) < BOUND for loss in simulate(dict(kind.axes), rank))
    model.chance = 8
    assert abs(float(sum(losses(model, batch)[0].values()).detach() - wanted)) > 1e-3, "nothing depends on chance"


DROPPED = """
block both(heads, kv_heads, rate, near):
    x[seq, hidden]
    q = linear(x, hidden -> [heads, head_dim = 4])
    k = linear(x, hidden -> [kv_heads, head_dim])
    v = linear(x, hidden -> [kv_heads, head_dim])
    say = linear(x, hidden -> [kv_heads, rank = 3])
    seq.piece = seq.position // 4
    far_k, far_v = summarise(k, say, by = seq.piece), summarise(v, say, by = seq.piece)
    some = dropout(far_v, rate)
    o = attend(q, (k, v, near), (far_k, some, key.piece < query.piece), dropout = rate)
    return linear(o, [heads, head_dim] -> hidden)

model dropped(vocab = 32, hidden = 16, heads = 4, kv_heads = {kv_heads}, ffn = 12, rate = {rate}):
    tokens[batch, seq]: token
    embedding = embed(tokens, vocab -> hidden)
    x = embedding
    for layer in 2:
        norm1 = rms_norm(x)
        x = x + dropout(attention(norm1, heads, kv_heads, mask = {mask}, drop = rate), rate)
        norm2 = rms_norm(x)
        x = x + both(norm2, heads, kv_heads, rate, {mask})
        norm3 = rms_norm(x)
        x = x + dropout(mlp(norm3, ffn), rate)
    final = rms_norm(x)
    logits = linear(final, hidden -> vocab)
    return logits
"""


@settings(
    max_examples=60 if LONG else 12, deadline=None, suppress_health_check=list(HealthCheck), phases=[Phase.explicit, Phase.generate]
)
@given(
    drawn=layouts(), ways=st.sampled_from(WAYS), kv_heads=st.sampled_from([1, 2, 4]), rate=st.sampled_from([0.1, 0.5]),
    mask=st.sampled_from(["causal", "window(5)"]), seed=st.integers(0, 2**16), packed=st.booleans(),
    padded=st.booleans(), more=st.sampled_from(["", AGAIN, "    recompute attend\n", PARTS + "    recompute attend\n"]),
)  # fmt: skip
# A row of two documents has other pieces than one of one: how many there are side by side depends on who has the row.
@example(drawn=(dict(data=2, context=1, tensor=1), [], False), ways=(), kv_heads=2, rate=0.5, mask="causal", seed=0,
         packed=True, padded=False, more="")  # fmt: skip
def test_values_and_weights_of_attention_are_dropped_alike_under_any_layout(
    drawn: Any, ways: tuple[str, ...], kv_heads: int, rate: float, mask: str, seed: int, packed: bool, padded: bool,
    more: str,
) -> None:  # fmt: skip
    """By where they are in the whole: row, head, query and key, or row, piece, head and channel; also made again."""
    ways = tuple(w.partition(",")[0] if w.startswith("recompute") else w for w in ways)
    text = DROPPED.replace("{kv_heads}", str(kv_heads)).replace("{rate}", str(rate)).replace("{mask}", mask)
    try:
        check(text, drawn, 16, seed, packed, padded, 1, ways=ways, more=more, chance=seed)
    except SpecError as error:
        assert {d.code for d in error.diagnostics} == {"uneven-split"}
        reject()


@pytest.mark.parametrize("again", ["layer_norm", "attend", "linear", "attention", "gelu"])
def test_what_is_made_again_is_made_of_what_it_was_given(again: str) -> None:
    """A variable of a generated module may hold something else by then: `x = x + ...`."""
    base = Twin(BIASED, f"mesh context = 2, tensor = 2\nshard ffn over tensor\nshard seq over context\nrecompute {again}")
    assert base.far(Mutant("none", "", base.sharded)) < BOUND


@pytest.mark.parametrize("file", TWINS)
def test_every_family_on_all_axes_at_once(file: str) -> None:
    check(file, (dict(data=2, context=2, tensor=2), list(DIMS), True), 16, 1, True, True, more=AGAIN + PARTS)


@pytest.mark.parametrize("file", ["llama/tiny.spec", "nemotron_h/tiny.spec", "transformer_ls/tiny_released.spec"])
def test_forward_gives_whole_logits_for_a_ranks_rows(file: str) -> None:
    mesh = dict(data=2, context=2, tensor=2)
    path = shipped_folder() / file
    text = path.read_text(encoding="utf-8") + text_of(mesh, list(DIMS), True)
    loaded = load_text(text, folder=path.parent)
    program = program_of(loaded)
    model = start(program)
    state, tokens = dict(model.state_dict()), torch.randint(0, model.vocab or 8, (4, 8))
    wanted = model(tokens)
    kind = module_class((made := build(program, layout=layout_of(loaded))).source, made.name)

    def rank(where: Any) -> float:
        laid = kind().double().eval()
        laid.mesh = where
        take_whole(laid, state)
        mine = [laid.rows, ()]
        return float((laid(part(tokens, mine, where)) - part(wanted, [*mine, ()], where)).detach().abs().max())

    assert max(simulate(dict(kind.axes), rank)) < BOUND
