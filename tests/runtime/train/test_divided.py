"""What ranks step and save is what one process would: gradients summed once, parts of the optimizer, pieces of tensors
that tile each whole. All ranks are threads of this process."""

from __future__ import annotations

import json
from itertools import pairwise
from math import prod
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from heddle.dsl.layout import layout_of
from heddle.dsl.load import load_text
from heddle.runtime.check import program_of
from heddle.runtime.compile import build, instantiate
from heddle.runtime.errors import UserError
from heddle.runtime.lib.laid import laid_parameters, part
from heddle.runtime.lib.simulated import simulate
from heddle.runtime.train import TrainConfig
from heddle.runtime.train.divided import Divided
from heddle.runtime.train.laying import Box, Laying
from heddle.runtime.train.optimizer import Optimizer
from heddle.runtime.train.pieces import PLACES, Saved

SPEC = """
model tiny(vocab = 12, hidden = 6, heads = 2):
    tokens[batch, seq]: token
    embedding = embed(tokens, vocab -> hidden)
    x = embedding
    norm1 = rms_norm(x)
    x = x + attention(norm1, heads, bias = true)
    norm2 = rms_norm(x)
    x = x + mlp(norm2, 10, bias = true)
    final = rms_norm(x)
    logits = linear(final, hidden -> vocab)
    return logits

layout grid:
    mesh data = 2, tensor = 2
    shard vocab, heads, ffn over tensor
    shard batch over data

layout rows = grid with:
    mesh data = 3, tensor = 1

layout deep = grid with:
    mesh outer = 2, data = 3, tensor = 1
    shard batch over outer, data
"""
FILE = load_text(SPEC)
PROGRAM = program_of(FILE)
ONE = build(PROGRAM)
LAID = {name: build(PROGRAM, layout=layout_of(FILE, name)) for name in ("grid", "rows", "deep")}
OVER = {"grid": [(), ("data",)], "rows": [(), ("data",)], "deep": [("data",), ("outer", "data"), ("outer",)]}


def one_process(dtype: str, gradients: list[dict[str, torch.Tensor]], config: TrainConfig):
    model = instantiate(ONE, seed=3, dtype={"fp64": torch.float64, "bf16": torch.bfloat16}[dtype])
    optimizer, norms = Optimizer(model, config), []
    for step in gradients:
        for name, weight in model.named_parameters():
            weight.grad = torch.zeros_like(weight)
            for h in (h for h in optimizer.held if h.name == name):
                h.cut(weight.grad).copy_(step[h.path])
        optimizer.gather()
        optimizer.reduce()
        norms.append(float(optimizer.clip(config.clip)))
        optimizer.step(0.01)
    return model.state_dict(), optimizer.state(), norms


cases = st.sampled_from([(n, o) for n in LAID for o in OVER[n]])


@given(
    case=cases, dtype=st.sampled_from(["fp64", "bf16"]), seed=st.integers(0, 2**20), clip=st.sampled_from([0.1, 1e9])
)
@settings(max_examples=12)
def test_steps_on_a_mesh_are_steps_of_one(case, dtype, seed, clip):
    """Each rank has a part of each sum; weights, masters and moments behind three steps, and every norm. In bf16 the
    gradients are whole numbers, so that no sum is rounded."""
    name, over = case
    config = TrainConfig(clip=clip)
    source = torch.Generator().manual_seed(seed)
    sizes = LAID[name].lowered.laid.mesh
    ranks = prod(a.size for a in sizes.atoms)
    shapes = {p.name: p.shape for p in PROGRAM.parameters()}
    kind = torch.float64 if dtype == "fp64" else torch.bfloat16
    pieces = [  # [step][rank][path]: what each rank would add
        [{p: torch.randint(-4, 5, s, generator=source).to(kind) for p, s in shapes.items()} for _ in range(ranks)]
        for _ in range(3)
    ]

    def rank(mesh):
        model = instantiate(LAID[name], seed=3, dtype=kind, mesh=mesh)
        optimizer, norms = Divided(model, config, over), []
        for step in pieces:
            for laid in laid_parameters(model):
                # What a rank adds is the same on all ranks along axes over which its gradient is whole.
                shared = mesh.coordinates | {a: 0 for a in mesh.axes if a not in laid.sync}
                laid.holder.grad = part(step[mesh.along((), shared)[0]][laid.path], laid.splits, mesh).to(
                    laid.holder.dtype, copy=True
                )
            optimizer.gather()
            optimizer.reduce()
            norms.append(float(optimizer.clip(clip)))
            optimizer.step(0.01)
        laying = Laying(model)
        saved = laying.pieces((n, n, t) for n, t in laying.tensors.items()), laying.pieces(optimizer.states())
        return saved, norms, {laid.path: laid.sync for laid in laid_parameters(model)}, mesh

    found = simulate({a.name: a.size for a in sizes.atoms}, rank)
    _, _, sync, mesh = found[0]

    def whole(step, path):
        places = mesh.along(tuple(sync[path]), dict.fromkeys(mesh.axes, 0))
        return sum(step[r][path].double() for r in places).to(torch.float64 if dtype == "fp64" else torch.float32)

    wanted = one_process(dtype, [{p: whole(step, p) for p in shapes} for step in pieces], config)
    # fp32 masters: three updates of at most the rate, each with some roundings of 2^-24; moments to their own size.
    close = {"rtol": 0, "atol": 1e-10} if dtype == "fp64" else {"rtol": 1e-6, "atol": 3 * 0.01 * 8 * 2**-24}
    weights, states = (put_together([saved[i] for saved, *_ in found]) for i in (0, 1))
    assert weights.keys() == wanted[0].keys() and states.keys() == wanted[1].keys()
    for key, tensor in {**weights, **states}.items():
        if tensor.dtype == torch.bfloat16:
            assert torch.equal(tensor, states[f"master.{key}"].bfloat16()), key
        else:
            torch.testing.assert_close(tensor, {**wanted[0], **wanted[1]}[key], **close, msg=key)
    for _, norms, *_ in found:
        assert norms == pytest.approx(wanted[2], rel=1e-6 if dtype == "bf16" else 1e-12)


