"""The kernels of every small shipped model: all are launched, and each kind builds for a generation of GPU."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import triton
from click.testing import Result
from typer.testing import CliRunner

from heddle.codegen.lock import Lock
from heddle.dsl.load import load
from heddle.lowering.target import TARGETS, Target
from heddle.runtime import ahead
from heddle.runtime.ahead import Built
from heddle.runtime.ahead import build as build_ahead
from heddle.runtime.check import proved
from heddle.runtime.cli import app
from heddle.runtime.compile import Artifact, build, class_of
from heddle.runtime.launched import launched
from heddle.runtime.lib.kernels import Launch
from heddle.runtime.plan.step import Feed

FOLDER = Path(__file__).resolve().parents[2] / "specs"
# A published model of each family, two where one has experts: at their sizes, on shapes alone.
PUBLISHED = [FOLDER / f"{name}.spec" for name in (
    "llama/llama31_8b", "lra/text", "mistral/mistral_nemo_12b", "nemotron4/nemotron4_15b", "nemotron_h/nemotron3_nano_30b",
    "nemotron_h/nemotron_h_8b", "retro/retro_small", "transformer_ls/enwik8_base",
)]  # fmt: skip
HYBRID = FOLDER / "nemotron_h/nemotron_h_8b.spec"
GPUS = [t for t in TARGETS.values() if t.capability]
# What a thread may read again from memory: a tile that is a little too large, and not one that is twice so.
SPILLS = 16
# Kinds are spread over so many tests, which may run in as many processes.
PARTS = 4


@cache
def made(spec: Path, target: str) -> tuple[Artifact, list[Launch]]:
    """A model for a target, and what it launches: rows of several documents, or of one where it takes no others."""
    artifact = build(proved(load(spec)), target)
    feed = Feed(rows=2, seq=min(4096, class_of(artifact).longest or 4096))
    try:
        return artifact, launched(artifact, feed)
    except ValueError:
        return artifact, launched(artifact, replace(feed, documents=False))


def model(spec: Path) -> tuple[Artifact, Target, list[Launch]]:
    """A model for one of the targets, another for each spec, and what it launches."""
    target = GPUS[PUBLISHED.index(spec) % len(GPUS)]
    return *made(spec, target.name), target


def test_each_family_has_a_published_model_here() -> None:
    families = {p.parent.name for p in FOLDER.glob("*/*.spec")} - {"std", "minitron"}  # blocks; ways to prune others
    assert {spec.parent.name for spec in PUBLISHED} == families


@pytest.mark.parametrize("spec", PUBLISHED, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_every_kernel_that_is_written_is_launched(spec: Path) -> None:
    artifact, told, _ = model(spec)
    assert artifact.files.kernels
    written = {name for text in artifact.files.kernels.values() for name in re.findall(r"^def (\w+_kernel)\(", text, re.M)}
    found = {launch.kernel.__name__ for launch in told}
    decodes = bool(artifact.program.objectives)
    assert found <= written and {name for name in written - found if decodes or "split" not in name} == set()


def test_decoding_is_launched_behind_training() -> None:
    artifact, told = made(HYBRID, "sm_100")
    tokens = [launch.args[0].shape for launch in told if launch.kernel.__name__.startswith("rms_norm_fwd")]
    assert tokens[0][0] == 2 * 4096 and [s[0] for s in tokens[-2:]] == [2 * 4080, 2]
    again = [launch.kernel.__name__ for launch in launched(artifact, Feed(rows=2, seq=4096))]
    assert again == [launch.kernel.__name__ for launch in told]


def sound(launch: Launch, target: Target, config: pytest.Config) -> Built:
    """The build of a launch, without a problem and with hardly a spilled register. What was built in an earlier run is
    kept by pytest: only what changed is built again."""
    kept = Path(config.cache.mkdir("builds"))  # type: ignore[union-attr]
    (built,) = build_ahead([launch], target, kept)
    assert not built.problems, built
    assert built.resources and built.resources.spill_loads <= SPILLS, built
    return built


@pytest.mark.parametrize("part", range(PARTS))
def test_each_kind_of_kernel_builds_and_fits(part: int, pytestconfig: pytest.Config) -> None:
    """For one target each, in turn; a second chain of the same ops is no other kind."""
    kinds: dict[str, list[tuple[Target, Launch]]] = {}
    for spec in PUBLISHED:
        _, told, target = model(spec)
        for launch in {launch.kernel.__name__: launch for launch in told}.values():
            kinds.setdefault(re.sub(r"_?\d+(?=_)", "", launch.kernel.__name__), []).append((target, launch))
    for place, (_, found) in enumerate(sorted(kinds.items())):
        if place % PARTS == part:
            target, launch = found[place // PARTS % len(found)]
            sound(launch, target, pytestconfig)


@pytest.mark.parametrize("target", GPUS, ids=lambda t: t.name)
def test_products_are_on_the_newest_tensor_cores(target: Target, pytestconfig: pytest.Config) -> None:
    """Those of attention and of the scan, at published sizes: tiles are large enough for them on each target."""
    launches = {launch.kernel.__name__: launch for launch in made(HYBRID, target.name)[1]}
    newest = {80: "mma", 90: "wgmma", 100: "tcgen05"}[target.capability or 0]
    for kernel in ("attend_grad_kv_kernel", "ssd_bwd_bc_kernel"):
        built = sound(launches[kernel], target, pytestconfig)
        assert dict(built.products).get(newest), built


# --- heddle compile --build -----------------------------------------------------------------------------------------

PLAIN = """
model plain(vocab = 32, hidden = 32):
    tokens[batch, seq]: token
    x = embed(tokens, vocab -> hidden)
    logits = linear(rms_norm(x), hidden -> vocab)
    return logits
