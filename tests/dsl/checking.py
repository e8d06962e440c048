"""Checking specs given as text, and the pages of the error codes as data.

A page shows a broken example and what the tool says of it, then the cure. The example is a spec that is checked (its
maps too, held against the page's config.json if it has one), or the commands of a session, which are run.
`python -m tests.dsl.checking --update` writes what the tool says into each page.
"""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from heddle.dsl.checkpoint import read_config, tensor_map
from heddle.dsl.diagnostics import Diagnostic, SpecError
from heddle.dsl.load import File, load, standard_index
from heddle.dsl.program import Program
from heddle.dsl.render import render_all

ROOT = Path(__file__).resolve().parents[2]
PAGES = ROOT / "dsl" / "errors"
_FENCE = re.compile(r"^```(spec|json|text)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_FILE = re.compile(r"# file: (\S+)(?: as (\S+))?\n")
_NAMES = {"spec": "broken.spec", "json": "config.json"}


# --- specs ---------------------------------------------------------------------------------------


def diagnostics_of(files: Mapping[str, str | bytes]) -> list[Diagnostic]:
    """What checking `broken.spec` says, with these files around it. Exceptions but `SpecError` go on to the caller."""
    from heddle.runtime.check import check_file

    with a_project(files):
        try:
            checked = check_file(load("broken.spec"))
            check_maps(checked.file, checked.programs, files.get("config.json"))
        except SpecError as error:
            return list(error.diagnostics)
    return []


def check_maps(file: File, programs: Mapping[str, Program], config: str | bytes | None = None) -> None:
    """Hold every map of a file against the models that it is for, and against a config. Raises `SpecError`."""
    from heddle.lowering.ops import table

    kinds = frozenset(standard_index()) | frozenset(table())
    for checkpoint in file.checkpoints:
        found = file.lookup(checkpoint.model.id)
        if config is not None and found is not None:
            read_config(checkpoint, json.loads(config), getattr(found.declaration, "parameters", ()))
        for program in programs.values():
            if program.family == checkpoint.model.id:
                tensor_map(checkpoint, program.parameters(), program.arguments, kinds)


@contextmanager
def a_project(files: Mapping[str, str | bytes], like: Path | None = None) -> Iterator[None]:
    """Stand in a new folder `project` with these files, and with those of another folder."""
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        project = Path(folder) / "project"
        if like is None:
            project.mkdir()
        else:
            shutil.copytree(like, project)
        os.chdir(project)
        try:
            write(files)
            yield
        finally:
            os.chdir(before)


def write(files: Mapping[str, str | bytes]) -> None:
    for name, text in files.items():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(text if isinstance(text, bytes) else text.encode())


# --- sessions ------------------------------------------------------------------------------------

TINY = """\
use llama from "llama/llama.spec"

model tiny = llama(vocab = 256, hidden = 32, ffn = 48, layers = 2, heads = 2)
"""
TEXT = "the warp is held on the loom, and the weft is drawn through over and under. "


@cache
def shelf() -> Path:
    """What lies in the folder of every session: a spec, texts, tokens, a run, and the run as a Hugging Face folder."""
    import numpy as np

    from heddle.runtime.data.indexed import write_index

    holder = tempfile.TemporaryDirectory()
    _kept.append(holder)
    folder = Path(holder.name) / "shelf"
    (folder / "texts").mkdir(parents=True)
    (folder / "tiny.spec").write_text(TINY, encoding="utf-8")
    for i in range(4):
        (folder / "texts" / f"{i}.txt").write_text(TEXT * (i + 3), encoding="utf-8")
    tokens = np.frombuffer((TEXT * 3).encode(), np.uint8).astype(np.int32)
    write_index(folder / "corpus.bin", [tokens, tokens])
    before = Path.cwd()
    os.chdir(folder)
    try:
        printed = session(
            "$ heddle train tiny.spec --data texts --seq 16 --batch 2 --steps 4 --save-every 2 -o runs/tiny\n"
            "$ heddle export runs/tiny -o tiny-hf\n"
        )
    finally:
        os.chdir(before)
    assert "error" not in printed, printed
    return folder


_kept: list[tempfile.TemporaryDirectory[str]] = []


def session(text: str) -> str:
    """Commands as a user types them, each behind `$ `, and what the last one says if it fails or warns; others must
    succeed. `heddle` runs in this process, anything else in a shell."""
    from typer.testing import CliRunner

    from heddle.runtime.cli import app

    commands = [line[2:] for line in text.split("\n") if line.startswith("$ ")]
    for i, command in enumerate(commands):
        program, *words = shlex.split(command)
        if program == "heddle":
            result = CliRunner().invoke(app, words)
            if not isinstance(result.exception, SystemExit | None):
                raise result.exception
            code, said = result.exit_code, result.stderr
        else:
            done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=60)
            code, said = done.returncode, done.stderr
        if code:
            assert (code, i) == (2, len(commands) - 1), f"`{command}` ends with {code}: {said}"
            said = said[max(said.find("error["), 0) :]
            return "\n".join([*(f"$ {c}" for c in commands), said.rstrip("\n")])
    if said.startswith("warning["):
        return "\n".join([*(f"$ {c}" for c in commands), said.rstrip("\n")])
    return "\n".join(f"$ {c}" for c in commands)


