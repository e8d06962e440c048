"""Products that are one kernel with what is behind them: which may be, who chooses, and that it changes no number."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from typer.testing import CliRunner

from heddle.codegen.lock import BadLock, Lock, Tuned, read
from heddle.codegen.tiles import constants_of
from heddle.dsl.load import load_text
from heddle.lowering.alone import products
from heddle.lowering.pipeline import lower
from heddle.lowering.target import TARGETS
from heddle.runtime import ahead
from heddle.runtime import tune as tuning
from heddle.runtime import verify as verifying
from heddle.runtime.check import program_of
from heddle.runtime.cli import app
from heddle.runtime.compile import Artifact, build, class_of, instantiate, tell, versions
from heddle.runtime.errors import UserError
from heddle.runtime.kernel_bench import bench_spec
from heddle.runtime.launched import launched
from heddle.runtime.lib import gemms, kernels
from heddle.runtime.lib.gemms import Gemm
from heddle.runtime.lib.later import Later, later
from heddle.runtime.lib.linear import Linear, Parallel
from heddle.runtime.plan.step import Feed
from heddle.runtime.tune import choosing, lock_of, tune
from heddle.runtime.verify import verify

from ..lowering.test_passes import twin
from . import harness

pytest.importorskip("cutlass")
CPU = torch.device("cpu")
SPEC = """
model made(vocab = 24, hidden = 64, wide = 72):
    tokens[batch, seq]: token
    x = embed(tokens, vocab -> hidden)
    up = linear(x, hidden -> wide, bias = true)
    other = embed(tokens, vocab -> wide)
    y = silu(up) + other
    logits = linear(y, wide -> vocab)
    return logits
