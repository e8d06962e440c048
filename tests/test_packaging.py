"""What ships: the wheel holds the tree and runs without it, and what README, Makefile and pins say is so."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterable
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import heddle

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
README = (ROOT / "README.md").read_text()

SHIPPED = ("dsl", "lowering", "codegen", "runtime", "specs")


def should_ship(tree: Path) -> set[str]:
    """Every file of the packages and of `specs`, whatever its kind, but for a room's notes; and the two of the root."""
    files = [p for folder in SHIPPED for p in (tree / folder).rglob("*") if p.is_file() and p.name != "README.md"]
    kept = {p.relative_to(tree).as_posix() for p in files if p.parent.name != "__pycache__"}
    return kept | {"__init__.py", "py.typed"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this tree, built from a copy: setuptools leaves its `build` folder beside what it builds."""
    tree = tmp_path_factory.mktemp("wheel") / "tree"
    shutil.copytree(
        ROOT, tree, ignore=shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist", "runs")
    )
    built = tree.with_name("built")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--quiet", "--no-deps"]
    run = subprocess.run(
        [*pip, "--no-build-isolation", "--wheel-dir", str(built), str(tree)], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    (found,) = built.glob("*.whl")
    return found


def test_the_wheel_holds_the_tree_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    inside = {n.removeprefix("heddle/") for n in names if n.startswith("heddle/")}
    assert inside == should_ship(ROOT)
    assert {n.split("/")[0] for n in names} == {"heddle", f"heddle_lang-{heddle.__version__}.dist-info"}
    assert any(n.endswith("licenses/LICENSE") for n in names)


def test_a_file_of_a_new_kind_would_be_missed(tmp_path: Path) -> None:
    for name in ("dsl/table.bin", "lowering/ops/linear/README.md", "codegen/__pycache__/emit.pyc", "tests/test_a.py"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).touch()
    assert should_ship(tmp_path) == {"dsl/table.bin", "__init__.py", "py.typed"}


def test_the_wheel_runs_the_readme_without_the_tree(wheel: Path, tmp_path: Path) -> None:
    """Checks, compiles and runs the specs that README shows, from an unpacked wheel."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    names = [str(tmp_path / f"{n}.spec") for n in ("my", "tuned", "reader", "shrink")]
    for place, name in enumerate(names):
        Path(name).write_text(readme_spec(place))
    code = (
        "import sys, heddle, torch\n"
        f"assert heddle.__file__.startswith({str(tmp_path / 'site')!r}), heddle.__file__\n"
        f"names, more = {names!r}, [{{}}, {{}}, {{'neighbors': torch.zeros(1, 1, 2, 128, dtype=torch.long)}}]\n"
        "for spec, given in zip(names, more):\n"
        "    logits = heddle.compile(spec)(torch.zeros(1, 70, dtype=torch.long), **given)\n"
        "    assert logits.shape[:2] == (1, 70) and logits.isfinite().all(), logits\n"
        "from heddle.dsl.load import load\n"
        "from heddle.runtime.recipes import planned\n"
        "from pathlib import Path\n"
        "assert planned(load(Path(names[3]))).returned == ('student',)\n"
        "from heddle.runtime.cli import main\n"
        "sys.argv = ['heddle', 'check', *names]\n"
        "sys.exit(main())\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "site")},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr


def readme_spec(place: int = 0) -> str:
    """A spec in README: a model, its variant, one that retrieves, a recipe."""
    found: list[str] = re.findall(r"^```spec\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    return found[place]


def test_the_readme_shows_the_error_that_is_printed(tmp_path: Path) -> None:
    (shown,) = re.findall(r"^```text\n(error.*?)^```", README, re.MULTILINE | re.DOTALL)
    (wrong, right) = re.findall(r"^Write `(\w+)` for `(\w+)` in the fifth line", README, re.MULTILINE)[0]
    lines = readme_spec().splitlines()
    lines[4] = lines[4].replace(right, wrong)
    (tmp_path / "my.spec").write_text("\n".join(lines) + "\n")
    code = "import sys; from heddle.runtime.cli import main; sys.argv = ['heddle', 'check', 'my.spec']; main()"
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert (run.returncode, run.stdout) == (2, "")
    assert run.stderr.strip() == shown.strip()


def test_the_readme_gives_the_committed_figures() -> None:
    section = README.split("## How fast it is")[1].split("\n## ")[0]
    results = [json.loads((ROOT / "benchmarks" / "results" / f"{n}.json").read_text())["jobs"] for n in ("cpu", "gpu")]
    shown = [float(n) for n in re.findall(r"(\d\.\d)\s+times", section)]
    assert shown == [round(jobs[job]["ratio"], 1) for jobs in results for job in results[0]]


def test_the_readme_lists_the_commands() -> None:
    """Those that exist, each once; and what is not built is not among them."""
    from typer.main import get_command

    from heddle.runtime import cli

    table = README.split("## Commands")[1].split("\n## ")[0]
    listed = re.findall(r"^\| `heddle ([a-z]+)", table, re.MULTILINE)
    assert sorted(listed) == sorted(get_command(cli.app).commands)


def test_every_dependency_is_pinned_within_its_range() -> None:
    project = PROJECT["project"]
    extras = project["optional-dependencies"].values()
    wanted = [Requirement(r) for r in [*project["dependencies"], *(r for extra in extras for r in extra)]]
    assert unpinned([r for r in wanted if r.name != project["name"]], (ROOT / "constraints.txt").read_text()) == []


def unpinned(wanted: Iterable[Requirement], constraints: str) -> list[str]:
    """Requirements that no line of `constraints` pins to a version they allow."""
    pins = dict(re.findall(r"^([\w.-]+)==(\S+)", constraints, re.MULTILINE))
    return [str(r) for r in wanted if r.name not in pins or not r.specifier.contains(pins[r.name])]


def test_a_missing_pin_is_found() -> None:
    wanted = [Requirement(r) for r in ("lark>=1.2", "torch>=2.11,<2.14", "rich")]
    assert unpinned(wanted, "lark==1.3.1\ntorch==2.14.0\n") == ["torch<2.14,>=2.11", "rich"]


def test_the_makefile_lists_its_targets_and_runs_what_exists() -> None:
    text = (ROOT / "Makefile").read_text()
    (phony,) = re.findall(r"^\.PHONY: (.*)$", text, re.MULTILINE)
    shown = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert re.findall(r"^ *make ([\w-]+) +\S", shown, re.MULTILINE) == phony.split()
    assert [s for s in re.findall(r"\S+\.py\b", text) if not (ROOT / s).is_file()] == []


def test_continuous_integration_is_one_runnable_file() -> None:
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