"""


def compiled(folder: Path, *words: str) -> Result:
    spec = folder / "plain.spec"
    spec.write_text(PLAIN, encoding="utf-8")
    return CliRunner().invoke(app, ["compile", str(spec), "-o", str(folder / "build"), "--build", *words])


def figures(*problems: str) -> dict[str, object]:
    return {"seconds": 0.5, "shared": 16, "products": (), "code_bytes": 9000, "resources": None, "problems": problems}


@pytest.fixture
def nothing_is_built(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Builds have these problems, without being made."""
    return lambda *problems: monkeypatch.setattr(ahead, "_figures", lambda made, target: figures(*problems))


def test_compile_shows_what_its_kernels_ask_for(tmp_path: Path, nothing_is_built: Callable[..., None]) -> None:
    nothing_is_built()
    said = compiled(tmp_path, "--target", "sm_80")
    assert said.exit_code == 0, said.output
    path, head, first, *rest = said.stdout.splitlines()
    assert path.endswith("model.py") and Path(path).is_file() and head.startswith("sm_80")
    assert any(line.startswith("rms_norm_fwd_kernel") for line in (first, *rest))
    assert any("x bf16[4096, 32]" in line for line in rest)
    assert list((tmp_path / "build" / ".builds").glob("rms_norm_fwd_kernel-sm_80-*.json"))


def test_only_a_generation_of_gpu_is_built_for(tmp_path: Path) -> None:
    for target in ("cpu", "triton"):
        said = compiled(tmp_path, "--target", target)
        assert said.exit_code == 2 and f"error[unknown-target]: kernels are not built for `{target}`" in said.stderr
        assert "targets: sm_80, sm_90, sm_100" in said.stderr


def test_a_kernel_that_cannot_be_used_is_told(tmp_path: Path, nothing_is_built: Callable[..., None]) -> None:
    """As it was tuned it is the lock's fault, and ours where it is as the compiler made it."""
    nothing_is_built("300,000 bytes of shared memory")
    said = compiled(tmp_path, "--target", "sm_90")
    assert said.exit_code == 1 and "cannot be used: 300,000 bytes of shared memory" in said.stdout
    lock = tmp_path / "my.lock"
    lock.write_text(Lock("sm_90", triton.__version__).text(), encoding="utf-8")
    said = compiled(tmp_path, "--target", "sm_90", "--lock", str(lock))
    assert said.exit_code == 2 and "error[bad-lock]: `" in said.stderr and "300,000 bytes" in said.stderr
