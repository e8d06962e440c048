"""The kernels of every small shipped model: all are launched, and each kind builds for a generation of GPU."""

from __future__ import annotations

import re
from collections.abc import Callable
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
from heddle.runtime.ahead import build as build_ahead
from heddle.runtime.check import proved
from heddle.runtime.cli import app
from heddle.runtime.compile import Artifact, build, class_of
from heddle.runtime.launched import launched
from heddle.runtime.lib.kernels import Launch
from heddle.runtime.plan.step import Feed

SPECS = sorted((Path(__file__).resolve().parents[2] / "specs").glob("*/tiny*.spec"))
GPUS = [t for t in TARGETS.values() if t.capability]
# What a thread may read again from memory: a tile that is a little too large, and not one that is twice so.
SPILLS = 16
# Kinds are spread over so many tests, which may run in as many processes.
PARTS = 4


@cache
def model(spec: Path) -> tuple[Artifact, Target, list[Launch]]:
    """A model for one of the targets, another for each spec, and what it launches."""
    target = GPUS[SPECS.index(spec) % len(GPUS)]
    artifact = build(proved(load(spec)), target.name)
    return artifact, target, launched(artifact, feed(artifact))


def feed(artifact: Artifact) -> Feed:
    """As many tokens as no kernel takes for few."""
    return Feed(rows=2, seq=min(128, class_of(artifact).longest or 128))


@pytest.mark.parametrize("spec", SPECS, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_every_kernel_that_is_written_is_launched(spec: Path) -> None:
    artifact, _, told = model(spec)
    assert artifact.files.kernels
    written = {name for text in artifact.files.kernels.values() for name in re.findall(r"^def (\w+_kernel)\(", text, re.M)}
    assert {launch.kernel.__name__ for launch in told} == written


def test_decoding_is_launched_behind_training() -> None:
    artifact, _, told = model(SPECS[0])
    tokens = [launch.args[0].shape for launch in told if launch.kernel.__name__.startswith("rms_norm_fwd")]
    assert tokens[0][0] == 2 * 128 and [s[0] for s in tokens[-2:]] == [2 * 112, 2]
    again = [launch.kernel.__name__ for launch in launched(artifact, feed(artifact))]
    assert again == [launch.kernel.__name__ for launch in told]


@pytest.mark.parametrize("part", range(PARTS))
def test_each_kind_of_kernel_builds_and_fits(part: int, pytestconfig: pytest.Config) -> None:
    """What was built in an earlier run is kept by pytest: only what changed is built again."""
    kept = Path(pytestconfig.cache.mkdir("builds"))  # type: ignore[union-attr]
    kinds: dict[str, list[tuple[Target, Launch]]] = {}
    for spec in SPECS:
        _, target, told = model(spec)
        for launch in {launch.kernel.__name__: launch for launch in told}.values():
            kinds.setdefault(launch.kernel.__name__, []).append((target, launch))
    for place, (_, found) in enumerate(sorted(kinds.items())):
        if place % PARTS == part:
            target, launch = found[place // PARTS % len(found)]
            (built,) = build_ahead([launch], target, kept)
            assert not built.problems, built
            assert built.resources and built.resources.spill_loads <= SPILLS, built


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
