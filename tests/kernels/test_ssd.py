"""The kernels of the state space scan against fp64 math: forward, every gradient, documents, given states, decoding."""

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
from heddle.lowering.ops.ssd import reference
from heddle.lowering.ops.ssd.triton import MAX_STATE, Facts, facts, kernel, why_not
from heddle.lowering.target import TARGETS
from heddle.runtime import lib
from heddle.runtime.ahead import build
from heddle.runtime.lib import kernels

from . import harness

CHUNK = 16
SMALL = {"chunk": CHUNK, "sums_block": 16, "bc_block_n": 16, "x_block_i": 16}
FACTS = (
    Facts(1, 3, 5, **SMALL),
    Facts(2, 16, 16, **SMALL, heads_per_program=2),
    Facts(3, 1, 2, **SMALL, heads_per_program=1),
    # A head_dim and a state in several blocks, neither a power of two.
    Facts(2, 20, 33, **SMALL, heads_per_program=1, states_block_p=16),
)
ROWED = ("u", "dt", "b", "c")
LEAVES = (*ROWED, "A_log", "D", "dt_bias", "state")


def text(facts: Facts) -> str:
    return render("ssd", {"name": "scan", **facts.rendered()})


def load(facts: Facts) -> ModuleType:
    return harness.load(text(facts))


