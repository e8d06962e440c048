"""Pipelines equal one device: loss, every gradient and the norm, in fp64 to 1e-10; tied weights over stages, too."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from heddle.dsl.diagnostics import SpecError
from heddle.dsl.layout import layout_of
from heddle.dsl.load import load_text, shipped_folder
from heddle.runtime.check import program_of
from heddle.runtime.compile import build, module_class
from heddle.runtime.lib import Gathered
from heddle.runtime.lib.laid import (
    global_counts,
    global_sums,
    gradient_norm,
    laid_parameters,
    part,
    sync_gradients,
    take_whole,
)
from heddle.runtime.lib.later import Later
from heddle.runtime.lib.pipeline import keep_stages, pipelined
from heddle.runtime.lib.schedules import order
from heddle.runtime.lib.simulated import simulate
from heddle.runtime.plan.schedules import held
from heddle.runtime.train.config import TrainConfig
from heddle.runtime.train.divided import Divided

from .laid_out import alone, start
from .test_layouts import BOUND, LONG, batch_of

# name: layers, inputs beside the tokens
TWINS = {
    "llama/tiny.spec": 3, "nemotron_h/tiny.spec": 5, "nemotron_h/tiny_moe.spec": 5, "nemotron4/tiny.spec": 2,
    "transformer_ls/tiny_released.spec": 2, "retro/tiny.spec": 3,
}  # fmt: skip


def text_of(mesh: dict[str, int], stages: str, more: str = "") -> str:
    axes = ", ".join(f"{a} = {n}" for a, n in mesh.items())
    return f"""

