"""Two runs of one model: healthy ones differ by rounding, and a fault is named where it was planted."""

from __future__ import annotations

import contextlib
import json
import math
import re
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from typer.testing import CliRunner

from heddle.codegen.emit import digest
from heddle.dsl.load import load, load_text
from heddle.lowering.placement.types import Place
from heddle.runtime.bisect import watching
from heddle.runtime.bisect.command import feed_of
from heddle.runtime.bisect.finding import Comparison, Found, drawn, written
from heddle.runtime.bisect.places import dual, share, together
from heddle.runtime.bisect.rounding import MonteCarlo, arithmetic, rounded, roundoff
from heddle.runtime.bisect.show import print_found
from heddle.runtime.bisect.sides import DTYPES, sides_of
from heddle.runtime.check import program_of
from heddle.runtime.cli import app
from heddle.runtime.compile import Artifact, build, class_of, instantiate
from heddle.runtime.folder import write_spec
from heddle.runtime.lib.mesh import Mesh

HYBRID = """
use nemotron_h from "nemotron_h/nemotron_h.spec"

model small = nemotron_h(
    vocab = 32, hidden = 16, ffn = 24, heads = 4, kv_heads = 2, head_dim = 4, ssm_heads = 4, ssm_head_dim = 4, state = 4,
    groups = 2, chunk = 4, pattern = "M*-")
"""
DENSE = """
use llama from "llama/llama.spec"

model small = llama(vocab = 32, hidden = 16, ffn = 24, layers = 2, heads = 4, kv_heads = 2, head_dim = 4)
"""
LAYOUTS = """
layout grid:
    mesh data = 2, tensor = 2
    shard vocab, heads, kv_heads, ffn, groups? over tensor
    shard seq over tensor between blocks
    shard batch, parameters over data

layout rows:
    mesh data = 2
    shard batch over data

layout long:
    mesh context = 2, tensor = 2
    shard heads, kv_heads, ffn over tensor
    shard seq over context
    recompute attend

layout stages:
    mesh pipe = 2, tensor = 2
    shard heads, kv_heads, ffn over tensor
    stages over pipe, schedule = zero_bubble, microbatches = 2
"""


class Pair:
    """A spec, two sides by their words, and what both read."""

    def __init__(self, text: str, a: str, b: str) -> None:
        file = load_text(text + LAYOUTS)
        self.program = program_of(file)
        self.sides = sides_of(a, b, file)
        self.made = tuple(written(self.program, side) for side in self.sides)
        one = build(self.program)
        self.feed = feed_of(self.program, class_of(one), one.lowered, 2, 8, seed=3)
        weights = drawn(self.program, 3)
        self.compared = Comparison(self.program, self.sides, self.made, self.feed, (weights, weights))

    def found(self, second: Artifact | None = None) -> Found:
        """What is found, with another module for the second side."""
        return self.compared.found(second)

    def in_kernel(self, kernel: str, old: str, new: str) -> Found:
        """The same with another text in a kernel's file, where this one stands first."""
        files = self.made[1].files
        assert old in files.kernels[kernel] and old != new
        texts = {**files.kernels, kernel: files.kernels[kernel].replace(old, new, 1)}
        name = f"small-{digest(*texts.values())}"  # Triton reads a kernel's text where its file is said to be
        return self.found(replace(self.made[1], name=name, files=replace(files, kernels=texts)))

    def planted(self, old: str, new: str, head: str = "", count: int | None = 1) -> Found:
        """The same with a fault: another text where the second side's module has this one, `count` times."""
        text = self.made[1].source
        assert text.count(old) == count or (count is None and old in text), f"`{old}` stands {text.count(old)} times"
        text = text.replace(old, new).replace("\nimport torch\n", f"\nimport torch\n{head}\n", 1)
        return self.found(replace(self.made[1], files=replace(self.made[1].files, model=text)))


@cache
def pair(text: str, a: str, b: str) -> Pair:
    return Pair(text, a, b)