class Case(NamedTuple):
    """u [B, T, H, P], dt [B, T, H], b and c [B, T, G, N], three [H], state [B, H, P, N] or None; first [B, T] or None,
    and gradients of y and of the final state."""

    facts: Facts
    u: Tensor
    dt: Tensor
    b: Tensor
    c: Tensor
    A_log: Tensor
    D: Tensor
    dt_bias: Tensor
    state: Tensor | None
    first: Tensor | None
    g: Tensor
    g_final: Tensor

    def leaves(self, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """The tensors that have gradients, anew; as they are, or all in one dtype."""
        held = {name: getattr(self, name) for name in LEAVES if getattr(self, name) is not None}
        return {name: x.detach().to(dtype or x.dtype).requires_grad_() for name, x in held.items()}

    @property
    def starts(self) -> Tensor | None:
        return None if self.first is None else self.first == torch.arange(self.u.shape[1])


def made(
    facts: Facts, batch: int, rows: int, groups: int, dtype: torch.dtype, first: Tensor | None, given: bool,
    seed: int = 5, scale: float = 1.0, lay: str = "contiguous",
) -> Case:  # fmt: skip
    heads, p, n = groups * facts.per_group, facts.head_dim, facts.state

    def values(place: int, *shape: int, kind: torch.dtype = dtype, size: float = 1.0) -> Tensor:
        return harness.laid(harness.values(shape, kind, seed + place, size), lay if len(shape) > 2 else "contiguous")

    one = torch.float32
    # exp(A_log) from a fiftieth to 20, and steps of up to a few: decays that keep nearly all, and nearly nothing.
    return Case(
        facts, values(0, batch, rows, heads, p, size=scale), values(1, batch, rows, heads), values(2, batch, rows, groups, n),
        values(3, batch, rows, groups, n), values(4, heads, kind=one).clamp(-4, 3), values(5, heads, kind=one),
        values(6, heads, kind=one).clamp(-5, 5), values(7, batch, heads, p, n, kind=one).contiguous() if given else None,
        first, values(8, batch, rows, heads, p), values(9, batch, heads, p, n, kind=one),
    )  # fmt: skip


def first_of(lengths: tuple[int, ...], goes_on: bool) -> Tensor:
    """The row at which each row's document starts; -1 in the first one if it `goes_on` from before."""
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    if goes_on and starts:
        starts[0] = -1
    return torch.tensor([s for s, n in zip(starts, lengths) for _ in range(n)], dtype=torch.int32)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    facts, batch, dtype = draw(st.sampled_from(FACTS)), draw(st.integers(0, 2)), draw(harness.dtypes())
    rows, groups = draw(harness.sizes(CHUNK)), draw(st.integers(1, 2))
    first = None
    if draw(st.booleans()):
        packed = [first_of(draw(harness.documents(rows)), draw(st.booleans())) for _ in range(batch)]
        first = torch.stack(packed) if packed else torch.zeros(0, rows, dtype=torch.int32)
    # In fp16 products of c and b that are large do not fit.
    scale = draw(st.sampled_from((0.02, 0.3) if dtype == torch.float16 else (0.02, 1.0, 30.0)))
    return made(
        facts, batch, rows, groups, dtype, first, draw(st.booleans()), draw(harness.seeds()), scale, draw(harness.layouts())
    )  # fmt: skip


# --- the math, and what rounding may cost -----------------------------------------------------------------------------


def backward(results: tuple[Tensor, Tensor], leaves: dict[str, Tensor], case: Case) -> dict[str, Tensor]:
    """y, the final state, and the gradients of all leaves."""
    # What has no rows is a constant to the reference.
    slopes = [(r, slope.to(r.dtype)) for slope, r in zip((case.g, case.g_final), results) if r.requires_grad]
    grads: Any = [torch.zeros_like(x) for x in leaves.values()]
    if slopes:
        outs, given = zip(*slopes)
        grads = torch.autograd.grad(outs, list(leaves.values()), given, allow_unused=True, materialize_grads=True)
    return {"y": results[0].detach(), "final": results[1].detach(), **dict(zip(leaves, grads))}


def expected(case: Case) -> dict[str, Tensor]:
    """By the reference of the room, in fp64."""
    leaves = case.leaves(torch.float64)
    u, dt, b, c, A_log, D, dt_bias = (leaves[name] for name in LEAVES[:-1])
    before = reference.identity(u, b)
    if "state" in leaves:
        before = before[0], leaves["state"]
    y, (_, final) = reference.run(before, u, dt, b, c, A_log, D, dt_bias, case.starts)
    return backward((y, final), leaves, case)


def sizes(case: Case) -> dict[str, Tensor]:
    """Of each result the sum of the sizes of its terms: the same math on sizes, where every derivative is positive."""
    leaves = {name: x.detach().abs().requires_grad_() for name, x in case.leaves(torch.float64).items()}
    for name in ("dt", "A_log", "dt_bias"):  # their sign is no sign of a term
        leaves[name] = getattr(case, name).double().requires_grad_()
    u, dt, b, c, A_log, D, dt_bias = (leaves[name] for name in LEAVES[:-1])
    each = u.shape[2] // b.shape[2]
    b, c = b.repeat_interleave(each, 2), c.repeat_interleave(each, 2)
    d = torch.logaddexp(torch.zeros_like(dt + dt_bias), dt + dt_bias)
    a = d * A_log.exp()
    keep = torch.exp(a - 2 * a.detach())  # exp(-a), whose derivative is positive here
    s, rows = leaves.get("state", torch.zeros_like(case.g_final.double())), []
    for t in range(u.shape[1]):
        if case.starts is not None:
            s = torch.where(case.starts[:, t, None, None, None], 0, s)
        s = keep[:, t, :, None, None] * s + (d[:, t, :, None] * u[:, t])[..., None] * b[:, t, :, None]
        rows.append((s * c[:, t, :, None]).sum(-1) + D[:, None] * u[:, t])
    y = torch.stack(rows, 1) if rows else torch.zeros_like(u)
    return backward((y, s), leaves, case._replace(g=case.g.abs(), g_final=case.g_final.abs()))


# How often a term was rounded to the storage type as an operand of a product, at most: the weights of a chunk's rows,
# rows that enter a state, states, gradients that enter one of states, and those.
ROUNDED = {
    "y": 2, "final": 1, "u": 2, "b": 2, "c": 2, "dt": 4, "A_log": 4, "dt_bias": 4, "D": 0, "state": 1,
}  # fmt: skip


def floors(case: Case) -> dict[str, Tensor]:
    """What roundings may cost each result: u_out |result|, and for its terms, whose sizes add up to m,

    k u_storage m of operands, u m for each addition in fp32, and u m times an exponent: an error of ca is one of its
    exponential. ca is a sum over a chunk; raw values are rounded before the softplus.
    """
    dtype, want, terms = case.u.dtype, expected(case), sizes(case)
    raw = case.dt.double() + case.dt_bias.double()
    d = torch.logaddexp(torch.zeros_like(raw), raw)
    a = torch.nn.functional.pad(d * case.A_log.double().exp(), (0, 0, 0, -case.u.shape[1] % case.facts.chunk))
    ca = a.unflatten(1, (-1, case.facts.chunk)).sum(2).max().item() if a.numel() else 0.0
    exponent = 4 + ca + (raw.abs().max().item() if raw.numel() else 0.0)
    single, low = harness.roundoff(torch.float32), harness.roundoff(dtype)
    p, n = case.facts.head_dim, case.facts.state
    steps = case.u.shape[0] * case.u.shape[1] + p + n + 8 * exponent
    # What is smaller than the storage type knows is lost: a part of one operand, times the largest of the others.
    least = torch.finfo(dtype)
    others = [x.double().abs().max().item() for x in (*case.leaves().values(), case.g, case.g_final) if x.numel()]
    lost = least.smallest_normal * least.eps * (case.u.shape[1] + p * n) * max([1.0, *others]) ** 3
    found = {}
    for name, w in want.items():
        stored = case.leaves()[name].dtype if name in LEAVES else torch.float32 if name == "final" else dtype
        share = single * steps + (ROUNDED[name] * low if dtype != torch.float32 else 0.0)
        found[name] = harness.floor(w, stored, 0, share * terms[name] + (lost if dtype == torch.float16 else 0.0), each=True)
    return found


def run(module: ModuleType, case: Case) -> dict[str, Tensor]:
    """What the kernels give, in memory that was poisoned first."""
    with harness.poisoned():
        leaves = {name: getattr(case, name).detach().requires_grad_() for name in case.leaves()}
        results = module.scan(*(leaves[name] for name in LEAVES[:-1]), case.first, leaves.get("state"))
        return backward(results, leaves, case)


def check(module: ModuleType, case: Case) -> float:
    """The worst share of the error that is allowed. Raises AssertionError."""
    got, want, floor = run(module, case), expected(case), floors(case)
    assert got["y"].dtype == case.u.dtype and got["final"].dtype == torch.float32
    return max(harness.worst(got[name], want[name], None, floor[name], name, each=True) for name in want)


@settings(max_examples=9)
@given(case=cases())
def test_it_is_the_reference_and_so_are_gradients(case: Case) -> None:
    check(load(case.facts), case)


# --- laws that need no reference --------------------------------------------------------------------------------------


def one(facts: Facts, rows: int, first: Tensor | None = None, batch: int = 1, given: bool = True, groups: int = 1) -> Case:
    first = None if first is None else first.expand(batch, rows).contiguous()
    return made(facts, batch, rows, groups, torch.float32, first, given)


def equal(a: dict[str, Tensor], b: dict[str, Tensor], names: tuple[str, ...] = ("y", "final", *LEAVES)) -> list[bool]:
    return [torch.equal(a[name], b[name]) for name in names if name in a]


def changed(case: Case, rows: slice) -> Case:
    """The case with other values in some rows."""
    more = {}
    for name in (*ROWED, "g"):
        more[name] = getattr(case, name).clone()
        more[name][:, rows] = 3 * harness.values(more[name][:, rows].shape, case.u.dtype, 77)
    return case._replace(**more)


@settings(max_examples=3)
@given(cut=st.integers(1, 18), first=st.booleans())
def test_another_document_changes_no_bit(cut: int, first: bool) -> None:
    case = one(FACTS[0], 19, first_of((cut, 19 - cut), False), given=False)
    kept, others = (slice(0, cut), slice(cut, 19)) if first else (slice(cut, 19), slice(0, cut))
    ours, theirs = (run(load(case.facts), c) for c in (case, changed(case, others)))
    for name in ("y", *ROWED):
        assert torch.equal(ours[name][:, kept], theirs[name][:, kept]), name


def test_a_state_that_no_row_reads_may_be_anything() -> None:
    case = one(FACTS[1], 17, first_of((1, 16), False))
    assert case.state is not None
    wild = case._replace(state=torch.full_like(case.state, float("inf")))
    found, plain = run(load(case.facts), wild), run(load(case.facts), case)
    assert all(equal(found, plain)) and not found["state"].any()


def test_batch_rows_know_nothing_of_each_other_and_the_past_nothing_of_the_future() -> None:
    case, module = one(FACTS[1], 17, batch=2), load(FACTS[1])
    found = run(module, case)
    flipped = {n: getattr(case, n).flip(0) for n in (*ROWED, "state", "g", "g_final")}
    other = run(module, case._replace(**flipped))
    assert all(torch.equal(found[n].flip(0), other[n]) for n in ("y", "final", *ROWED, "state"))
    assert torch.equal(run(module, changed(case, slice(3, 17)))["y"][:, :3], found["y"][:, :3])


@settings(max_examples=3)
@given(cut=st.sampled_from((1, 5, 16, 17)))
def test_rows_behind_a_carried_state_are_those_of_the_whole(cut: int) -> None:
    """At the end of a chunk to the bit, where the storage type is that of states."""
    case, module = one(FACTS[1], 21, first_of((2, 19), True)), load(FACTS[1])
    whole, floor = run(module, case), floors(case)
    assert case.first is not None
    at, y = case.state, []
    for rows in (slice(0, cut), slice(cut, 21)):
        first = (case.first[:, rows] - rows.start).clamp_min(-1)
        given = [getattr(case, name)[:, rows] for name in ROWED]
        part, at = module.scan(*given, case.A_log, case.D, case.dt_bias, first, at)
        y.append(part)
    assert torch.equal(torch.cat(y, 1), whole["y"]) == (cut == 16)
    for name, got in (("y", torch.cat(y, 1)), ("final", at)):
        assert ((got.double() - whole[name]).abs() <= 2 * floor[name]).all()


def test_steps_are_the_whole() -> None:
    for made_of, dtype in ((FACTS[3], torch.bfloat16), (FACTS[0], torch.float32)):
        case = made(made_of, 2, 5, 2, dtype, first_of((2, 3), True).expand(2, 5), True)
        want, floor, module = expected(case), floors(case), load(made_of)
        assert case.state is not None and case.first is not None
        held, y = case.state.clone(), []
        for t in range(5):
            rows = slice(t, t + 1)
            given = [getattr(case, name)[:, rows] for name in ROWED]
            with harness.poisoned():
                part, same = module.scan(*given, case.A_log, case.D, case.dt_bias, case.first[:, rows] - t, held, update=True)
            assert same is held
            y.append(part)
        harness.worst(torch.cat(y, 1), want["y"], None, floor["y"], "y", each=True)
        harness.worst(held, want["final"], None, floor["final"], "state", each=True)
        more = case.state.clone()
        given = [getattr(case, name) for name in LEAVES[:-1]]
        assert module.scan(*given, case.first, more, update=True)[1] is more
        harness.worst(more, want["final"], None, floor["final"], "state", each=True)


# --- faults, registration, text ---------------------------------------------------------------------------------------

FAULTS = {
    "a row sees the one behind it": harness.Fault("seen = (t[None, :] <= t[:, None]) &", "seen = (t[None, :] <= t[:, None] + 1) &"),
    "documents are not told apart": harness.Fault("& (t[None, :] >= first[:, None])", ""),
    "nor are they for gradients": harness.Fault("later & (t[:, None] >= first_i[None, :])", "later"),
    "the state goes on into the next document": harness.Fault("s = tl.where(first_last < chunk * CHUNK, s * tl.exp2(ca_last), 0.0)", "s = s * tl.exp2(ca_last)"),
    "the state does not decay": harness.Fault("s * tl.exp2(ca_last), 0.0)", "s, 0.0)"),
    "the state is stale": harness.Fault("num_heads + h) * P * N, s, N, p, n, P, N)\n        t = ", "num_heads + h) * P * N, s if chunk < 1 else 0.5 * s, N, p, n, P, N)\n        t = "),
    "the given state is forgotten": harness.Fault("if state_ptr is not None:", "if False:"),
    "rows of another document leave": harness.Fault("leave = d * tl.exp2(tl.where(t >= first_last,", "leave = d * tl.exp2(tl.where(t >= 0,"),
    "the state reaches all documents": harness.Fault("tl.where((first < chunk * CHUNK)[:, None], tl.exp2(ca)", "tl.where((first < num_rows)[:, None], tl.exp2(ca)"),
    "no D": harness.Fault("y += tl.load(D_ptr", "y += 0 * tl.load(D_ptr"),
    "softplus loses small steps": harness.Fault("tl.where(w == 1.0, e, tl.log(w) * (e / tl.where(w == 1.0, 1.0, w - 1.0)))", "tl.log(w)"),
    "the wrong group": harness.Fault("group, rows = block * HEADS // PER_GROUP", "group, rows = block * 0"),
    "the gradient of the state goes on into another document": harness.Fault("z = tl.where(first_last < chunk * CHUNK, z * tl.exp2(ca_last), 0.0)", "z = z * tl.exp2(ca_last)"),
    "the gradient of the final state is forgotten": harness.Fault("z = load_tile(d_final_ptr", "z = 0 * load_tile(d_final_ptr"),
    "the last row is left out": harness.Fault("tl.store(part_ptr + 2 * size + head * num_rows + t, d_raw, mask=t < num_rows)", "tl.store(part_ptr + 2 * size + head * num_rows + t, d_raw, mask=t < num_rows - 1)"),
    "the last column is left out": harness.Fault("(cols < num_cols)[None, :]\n    tl.store", "(cols < num_cols - 1)[None, :]\n    tl.store"),
    "a_t gets its own pair": harness.Fault("lower = (t[None, :] < t[:, None])", "lower = (t[None, :] <= t[:, None])"),
    "a_t gets the pairs before it": harness.Fault("tl.where(later, sum_before", "tl.where(t[:, None] >= t_i[None, :], sum_before"),
    "what a state brings through is lost": harness.Fault("tl.sum(got * c.to(tl.float32), 1) + through", "tl.sum(got * c.to(tl.float32), 1)"),
    "what rows give to the state is counted twice": harness.Fault("tl.sum(given * b.to(tl.float32), 1)", "2 * tl.sum(given * b.to(tl.float32), 1)"),
    "a block of a state is lost": harness.Fault("for tile in range(TILES):\n            offs_i", "for tile in range(1):\n            offs_i"),
    "no slope of the softplus": harness.Fault("/ (1.0 + tl.exp(-raw))", ""),
    "sums stop early": harness.Fault("for start in range(0, num_rows, SUMS_BLOCK)", "for start in range(0, num_rows - SUMS_BLOCK, SUMS_BLOCK)"),
    "one batch row is summed": harness.Fault("for batch in range(num_batch)", "for batch in range(1)"),
}  # fmt: skip


def test_every_planted_fault_is_found() -> None:
    facts = replace(FACTS[3], head_dim=3, state=17, per_group=1)

    case = made(facts, 1, 18, 1, torch.float32, first_of((10, 8), True)[None], True)
    slow = made(facts, 2, 2, 2, torch.float32, None, False)
    drawn = case._replace(dt=case.dt - 2, A_log=case.A_log - 3), slow._replace(dt=slow.dt - 10)

    def checks(module: ModuleType) -> None:
        for one in drawn:
            check(module, one)

    assert harness.survivors(text(facts), FAULTS, checks) == []


STEP_FAULTS = {
    "the state is stale": harness.Fault("store_tile(state_ptr + head * P * N, s, N", "store_tile(state_ptr + head * P * N, 0.5 * s, N"),
    "a new document keeps the state": harness.Fault("tl.load(first_ptr + batch) < 0", "tl.load(first_ptr + batch) < 1"),
    "it does not decay": harness.Fault("s = s * tl.exp(-tl.exp(", "s = s * tl.exp(-0 * tl.exp("),
}


@pytest.mark.parametrize("fault", STEP_FAULTS)
def test_a_fault_of_a_step_is_found(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    planted = harness.plant(text(FACTS[0]), STEP_FAULTS[fault].old, STEP_FAULTS[fault].new)
    monkeypatch.setitem(globals(), "load", lambda facts: harness.load(planted))
    monkeypatch.setitem(globals(), "FACTS", (FACTS[0],) * 4)
    with pytest.raises(AssertionError):
        test_steps_are_the_whole()


def test_rows_and_heads_are_numbered_in_64_bits() -> None:
    """Every row and head that a stride is multiplied with; sizes at which it shows do not fit a test."""
    made = text(FACTS[3])
    assert made.count("tl.program_id(2).to(tl.int64)") == 6 and "batch.to(tl.int64) * num_heads" in made
    assert made.count("t.to(tl.int64), p, num_rows") == 2 and made.count("t_i.to(tl.int64), p, num_rows") == 1
    assert made.count(", t.to(tl.int64)\n") == 2 and "rows, batch = t.to(tl.int64), batch.to" in made
    assert made.count("tl.program_id(1).to(tl.int64)") == 3


def test_its_ops_are_ops_of_torch() -> None:
    facts = FACTS[0]
    case, module = one(facts, 3, first_of((2, 1), True)), load(facts)
    leaves = list(case.leaves().values())
    torch.library.opcheck(module.ssd_fwd, (*leaves[:-1], case.first, leaves[-1]))
    plain = [x.detach() for x in leaves]
    row = [x[:, :1] for x in plain[:4]]
    torch.library.opcheck(module.ssd_step, (*row, *plain[4:-1], None, plain[-1].clone()))

    def loss(*given: Tensor) -> Tensor:
        y, final = module.scan(*given[:-1], case.first, given[-1])
        return y.square().sum() + final.sum()

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    ours, theirs = (torch.autograd.grad(f(*leaves), leaves) for f in (compiled, loss))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs))


