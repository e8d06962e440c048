"""The kernels of causal convolutions against fp64 math: forward, every gradient, packed documents, and decoding."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from heddle.codegen.kernels import render
from heddle.lowering.ops.causal_conv.reference import window
from heddle.lowering.ops.causal_conv.triton import MOST_TAPS, Facts
from heddle.runtime import lib

from . import harness

ROWS = 3
FACTS = (
    Facts((17, 3), 4, bias=True, act="silu", block_c=32, rows=ROWS, back_rows=ROWS + 1),
    Facts((17,), 4, act="silu", block_c=16, rows=ROWS, back_rows=ROWS),
    Facts((3, 2), 2, bias=True, rows=ROWS + 1, back_rows=1),
    Facts((3,), 1, bias=True, act="silu", rows=ROWS, back_rows=ROWS),
    Facts((1,), 7, rows=ROWS, back_rows=2 * ROWS),
)
MOST = 2 * ROWS + 1


def text(facts: Facts) -> str:
    return render("causal_conv", {"name": "conv", **facts.rendered()})


def load(facts: Facts) -> ModuleType:
    return harness.load(text(facts))


class Case(NamedTuple):
    """x [B, before + T, C], weight [C, taps], bias [C] or None, since [B, T] or None, and gradients of y [B, T, C]."""

    facts: Facts
    x: Tensor
    weight: Tensor
    bias: Tensor | None
    since: Tensor | None
    before: int
    dy: Tensor

    def leaves(self, dtype: torch.dtype) -> list[Tensor]:
        given = [t for t in (self.x, self.weight, self.bias) if t is not None]
        return [t.detach().to(dtype).requires_grad_() for t in given]


def since_of(lengths: tuple[int, ...], back: int) -> Tensor:
    """Rows since the start of each row's document; the first began `back` rows before."""
    found = [torch.arange(n) for n in lengths]
    if found:
        found[0] = found[0] + back
    return torch.cat([torch.zeros(0, dtype=torch.long), *found])


@st.composite
def cases(draw: st.DrawFn, facts: Facts | None = None, most: int = MOST) -> Case:
    facts = draw(st.sampled_from(FACTS)) if facts is None else facts
    batch, rows, dtype = draw(st.integers(0, 2)), draw(harness.sizes(ROWS, most)), draw(harness.dtypes())
    before = draw(st.sampled_from((0, 0, facts.taps - 1, 2)))
    channels, seed, scale = sum(facts.widths), draw(harness.seeds()), draw(harness.scales())
    lay = st.sampled_from(harness.LAYOUTS)
    x = harness.laid(harness.values((batch, before + rows, channels), dtype, seed, scale), draw(lay))
    weight = harness.values((channels, facts.taps), dtype, seed + 1)
    bias = harness.values((channels,), dtype, seed + 2) if facts.bias else None
    dy = harness.values((batch, rows, channels), dtype, seed + 3)
    since = None
    if draw(st.booleans()):
        packed = [since_of(draw(harness.documents(rows)), draw(st.integers(0, before))) for _ in range(batch)]
        since = torch.stack(packed) if packed else torch.zeros(0, rows, dtype=torch.long)
    return Case(facts, x, weight, bias, since, before, dy)