"""


def program(text: str = SPEC):
    return program_of(load_text(text))


def chosen(made: Any, target: str = "sm_90") -> tuple[Artifact, Artifact]:
    """The artifact with every product PyTorch's, and with every one that may be a kernel."""
    plain = build(made, target)
    return plain, build(made, target, lock=choosing(plain.files.offered, target))


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU counts as the GPU of every kernel."""
    monkeypatch.setattr(gemms, "has", lambda device, target: True)


@pytest.fixture
def by_torch(monkeypatch: pytest.MonkeyPatch, here: None) -> list[str]:
    """Products are PyTorch's arithmetic, in fp32, where the kernel's would be; the names of those that ran."""
    ran: list[str] = []

    def run(gemm: Gemm, grid: tuple[int, ...]) -> Callable[..., None]:
        def of(x: Tensor, w: Tensor, bias: Tensor, residual: Tensor, z: Tensor | None, y: Tensor, m: int) -> None:
            ran.append(gemm.__name__)
            sums = x.float() @ w.float().T + bias.float()
            if z is not None:
                z.copy_(sums)
            y.copy_(F.silu(sums) + residual.float())

        return of

    monkeypatch.setattr(Gemm, "__getitem__", run)
    return ran


# --- which may be -----------------------------------------------------------------------------------------------------

WIDE = "up = linear(x, hidden -> [ffn = 32]{})\n"
BACK = "x = linear(y, ffn -> hidden)"
FOUND = {
    "an activation": ("", "y = relu2(up)", ("relu2",), False),
    "a bias": (", bias = true", "y = silu(up)", ("silu",), False),
    "several steps": ("", "y = 2 * relu(up) + 1", ("relu", "mul", "add"), False),
    "itself": ("", "y = up * up", ("mul",), False),
    "a sum": ("", "r = embed(tokens, vocab -> ffn)\ny = silu(up) + r", ("silu", "add"), True),
}


@pytest.mark.parametrize("name", FOUND)
def test_what_reads_a_product_alone_may_be_its_end(name: str) -> None:
    bias, end, ops, residual = FOUND[name]
    made = twin(WIDE.format(bias) + end + "\n" + BACK)
    graphs = lower(made, target=TARGETS["sm_90"])
    (e,) = (e for e in graphs.epilogues["made"] if e.product == "up")
    graph = graphs.graphs["made"]
    assert tuple(graph.producers[n].op for n in e.nodes) == ops
    assert (e.residual is not None) == residual == e.facts.residual and e.facts.bias == bool(bias)
    assert (e.facts.n, e.facts.k) == (32, 16)
    assert not lower(made).epilogues, "there are none for a target without kernels"


APART = {
    "a norm": "y = rms_norm(relu2(up))",
    "read twice": "v = relu2(up)\ng = linear(up, ffn -> ffn)\nk = linear(v, ffn -> ffn)\ny = k + g",
    "two results": "h = silu(up)\ng = linear(h, ffn -> ffn)\nv = h * 2\nk = linear(v, ffn -> ffn)\ny = k + g",
    "a weight": "param w[ffn] = 1\ny = silu(up) + w",
    "a gate": "g = embed(tokens, vocab -> ffn)\ny = silu(up) * g",
    "one product of two": "a = linear(x, hidden -> ffn)\ny = silu(up) * 2 + a",
}


@pytest.mark.parametrize("name", APART)
def test_what_is_more_than_that_is_not(name: str) -> None:
    graphs = lower(twin(WIDE.format("") + APART[name] + "\n" + BACK), target=TARGETS["sm_90"])
    assert not [e for e in graphs.epilogues.get("made", ()) if e.product == "up"]


def test_what_is_dropped_is_dropped_behind_the_product() -> None:
    graphs = lower(twin(WIDE.format("") + "y = dropout(relu2(up), 0.5)\n" + BACK), target=TARGETS["sm_90"])
    ends = [graphs.graphs["made"].producers[n].op for e in graphs.epilogues.get("made", ()) for n in e.nodes]
    assert "dropout" not in ends


@pytest.mark.parametrize(
    ("body", "target", "why"),
    [
        (WIDE.format("") + "y = sin(up)\n" + BACK, "sm_90", "`sin` has no text"),
        ("up = linear(x, hidden -> [ffn = 30])\ny = silu(up)\n" + BACK, "sm_100", "30 outputs"),
        (WIDE.format("") + "y = silu(up)\n" + BACK, "sm_80", "`sm_80` has no kernel of products"),
    ],
)
def test_explain_says_why_there_is_none(body: str, target: str, why: str) -> None:
    made = twin(body)
    (e,) = lower(made, target=TARGETS[target]).epilogues["made"]
    assert e.facts is None and why in e.why_not
    assert not build(made, target).files.offered


# --- who chooses ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["sm_90", "sm_100"])
def test_a_lock_chooses_and_nothing_else(target: str) -> None:
    plain, ours = chosen(program(), target)
    assert list(plain.files.offered.values()) == ["linear_silu_add"] and "linear_silu_add" not in plain.files.kernels
    assert ours.files == chosen(program(), target)[1].files
    text = ours.files.kernels["linear_silu_add"]
    assert f'gemms.Gemm(linear_silu_add_fwd, "{target}a"' in text
    assert {n: t for n, t in ours.files.kernels.items() if n != "linear_silu_add"} == plain.files.kernels
    assert re.search(r"y = self\.up\(\s*x,\s*kernel=kernels\.linear_silu_add", ours.source)
    (key,) = plain.files.offered
    unused = Lock(target, "", {key: Tuned("linear_silu_add", {}, 2.0, 2.0, 1.0, is_used=False)})
    assert build(program(), target, lock=unused).files == plain.files
    cut = Lock(target, "", {key: Tuned("linear_silu_add", {"BAND": 4})})
    assert constants_of(build(program(), target, lock=cut).files.kernels["linear_silu_add"])["BAND"] == 4


def test_a_lock_of_another_dsl_is_refused(tmp_path: Path) -> None:
    """Where a kernel of it is used, and the DSL is here."""
    path = tmp_path / "my.lock"
    for used, here, refused in ((True, "4.9.0", True), (True, "4.8.3", False), (True, "", False), (False, "4.9.0", False)):
        made = Lock("sm_90", "3.7.1", {"k": Tuned("f", {}, 1.0, 1.0, 2.0, used)}, dsl="4.8.1")
        path.write_text(made.text())
        if refused:
            with pytest.raises(BadLock, match=r"nvidia-cutlass-dsl 4\.8\.1, this is 4\.9\.0"):
                read(path, "sm_90", "3.7.1", here)
        else:
            assert read(path, "sm_90", "3.7.1", here) == made


def test_without_the_dsl_loading_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, ours = chosen(program(SPEC.replace("24", "40")))
    monkeypatch.setattr(gemms, "find_spec", lambda name: None)
    class_of(plain)
    with pytest.raises(UserError, match="install `nvidia-cutlass-dsl`") as told:
        class_of(ours)
    assert told.value.code == "no-kernels" and "without the lock" in (told.value.help or "")
    with pytest.raises(gemms.Missing):
        gemms.require()


# --- that it changes no number ----------------------------------------------------------------------------------------


def step(artifact: Artifact, dtype: torch.dtype, seed: int = 0) -> dict[str, Tensor]:
    """Logits and the gradients of linear maps: those of tables are kernels of their own."""
    model = instantiate(artifact, seed, dtype)
    tokens = torch.randint(0, model.vocab, (2, 7), generator=torch.Generator().manual_seed(seed))
    logits = model(tokens)
    maps = {n: m.weight for n, m in model.named_modules() if isinstance(m, (Linear, Parallel))}
    grads = torch.autograd.grad(logits.square().mean(), list(maps.values()))
    return {"logits": logits.detach(), **dict(zip(maps, grads, strict=True))}


REBOUND = """
r = embed(tokens, vocab -> [ffn = 32])
back = linear(r, ffn -> hidden)
u = linear(x, hidden -> ffn)
x = x + back
o = linear(x, hidden -> hidden)
v = silu(u) + r
x = o + linear(v, ffn -> hidden)
"""


@st.composite
def bodies(draw: st.DrawFn) -> str:
    """Products with ends, and between both what gives their operands' names to other values."""
    lines = ["r = embed(tokens, vocab -> [ffn = 32])", "back = linear(r, ffn -> hidden)"]
    for i in range(draw(st.integers(1, 3))):
        end = draw(st.sampled_from(("relu2({0})", "silu({0}) + r", "2 * relu({0}) + 1", "r + {0}", "{0} * {0}")))
        v = draw(st.sampled_from(("r", f"v{i}")))
        between = draw(st.sampled_from(("x = x + back", "x = x + sin(x)", "r = sin(r)\nx = x * 0.5")))
        bias = draw(st.sampled_from(("true", "false")))
        lines += [f"u{i} = linear(x, hidden -> ffn, bias = {bias})", between, f"o{i} = linear(x, hidden -> hidden)"]
        lines += [f"{v} = {end.format(f'u{i}')}", f"w{i} = linear({v}, ffn -> hidden)", f"x = o{i} + w{i}"]
    return "\n".join(lines)