def test_it_is_built_without_a_gpu() -> None:
    """In fp32, on small tiles, which build quickly: what the interpreter takes and Triton's compiler does not is found.
    In bf16 the kernels of published models are built."""
    module = harness.load(text(FACTS[0]), interpret=False)
    like = {"device": "meta", "dtype": torch.float32}
    u, dt, b = (torch.empty(shape, **like) for shape in ((1, 40, 2, 3), (1, 40, 2), (1, 40, 2, 5)))
    weights = [torch.empty(2, device="meta") for _ in range(3)]
    first, state = torch.empty(1, 40, device="meta", dtype=torch.int32), torch.empty(1, 2, 3, 5, device="meta")
    with kernels.launches() as told:
        module.ssd_bwd._init_fn(u, state, u, dt, b, b, *weights, first, state)
        module.ssd_fwd._init_fn(u, dt, b, b, *weights, first, state)
        module.ssd_step._init_fn(u[:, :1], dt[:, :1], b[:, :1], b[:, :1], *weights, first[:, :1], state)
    built = build(told, TARGETS["sm_90"])
    assert len({b.kernel for b in built}) == 8
    assert all(not b.problems and b.resources and not b.resources.spill_loads for b in built)


def test_what_it_does_not_take_is_said() -> None:
    case, module = one(FACTS[0], 2, given=False), load(FACTS[0])
    plain = [x.detach() for x in case.leaves().values()]
    with pytest.raises(TypeError, match="float64"):
        module.scan(*(x.double() for x in plain))
    with pytest.raises(TypeError, match=r"u is torch\.float32, b torch\.bfloat16"):
        module.scan(*plain[:2], plain[2].bfloat16(), *plain[3:])


