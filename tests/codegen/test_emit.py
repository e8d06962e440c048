"""The generated module: the same bytes everywhere, readable, and at home where the compiler is not."""

from __future__ import annotations

import ast
import itertools
import os
import re
import shutil
import subprocess
import sys
import textwrap
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from heddle.codegen import layout, names
from heddle.dsl.diagnostics import SpecError
from heddle.dsl.elaborate import entries
from heddle.dsl.load import load, load_text, shipped_folder
from heddle.runtime import lib
from heddle.runtime.check import program_of
from heddle.runtime.compile import build, instantiate

from ..specs.published import INPUTS

TINY = sorted(shipped_folder().glob("*/tiny*.spec"))
ROOT = Path(__file__).resolve().parents[2]
twins = pytest.mark.parametrize("path", TINY, ids=lambda p: f"{p.parent.name}-{p.stem}")


@cache
def source(path: Path) -> str:
    return build(program_of(load(path))).source


def python(code: str, *args: object, folder: Path = ROOT, **env: str) -> str:
    """What a fresh interpreter prints."""
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, args)]
    env = {"PATH": "/usr/bin:/bin", **env}
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout


# --- the same bytes ------------------------------------------------------------------------------


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
    elsewhere = tmp_path / "else where"
    shutil.copytree(shipped_folder(), elsewhere)
    moved = [elsewhere / path.relative_to(shipped_folder()) for path in TINY]
    first = python(code, *TINY, PYTHONHASHSEED="0")
    second = python(code, *(os.path.relpath(p, tmp_path) for p in moved), folder=tmp_path, PYTHONHASHSEED="4711")
    assert first == second and len(first.split()) == len(TINY)
    assert not any(str(folder) in source(path) for path in TINY for folder in (ROOT, Path.home(), Path.cwd()))


# --- at home elsewhere ---------------------------------------------------------------------------


def test_they_run_where_the_compiler_is_not(tmp_path):
    """Only torch and heddle.runtime.lib may be imported; everything else of Heddle, and what it uses, is blocked."""
    for path in TINY:
        (tmp_path / f"{path.parent.name}_{path.stem}.py").write_text(source(path))
    code = f"INPUTS = {INPUTS}\n" + textwrap.dedent("""
        import importlib.abc, pathlib, runpy, sys
        class Blocked(importlib.abc.MetaPathFinder):
            def find_spec(self, name, path, target=None):
                library = name == "heddle.runtime" or name.startswith("heddle.runtime.lib")
                if name.startswith("heddle.") and not library or name in ("lark", "pydantic"):
                    raise ImportError(name + " is blocked")
        sys.meta_path.insert(0, Blocked())
        import torch
        for path in sys.argv[1:]:
            model, tokens = runpy.run_path(path)["Model"]().initialise(0), torch.arange(12).view(2, 6)
            sizes = INPUTS.get(pathlib.Path(path).stem.replace("_", "/", 1), {})
            rows = lambda name, groups: torch.ones(2, len(groups), *sizes[name], dtype=torch.int64)
            given = {n: (lambda tokens, groups, n=n: rows(n, groups)) for n in sizes}
            come = {n: rows(n, range(model.follows[n].groups(6))) for n in sizes}
            sum(model.losses(tokens, **come).values()).backward()
            model.generate(tokens, 3, given=given)
        for name in ("heddle.dsl.load", "heddle.lowering.graph", "heddle.codegen.emit", "lark", "pydantic"):
            try:
                __import__(name)
            except ImportError:
                continue
            raise SystemExit("the block does not work")
        print(sorted(m for m in sys.modules if m.startswith("heddle") and "lib" not in m))
    """)
    assert python(code, *sorted(tmp_path.iterdir())) == "['heddle', 'heddle.runtime']\n"


# --- readable ------------------------------------------------------------------------------------


