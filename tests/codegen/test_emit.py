"""The generated module: the same bytes everywhere, readable, and at home where the compiler is not."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from heddle.dsl.load import load, load_text, shipped_folder
from heddle.runtime.check import program_of
from heddle.runtime.compile import build

TINY = sorted(shipped_folder().glob("*/tiny.spec"))
ROOT = Path(__file__).resolve().parents[2]
twins = pytest.mark.parametrize("path", TINY, ids=lambda p: p.parent.name)


def source(path: Path) -> str:
    return build(program_of(load(path))).source


def python(code: str, *args: object, **env: str) -> str:
    """What a fresh interpreter prints."""
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, env={"PATH": "/usr/bin:/bin", **env})
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_bytes_do_not_depend_on_hash_seed_time_or_folder(tmp_path):
    code = """
        import hashlib, sys
        from pathlib import Path
        from heddle.dsl.load import load
        from heddle.runtime.check import program_of
        from heddle.runtime.compile import build
        for path in sys.argv[1:]:
            print(hashlib.sha256(build(program_of(load(Path(path)))).source.encode()).hexdigest())
    """
    first, second = (python(code, *TINY, PYTHONHASHSEED=seed) for seed in ("0", "4711"))
    assert first == second and len(first.split()) == len(TINY)
    for path in shipped_folder().rglob("*.spec"):
        place = tmp_path / "elsewhere" / path.relative_to(shipped_folder())
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(path.read_text())
    for path in TINY:
        assert source(tmp_path / "elsewhere" / path.relative_to(shipped_folder())) == source(path)


@twins
def test_it_runs_where_the_compiler_is_not(path, tmp_path):
    """Only torch and heddle.runtime.lib may be imported; everything else of Heddle is blocked."""
    (tmp_path / "model.py").write_text(source(path))
    code = """
        import importlib.abc, runpy, sys
        class Blocked(importlib.abc.MetaPathFinder):
            def find_spec(self, name, path, target=None):
                library = name == "heddle.runtime" or name.startswith("heddle.runtime.lib")
                if name.startswith("heddle.") and not library:
                    raise ImportError(name + " is blocked")
        sys.meta_path.insert(0, Blocked())
        import torch
        Model = runpy.run_path(sys.argv[1])["Model"]
        model = Model().initialise(0)
        tokens = torch.arange(12).view(2, 6)
        sum(model.losses(tokens).values()).backward()
        model.generate(tokens, 3)
        for name in ("heddle.dsl.load", "lark"):
            try:
                __import__(name)
            except ImportError:
                continue
            assert name == "lark", "the block does not work"
        print(sorted(m for m in sys.modules if m.startswith("heddle") and "lib" not in m))
    """
    assert python(code, tmp_path / "model.py") == "['heddle', 'heddle.runtime']\n"


@twins
def test_it_reads_like_a_module(path):
    """Parses; one class a distinct block, each with a docstring; lines fit; the spec's line stands above each group."""
    text = source(path)
    tree = ast.parse(text)
    classes = [n for n in tree.body if isinstance(n, ast.ClassDef)]
    assert all(ast.get_docstring(c) for c in classes) and ast.get_docstring(tree)
    assert len({c.name for c in classes}) == len(classes)
    program = program_of(load(path))
    owners = [b for b in program.bodies.values() if (b.weights or b.instances) and not b.emits]
    assert len(classes) == len(owners)
    imports = {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    assert imports == {"torch", "heddle.runtime"}
    assert [line for line in text.splitlines() if line != line.rstrip()] == []
    lines = text.splitlines()
    for function in (f for c in classes for f in c.body if isinstance(f, ast.FunctionDef)):
        if function.name in ("forward", "run", "losses_of", "counts_of"):
            first = lines[function.body[0].lineno - 2].strip()
            assert re.fullmatch(r"# \w+\.spec:\d+  \S.*", first), f"{function.name}: {first}"


@twins
def test_every_comment_is_a_line_of_a_spec(path):
    specs = {
        p.name: p.read_text().splitlines()
        for p in shipped_folder().rglob("*.spec")
        if p.parent in (path.parent, shipped_folder() / "std")
    }
    for line in source(path).splitlines():
        found = re.fullmatch(r"\s*# (\w+\.spec):(\d+)  (.*)", line)
        if found:
            assert specs[found[1]][int(found[2]) - 1].strip().startswith(found[3])


def test_the_length_does_not_grow_with_depth():
    def lines(layers: int) -> int:
        text = f"""
model deep(vocab = 16, hidden = 8):
    tokens[batch, seq]: token
    x = embed(tokens, vocab -> hidden)
    for layer in {layers}:
        x = x + mlp(rms_norm(x), 12)
    logits = linear(x, hidden -> vocab)
    return logits
"""
        return len(build(program_of(load_text(text))).source.splitlines())

    assert lines(2) == lines(2000)


def test_a_name_is_not_reused_while_an_inlined_expression_still_needs_it():
    """`often` is written where it is read, behind a second value that is also called `mean`."""
    text = """
model twice(vocab = 16, hidden = 8):
    tokens[batch, seq]: token
    x = embed(tokens, vocab -> hidden)
    often = mean(x, over = hidden) / 2
    both  = often * mean(x ^ 2, over = hidden)
    logits = linear(outer(both, index(hidden)), hidden -> vocab)
    return logits
"""
    made = build(program_of(load_text(text))).source
    (line,) = (line.strip() for line in made.splitlines() if re.search(r"^ *outer = .*/ 2", line))
    names = re.findall(r"mean(?:_\d+)?", line)
    assert len(names) == len(set(names)) == 2, line