def expected(case: Case, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """y [B, T, C] by the reference of the room, document by document."""
    rows = []
    for b in range(len(x)):
        since = torch.arange(case.before, x.shape[1]) if case.since is None else case.since[b]
        t = 0
        while t < len(since):
            # A document's rows; those before it that it may read.
            end = next((e for e in range(t + 1, len(since)) if since[e] == 0), len(since))
            first = case.before + t
            told = x[b, first - min(int(since[t]), first) : first]
            rows.append(window(told, x[b, first : case.before + end], weight, bias))
            t = end
    y = torch.cat(rows) if rows else x.new_zeros(0, x.shape[2])
    if case.facts.act:
        y = torch.nn.functional.silu(y)
    return y.view(len(x), -1, x.shape[2]) if y.numel() else x.new_zeros(case.dy.shape)


def gradients(case: Case, run: Callable[..., Tensor], dtype: torch.dtype, dy: Tensor) -> tuple[Tensor, list[Tensor]]:
    leaves = case.leaves(dtype)
    y = run(*leaves)
    if not y.numel():
        return y, [torch.zeros_like(leaf) for leaf in leaves]
    return y, list(torch.autograd.grad(y, leaves, dy.to(dtype), allow_unused=True, materialize_grads=True))


def run_kernel(module: ModuleType, case: Case) -> tuple[Tensor, list[Tensor]]:
    """y and the gradients of x, weight [C, taps] and bias, of memory that was poisoned first."""

    def run(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, ...]:
        return module.conv(x, weight.T, bias, case.since, case.before)

    with harness.poisoned():
        leaves = [x.detach().requires_grad_() for x in (case.x, case.weight, case.bias) if x is not None]
        parts = run(*leaves)
        # Each part's gradient has NaN around it: what is read of rows that are not there must show.
        slopes = [harness.laid(dy, "contiguous") for dy in case.dy.split([y.shape[-1] for y in parts], -1)]
        return torch.cat(parts, -1), list(torch.autograd.grad(parts, leaves, slopes))


def floors(case: Case) -> tuple[Tensor, list[Tensor]]:
    """What roundings may cost, from magnitudes: y, then x, weight and bias. With g = dy act'(s), |act''| <= 1/2:

    s loses u (taps + 1) (|bias| + sum |w x|), silu and its derivative a few u more; sums of gradients add as they go.
    """
    u, taps, dtype = harness.roundoff(torch.float32), case.facts.taps, case.x.dtype
    x, weight, *bias = (t.detach().abs() for t in case.leaves(torch.float64))
    linear = case._replace(facts=replace(case.facts, act=None))
    size = expected(linear, x, weight, *bias)
    lost = u * (taps + 1) * size
    y = expected(case, *(t.detach() for t in case.leaves(torch.float64)))
    dy = case.dy.double().abs()
    lost_g = dy * (lost / 2 + 8 * u) if case.facts.act else torch.zeros_like(dy)
    steps = case.x.shape[0] * case.x.shape[1] + taps + 3
    # Magnitudes go through the same linear maps.
    leaves = [t.requires_grad_() for t in (x, weight, *bias)]
    spread = expected(linear, *leaves)
    found = [torch.zeros_like(leaf) for leaf in leaves]
    if spread.numel():
        upper = lost_g + u * steps * 1.2 * dy
        found = torch.autograd.grad(spread, leaves, upper, allow_unused=True, materialize_grads=True)
    _, grads = gradients(case, lambda *given: expected(case, *given), torch.float64, case.dy)
    own = lost * 1.1 + 8 * u * y.abs() if case.facts.act else lost
    return harness.floor(y, dtype, 0, own), [harness.floor(g, dtype, 0, f) for g, f in zip(grads, found, strict=True)]


def check(module: ModuleType, case: Case) -> float:
    """The worst share of the error that is allowed. Raises AssertionError."""

    def math(*given: Tensor) -> Tensor:
        return expected(case, *given)

    want, want_grads = gradients(case, math, torch.float64, case.dy)
    eager, eager_grads = gradients(case, math, case.x.dtype, case.dy)
    got, got_grads = run_kernel(module, case)
    floor, floor_grads = floors(case)
    shares = [harness.worst(got, want, eager, floor, "y")]
    for name, *each in zip(("dx", "dweight", "dbias"), got_grads, want_grads, eager_grads, floor_grads):
        shares.append(harness.worst(*each, name))
    return max(shares)


@settings(max_examples=14)
@given(case=cases())
def test_it_is_the_reference_and_so_are_gradients(case: Case) -> None:
    check(load(case.facts), case)


# --- laws that need no reference --------------------------------------------------------------------------------------


def one(
    facts: Facts, rows: int, lengths: tuple[int, ...] | None, batch: int = 1, before: int = 0, back: int = 0, seed: int = 5
) -> Case:
    channels = sum(facts.widths)
    x, dy = (harness.values((batch, n, channels), torch.float32, seed + i) for i, n in enumerate((before + rows, rows)))
    weight = harness.values((channels, facts.taps), torch.float32, seed + 2)
    bias = harness.values((channels,), torch.float32, seed + 3) if facts.bias else None
    since = None if lengths is None else since_of(lengths, back).expand(batch, rows)
    return Case(facts, x, weight, bias, since, before, dy)


@settings(max_examples=2)
@given(cut=st.integers(1, 4), first=st.booleans())
def test_another_document_and_a_batch_row_change_no_bit(cut: int, first: bool) -> None:
    facts = FACTS[1]
    case = one(facts, 5, (cut, 5 - cut), batch=2)
    y, (dx, *_) = run_kernel(load(facts), case)
    changed, kept = slice(0, cut), slice(cut, 5)
    if not first:
        changed, kept = kept, changed
    x, dy = case.x.clone(), case.dy.clone()
    x[:, changed], dy[:, changed] = float("nan"), float("inf")
    other, (dx_other, *_) = run_kernel(load(facts), case._replace(x=x, dy=dy))
    assert torch.equal(y[:, kept], other[:, kept]) and torch.equal(dx[:, kept], dx_other[:, kept])
    swapped = case._replace(x=case.x.flip(0), dy=case.dy.flip(0))
    other, (dx_other, *_) = run_kernel(load(facts), swapped)
    assert torch.equal(y.flip(0), other) and torch.equal(dx.flip(0), dx_other)


@settings(max_examples=2)
@given(cut=st.integers(1, 4))
def test_the_future_changes_no_bit_and_rows_behind_others_are_those_of_the_whole(cut: int) -> None:
    facts = FACTS[0]
    case = one(facts, 5, None)
    y, _ = run_kernel(load(facts), case)
    x = case.x.clone()
    x[:, cut:] = float("nan")
    assert torch.equal(run_kernel(load(facts), case._replace(x=x))[0][:, :cut], y[:, :cut])
    behind = case._replace(before=cut, dy=case.dy[:, cut:])
    assert torch.equal(run_kernel(load(facts), behind)[0], y[:, cut:])


@pytest.mark.parametrize("facts", [FACTS[0], FACTS[2], FACTS[4]])
def test_steps_with_a_window_are_the_whole(facts: Facts) -> None:
    case, module = one(facts, 5, None, batch=2), load(facts)
    whole, _ = run_kernel(module, case)
    kept = torch.zeros(2, facts.taps - 1, sum(facts.widths))
    for t in range(5):
        with harness.poisoned():
            y = module.conv(case.x[:, t : t + 1], case.weight.T, case.bias, window=kept)
        assert torch.equal(torch.cat(y, -1), whole[:, t : t + 1])
        rows = torch.cat((torch.zeros_like(kept), case.x[:, : t + 1]), 1)
        assert torch.equal(kept, rows[:, rows.shape[1] - facts.taps + 1 :])


# --- faults, registration, text ---------------------------------------------------------------------------------------

FAULTS = {
    "a document is one row too long": harness.Fault("x2 = tl.where(since0 >= 2", "x2 = tl.where(since0 >= 1"),
    "documents are not told apart": harness.Fault("x1 = tl.where(since0 >= 1, x1, 0.0)", "x1 = x1"),
    "a gradient reaches another document": harness.Fault("dx0 + tl.where(since0 >= 1, w1 * g, 0.0)", "dx0 + w1 * g"),
    "the window forgets a row": harness.Fault("        x3 = x2\n", "        x3 = x1\n"),
    "the window is stale behind a run": harness.Fault("x1 = tl.load(x_ptr - 1 * stride_xt", "x1 = tl.load(x_ptr - 2 * stride_xt"),
    "taps the other way round": harness.Fault("w0 = tl.load(w_ptr + 3 *", "w0 = tl.load(w_ptr + 0 *"),
    "no bias": harness.Fault("s = bias + w0 * x0", "s = w0 * x0"),
    "no activation": harness.Fault("s / (1.0 + tl.exp(-s))", "s"),
    "the slope of another function": harness.Fault("(1.0 + s * (1.0 - p))", "(1.0 - s * (1.0 - p))"),
    "the gradient stops at the run": harness.Fault("end + 3, num", "end, num"),
    "rows of the next run are counted twice": harness.Fault("g = tl.where(row < end, g, 0.0)", "g = g"),
    "the last column is left out": harness.Fault("mask_c = cols < width", "mask_c = cols < width - 1"),
    "the second part is the first": harness.Fault("first, width, before_part = 17, 3,", "first, width, before_part = 0, 3,"),
    "rows before the first have results": harness.Fault("has_result = (row >= before) &", "has_result = (row >= 0) &"),
    "one row too few in a run": harness.Fault("end = tl.minimum(start + ROWS, all_rows)", "end = tl.minimum(start + ROWS, all_rows - 1)"),
}  # fmt: skip


def test_every_planted_fault_is_found() -> None:
    facts = FACTS[0]

    def checks(module: ModuleType) -> None:
        for case in (one(facts, 5, (4, 1)), one(facts, 3, (2, 1), before=3, back=1)):
            check(module, case)

    assert harness.survivors(text(facts), FAULTS, checks) == []


def test_a_stale_window_is_found() -> None:
    facts = FACTS[0]
    module = harness.load(harness.plant(text(facts), "tl.store(window_ptr + 2 * 20, x0", "tl.store(window_ptr + 2 * 20, x1"))
    case, kept = one(facts, 2, None), torch.zeros(1, 3, 20)
    y = [torch.cat(module.conv(case.x[:, t : t + 1], case.weight.T, case.bias, window=kept), -1) for t in range(2)]
    assert not torch.equal(torch.cat(y, 1), run_kernel(load(facts), case)[0])


def test_rows_are_numbered_in_64_bits() -> None:
    for line in ("b, start = (run // runs).to(tl.int64)", "start.to(tl.int64) * stride_xt", "run.to(tl.int64) *"):
        assert line in text(FACTS[0])


def test_its_ops_are_ops_of_torch() -> None:
    module, case = load(FACTS[0]), one(FACTS[0], 2, (1, 1))
    x, weight, bias = (t.requires_grad_() for t in (case.x, case.weight.T.contiguous(), case.bias))
    torch.library.opcheck(module.conv_fwd, (x, weight, bias, case.since, 0))
    parts = [torch.zeros(1, 1, width) for width in FACTS[0].widths]
    kept = torch.zeros(1, 3, 20)
    torch.library.opcheck(module.conv_step, (x.detach()[:, :1], weight.detach(), bias.detach(), kept, parts))

    def loss(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return sum(y.square().sum() for y in module.conv(x, weight, bias, case.since))

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    ours, theirs = (torch.autograd.grad(f(x, weight, bias), (x, weight, bias)) for f in (compiled, loss))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs))