# --- healthy pairs --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "a", "b", "values"),
    [
        (HYBRID, "fp32", "fp64", 25),
        (HYBRID, "bf16", "fp16", 25),
        (HYBRID, "fp64", "layout=grid", 24),
        (HYBRID, "layout=long,fp32", "layout=stages,bf16", 24),
    ],
)
def test_healthy_runs_differ_by_rounding(text: str, a: str, b: str, values: int) -> None:
    found = pair(text, a, b).found()
    assert found.equal and found.first is None
    assert len(found.values) >= values and len(found.gradients) > 2 * values
    assert sum(r.difference > 0 for r in found.gradients) > values  # they do differ


def test_a_model_that_nothing_trains_is_compared_by_its_result() -> None:
    text = """
model plain(vocab = 16, hidden = 8):
    words[batch, seq]: token
    x = embed(words, vocab -> hidden)
    return linear(gelu(rms_norm(x)), hidden -> 4)
"""
    made = pair(text, "bf16", "layout=rows")
    assert not made.program.objectives
    found = made.found()
    assert found.equal and len(found.values) == 5 and len(found.gradients) >= 5
    first = made.planted(
        "lib.rms_norm(x, self.rms_norm.weight, 1e-05", "lib.rms_norm(x, self.rms_norm.weight, 0.5"
    ).first
    assert first is not None and first.op == "rms_norm"


# --- planted faults -------------------------------------------------------------------------------------

WRONG = """
class Wrong(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return 1.001 * grad
"""
TEXTS = {
    # what is wrong -> (sides, old text, new text, where it is named, of which gradient)
    "eps": ("fp32", "self.final = lib.RmsNorm((16,), eps=1e-05)", "self.final = lib.RmsNorm((16,), eps=1e-03)", "final", None),
    "scale": ("fp32", "scale=0.5", "scale=0.25", "layer.1.attention.o", None),
    "mask": ("fp32", "(k, v, CAUSAL)", "(k, v, lib.Mask(None, behind=None, ahead=None))", "layer.1.attention.o", None),
    "no residual": ("bf16", "lambda: x + attention", "lambda: attention + 0 * x", "layer.1.x_2", None),
    "other gate": ("bf16", "lib.silu_mul(y, z)", "y * torch.sigmoid(z)", "layer.0.mamba2.mul", None),
    "backward only": ("fp32", "lambda: self.norm(mul)", "lambda: self.norm(Wrong.apply(mul))", "layer.0.mamba2.norm", "layer.0.mamba2.mul"),
    "no gradient": ("fp32", "lambda: lib.relu2(up)", "lambda: lib.relu2(up.detach())", "layer.2.mlp.relu2", "layer.2.mlp.up"),
    "half a gradient": ("fp32", "lib.ssd(uc, ", "lib.ssd(uc.detach(), ", "layer.0.mamba2.y", "layer.0.mamba2.silu(uc)"),
}  # fmt: skip


@pytest.mark.parametrize("what", TEXTS)
def test_a_fault_in_a_module_is_named(what: str) -> None:
    dtype, old, new, where, of = TEXTS[what]
    found = pair(HYBRID, "fp64", dtype).planted(old, new, WRONG)
    first = found.first
    assert first is not None and not found.equal
    assert (str(first.key), None if first.of is None else str(first.of)) == (where, of)
    assert first.errors[1] > 100 * first.errors[0] and first.spec.count(".spec:") == 1
    forward = [r for r in found.values if r.share > 1]
    assert forward == ([] if of else [first])  # it is not carried on


def test_a_gradient_that_ranks_do_not_sum_is_named_backward() -> None:
    """I -> R is nothing in the forward pass, and a sum in the backward pass."""
    made = pair(DENSE, "fp64", "layout=long")
    convert = re.search(r"spmd\.convert\((\w+), [^\n]*src=I, dst=R\)", made.made[1].source)
    assert convert is not None
    found = made.planted(convert[0], convert[1], count=None)
    assert all(r.share <= 1 for r in found.values)
    assert found.first is not None and found.first.of is not None


def test_a_sum_over_ranks_that_is_not_made_is_named_where_it_is_read() -> None:
    made = pair(DENSE, "fp64", "layout=long")
    call = re.search(r"spmd\.all_reduce\((\w+), [^\n]*src=P, dst=[IR]\)", made.made[1].source)
    assert call is not None
    found = made.planted(call[0], call[1], count=None)
    assert found.first is not None and found.first.of is None and found.first.op == "add", found.first


