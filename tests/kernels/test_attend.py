"""The kernel of attention in Triton's interpreter, against fp64 and against its own laws."""

from __future__ import annotations

import re
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from heddle.dsl.parse import parse
from heddle.dsl.source import Source as Spec
from heddle.lowering.ops.attend.triton import Attend, Source, kernel, why_not
from heddle.lowering.target import TARGETS
from heddle.runtime import lib
from heddle.runtime.lib import sources

from . import harness
from .attention import CLOCK, FORMS, MASKS, SMALL, Form, case, check, module, rows, text, tiles

# Few rows read keys in parts of 8, side by side.
PARTS = tiles(8, 8, split_rows=8, split_keys=8)


def up_of(form: Form, batch: int, seq: int, kv: int, dtype: torch.dtype, seed: int) -> Tensor:
    """What comes back from behind."""
    return harness.values((batch, seq, kv * form.group, form.value_width), dtype, seed + 99)


@settings(max_examples=settings.default.max_examples // 6)
@given(st.data(), st.sampled_from(sorted(FORMS)), harness.dtypes(), harness.seeds())
def test_the_result_and_every_gradient_are_attention(data: st.DataObject, name: str, dtype: torch.dtype, seed: int) -> None:
    batch, kv = data.draw(st.sampled_from([(1, 1), (2, 1), (1, 2)]))
    seq = data.draw(harness.sizes(8, 13, least=1))
    document, valid = data.draw(rows(batch, seq, not FORMS[name].biases))
    layout, scale = data.draw(harness.layouts()), data.draw(harness.scales())
    one = case(FORMS[name], batch, seq, kv, dtype, seed, scale, layout, document, valid)
    of = data.draw(st.sampled_from([SMALL, PARTS, tiles(16, 8)]))
    check(one, module(FORMS[name], of).attend, up_of(FORMS[name], batch, seq, kv, dtype, seed))


@pytest.mark.parametrize("width", [80, 256])
def test_wide_heads(width: int) -> None:
    form = Form(("window",), group=2, width=width, value_width=width)
    one = case(form, 1, 9, 1, torch.bfloat16, 3)
    check(one, module(form, tiles(16, 16)).attend, up_of(form, 1, 9, 1, torch.bfloat16, 3))


@pytest.mark.parametrize(("queries", "keys"), [(0, 3), (3, 0), (0, 0)])
@pytest.mark.parametrize("of", [SMALL, PARTS])
def test_nothing_to_ask_and_nothing_to_see(queries: int, keys: int, of: tiles) -> None:
    q, k, v = (torch.ones(2, n, 2, 16, requires_grad=True) for n in (queries, keys, keys))
    low, high = torch.zeros(2, queries, dtype=torch.int32), torch.full((2, queries), keys, dtype=torch.int32)
    first, last = torch.zeros(2, keys, dtype=torch.int32), torch.full((2, keys), queries, dtype=torch.int32)
    with harness.poisoned():
        o = module(Form(("all",)), of).attend(q, sources.Read(k, v, low, high, first, last), scale=1.0)
        grads = torch.autograd.grad(o.sum(), [q, k, v])
    assert o.shape == (2, queries, 2, 16) and not bool(o.any())
    assert [g.shape for g in grads] == [q.shape, k.shape, v.shape] and not any(bool(g.any()) for g in grads)


# --- laws -----------------------------------------------------------------------------------------


def results(form: Form, kernel: Callable[..., Tensor], *given: object, **changed: Tensor) -> dict[str, Tensor]:
    """The result and gradients of one case, some of whose tensors are changed."""
    one = case(form, *given)  # type: ignore[arg-type]
    for name, x in changed.items():
        one.tensors[name.replace("_", " ")] = x.detach().requires_grad_()
    o = one.run(kernel)
    up = up_of(form, *o.shape[:2], o.shape[2] // form.group, o.dtype, 1)
    grads = torch.autograd.grad(o, [one.tensors[n] for n in one.names], up, allow_unused=True, materialize_grads=True)
    return {"o": o.detach(), **dict(zip(one.names, grads))}


@pytest.mark.parametrize("name", ["one key head", "distances in both"])
def test_another_document_changes_no_bit(name: str) -> None:
    form, cut = FORMS[name], 5
    document = (torch.arange(12) >= cut).long()[None]
    kernel = module(form).attend
    found = []
    for seed in (10, 20):
        one = case(form, 1, 12, 1, torch.bfloat16, 3, 1.0, "contiguous", document)
        later = lib.on(one.at, CLOCK, 2).keys().document[0] == 1
        changed = {}
        for i, (tensor, x) in enumerate(one.tensors.items()):
            mine = later if tensor.startswith("recent") and tensor[-1] in "kv" else document[0] == 1
            other = harness.values(x.shape, x.dtype, seed + i, 5.0)
            changed[tensor.replace(" ", "_")] = torch.where(mine[None, :, None, None], x, other)
        got = results(form, kernel, 1, 12, 1, torch.bfloat16, 3, 1.0, "contiguous", document, **changed)
        found.append({n: g[:, later if n.startswith("recent") and n[-1] in "kv" else document[0] == 1]
                      for n, g in got.items()})  # fmt: skip
    assert all(torch.equal(found[0][n], found[1][n]) for n in found[0])


def test_batch_rows_do_not_meet() -> None:
    form = FORMS["window and summaries"]
    kernel = module(form).attend
    mine = results(form, kernel, 3, 9, 1, torch.float32, 3)
    one, order = case(form, 3, 9, 1, torch.float32, 3), torch.tensor([2, 0, 1])
    turned = {n.replace(" ", "_"): x[order] for n, x in one.tensors.items()}
    up, run = up_of(form, 3, 9, 1, torch.float32, 1), case(form, 3, 9, 1, torch.float32, 3)
    run.tensors = {n: turned[n.replace(" ", "_")].detach().requires_grad_() for n in run.names}
    o = run.run(kernel)
    grads = torch.autograd.grad(o, [run.tensors[n] for n in run.names], up[order])
    assert torch.equal(o, mine["o"][order])
    assert all(torch.equal(g, mine[n][order]) for n, g in zip(run.names, grads))


def test_later_rows_change_no_bit() -> None:
    form = FORMS["window and summaries"]
    base = case(form, 1, 12, 1, torch.float32, 3)
    changed = {}
    for name, x in base.tensors.items():
        cut = 8 if not name.startswith("past") else 4  # rows of the summaries of the first two groups
        other = harness.values(x.shape, x.dtype, 77, 3.0)
        changed[name.replace(" ", "_")] = torch.where((torch.arange(x.shape[1]) < cut)[None, :, None, None], x, other)
    kernel = module(form).attend
    mine = results(form, kernel, 1, 12, 1, torch.float32, 3)["o"]
    other = results(form, kernel, 1, 12, 1, torch.float32, 3, **changed)["o"]
    assert torch.equal(mine[:, :8], other[:, :8]) and not torch.equal(mine[:, 8:], other[:, 8:])


@settings(max_examples=settings.default.max_examples // 16)
@given(
    st.sampled_from(["causal", "window", "past"]),
    st.sampled_from([None, 4, 6]),
    st.lists(st.integers(1, 5), min_size=1, max_size=4),
    st.integers(0, 2),
    st.booleans(),
)
def test_steps_of_a_stream_are_the_whole(name: str, keep: int | None, widths: list[int], slack: int, ragged: bool) -> None:
    """A cache that keeps all, or the last rows; rows of a step that do not count; bounds from coordinates alone."""
    keep = keep if name == "window" else None
    mask = MASKS[name] if name != "past" else lib.Mask(lambda q, k: k.position // 2 < q.position // 2, None, -1)
    form = Form(("all",), group=2)
    kernel = module(form, PARTS).attend

    class Owner:
        def slots(self, stream: lib.Stream) -> lib.Slots:
            return lib.Slots(o=stream.cache(k=(1, 16), v=(1, 16), keep=keep))

    n = sum(widths)
    q, k, v = (harness.values((2, n, h, 16), torch.float32, i) for i, h in enumerate((2, 1, 1)))
    stream = lib.Stream(Owner(), 2, n, slack, torch.float32)
    whole = lib.attend(*(x.double() for x in (q,)), (k.double(), v.double(), mask), at=lib.At((2, n)), scale=0.5)
    parts, called = [], 0

    def counted(*args: object, **more: object) -> Tensor:
        nonlocal called
        called += 1
        return kernel(*args, **more)

    for a, b, c in zip(*(x.split(widths, 1) for x in (q, k, v))):
        pad = 1 if ragged else 0
        a, b, c = (torch.cat((x, torch.full_like(x[:, :1], torch.nan)), 1) if pad else x for x in (a, b, c))
        count = torch.full((2,), a.shape[1] - pad)
        at = stream.begin(a.shape[1], count)
        parts.append(lib.attend(a, (b, c, mask), at=at, scale=0.5, past=stream.state.o, kernel=counted)[:, : a.shape[1] - pad])
        stream.commit(at)
    plain = not (slack or ragged) and name == "causal" and widths[0] > 1  # the first step is what torch has a kernel for
    assert called == len(widths) - plain
    top = max(1.0, float(v.abs().max()))
    assert ((torch.cat(parts, 1).double() - whole).abs().max()) <= 2**-24 * 16 * 40 * top


# --- what it is given -----------------------------------------------------------------------------


def test_what_a_kernel_does_not_take_goes_through_torch() -> None:
    form = FORMS["heads of their own"]

    def never(*_: object, **__: object) -> Tensor:
        raise AssertionError("the kernel was asked")

    q, k, v = (harness.values((1, 4, 1, 16), torch.float32, i) for i in range(3))
    causal, window = MASKS["causal"], MASKS["window"]
    two = lib.Mask(lambda query, key: (key.position < 1) | (key.position >= query.position), None, None)
    place = torch.zeros(1, 4, 1, 9)
    far = lib.Source(k, v, window, bias=place, distance=lambda query, key: (query.position - key.position) // 2)
    falling = lib.At((1, 4), position=torch.tensor([3, 0, 1, 2]))
    for source, at in (
        (lib.Source(k, v, causal), lib.At((1, 4))),
        (lib.Source(k, v, two), lib.At((1, 4))),
        (far, lib.At((1, 4))),
        (lib.Source(k, v, window), falling),
        (lib.Source(k, v.double(), window), None),
    ):
        if at is None:
            q64, k64 = q.double(), k.double()
            lib.attend(q64, (k64, v.double(), window), at=lib.At((1, 4)), scale=1.0, kernel=never)
        else:
            with_kernel = lib.attend(q, source, at=at, scale=1.0, kernel=never)
            at.memo.clear()
            assert torch.equal(with_kernel, lib.attend(q, source, at=at, scale=1.0))
    read = sources.Read(k, v, *(torch.zeros(1, 4, dtype=torch.int32) for _ in range(2)))
    with pytest.raises(TypeError, match=r"this tensor is torch\.float64"):
        module(form).attend(q.double(), read, scale=1.0)
    with pytest.raises(ValueError, match="1 query heads share a key head, keys are 16 wide, values 7"):
        module(form).attend(q, read, scale=1.0)
    o = module(FORMS["heads of their own"]).attend(q.requires_grad_(), read._replace(v=v[..., :7]), scale=1.0)
    with pytest.raises(ValueError, match="gradients need to know who asks for a key"):
        o.sum().backward()


def test_positions_that_rise_are_taken_as_they_are_given() -> None:
    form = FORMS["heads of their own"]
    q, k, v = (harness.values((1, 4, 1, d), torch.float32, i) for i, d in enumerate((16, 16, 7)))
    at = lib.At((1, 4), position=torch.tensor([0, 2, 9, 10]))
    got = lib.attend(q, (k, v, MASKS["window"]), at=at, scale=1.0, kernel=module(form).attend)
    at.memo.clear()
    assert (got - lib.attend(q, (k, v, MASKS["window"]), at=at, scale=1.0)).abs().max() < 1e-5


def test_autocast_gives_all_tensors_one_dtype() -> None:
    form = FORMS["heads of their own"]
    q, k, v = (harness.values((1, 4, 1, d), torch.float32, i) for i, d in enumerate((16, 16, 7)))
    with torch.autocast("cpu", torch.bfloat16):
        o = lib.attend(q, (k, v.bfloat16(), MASKS["window"]), at=lib.At((1, 4)), scale=1.0, kernel=module(form).attend)
    assert o.dtype == torch.bfloat16


def read_of(form: Form, seq: int) -> tuple[Tensor, list[sources.Read]]:
    """The tensors of a case as the op takes them."""
    one, got = case(form, 1, seq, 1, torch.float32, 3), []

    def take(q: Tensor, *given: sources.Read, scale: float) -> Tensor:
        got.append((q, list(given)))
        return q

    one.run(take)
    return got[0]


@pytest.mark.parametrize("name", ["distances in both"])
def test_torch_knows_the_op(name: str) -> None:
    form = FORMS[name]
    q, given_ = read_of(form, 5)
    made = module(form)
    fields = [x for r in given_ for x in (r.k, r.v, r.low, r.high, r.first, r.last, r.valid, r.query, r.bias, r.asks, r.holds)]
    args = [x for i, x in enumerate(fields) if x is not None or i % 11 == 6]
    torch.library.opcheck(made.attend_forward, (q, *args, 0.4))
    compiled = torch.compile(made.attend, backend="aot_eager", fullgraph=True)
    wrt = [q, given_[0].k, given_[0].v]
    mine, theirs = (
        torch.autograd.grad(f(q, *given_, scale=0.4).square().sum(), wrt, allow_unused=True) for f in (compiled, made.attend)
    )
    assert all((a is None and b is None) or torch.equal(a, b) for a, b in zip(mine, theirs))


# --- the file -------------------------------------------------------------------------------------

RICH = Form(("window", "recent"), group=2, width=12, value_width=20, queries=("window",), biases=("recent",))
FAULTS = {
    "a key too many, forward": ("& (offs_n[None, :] < high[:, None]) & there", "& (offs_n[None, :] <= high[:, None]) & there"),
    "a key too few, gradient of q": ("seen & (offs_n[None, :] >= low[:, None])", "seen & (offs_n[None, :] > low[:, None])"),
    "a key too many, gradient of k": ("(offs_n[:, None] < high[None, :])", "(offs_n[:, None] <= high[None, :])"),
    "padding counts": ("there = there & (tl.load(valid_ptr + offs_n, mask=there, other=0) != 0)", "there = there"),
    "values not rescaled": ("acc * keep[:, None], input", "acc, input"),
    "sum not rescaled": ("mass = mass * keep + tl.sum(p, 1)", "mass = mass + tl.sum(p, 1)"),
    "stale largest score": ("        m = m_new\n    return m, mass, acc", "    return m, mass, acc"),
    "all that some see": ("tl.cdiv(inner, BLOCK_N) * BLOCK_N, first", "inner // BLOCK_N * BLOCK_N, first"),
    "all beyond what all see": ("2147483647), 0) // BLOCK_N * BLOCK_N, inner)", "2147483647), 0), inner)"),
    "no d_o . o": (" - delta[:, None])", ")"),
    "gradient of q not scaled": ("d_q * scale", "d_q"),
    "gradient of k not scaled": ("d_k * scale", "d_k"),
    "one head for all": ("head = (h * 2 + rows % 2).to(tl.int64)\n    mask", "head = (h * 2 + rows * 0).to(tl.int64)\n    mask"),
    "bias in another base": (".to(tl.float32) * 1.4426950408889634", ".to(tl.float32)"),
    "no bias for the gradient of k": ("s += load_bias(bias_rows[None, :]", "s += 0.0 * load_bias(bias_rows[None, :]"),
    "the last row is not there": ("    mask_m = rows < num_rows\n    q = load", "    mask_m = rows < num_rows - 1\n    q = load"),
    "rows that see a key missed": ("for row in range(first, last * 2, BLOCK_M)", "for row in range(first, last, BLOCK_M)"),
    "parts overlap": ("tl.minimum(part * PART + PART,", "tl.minimum(part * PART + PART + 1,"),
    "parts weigh the same": ("acc * keep[:, None] + o * weight[:, None]", "acc * keep[:, None] + o"),
    "parts of another source": ("        parts1, num_heads", "        0, num_heads"),
}  # fmt: skip


SLOPED = Form(("causal", "window"), group=2, width=12, slopes=("causal",))
SLOPE_FAULTS = {
    "one slope for all": ("head = h * 2 + rows % 2\n", "head = h * 2 + rows * 0\n"),
    "slope in another base": (".to(tl.float32) * 1.4426950408889634\n\n", ".to(tl.float32)\n\n"),
    "where the query is left out": ("far = asks[:, None] + tl", "far = 0 * asks[:, None] + tl"),
    "one distance for all keys": ("holds_ptr + offs_n, mask=there, other=0)[None, :]\n", "holds_ptr + offs_n * 0, mask=there, other=0)[None, :]\n"),
    "no slope for the gradient of q": ("s += slope[:, None] * far\n", "s += 0.0 * slope[:, None] * far\n"),
    "no slope for the gradient of k": ("s += load_slope(", "s += 0.0 * load_slope("),
    "gradient of slopes of the last tile": ("d_slope += tl.sum", "d_slope = tl.sum"),
    "gradient of slopes without distance": ("tl.sum(d_s * far, 1)", "tl.sum(d_s, 1)"),
    "gradients of heads mixed up": (".sum((0, 2)).flatten()", ".sum((0, 2)).flip(-1).flatten()"),
}  # fmt: skip


@pytest.mark.parametrize(("form", "faults"), [(RICH, FAULTS), (SLOPED, SLOPE_FAULTS)], ids=["bias", "slope"])
def test_planted_faults_are_found(form: Form, faults: dict[str, tuple[str, str]]) -> None:
    hole = torch.arange(7)[None] != 3

    def attempt(made: ModuleType) -> None:
        """14 rows, whose keys are read in parts, and 20 in two tiles."""
        for seq, valid in ((7, hole), (10, None)):
            one = case(form, 1, seq, 1, torch.float32, 5, valid=valid)
            check(one, made.attend, up_of(form, 1, seq, 1, torch.float32, 5))

    planted = {name: harness.Fault(*pair) for name, pair in faults.items()}
    assert harness.survivors(text(form, tiles(16, 4, 14, 4)), planted, attempt) == []


def test_the_same_facts_make_the_same_bytes_and_offsets_are_wide() -> None:
    form = FORMS["distances in both"]
    first = text.__wrapped__(form, SMALL)
    assert first == text.__wrapped__(form, SMALL)
    harness.stable(first)
    assert max(map(len, first.splitlines())) <= 120
    for wide in ("b = (tl.program_id(0) // num_tiles // num_heads).to(tl.int64)", "t = (rows // 1).to(tl.int64)",
                 "head = (h * 1 + rows % 1).to(tl.int64)", "offs_n.to(tl.int64)[:, None] * stride_xn"):  # fmt: skip
        assert wide in first
    assert not re.search(r"[^\n]\n{4,}", first)


def test_a_readable_file(golden: Callable[[str, str], None]) -> None:
    from heddle.codegen.kernels import render

    near, far = "key.position <= query.position and query.position - key.position < 512", "key.position < query.position // 16"
    facts = Attend(4, 128, 128, (Source(near), Source(far)), 90)
    golden("attend", render("attend", {"name": "attend", **facts.rendered()}))


# --- what the compiler says -----------------------------------------------------------------------


class Use:
    """One use of attention as the room is asked about it."""

    def __init__(self, mask: str = "key.position <= query.position", width: int = 64, **more: Any) -> None:
        (block,) = parse(Spec("<mask>", f"block m(): return {mask}\n")).declarations
        self.op = more.pop("op", "attend")
        distance = more.pop("distance", None)
        name = more.pop("name", "bias")
        self.attrs = {"masks": (block.body[0].values[0],), "options": (name,) if distance else (), **more}
        self.operands = ("q", "k", "v", *(("b",) if distance else ()))
        self.widths = {"H": 8, "K": 2, "D": width, "E": 64, "N": 16}
        if distance:
            (block,) = parse(Spec("<distance>", f"block d(): return {distance}\n")).declarations
            self.attrs["distances"] = (block.body[0].values[0],)

    def attr(self, name: str) -> Any:
        return self.attrs.get(name)

    def sizes(self, formal: str) -> tuple[int, ...]:
        return (self.widths[formal],)


def test_a_use_has_a_kernel_or_a_reason() -> None:
    facts = kernel(Use(distance="query.position - key.position"), TARGETS["sm_90"])
    assert facts == Attend(4, 64, 64, (Source("key.position <= query.position", False, 16),), 90)
    facts = kernel(Use(distance="(key.position - 3) // 2", name="slope"), TARGETS["sm_90"])
    assert facts == Attend(4, 64, 64, (Source("key.position <= query.position", slope=True),), 90)
    for use, reason in (
        (Use(width=320), "its keys are 320 wide, a tile holds at most 256"),
        (Use(op="attend_ring", distance="query.position - key.position"), "told from rank to rank, and have a bias"),
        (Use(op="attend_ring", distance="query.position - key.position", name="slope"), "and have a slope of their own"),
        (Use("key.position != query.position"), "what is cut off in front or what is cut off behind may be two runs"),
        (Use("key.position < 3 or key.position > query.position - 4"), "not proved to let each query see one interval"),
        (Use("key.row == query.row and key.position >= 0"), "`key.row` is in no order along the keys that is known"),
        (Use("(query.position - key.position) // 2 == 0"), "a query and a key are divided together"),
        (Use("key.position - key.position // 2 <= query.position"), "what rises along the keys and what falls"),
        (Use(distance="(query.position - key.position) // 2", name="slope"), "a term of the query and one of the key"),
        (Use(distance="(query.position - key.position) // 2"), "not proved to be another place for each key"),
    ):
        assert kernel(use, TARGETS["sm_90"]) is None and reason in why_not(use)
