"""Checking specs given as text, and the pages of the error codes as data.

`python -m tests.dsl.checking --update` writes the rendering that each page shows.
"""

from __future__ import annotations

import ast
import os
import re
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from heddle.dsl.diagnostics import Diagnostic, SpecError
from heddle.dsl.load import load
from heddle.dsl.render import render_all

ROOT = Path(__file__).resolve().parents[2]
PAGES = ROOT / "dsl" / "errors"
_FENCE = re.compile(r"^```(spec|text)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_FILE = re.compile(r"# file: (\S+)(?: as (\S+))?\n")


def diagnostics_of(files: Mapping[str, str | bytes]) -> list[Diagnostic]:
    """What checking `broken.spec` says, with these files around it. Exceptions but `SpecError` go on to the caller."""
    from heddle.runtime.check import check_file

    before = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        project = Path(folder) / "project"
        project.mkdir()
        os.chdir(project)
        try:
            for name, text in files.items():
                Path(name).parent.mkdir(parents=True, exist_ok=True)
                Path(name).write_bytes(text if isinstance(text, bytes) else text.encode())
            check_file(load("broken.spec"))
        except SpecError as error:
            return list(error.diagnostics)
        finally:
            os.chdir(before)
    return []


@dataclass(frozen=True)
class Page:
    """A page with its parts. A page without a spec shows a command; nothing of it is executed."""

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
        return {**self.broken, **_files(self.text.partition("\n## Cure\n")[2])}

    @property
    def rendering(self) -> str:
        return next((m[2] for m in _FENCE.finditer(self.text) if m[1] == "text"), "").rstrip("\n")

    @property
    def is_executed(self) -> bool:
        return bool(self.broken) or "```spec" in self.text

    def actual(self) -> str:
        """What the broken spec really gives."""
        return render_all(diagnostics_of(self.broken))


def _files(text: str) -> dict[str, bytes]:
    found = {}
    for match in _FENCE.finditer(text):
        if match[1] == "spec":
            head = _FILE.match(match[2])
            name, coding = (head[1], head[2] or "utf-8") if head else ("broken.spec", "utf-8")
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
    """Write what each broken spec gives into its page."""
    for page in pages():
        if page.is_executed:
            head, rest = page.text.split("```text\n", 1)
            text = f"{head}```text\n{page.actual()}\n```\n" + rest.split("\n```\n", 1)[1]
            if text != page.text:
                (PAGES / f"{page.code}.md").write_text(text, encoding="utf-8")
                print(f"wrote {page.code}")


if __name__ == "__main__" and "--update" in sys.argv:
    update()