def test_same_facts_same_bytes(golden: Callable[[str, str], None]) -> None:
    made = text(Facts((8192, 1024, 1024), 4, bias=True, act="silu"))
    assert made == text(Facts((8192, 1024, 1024), 4, bias=True, act="silu"))
    harness.stable(made)
    golden("causal_conv", made)


# --- in the library ---------------------------------------------------------------------------------------------------


def layer(facts: Facts) -> lib.ParallelConv:
    made = lib.ParallelConv({f"p{i}": (w,) for i, w in enumerate(facts.widths)}, facts.taps, facts.bias)
    lib.initialise(made, {f"p{i}.{kind}": ("normal", 1) for i in range(len(facts.widths)) for kind in ("weight", "bias")})
    return made


@settings(max_examples=4)
@given(data=st.data(), rows=st.integers(1, 5))
def test_a_layer_with_its_kernel_is_the_layer(data: st.DataObject, rows: int) -> None:
    facts = FACTS[0]
    made, kernel = layer(facts), load(facts).conv
    x = harness.values((2, rows, 20), torch.float32, 3)
    more: dict[str, Any] = {}
    if data.draw(st.booleans()):
        more["document"] = torch.stack([since_of(data.draw(harness.documents(rows)), 0).eq(0).cumsum(0) for _ in range(2)])
    if data.draw(st.booleans()):
        more["valid"] = torch.arange(rows) < torch.tensor([[rows], [data.draw(st.integers(0, rows))]])
        x = torch.where(more["valid"][..., None], x, float("nan"))
    results = []
    for made_by in (None, kernel):
        leaf = x.clone().requires_grad_()
        y = torch.cat(made(leaf, lib.At((2, rows), **more), act="silu", kernel=made_by), -1)
        wrt = [leaf, *made.parameters()]
        results.append([y, *torch.autograd.grad(y, wrt, harness.values(y.shape, torch.float32, 4))])
    for a, b in zip(*results):
        assert (a - b).abs().max() <= 1e-5 * b.abs().max()