def test_same_facts_same_bytes(golden: Callable[[str, str], None]) -> None:
    made = text(facts(16, 64, 128, 128, TARGETS["sm_90"]))
    assert made == text(facts(16, 64, 128, 128, TARGETS["sm_90"]))
    harness.stable(made)
    golden("ssd", made)


def test_sizes_that_no_program_holds_are_told() -> None:
    class Use:
        op = "ssd"

        def __init__(self, state: int) -> None:
            self.state = state

        def attr(self, name: str) -> Any:
            return 256

        def sizes(self, formal: str) -> tuple[int, ...]:
            return ({"H": 4, "G": 2, "P": 20, "N": self.state}[formal],)

    made = kernel(Use(33), TARGETS["sm_80"])
    assert made and (made.per_group, made.head_dim, made.state, made.block_p, made.block_n) == (2, 20, 33, 32, 64)
    assert kernel(Use(MAX_STATE + 1), TARGETS["sm_80"]) is None
    assert f"{MAX_STATE}" in (why_not(Use(MAX_STATE + 1)) or "") and why_not(Use(MAX_STATE)) is None


# --- in the library ---------------------------------------------------------------------------------------------------


def given_to_lib(case: Case) -> dict[str, Tensor]:
    return {name: x for name, x in case.leaves().items() if name != "state"}