layout drawn:
    mesh {axes}
    shard vocab?, heads?, kv_heads?, ffn?, groups? over tensor
    shard seq? over tensor between blocks
    shard batch? over data
    stages over pipe, {stages}
{more}"""


def check(file: str, mesh: dict[str, int], stages: str, batches: int, seed: int, more: str = "") -> list[int]:
    """Gives how many numbers each rank holds."""
    path, retro = shipped_folder() / file, file.startswith("retro")
    loaded = load_text(path.read_text(encoding="utf-8") + text_of(mesh, stages, more), folder=path.parent)
    program, layout = program_of(loaded), layout_of(loaded)
    model = start(program, seed)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    # As many rows for each micro-batch as there are ranks of data, so that all are cut alike.
    batch = batch_of({**mesh, "data": mesh.get("data", 1) * batches}, 8, seed, model.vocab or 8, retro, False, False)
    one = alone(model, batch)
    kind = module_class((made := build(program, layout=layout)).source, made.name)

    def rank(where: Any) -> Any:
        laid = kind().double().eval()
        laid.mesh = where
        keep_stages(laid)
        take_whole(laid, state)
        mine = batch.cut(laid.rows, where)
        names = list(mine.more)
        pieces = list(zip(mine.tokens.chunk(batches), *(mine.more[n].chunk(batches) for n in names), strict=True))
        counts: dict[str, Any] = {}
        for tokens, *rest in pieces:
            for label, n in laid.counts(tokens, **dict(zip(names, rest, strict=True))).items():
                counts[label] = counts.get(label, 0) + n
        known, gathered = global_counts(laid, counts), Gathered()

        def at_of(i: int) -> Any:
            at = laid._rows(pieces[i][0], None, None, None)
            at.gathered = gathered
            return at

        sums = pipelined(laid, pieces, known, at_of)
        sync_gradients(laid)
        whole = global_sums(laid, sums)
        loss = sum(whole[k] / known[k].clamp_min(1) for k in whole)
        far = [(loss - one.loss).abs(), (gradient_norm(laid) - one.norm).abs()]
        for p in laid_parameters(laid):
            grad = torch.zeros_like(p.view) if p.holder.grad is None else p.holder.grad
            far.append(
                (grad - part(one.grads[p.path], p.splits, where)).abs().max() / (1 + one.grads[p.path].abs().max())
            )
        return float(torch.stack([f.reshape(()) for f in far]).max()), sum(p.numel() for p in laid.parameters())

    found = simulate(dict(kind.axes), rank)
    assert max(f for f, _ in found) < BOUND, (file, mesh, stages, [f for f, _ in found])
    return [n for _, n in found]


@settings(
    max_examples=80 if LONG else 16, deadline=None, suppress_health_check=list(HealthCheck), phases=[Phase.explicit, Phase.generate]
)
@given(data=st.data(), file=st.sampled_from(sorted(TWINS)), seed=st.integers(0, 2**16))
def test_any_pipeline_equals_one_device(data: Any, file: str, seed: int) -> None:
    layers = TWINS[file]
    pipe = data.draw(st.integers(2, min(3, layers)))
    chunks = data.draw(st.sampled_from([c for c in (1, 2) if pipe * c <= layers]))
    batches = pipe * data.draw(st.integers(1, 2))
    mesh = {"pipe": pipe, "data": data.draw(st.sampled_from((1, 2))), "tensor": data.draw(st.sampled_from((1, 2)))}
    name = data.draw(st.sampled_from(("interleaved", "zero_bubble")))
    how = f"schedule = {name}(chunks = {chunks}), "
    stored = data.draw(
        st.sampled_from(("", *(f"    shard parameters over data{x}\n" for x in ("", " between microbatches"))))
    )
    more = "    recompute blocks\n" * data.draw(st.booleans()) + stored
    check(file, mesh, f"{how}microbatches = {batches}", batches, seed, more)


@pytest.mark.parametrize("file", ["llama/tiny.spec", "nemotron_h/tiny_moe.spec"])
def test_a_stage_of_one_layer_is_made_again_from_what_it_was_given(file: str) -> None:
    """And not from what it gave, which has the same name."""
    layers = TWINS[file]
    check(file, {"pipe": layers}, f"microbatches = {layers}", layers, 0, "    recompute blocks\n")


def test_ranks_hold_their_stages_only() -> None:
    """A tied table is on the first and the last stage; the rest is on one."""
    path = shipped_folder() / "transformer_ls/tiny_released.spec"
    whole = program_of(load_text(path.read_text(encoding="utf-8"), folder=path.parent)).num_parameters()
    held = check("transformer_ls/tiny_released.spec", {"pipe": 2}, "microbatches = 2", 2, 0)
    assert sum(held) - whole == 256 * 16  # the table, once more


def test_uneven_stages() -> None:
    a, b = check("nemotron_h/tiny.spec", {"pipe": 2}, "microbatches = 2, layers = [1, 4]", 2, 0)
    c, d = check("nemotron_h/tiny.spec", {"pipe": 2}, "microbatches = 2, layers = [4, 1]", 2, 0)
    assert a < b and c > d and a + b == c + d


@pytest.mark.parametrize(
    ("stages", "code"),
    [
        ("microbatches = 1", "too-few-microbatches"),
        ("microbatches = 3, schedule = interleaved(chunks = 2)", "too-few-microbatches"),
        ("microbatches = 2, layers = [2, 1]", "stages-do-not-fit"),
        ("microbatches = 2, layers = [1, 1, 3]", "stages-do-not-fit"),
        ("microbatches = 2, schedule = interleaved(chunks = 3)", "stages-do-not-fit"),
        ("microbatches = 3, schedule = zero_bubble(chunks = 2)", "too-few-microbatches"),
        ("microbatches = 2, schedule = no_bubble", "unknown-name"),
        ("microbatches = 2, depth = 3", "unknown-setting"),
    ],
)
def test_stages_that_cannot_be(stages: str, code: str) -> None:
    with pytest.raises(SpecError) as caught:
        check("nemotron_h/tiny.spec", {"pipe": 2}, stages, 2, 0)
    assert caught.value.diagnostics[0].code == code


@pytest.mark.parametrize("schedule", ["interleaved(chunks = 1)", "zero_bubble"])
def test_gradients_in_bf16_are_summed_over_micro_batches_in_fp32(schedule: str) -> None:
    """The sum of what each micro-batch gives where it is alone, which is rounded; the sum is not."""
    path, batches = shipped_folder() / "llama/tiny.spec", 8
    text = path.read_text(encoding="utf-8") + text_of({"pipe": 2}, f"schedule = {schedule}, microbatches = {batches}")
    loaded = load_text(text, folder=path.parent)
    program, layout = program_of(loaded), layout_of(loaded)
    one = start(program)
    tokens = [(t,) for t in batch_of({"data": batches}, 8, 0, one.vocab, False, False, False).tokens.chunk(batches)]
    made, counts = build(program, layout=layout), {"lm": torch.tensor(100)}

    def rank(mesh: Any) -> list[float]:
        model = module_class(made.source, made.name)().to(torch.bfloat16).eval()
        model.mesh = mesh
        keep_stages(model)
        take_whole(model, one.state_dict())

        def sums(batches: list[Any]) -> dict[str, torch.Tensor]:
            optimizer = Divided(model, TrainConfig(dtype="bf16"))
            pipelined(model, batches, counts, lambda i: model._rows(batches[i][0], None, None, None), optimizer.gather)
            return {laid.path: optimizer.sums[name].double() for name, laid in optimizer.laid.items()}

        whole, parts = sums(tokens), [sums([t]) for t in tokens]
        return [float((whole[p] - sum(x[p] for x in parts)).abs().max() / whole[p].abs().max()) for p in whole]

    assert max(max(found) for found in simulate({"pipe": 2, "back": 1}, rank)) < batches * 2**-24


def test_gradients_that_wait_are_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without their second part, numbers differ: nearly all weights are in it."""
    monkeypatch.setattr(Later, "run", lambda self: None)
    with pytest.raises(AssertionError):
        check("llama/tiny.spec", {"pipe": 2}, "microbatches = 2, schedule = zero_bubble", 2, 0)