@settings(max_examples=40 if settings.get_current_profile_name() == "soak" else 3)
@example(body=REBOUND, seed=0)
@given(body=bodies(), seed=harness.seeds())
def test_where_no_kernel_runs_nothing_changes(body: str, seed: int) -> None:
    """PyTorch's product and what is behind it: the same bits, from statements that stand elsewhere."""
    plain, ours = chosen(twin(body))
    assert plain.files.offered
    before, after = (step(a, torch.float32, seed) for a in (plain, ours))
    assert all(torch.equal(after[n], x) for n, x in before.items())


def test_the_cpu_has_pytorch_s_product() -> None:
    """In a type that the kernel takes."""
    plain, ours = (step(a, torch.bfloat16) for a in chosen(program()))
    assert all(torch.equal(ours[n], x) for n, x in plain.items())


def test_a_model_s_step_through_the_kernel(by_torch: list[str]) -> None:
    _, ours = chosen(program())
    exact = step(build(program()), torch.float64)
    eager = step(build(program()), torch.bfloat16)
    found = step(ours, torch.bfloat16)
    assert by_torch == ["linear_silu_add_fwd"]
    for name, want in exact.items():
        harness.worst(found[name], want, eager[name], harness.floor(want, torch.bfloat16, 72 + 64), name)