def test_a_loss_that_ranks_sum_twice_is_named() -> None:
    """Nothing in the module reads it, but a training step does, which sums it over the ranks that have parts of it."""
    made = pair(DENSE, "fp64", "layout=long")
    twice = """return {"lm": spmd.all_reduce(lm, at.mesh["context"], src=P, dst=I)}"""
    first = made.planted('return {"lm": lm}', twice).first
    assert first is not None and (str(first.key), first.of) == ("the loss lm", None)


# --- any use ------------------------------------------------------------------------------------------------


class _Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, there: float, back: float) -> torch.Tensor:
        ctx.back = back
        return x * there

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return grad * ctx.back, None, None


@settings(max_examples=8)
@given(st.data(), st.booleans())
def test_any_use_that_is_wrong_is_named(data: st.DataObject, forward: bool) -> None:
    """One use of one side gives 1 % more, or hands on 1 % more of a gradient: exactly that is named."""
    made = pair(HYBRID, "fp32", "fp64")
    lowered = made.made[1].lowered
    uses = sorted({(r.key, made_by(lowered, r.key)) for r in made_rows(made, forward)})
    key, (graph, node) = data.draw(st.sampled_from(uses))
    plain = watching._use

    def use(g: str, n: str, run: Any, operands: Any) -> Any:
        watch = watching._here.watch
        if watch is None or watch.program is not lowered or (g, n) != (graph, node) or watch._blocks[-1][0] != key.path:
            return plain(g, n, run, operands)
        there, back = (1.01, 1.0) if forward else (1.0, 1.01)

        def wrong() -> Any:
            got = run()
            many = isinstance(got, tuple)
            scaled = tuple(_Scaled.apply(x, there, back) for x in (got if many else (got,)))
            return scaled if many else scaled[0]

        return plain(g, n, wrong, operands)

    watching._use = use
    try:
        found = made.found(made.made[1])
    finally:
        watching._use = plain
    first = found.first
    assert first is not None and made_by(lowered, first.key) == (graph, node) and first.key.path == key.path
    assert (first.of is None) == forward


def made_by(lowered: Any, key: watching.Key) -> tuple[str, str]:
    """The graph and node that a value of a run is made by."""
    for name in [key.root] if key.root else blocks_at(lowered, key.path):
        for node in lowered.graphs[name].nodes:
            if any(watching.called(node, r.name) == key.value for r in node.results):
                return name, node.name
    raise AssertionError(key)


def blocks_at(lowered: Any, path: str) -> tuple[str, ...]:
    """The graphs of the block at a path."""
    here, loop = lowered.model, None
    for segment in path.split("."):
        loop = loop if segment.isdigit() else here.instance(segment)
        names = (
            loop.bodies
            if loop.schedule is None
            else (loop.bodies[loop.schedule[int(segment)]],)
            if segment.isdigit()
            else ()
        )
        here = lowered.graphs[names[0]] if names else here
    return names


@cache
def made_rows(made: Pair, forward: bool) -> tuple[Any, ...]:
    found = made.found()
    rows = found.values if forward else found.gradients
    real = made.compared.oracle.made
    return tuple(
        r for r in rows if r.size > 0 and real[r.key].is_floating_point() and not r.key.value.startswith("the ")
    )


# --- kernels --------------------------------------------------------------------------------------------


def test_kernels_are_compared_at_what_they_give() -> None:
    """A target with kernels is one more way to write a module; what is one kernel there is one here, too."""
    made = pair(DENSE.replace("layers = 2", "layers = 1"), "cpu", "triton")
    assert [side.dtype for side in made.sides] == ["fp32", "fp32"]
    found = made.found()
    assert found.equal and len(found.values) > 12 and len(found.gradients) > 24
    files = made.made[1].files
    assert files.kernels and "use_chain" in files.model


def test_gradients_that_are_parts_of_one_tensor_are_read_where_they_are() -> None:
    """As the kernel of a scan gives those of its A_log, D and dt_bias."""
    assert pair(HYBRID.replace("M*-", "M"), "cpu", "triton").found().equal