# Megatron-LM's tables (facts: arXiv 2104.04473, section 2.2; schedules.py) and, with gradients of weights apart, those
# that PyTorch's ScheduleInterleavedZeroBubble runs: ranks, chunks, parts, micro-batches, rank, order.
PUBLISHED = [
    (4, 1, 1, 6, 0, "F0 F1 F2 F3 B0 F4 B1 F5 B2 B3 B4 B5"),
    (4, 1, 1, 6, 3, "F0 B0 F1 B1 F2 B2 F3 B3 F4 B4 F5 B5"),
    (2, 2, 1, 4, 0, "F0.0 F1.0 F0.1 F1.1 F2.0 B0.1 F3.0 B1.1 F2.1 B0.0 F3.1 B1.0 B2.1 B3.1 B2.0 B3.0"),
    (2, 2, 1, 4, 1, "F0.0 F1.0 F0.1 B0.1 F1.1 B1.1 F2.0 B0.0 F3.0 B1.0 F2.1 B2.1 F3.1 B3.1 B2.0 B3.0"),
    (4, 2, 1, 8, 2, "F0.0 F1.0 F2.0 F3.0 F0.1 F1.1 F2.1 B0.1 F3.1 B1.1 F4.0 B2.1 F5.0 B3.1 F6.0 B0.0 F7.0 B1.0 F4.1 B2.0 "
                    "F5.1 B3.0 F6.1 B4.1 F7.1 B5.1 B6.1 B7.1 B4.0 B5.0 B6.0 B7.0"),
    (4, 2, 2, 8, 1, "F0.0 F1.0 F2.0 F3.0 F0.1 F1.1 F2.1 B0.1 F3.1 B1.1 W0.1 F4.0 B2.1 W1.1 F5.0 B3.1 W2.1 F6.0 B0.0 W3.1 "
                    "F7.0 B1.0 W0.0 F4.1 B2.0 W1.0 F5.1 B3.0 W2.0 F6.1 B4.1 W3.0 F7.1 B5.1 W4.1 B6.1 W5.1 B7.1 W6.1 B4.0 "
                    "W7.1 B5.0 W4.0 B6.0 W5.0 B7.0 W6.0 W7.0"),
    (4, 2, 2, 8, 3, "F0.0 F1.0 F2.0 F3.0 F0.1 B0.1 F1.1 B1.1 F2.1 B2.1 F3.1 B3.1 W0.1 F4.0 B0.0 W1.1 F5.0 B1.0 W2.1 F6.0 "
                    "B2.0 W3.1 F7.0 B3.0 W0.0 F4.1 B4.1 W1.0 F5.1 B5.1 W2.0 F6.1 B6.1 W3.0 F7.1 B7.1 W4.1 B4.0 W5.1 B5.0 "
                    "W6.1 B6.0 W7.1 B7.0 W4.0 W5.0 W6.0 W7.0"),
]  # fmt: skip