@twins
def test_it_reads_like_a_module(path):
    """Parses; one class a distinct block, each with a docstring; the spec's line stands above each group."""
    text = source(path)
    tree = ast.parse(text)
    classes = [n for n in tree.body if isinstance(n, ast.ClassDef)]
    assert all(ast.get_docstring(c) for c in classes) and ast.get_docstring(tree)
    assert len({c.name for c in classes}) == len(classes)
    program = program_of(load(path))
    owners = [b for b in program.bodies.values() if (b.weights or b.instances) and not b.emits or b.rules]
    blocks = {b for b in program.bodies if b not in program.objectives.values()}
    assert len(owners) <= len(classes) <= len(blocks)
    imports = {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    assert imports == {"torch", "heddle.runtime"}
    assert {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names} == {
        "torch", "torch.nn.functional"
    }  # fmt: skip
    lines = text.splitlines()
    for function in (f for c in classes for f in c.body if isinstance(f, ast.FunctionDef)):
        if function.name in ("forward", "run", "losses_of", "counts_of"):
            above = list(itertools.takewhile(lambda s: s.startswith("#"), reversed(before(lines, function.body[0]))))
            assert above and re.fullmatch(r"# \w+\.spec:\d+  \S.*", above[-1]), f"{function.name}: {above}"


def before(lines: list[str], statement: ast.stmt) -> list[str]:
    return [line.strip() for line in lines[: statement.lineno - 1]]


@twins
def test_every_comment_is_a_line_of_a_spec(path):
    """Whole, also where it goes on below; and the lines of the model's own spec come in order within each method."""
    specs = {f.path.name: f.path.read_text().splitlines() for f in load(path).all_files()}
    specs |= {p.name: p.read_text().splitlines() for p in (shipped_folder() / "std").glob("*.spec")}
    comments = re.findall(r"^ *# (\w+\.spec):(\d+)  (.*(?:\n *#  .*)*)", source(path), re.MULTILINE)
    assert len(comments) > 20
    for file, line, said in comments:
        wanted = specs[file][int(line) - 1].split("  #")[0]
        assert re.sub(r"\s*\n *#\s*", " ", said).split() == wanted.split()


SHIPPED = sorted(
    p
    for p in shipped_folder().glob("*/*.spec")
    if p.parent.name != "std" and p.stem != p.parent.name and entries(load(p))
)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_lines_fit(path):
    lines = source(path).splitlines()
    assert [line for line in lines if len(line) > 120 or line != line.rstrip() or "\t" in line] == []


def test_ruff_finds_nothing(tmp_path):
    """No unused variable, no undefined name, no line too long."""
    ruff = Path(sys.executable).parent / "ruff"
    if not ruff.exists():
        pytest.skip("ruff is not installed")
    for i, path in enumerate(TINY):
        (tmp_path / f"model{i}.py").write_text(source(path))
    rules = ["--select", "E,F,W", "--ignore", "F401", "--line-length", "120"]  # the head imports what most modules need
    command = [ruff, "check", "--isolated", "--no-cache", *rules, "."]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


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


# --- layout --------------------------------------------------------------------------------------

words = st.text("bcgh", min_size=1, max_size=16)
expressions = st.recursive(
    words,
    lambda inner: (
        st.builds("{}({})".format, words, st.lists(inner, max_size=5).map(", ".join))
        | st.builds("{} {} {}".format, inner, st.sampled_from("+-*/"), inner)
        | st.builds("({}, {})".format, inner, inner)
        | st.builds("{}[:, None, {}]".format, words, words)
        | st.builds('{{"a(": {}, **{}}}'.format, inner, words)
        | st.builds("f(lambda query, key: {}, x={})".format, inner, inner)
    ),
    max_leaves=25,
)


@settings(max_examples=150)
@given(one=expressions, two=expressions, form=st.sampled_from(["x = {}", "return {}, {}", "a, b = {}, {}", "return {} if more else {}"]))  # fmt: skip
def test_a_statement_is_the_same_on_more_lines(one, two, form):
    text = form.format(one, two)
    made = layout.statement(text, 8)
    assert ast.dump(ast.parse(f"def f():\n        {text}")) == ast.dump(ast.parse(f"def f():\n{made}"))
    assert all(len(line) <= 120 for line in made.splitlines()) or len(text) > 112
    if len(text) <= 112:
        assert "\n" not in made


@settings(max_examples=100)
@given(text=st.text(st.characters(codec="ascii", exclude_categories=["Cc"]), min_size=1, max_size=300))
@pytest.mark.parametrize("write", [layout.docstring, layout.comment])
def test_any_text_can_be_said(write, text):
    """Quotes, backslashes, brackets: the module still parses, and says just that."""
    text = " ".join(text.split()) or "-"
    made = write(text, 4)
    tree = ast.parse(f"class C:\n{made}\n    x = 1\n")
    if write is layout.docstring:
        assert ast.get_docstring(tree.body[0]).split() == text.split()
    else:
        assert [ast.dump(n) for n in tree.body[0].body] == [ast.dump(ast.parse("x = 1").body[0])]
        assert all(len(line) <= 120 for line in made.splitlines())


def test_a_spec_may_say_anything_in_its_comments():
    text = (
        '## He said """no\\N{x}""" and "yes"\nmodel quotes(vocab = 5, hidden = 4):\n    tokens[batch, seq]: token\n'
        '    x = embed(tokens, vocab -> hidden)   # "a\\\n    logits = linear(x, hidden -> vocab)\n    return logits\n'
    )
    model = instantiate(build(program_of(load_text(text))))
    assert type(model).__doc__ == 'He said """no\\N{x}""" and "yes"'


# --- names ---------------------------------------------------------------------------------------

NAMED = {
    "value": "N = silu(x)\nfor layer in 2:\n    x = x + mlp(x, 4)\nx = x + N * N + exp(N)",
    "loop": "for N in 2:\n    x = x + attention(x, 2)",
    "param": "param N[hidden] = 0.5\ny = N * x\nfor layer in 2:\n    x = x + mlp(x, 4)\nx = x + y + N",
    "linear": "N = linear(x, hidden -> hidden)\nx = x + silu(N) + N",
    "block": "N = attention(x, 2)\nx = x + N",
    "shared": "shared N = mlp(4)\nfor layer in 2:\n    x = x + N(x)\nx = N(x)",
    "constant": "N = cos(index(hidden) / 3)\nx = x * N + attention(x, 2, rotary = rope())\nx = x + N",
    "input": "x = inside(x)",
    "declared": "x = outside(x)",
}


def named(kind: str, name: str) -> torch.nn.Module:
    lines = "".join(f"    {line}\n" for line in NAMED[kind].split("\n"))
    text = (
        "block inside():\n    I[hidden]\n    y = I\n    for inner in 2:\n        y = y + mlp(y, 4)\n"
        "    return y + I + attention(I, 2)\n\nblock D():\n    x[hidden]\n    y = attention(x, 2)\n"
        "    return mlp(gelu(y), 3)\n\n"
        "model made(vocab = 7, hidden = 4):\n    tokens[batch, seq]: token\n    x = embed(tokens, vocab -> hidden)\n"
        f"{lines}    logits = linear(x, hidden -> vocab)\n    return logits\n"
    )
    swap = {"N": name, "I": name if kind == "input" else "entry", "D": name if kind == "declared" else "outside"}
    swap["outside"] = swap["D"]
    text = re.sub(r"\b(N|I|D|outside)\b", lambda m: swap[m[1]], text)
    return instantiate(build(program_of(load_text(text, folder=shipped_folder()))), dtype=torch.float64)


def filled(model: torch.nn.Module) -> torch.Tensor:
    """Logits of a model whose weights follow from their order, not from their names."""
    order = [p.name for p in model.program.parameters()]
    with torch.no_grad():
        for path, _, view in model.named_logical_parameters():
            view.copy_(0.3 * torch.randn(view.shape, generator=torch.Generator().manual_seed(order.index(path))))
        tokens = torch.arange(12).view(2, 6) % 7
        full, stream = model(tokens), model.stream(2, 6)
        steps = torch.cat([model.decode(tokens[:, i : i + 1], stream) for i in range(6)], 1)
    torch.testing.assert_close(steps, full, rtol=0, atol=1e-10)
    return full


WORDS = ("kept", "layer", "more", "sums", "at", "state", "self", "stream", "lib", "torch", "nn", "F", "f", "CAUSAL",
         "MASK_1", "Model", "zip", "print", "class", "forward", "type", "_buffers", "slots", "print_", "None")  # fmt: skip


@pytest.mark.parametrize("kind", NAMED)
def test_any_name_means_what_it_means_or_is_refused(kind):
    """A name of Python, torch, or the generated code changes nothing; where it cannot be, a line of the spec says so."""
    wanted, refused = filled(named(kind, "plain")), 0
    for word in WORDS:
        try:
            found = filled(named(kind, word))
        except SpecError as error:
            assert all(d.code in CODES and d.primary.span.source.text for d in error.diagnostics)
            refused += 1
        else:
            assert torch.equal(found, wanted), word
    assert refused <= len(WORDS) / 2


CODES = {"not-built-yet", "reserved-word", "same-name-twice", "not-a-function", "bound-twice", "wrong-kind", "syntax"}


def test_the_names_that_modules_have_are_known():
    """Of the installed torch, and of the library: none of their attributes can be hidden by weights."""
    has = {*dir(torch.nn.Module()), *dir(lib.Model), *dir(lib.Slots)}
    # What another library of this process has put into torch's class is none of torch's.
    others = {n for n, f in vars(torch.nn.Module).items() if not (getattr(f, "__module__", None) or "torch").startswith("torch")}
    assert {name for name in has if not names.is_taken(name)} - others == set()


def test_classes_are_all_different():
    found = names.class_names(["mlp_2", "mlp2", "Mlp2", "f", "F", "model", "cAUSAL", "_", "none"])
    assert len(set(found.values())) == len(found)
    assert not {"F", "Model", "CAUSAL", "None"} & set(found.values())
    text = """
block mlp2(ffn): return mlp(x, ffn)
model two(vocab = 16, hidden = 8):
    tokens[batch, seq]: token
    x = embed(tokens, vocab -> hidden)
    a = mlp(x, 4); b = mlp(a, 6); c = mlp2(b, 3)
    logits = linear(c, hidden -> vocab)
    return logits
""".replace("block mlp2(ffn): return", "block mlp2(ffn):\n    x[hidden]\n    return")
    made = instantiate(build(program_of(load_text(text))))
    sizes = {n: tuple(p.shape) for n, p in made.named_parameters() if n.endswith("up.weight")}
    assert sizes == {"a.up.weight": (4, 8), "b.up.weight": (6, 8), "c.out.up.weight": (3, 8)}


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
    found = re.findall(r"mean(?:_\d+)?", line)
    assert len(found) == len(set(found)) == 2, line


# --- weights -------------------------------------------------------------------------------------


def test_weights_that_nobody_reads_are_there():
    """They belong to the checkpoint: dropping what computes with them does not drop them."""
    text = """
model unread(vocab = 16, hidden = 8):
    tokens[batch, seq]: token
    x = embed(tokens, vocab -> hidden)
    lost = linear(rms_norm(x), hidden -> hidden, bias = true)
    conv = causal_conv(lost, 3)
    deep = attention(x, 2)
    other = embed(tokens, vocab -> hidden)
    logits = linear(x, hidden -> vocab, weight = other.weight)
    return logits
"""
    program = program_of(load_text(text))
    model = instantiate(build(program))
    shapes = {path: tuple(view.shape) for path, _, view in model.named_logical_parameters()}
    assert shapes == {p.name: p.shape for p in program.parameters()}
    assert torch.equal(model(torch.arange(3)[None]), model.x(torch.arange(3)[None]) @ model.other.weight.T)