class Interpreted:
    """Runs the machine code of a product, PTX, in place of a GPU."""

    def __init__(self) -> None:
        self.ran = 0

    def __call__(self, gemm: Gemm, grid: tuple[int, ...]) -> Callable[..., None]:
        from .ptx import parse
        from .test_linear_built import ran

        def run(*args: Any) -> None:
            *tensors, _ = args
            dtypes = tuple(None if t is None else t.dtype for t in tensors)
            folder = str(self.folder)
            ptx = gemm.compiled(dtypes, f"--keep-ptx --dump-dir {folder}").artifacts.PTX
            (epilogue,) = lower(program(), target=TARGETS["sm_90"]).epilogues["made"]
            ran(epilogue.facts, parse(ptx), grid[0], [t for t in tensors if t is not None], 1)
            self.ran += 1

        return run

    folder: Path


def test_the_artifact_s_file_is_what_its_ptx_computes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, here: None
) -> None:
    """The block by itself, forward and backward, of the file that the artifact has, against fp64."""
    machine = Interpreted()
    machine.folder = tmp_path
    monkeypatch.setattr(Gemm, "__getitem__", lambda gemm, grid: machine(gemm, grid))
    (row,) = found_by_verify(monkeypatch)
    assert machine.ran == 1 and row.holds and row.worst > 0


def found_by_verify(monkeypatch: pytest.MonkeyPatch, examples: int = 2) -> list[Any]:
    """What `verify` says of products alone: of fp32, which the kernel does not take, and bf16."""
    monkeypatch.setattr(verifying, "kernels", lambda lowered: iter(()))
    lock = choosing(build(program(), "sm_90").files.offered, "sm_90")
    return list(verify(program(), "sm_90", examples, 0, CPU, lock))


# --- where a kernel does not fit --------------------------------------------------------------------------------------


class Kernel:
    target = "sm_90"


def test_what_a_kernel_takes(here: None) -> None:
    x, w, b = (torch.ones(s, dtype=torch.bfloat16) for s in ((3, 8), (16, 8), (16,)))
    w.requires_grad_()
    takes = gemms.takes
    assert takes(Kernel, x, w, b) and takes(Kernel, x.float(), w, None) and not takes(None, x, w)
    assert takes(Kernel, x.half(), w.half()) and not takes(Kernel, x.float(), w.float())
    assert not takes(Kernel, x, w, b.float()) and not takes(Kernel, x[:0], w)
    with torch.autocast("cpu", torch.bfloat16):
        assert not takes(Kernel, x, w)
    with later(Later()):
        assert not takes(Kernel, x, w) and takes(Kernel, x, w.detach())


def test_only_on_its_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.ones(8, 8, dtype=torch.bfloat16)
    assert not gemms.takes(Kernel, x, x)
    with kernels.launches(elsewhere=True):
        assert gemms.takes(Kernel, x, x)
    assert not gemms.takes(Kernel, x, x)
    for have, fits in (((9, 0), True), ((10, 0), False), ((8, 9), False)):
        found = type("Found", (), dict(zip(("major", "minor"), have)))
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device, found=found: found)
        assert gemms.has(torch.device("cuda"), "sm_90") == fits


def test_it_is_traced_in_one_piece(by_torch: list[str]) -> None:
    model = instantiate(chosen(program())[1], 0, torch.float16)
    x = torch.randn(3, 64, dtype=torch.float16)
    kernel = sys.modules[type(model).__module__].kernels.linear_silu_add
    run = partial(model.up, kernel=kernel, epilogue=lambda up: F.silu(up) + 1, residual=torch.ones(3, 72).half())
    traced = torch.compile(run, backend="aot_eager", fullgraph=True)
    assert torch.equal(traced(x), run(x)) and len(by_torch) == 2


# --- tools ------------------------------------------------------------------------------------------------------------