class Toy(lib.Model):
    """A convolution of embedded tokens, for a stream."""

    vocab = 9

    def __init__(self, facts: Facts) -> None:
        super().__init__()
        self.embedding, self.conv, self.facts = lib.Embed(9, (sum(facts.widths),)), layer(facts), facts
        self.kernel: Any = None

    def slots(self, stream: Any) -> lib.Slots:
        return lib.Slots(conv=stream.window(channels=sum(self.facts.widths), taps=self.facts.taps))

    def run(self, tokens: Tensor, at: Any, state: Any) -> Tensor:
        return torch.cat(self.conv(self.embedding(tokens), at, past=state.conv, act="silu", kernel=self.kernel), -1)


@pytest.mark.parametrize("rollback", [0, 2])
def test_a_stream_with_the_kernel_is_the_whole_sequence(rollback: int) -> None:
    facts = FACTS[0]
    model = Toy(facts)
    lib.initialise(model.embedding, {"weight": ("normal", 1)})
    tokens = torch.randint(0, 9, (2, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        whole = model(tokens)
    model.kernel = load(facts).conv
    told: list[str] = []
    from heddle.runtime.lib import kernels

    stream, found = model.stream(2, 20, rollback=rollback), []
    for first, end in ((0, 4), (4, 5), (5, 6), (6, 9)):
        with kernels.launches() as launched:
            found.append(model.decode(tokens[:, first:end], stream))
        told += [launch.kernel.__name__ for launch in launched]
    assert (torch.cat(found, 1) - whole).abs().max() <= 1e-5 * whole.abs().max()
    step = "conv_fwd_kernel" if rollback else "conv_step_kernel"
    assert told == ["conv_fwd_kernel", step, step, "conv_fwd_kernel"]
    counted = model.stream(2, 20, rollback=rollback)
    ragged = model.decode(tokens[:, :4], counted, count=torch.tensor([4, 2]))
    rest = model.decode(torch.stack((tokens[0, 4:7], tokens[1, 2:5])), counted)
    assert (ragged[0] - whole[0, :4]).abs().max() <= 1e-5 * whole.abs().max()
    assert (rest[1] - whole[1, 2:5]).abs().max() <= 1e-5 * whole.abs().max()


def test_behind_a_halo_the_kernel_is_the_same() -> None:
    facts = replace(FACTS[1], widths=(6,), bias=True)
    x, before = (harness.values((2, n, 2, 3), torch.float32, n).requires_grad_() for n in (7, 3))
    weight, bias = (harness.values(s, torch.float32, 9).requires_grad_() for s in ((2, 3, 4), (2, 3)))
    at = lib.At((2, 7), document=torch.tensor([[0, 0, 1, 1, 1, 2, 2]]).expand(2, 7))
    at.memo["since"] = torch.tensor([[2, 3, 0, 1, 2, 0, 1]] * 2)
    wrt = (x, before, weight, bias)
    results = []
    for kernel in (None, load(facts).conv):
        y = lib.conv_behind(x, before, weight, bias, at, act="silu", kernel=kernel)
        results.append([y, *torch.autograd.grad(y, wrt, harness.values(y.shape, torch.float32, 4))])
    for a, b in zip(*results):
        assert (a - b).abs().max() <= 1e-5 * b.abs().max()


def test_what_a_kernel_does_not_take_goes_the_plain_way() -> None:
    made = layer(FACTS[0]).double()
    at = lib.At((1, 2))
    x = harness.values((1, 2, 20), torch.float64, 1)
    wrong: Any = lambda *given, **more: pytest.fail("fp64 is not for kernels")  # noqa: E731
    assert torch.equal(torch.cat(made(x, at, kernel=wrong), -1), torch.cat(made(x, at), -1))


def test_more_taps_than_a_kernel_holds_are_told() -> None:
    from heddle.lowering.ops.causal_conv import triton as room

    class Use:
        op, operands = "causal_conv", ("x", "w", None)

        def __init__(self, taps: int) -> None:
            self.taps = taps

        def attr(self, name: str) -> Any:
            return {"taps": self.taps}.get(name)

        def sizes(self, formal: str) -> tuple[int, ...]:
            return (2, 3)

    assert room.kernel(Use(4), None) == Facts((6,), 4)
    assert room.kernel(Use(MOST_TAPS + 1), None) is None
    assert str(MOST_TAPS + 1) in (room.why_not(Use(MOST_TAPS + 1)) or "")