@settings(max_examples=4)
@given(data=st.data(), rows=st.integers(1, 19))
def test_the_scan_with_its_kernel_is_the_scan(data: st.DataObject, rows: int) -> None:
    case, more = one(FACTS[0], rows, batch=2, given=False), {}
    if data.draw(st.booleans()):
        first = [first_of(data.draw(harness.documents(rows)), False) for _ in range(2)]
        more["document"] = torch.stack(first).long()
    if data.draw(st.booleans()):
        more["valid"] = torch.arange(rows) < torch.tensor([[rows], [data.draw(st.integers(0, rows))]])
        nan = {n: torch.where(more["valid"].view(2, rows, *[1] * (getattr(case, n).dim() - 2)), getattr(case, n), float("nan")) for n in ROWED}
        case = case._replace(**nan)
    results = []
    for made_by in (None, load(case.facts).scan):
        leaves = given_to_lib(case)
        with kernels.launches() as told:
            y = lib.ssd(**leaves, at=lib.At((2, rows), **more), kernel=made_by)
        assert bool(told) == (made_by is not None)
        results.append([y, *torch.autograd.grad(y, list(leaves.values()), case.g)])
    for a, b in zip(*results):
        assert (a - b).abs().max() <= 2e-5 * (1e-3 + b.abs().max())