def test_products_by_themselves() -> None:
    """What is tuned and tested: the product with its end, given what they read."""
    (alone,) = products(lower(program(), target=TARGETS["sm_90"]))
    assert [n.op for n in alone.nodes] == ["linear", "silu", "add"]
    assert [v.name for v in alone.graph.body.inputs] == ["x", "other"]
    assert [w.name for w in alone.graph.body.weights] == ["up.weight", "up.bias"]


def test_verify_says_where_the_kernel_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    (row,) = found_by_verify(monkeypatch)
    assert "that kernel is for sm_90, and this is cpu" in row.why_not
    assert not list(verify(program(), "sm_90", 1, 0, CPU)), "without a lock it is PyTorch's"


def test_verify_finds_a_fault(by_torch: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Gemm.__getitem__

    def planted(gemm: Gemm, grid: tuple[int, ...]) -> Callable[..., None]:
        def run(x: Tensor, w: Tensor, bias: Tensor, *more: Any) -> None:
            plain(gemm, grid)(x, w, 0 * bias, *more)  # type: ignore[operator]

        return run

    monkeypatch.setattr(Gemm, "__getitem__", planted)
    (row,) = found_by_verify(monkeypatch)
    assert by_torch and row.launches and not row.holds


def test_a_lock_that_chose_pytorch_is_not_stale(recwarn: pytest.WarningsRecorder) -> None:
    made = build(program(), "sm_90")
    unused = {key: Tuned(name, {}, 3.0, 3.0, 2.0, is_used=False) for key, name in made.files.offered.items()}
    lock = Lock("sm_90", "3.7", unused)
    tell(build(program(), "sm_90", lock=lock), lock)
    assert unused and not recwarn.list


def test_bench_counts_what_was_chosen() -> None:
    made = program()
    locks = (None, choosing(build(made, "sm_90").files.offered, "sm_90"))
    found = [{r.ops: r for r in bench_spec(made, "sm_90", (1, 64), "h100-80g", lock)} for lock in locks]
    row = found[1].pop(("linear", "silu", "add"))
    assert found[0].keys() == found[1].keys()
    assert row.launches == 2, "the product, and the slope of what it ends with"


@pytest.fixture
def built_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is built, and one constant is tried."""
    monkeypatch.setattr(tuning, "build", lambda told, target: [])
    monkeypatch.setattr(tuning, "grid_of", lambda alone, text: ({"BAND": (4,)}, ()))


def tuned(kernel_us: float, library_us: float, **more: Any) -> list[tuning.Found]:
    """By a clock that knows whether the kernel is in the file: a band of 4 takes half of its time."""

    def clock(run: Callable[[], object]) -> float:
        before = len(RAN)
        run()
        band = RAN[-1] if len(RAN) > before else None
        return library_us if band is None else kernel_us / (2 if band == 4 else 1)

    how = {"only": "linear_silu_add", "timer": clock, **more}
    return list(tune(program(), "sm_90", CPU, (1, 32), torch.bfloat16, 60.0, **how))


RAN: list[int] = []


@pytest.fixture
def bands(by_torch: list[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Which band each kernel that ran was cut with."""
    plain = Gemm.__getitem__

    def run(gemm: Gemm, grid: tuple[int, ...]) -> Callable[..., None]:
        RAN.append(sys.modules[gemm.function.__module__].BAND)
        return plain(gemm, grid)

    monkeypatch.setattr(Gemm, "__getitem__", run)
    yield
    RAN.clear()


@pytest.mark.parametrize(("library_us", "used"), [(60.0, True), (51.0, False), (40.0, False)])
def test_tuning_measures_against_pytorch(library_us: float, used: bool, bands: None, built_at_once: None) -> None:
    """The kernel at its best, 50 us, and less is noise: what wins is in the lock, and the lock in what is compiled."""
    (found,) = tuned(100.0, library_us)
    t = found.tuned
    assert (t.us, t.untuned_us, t.library_us, t.is_used) == (50.0, 100.0, library_us, used)
    assert dict(t.constants) == {"BAND": 4}
    assert used or any("PyTorch is as fast" in one.why_not for one in found.tried)
    lock = lock_of([found], "sm_90", {})
    assert lock.dsl == versions()["dsl"]
    files = build(program(), "sm_90", lock=lock).files
    assert ("linear_silu_add" in files.kernels) == used
    assert not used or constants_of(files.kernels["linear_silu_add"])["BAND"] == 4


def test_what_is_wrong_is_not_chosen(bands: None, built_at_once: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """However fast."""
    plain = Gemm.__getitem__

    def wrong(gemm: Gemm, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda x, *more: plain(gemm, grid)(2 * x, *more)  # type: ignore[operator]

    monkeypatch.setattr(Gemm, "__getitem__", wrong)
    (found,) = tuned(10.0, 100.0)
    assert not found.tuned.is_used and any("is wrong" in one.why_not for one in found.tried)


def test_products_are_not_tuned_where_they_cannot_be(built_at_once: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """In fp32, and where bits are to be kept; without the DSL it is said."""
    assert not tuned(1.0, 1.0, keep_bits=True)
    monkeypatch.setattr(tuning, "versions", lambda: {"triton": "3.7.1", "dsl": ""})
    with pytest.raises(UserError, match="`nvidia-cutlass-dsl` is not installed"):
        tuned(1.0, 1.0)


def test_what_is_chosen_is_built(tmp_path: Path) -> None:
    _, ours = chosen(program(SPEC.replace("72", "64")))
    told = launched(ours, Feed(rows=1, seq=16))
    mine = [launch for launch in told if launch.kernel.__name__.startswith("linear_silu_add")]
    assert {launch.kernel.__name__ for launch in mine} == {"linear_silu_add_fwd", "linear_silu_add_slope_kernel"}
    (found,) = ahead.build(mine[:1], TARGETS["sm_90"], tmp_path)
    assert not found.problems and found.resources and found.resources.tensor_cores == (("wgmma", 4),)
    assert found.shapes[:2] == ("x bf16[16, 64]", "w bf16[64, 64]") and 0 < found.shared <= found.limit
    assert ahead.build(mine[:1], TARGETS["sm_90"], tmp_path) == [found], "from the cache"


def test_explain_tells_each_with_its_estimate_and_why(tmp_path: Path) -> None:
    path = tmp_path / "my.spec"
    path.write_text(SPEC)
    said = CliRunner().invoke(app, ["explain", str(path), "--target", "sm_90"]).stdout
    assert "product with an epilogue: linear, silu, add; x -> y" in said
    assert "one kernel of 72 columns of 64 moves 1 MB less, of 8192 rows: by estimate" in said
    assert "PyTorch's: no lock has measured the kernel (heddle tune --target sm_90)" in said
    (key,) = build(program(), "sm_90").files.offered
    for used, says in ((True, "one kernel: as one 1.0 us, PyTorch's 2.0 us (lock)"), (False, "PyTorch: as one")):
        made = Lock("sm_90", kernels={key: Tuned("linear_silu_add", {}, 1.0, 1.0, 2.0, used)}, **versions())
        (tmp_path / "my.sm_90.lock").write_text(made.text())
        assert says in CliRunner().invoke(app, ["explain", str(path), "--target", "sm_90"]).stdout
    assert json.loads((tmp_path / "my.sm_90.lock").read_text())["kernels"][key]["is_used"] is False


NORMS = """
y = rms_norm(x)
a = linear(silu(y), hidden -> hidden)
b = linear(rms_norm(a * y), hidden -> hidden)
h = rms_norm(b * b)
x = linear(h, hidden -> hidden)
"""


def test_explain_says_what_a_norm_inside_would_save() -> None:
    from heddle.runtime.explain import explain_graphs

    made = twin(NORMS)
    text = explain_graphs(made, None, target="sm_90")
    found = re.findall(r"`(\w+)` is written for linear of 16 columns in `made`: made inside, .* at most [\d.]+%", text)
    assert found == ["silu", "h"], "not what would read more than it saves"