# --- pages ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Page:
    """A page with its parts."""

    code: str
    text: str

    @property
    def title(self) -> str:
        return self.text.partition("\n")[0]

    @property
    def broken(self) -> dict[str, bytes]:
        return _files(self.text.partition("\n## Cure\n")[0])

    @property
    def fixed(self) -> dict[str, bytes]:
        """The broken files, with those that the cure gives again."""
        return {**self.broken, **self.cure}

    @property
    def cure(self) -> dict[str, bytes]:
        return _files(self.text.partition("\n## Cure\n")[2])

    @property
    def rendering(self) -> str:
        """What is broken as the tool tells it; of a session with the commands."""
        return _text(self.text.partition("\n## Cure\n")[0])

    @property
    def cure_session(self) -> str:
        return _text(self.text.partition("\n## Cure\n")[2])

    @property
    def is_session(self) -> bool:
        return self.rendering.startswith("$ ")

    @property
    def is_executed(self) -> bool:
        return self.is_session or "```spec" in self.text

    def actual(self) -> str:
        """What the tool really says."""
        if not self.is_session:
            return render_all(diagnostics_of(self.broken))
        with a_project(self.broken, shelf()):
            return session(self.rendering)

    def cured(self) -> str:
        """What the tool says once the cure was done: nothing, or the commands alone."""
        if not self.is_session:
            return render_all(diagnostics_of(self.fixed))
        with a_project(self.broken, shelf()):
            session(self.rendering)
            write(self.cure)
            return session(self.cure_session)


def _text(part: str) -> str:
    return next((m[2] for m in _FENCE.finditer(part) if m[1] == "text"), "").rstrip("\n")


def _files(part: str) -> dict[str, bytes]:
    found = {}
    for match in _FENCE.finditer(part):
        if match[1] in _NAMES:
            head = _FILE.match(match[2])
            name, coding = (head[1], head[2] or "utf-8") if head else (_NAMES[match[1]], "utf-8")
            found[name] = (match[2][head.end() :] if head else match[2]).encode(coding)
    return found


def pages() -> list[Page]:
    return [Page(p.stem, p.read_text(encoding="utf-8")) for p in sorted(PAGES.glob("*.md"))]


def codes_in_sources() -> dict[str, str]:
    """Every code that a source file gives to `fail`, `Diagnostic` or `UserError`, with the first place of it."""
    found: dict[str, str] = {}
    for folder in ("dsl", "lowering", "codegen", "runtime"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                code = _code(node)
                if code is not None:
                    found.setdefault(code, f"{path.relative_to(ROOT)}:{node.lineno}")  # type: ignore[attr-defined]
    return found


def _code(node: ast.AST) -> str | None:
    if not isinstance(node, ast.Call):
        return None
    name = getattr(node.func, "id", getattr(node.func, "attr", None))
    if name not in ("fail", "Diagnostic", "UserError"):
        return None
    given = [*node.args[:1], *(k.value for k in node.keywords if k.arg == "code")]
    value = given[0].value if given and isinstance(given[0], ast.Constant) else None
    return value if isinstance(value, str) else None


def update() -> None:
    """Write what the tool says of each broken example into its page; those named behind `--update`, or all."""
    wanted = sys.argv[sys.argv.index("--update") + 1 :]
    for page in pages():
        if page.is_executed and (not wanted or page.code in wanted):
            head, rest = page.text.split("```text\n", 1)
            text = f"{head}```text\n{page.actual()}\n```\n" + rest.split("```\n", 1)[1]
            if text != page.text:
                (PAGES / f"{page.code}.md").write_text(text, encoding="utf-8")
                print(f"wrote {page.code}")


if __name__ == "__main__" and "--update" in sys.argv:
    update()