class Toy(lib.Model):
    """A scan of embedded tokens, for a stream: dims of u, dt, b and c side by side."""

    vocab = 9

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.weights = lib.Embed(9, (2 * 3 + 2 + 2 * 5,)), lib.Weights(A_log=(2,), D=(2,), dt_bias=(2,))
        self.kernel: Any = None

    def slots(self, stream: Any) -> lib.Slots:
        return lib.Slots(scan=stream.scan(heads=2, head_dim=3, groups=1, state=5))

    def run(self, tokens: Tensor, at: Any, state: Any) -> Tensor:
        u, dt, b, c = self.embedding(tokens).split((6, 2, 5, 5), -1)
        w = self.weights
        parts = u.unflatten(-1, (2, 3)), dt, b.unsqueeze(-2), c.unsqueeze(-2)
        return lib.ssd(*parts, w.A_log, w.D, w.dt_bias, at, past=state.scan, kernel=self.kernel).flatten(-2)


@pytest.mark.parametrize("rollback", [0, 2])
def test_a_stream_with_the_kernel_is_the_whole_sequence(rollback: int) -> None:
    model = Toy()
    names = ("embedding.weight", "weights.A_log", "weights.D", "weights.dt_bias")
    lib.initialise(model, dict.fromkeys(names, ("normal", 1)))
    tokens = torch.randint(0, 9, (2, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        whole = model(tokens)
    model.kernel = load(replace(FACTS[0], per_group=2, heads_per_program=1)).scan
    stream, found, told = model.stream(2, 20, rollback=rollback), [], []
    for first, end in ((0, 4), (4, 5), (5, 6), (6, 9)):
        with kernels.launches() as launched:
            found.append(model.decode(tokens[:, first:end], stream))
        told.append({launch.kernel.__name__ for launch in launched})
    near = 2e-5 * whole.abs().max()
    assert (torch.cat(found, 1) - whole).abs().max() <= near
    assert all(told) and ("ssd_step_kernel" in told[1]) == (not rollback)
    counted = model.stream(2, 20, rollback=rollback)
    ragged = model.decode(tokens[:, :4], counted, count=torch.tensor([4, 2]))
    if rollback:
        counted.rollback(torch.tensor([1, 0]))
    rest = model.decode(torch.stack((tokens[0, 4 - bool(rollback) :][:3], tokens[1, 2:5])), counted)
    assert (ragged[0] - whole[0, :4]).abs().max() <= near and (rest[1] - whole[1, 2:5]).abs().max() <= near
    assert (rest[0] - whole[0, 4 - bool(rollback) :][:3]).abs().max() <= near


def test_what_a_kernel_does_not_take_goes_the_plain_way() -> None:
    case = one(FACTS[0], 3, given=False)
    leaves = {name: x.double() for name, x in given_to_lib(case).items()}
    wrong: Any = lambda *given, **more: pytest.fail("fp64 is not for kernels")  # noqa: E731
    at = lib.At((1, 3))
    assert torch.equal(lib.ssd(**leaves, at=at, kernel=wrong), lib.ssd(**leaves, at=at))