def put_together(saved) -> dict[str, torch.Tensor]:
    """Whole tensors from what the ranks save. AssertionError where an element is there twice, or not at all."""
    made: dict[str, torch.Tensor] = {}
    there: dict[str, torch.Tensor] = {}
    for pieces in saved:
        for key, (tensor, box) in pieces.items():
            made.setdefault(key, torch.zeros(box.whole, dtype=tensor.dtype))
            there.setdefault(key, torch.zeros(box.whole))
            place = tuple(slice(a, a + n) for a, n in zip(box.offsets, box.shape))
            made[key][place] = tensor
            there[key][place] += 1
    assert all((count == 1).all() for count in there.values())
    return made


def test_ranks_share_what_they_save():
    """Nobody writes much more than a fair part."""

    def rank(mesh):
        model = instantiate(LAID["deep"], mesh=mesh)
        optimizer = Divided(model, TrainConfig(), ("data",))
        for weight in model.parameters():
            weight.grad = torch.zeros_like(weight)
        optimizer.gather()
        optimizer.reduce()
        optimizer.step(0.1)
        return sum(p.tensor.numel() for p in Laying(model).pieces(optimizer.states()).values())

    found = simulate({a.name: a.size for a in LAID["deep"].lowered.laid.mesh.atoms}, rank)
    assert max(found) < 3 * sum(found) / len(found)


# --- pieces of files -------------------------------------------------------------------------------


@st.composite
def cut(draw):
    """A tensor, a way to cut it into a grid of pieces, and a box in it."""
    shape = tuple(draw(st.lists(st.integers(1, 7), min_size=0, max_size=3)))
    grid = [sorted({0, n, *draw(st.lists(st.integers(0, n), max_size=2))}) for n in shape]
    low = [draw(st.integers(0, n - 1)) for n in shape]
    size = [draw(st.integers(1, n - a)) for a, n in zip(low, shape)]
    return shape, grid, Box(tuple(low), tuple(size), shape), draw(st.integers(1, 3))


@given(drawn=cut())
@settings(max_examples=40)
def test_any_box_is_read_from_any_pieces(tmp_path_factory, drawn):
    shape, grid, box, files = drawn
    folder = tmp_path_factory.mktemp("pieces")
    whole = torch.arange(prod(shape), dtype=torch.float32).view(shape)
    pieces = [()]
    for marks in grid:
        pieces = [(*p, (a, b)) for p in pieces for a, b in pairwise(marks)]
    paths = []
    for i, piece in enumerate(pieces):  # a name stands once in a file
        name = folder / f"{i % max(files, len(pieces)):03d}.safetensors"
        write(name, {"x": whole[tuple(slice(a, b) for a, b in piece)]}, {"x": [a for a, _ in piece]})
        paths.append(name)
    saved = Saved(paths)
    assert saved.shape("x") == shape
    assert torch.equal(saved.get("x"), whole)
    got = saved.read({"x": box})["x"]
    assert torch.equal(got, whole[tuple(slice(a, a + n) for a, n in zip(box.offsets, box.shape))])
    if shape:
        assert torch.equal(saved.get("x", shape[0] - 1), whole[-1])


def write(path: Path, tensors: dict[str, torch.Tensor], offsets: dict[str, list[int]]) -> None:
    places = {name: {"saved_offsets": at} for name, at in offsets.items()}
    save_file({n: t.contiguous() for n, t in tensors.items()}, path, {PLACES: json.dumps(places)})


@pytest.mark.parametrize("damage", ["missing", "cut", "table"])
def test_pieces_that_are_not_whole_are_named(tmp_path, damage):
    for i in range(2):
        write(tmp_path / f"{i}.safetensors", {"x": torch.zeros(2, 3)}, {"x": [2 * i, 0]})
    paths = sorted(tmp_path.glob("*.safetensors"))
    if damage == "missing":
        paths = paths[1:]
    elif damage == "cut":
        paths[1].write_bytes(paths[1].read_bytes()[:-2])
    else:
        write(paths[1], {"x": torch.zeros(2, 3)}, {"y": [0, 0]})
        raw = paths[1].read_bytes().replace(b'\\"y\\"', b"\\\"y\\'")
        paths[1].write_bytes(raw)
    with pytest.raises(UserError) as caught:
        Saved(paths)
    assert caught.value.code == "damaged-weights"