KERNELS = {
    # what is wrong -> (kernel, old text, new text, where it is named, of which gradient)
    "eps": ("add_rms_norm", "rstd = tl.rsqrt(s1 / C + 1e-05)", "rstd = tl.rsqrt(s1 / C + 1e-03)", "layer.0.norm2", None),
    "scale": ("attend", "(scale * 1.4426950408889634)", "scale", "layer.0.attention.o", None),
    "a key too many": ("attend", "offs_n[None, :] < high[:, None]", "offs_n[None, :] <= high[:, None]", "layer.0.attention.o", None),
    "backward only": ("add_rms_norm", " - x_2 * s4[:, None]", "", "layer.0.norm2", "embedding"),
    "gradient of a weight": ("add_rms_norm", "d_weight_acc += d_norm2 * (x_2 * s2[:, None])", "d_weight_acc += d_norm2 * x_2", "layer.0.norm2", "layer.0.norm2.weight"),
}  # fmt: skip


@pytest.mark.parametrize("what", KERNELS)
def test_a_fault_in_a_kernel_is_named(what: str) -> None:
    kernel, old, new, where, of = KERNELS[what]
    first = pair(DENSE.replace("layers = 2", "layers = 1"), "cpu", "triton").in_kernel(kernel, old, new).first
    assert first is not None and first.errors[1] > 100 * first.errors[0]
    assert (str(first.key), None if first.of is None else str(first.of)) == (where, of)


# --- parts ----------------------------------------------------------------------------------------------


@given(st.data())
def test_what_ranks_have_of_a_value_is_the_value_together(data: st.DataObject) -> None:
    """Each rank's share of it, put together again, and at each set of ranks that has all of it."""
    axes = {"a": 2, "b": 3}
    dims = data.draw(st.lists(st.sampled_from(("a", "b", None)), min_size=1, max_size=3))
    splits = tuple((d,) if d is not None and d not in dims[:i] else () for i, d in enumerate(dims))
    held = {a for atoms in splits for a in atoms}
    letters = tuple((a, data.draw(st.sampled_from("RIPN"))) for a in axes if a not in held)
    place = Place(splits, letters)
    whole = torch.randn([6] * len(dims), dtype=torch.float64)
    for at in (place, dual(place)) if place.has_gradient else (place,):
        assert at is not None
        parts = [share(whole, at, Mesh(dict(axes), rank)) for rank in range(6)]
        sets = together(parts, at, axes)
        assert all(torch.equal(x, whole) for x in sets)
        assert len(sets) == math.prod(axes[a] for a, letter in at.letters if letter != "P")
    assert (dual(place) is None) == any(letter == "N" for _, letter in letters)