@pytest.mark.parametrize(("ranks", "chunks", "parts", "batches", "rank", "wanted"), PUBLISHED)
def test_orders_are_the_published_ones(
    ranks: int, chunks: int, parts: int, batches: int, rank: int, wanted: str
) -> None:
    found = [str(a) if chunks > 1 else f"{a.kind}{a.batch}" for a in order(rank, ranks, batches, chunks, parts)]
    assert found == wanted.split()


@given(
    ranks=st.integers(1, 6), rounds=st.integers(1, 4), chunks=st.integers(1, 4), parts=st.integers(1, 2), data=st.data()
)
def test_orders_run_everything_once_and_what_it_needs_first(
    ranks: int, rounds: int, chunks: int, parts: int, data: Any
) -> None:
    batches = ranks * rounds if chunks > 1 else data.draw(st.integers(ranks, 4 * ranks))
    kinds = "FBW"[: parts + 1]
    for rank in range(ranks):
        found = order(rank, ranks, batches, chunks, parts)
        assert sorted((a.kind, a.batch, a.chunk) for a in found) == sorted(
            (k, b, c) for k in kinds for b in range(batches) for c in range(chunks)
        )
        place = {(a.kind, a.batch, a.chunk): i for i, a in enumerate(found)}
        for b in range(batches):
            for c in range(chunks):
                assert [place[k, b, c] for k in kinds] == sorted(place[k, b, c] for k in kinds)


def time_of(ranks: int, batches: int, chunks: int, parts: int, took: dict[str, int]) -> int:
    """When the last rank has done all, where only computing takes time."""
    orders = [list(order(rank, ranks, batches, chunks, parts)) for rank in range(ranks)]
    ended: dict[tuple[str, int, int], int] = {}
    now = [0] * ranks
    while any(orders):
        before = len(ended)
        for rank, actions in enumerate(orders):
            while actions:
                kind, batch, chunk = actions[0]
                stage = rank + chunk * ranks
                needs = {"F": ("F", batch, stage - 1), "B": ("B", batch, stage + 1), "W": ("B", batch, stage)}[kind]
                if 0 <= needs[2] < ranks * chunks and needs not in ended:
                    break
                now[rank] = ended[kind, batch, stage] = max(now[rank], ended.get(needs, 0)) + took[kind]
                actions.pop(0)
        assert len(ended) > before, "the ranks wait for each other"
    return max(now)


@given(
    ranks=st.integers(1, 6), chunks=st.integers(1, 3), f=st.integers(1, 20), b=st.integers(1, 20), w=st.integers(1, 20),
    data=st.data(),
)  # fmt: skip
def test_bubbles_and_memory_are_the_published_ones(ranks: int, chunks: int, f: int, b: int, w: int, data: Any) -> None:
    """Qi et al. 2023, table 2 (ZB-H1): 1F1B waits (p - 1) (F + B + W), zero-bubble (p - 1) (F + B - W), as long as W is
    the shortest of the three, and holds what the first rank of 1F1B holds; times are those of a chunk."""
    batches = ranks * data.draw(st.integers(1, 4)) if chunks > 1 else data.draw(st.integers(ranks, 4 * ranks))
    w = min(f, b, w)
    busy = batches * chunks * (f + b + w)
    one = time_of(ranks, batches, chunks, 1, {"F": f, "B": b + w})
    two = time_of(ranks, batches, chunks, 2, {"F": f, "B": b, "W": w})
    assert one - busy == (ranks - 1) * (f + b + w)
    assert two - busy == (ranks - 1) * (f + b - w)
    most = [[held(order(r, ranks, batches, chunks, parts)) for r in range(ranks)] for parts in (1, 2)]
    assert set(most[1]) == {ranks * chunks}
    assert max(most[1]) <= max(most[0]) and (chunks > 1 or max(most[0]) == ranks)