@given(
    st.lists(st.sampled_from(sorted(DTYPES)), min_size=1, max_size=3),
    st.integers(0, 2**31),
    st.sampled_from((1e-9, 1.0, 1e5)),
)
def test_what_is_given_is_held_by_all_dtypes(names: list[str], seed: int, scale: float) -> None:
    dtypes = [DTYPES[n] for n in names]
    x = torch.randn(64, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale
    y = rounded(x, dtypes)
    assert y.dtype == torch.float64 and y.isfinite().all()
    assert all(torch.equal(y.to(d).double(), y) for d in dtypes)
    widest = max(roundoff(d) for d in dtypes)
    inside = x.abs() < min(torch.finfo(d).max for d in dtypes)
    small = max(float(torch.finfo(d).tiny) for d in dtypes)
    assert ((y - x).abs() <= 2 * widest * (x.abs() + small))[inside].all()


@given(st.sampled_from(("fp32", "bf16", "fp16")), st.integers(0, 2**31), st.integers(1, 40))
def test_roundings_of_a_dtype_are_of_its_size(name: str, seed: int, terms: int) -> None:
    """A product in the dtype is off by as much as the drawn roundings move the product in fp64."""
    kind, source = arithmetic(DTYPES[name], False), torch.Generator().manual_seed(seed)
    a, b = (rounded(torch.randn(8, terms, generator=source, dtype=torch.float64), [kind.dtype]) for _ in range(2))
    exact = a @ b.T
    moved = []
    for i in range(2):
        with MonteCarlo(kind, i):
            moved.append(float((a @ b.T - exact).abs().max()))
    real = float(((a.to(kind.dtype) @ b.to(kind.dtype).T).double() - exact).abs().max())
    assert real <= 4 * max(moved) and max(moved) <= 100 * kind.roundoff * float(exact.abs().max())
    with MonteCarlo(kind, 0):
        assert torch.equal(a.reshape(-1).sort().values, a.flatten().sort().values)  # what moves numbers rounds none


# --- the command ----------------------------------------------------------------------------------------


def run(folder: Path, *words: str) -> tuple[int, str]:
    with contextlib.chdir(folder):
        result = CliRunner().invoke(app, ["bisect", *words])
    return result.exit_code, result.output


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("bisect")
    (made / "small.spec").write_text(DENSE.replace("layers = 2", "layers = 1") + LAYOUTS)
    (made / "text.txt").write_text("".join(map(chr, range(1, 32))) * 8)
    return made


def test_the_command_says_that_nothing_differs(folder: Path) -> None:
    code, said = run(folder, "small.spec", "cpu", "bf16", "--seq", "8", "--data", "text.txt", "--json")
    found = json.loads(said)
    assert code == 0 and found["equal"] and found["first"] is None and found["tokens"] == [2, 8]
    assert found["a"] == found["b"] == "cpu,bf16" and 0 < len(found["before"]) <= 5 or found["before"] == []


def test_weights_that_differ_are_named(folder: Path) -> None:
    """Two folders: one weight of one has moved. The use of an op that reads it is the first that differs."""
    file = load(folder / "small.spec")
    model = instantiate(build(program_of(file)), seed=0)
    for name in ("one", "two"):
        (folder / name).mkdir(exist_ok=True)
        write_spec(folder / name, file, "small")
        save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / name / "model.safetensors")
        with torch.no_grad():
            model.get_parameter("layer.0.gated_mlp.out.weight").mul_(1.01)
    code, said = run(folder, "small.spec", "weights=one", "weights=two", "--seq", "8")
    assert code == 1 and "weights differ: 1, the first is `layer.0.gated_mlp.out.weight`" in said
    assert "first difference: `layer.0.gated_mlp.out` (linear)\n  std/blocks.spec:" in said
    assert run(folder, "small.spec", "weights=one", "weights=two", "--seq", "8", "--quiet") == (1, "")


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["bf16,fp32", "cpu"], "unknown-side", "`bf16,fp32` says two things for its dtype"),
        (["triton,fp64", "cpu"], "unknown-side", "kernels compute in fp32 at most"),
        (["cpu", "layot=grid"], "unknown-side", "`layout` is one"),
        (["cpu", "layout=gird"], "unknown-name", "grid"),
        (["cpu", "layout=grid", "--rows", "3"], "uneven-batch", "--rows 2 or 4 does"),
        (["cpu", "layout=long", "--seq", "7"], "uneven-batch", "--seq 6 or 8 does"),
        (["cpu", "fp32", "--data", "text.txt", "--seq", "200"], "no-data", "are read"),
        (["cpu", "weights=nowhere"], "no-such-file", "nowhere"),
    ],
)
def test_what_is_wrong_is_said(folder: Path, words: list[str], code: str, said: str) -> None:
    ended, output = run(folder, "small.spec", *words)
    assert ended == 2 and f"error[{code}]" in output and said in output


def test_what_is_said_in_text(capsys: pytest.CaptureFixture[str]) -> None:
    row = {"value": "x", "op": "add", "spec": "a.spec:1  x = y", "gradient_of": "y", "difference": None, "allowed": 1.0,
           "size": 1.0, "a_error": 0.0, "b_error": None, "carried": None}  # fmt: skip
    found = {"model": "m", "a": "cpu", "b": "triton", "tokens": [2, 8], "equal": False, "values": 1, "gradients": 1,
             "weights": {"count": 0}, "left_out": ["z"], "first": row, "before": [{**row, "difference": 0.25}]}  # fmt: skip
    print_found(found)
    said = capsys.readouterr().out
    assert "first difference: the gradient of `y` by `x` (add)\n  a.spec:1  x = y\n  A - B     no number" in said
    assert "not compared: 1 values" in said and "as `z`" in said
    assert re.search(r"2.5e-01 +1.0e\+00 +25%  the gradient of `y`", said)
