"""The building's laws, as functions over a tree: each holds for this tree, and each can fail on a small planted one."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent

# The floors, the lowest first. Each may import those before it, and adds a layer of other people's packages.
FLOORS = ("dsl", "lowering", "codegen", "runtime")
ADDS = {"dsl": {"lark", "pydantic"}, "lowering": {"networkx"}, "codegen": {"jinja2"}}
LIB = "heddle.runtime.lib"

FAMILIES = (
    "nemotron", "llama", "mistral", "minitron", "retro", "bloom", "megatron", "gpt", "transformer_ls", "transformer-ls",
    "long_short", "long-short", "lra", "instructretro",
)  # fmt: skip
# (file, family) -> why a family's name stands in the compiler. Nearly always it belongs into a spec instead.
NAMED = {
    ("dsl/elaborate/expressions.py", "megatron"): "whose notation the `|` in a pattern string is",
    ("runtime/peers/rows.py", "llama"): "how another package calls the rounding of its norms",
    ("runtime/cli.py", "megatron"): "a data format that `heddle train` reads",
    ("runtime/data/indexed.py", "megatron"): "the data format that this reads",
    ("runtime/data/sources.py", "megatron"): "the same format, in the list of formats",
    ("runtime/train/optimizer.py", "megatron"): "whose rule of what decays this is",
}


class Import(NamedTuple):
    """One imported name: where it stands, whether it was written with dots, and its full dotted name."""

    path: str
    line: int
    relative: bool
    name: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line} imports {self.name}"


def sources(tree: Path, *suffixes: str) -> list[Path]:
    """The files of the floors that end so (default: .py), sorted."""
    wanted = suffixes or (".py",)
    return sorted(p for floor in FLOORS for p in (tree / floor).rglob("*") if p.suffix in wanted)


def imports(tree: Path, path: Path) -> Iterator[Import]:
    """Every import of a file, wherever it stands, and `import_module` of a name that is spelled out."""
    local = path.relative_to(tree)
    package = ("heddle", *local.parts[:-1])

    def absolute(name: str, dots: int) -> str:
        base = package[: len(package) - dots + 1] if dots else ()
        return ".".join((*base, *filter(None, [name])))

    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        match node:
            case ast.Import(names=names):
                found = [(False, alias.name) for alias in names]
            case ast.ImportFrom(module=module, names=names, level=dots):
                # `from .. import graph` may name a module, `from ..graph import Graph` does not: both are listed.
                base = absolute(module or "", dots)
                found = [(dots > 0, f"{base}.{alias.name}" if base else alias.name) for alias in names]
            case ast.Call(func=ast.Name("import_module" | "__import__") | ast.Attribute(attr="import_module")):
                name = _spelled(node.args[0]) if node.args else ""
                if not name:
                    continue
                bare = name.lstrip(".")
                found = [(name != bare, absolute(bare, len(name) - len(bare)).rstrip("."))]
            case _:
                continue
        yield from (Import(str(local), node.lineno, relative, name) for relative, name in found)


def _spelled(argument: ast.expr) -> str:
    """The literal text with which an argument begins: all of a string, or the head of an f-string."""
    match argument:
        case ast.Constant(value=str(text)) | ast.JoinedStr(values=[ast.Constant(value=str(text)), *_]):
            return text
        case _:
            return ""


def floor_of(name: str) -> str | None:
    """The floor that a dotted name of ours is on; `public` is the root package on top of them all."""
    parts = name.split(".")
    if parts[0] != "heddle":
        return None
    return parts[1] if len(parts) > 1 and parts[1] in FLOORS else "public"


def upward_imports(tree: Path) -> list[str]:
    """Imports of a higher floor, or of our own code by an absolute name."""
    wrong = []
    for path in sources(tree):
        mine = path.relative_to(tree).parts[0]
        allowed = {*FLOORS[: FLOORS.index(mine) + 1], *(["public"] if mine == "runtime" else [])}
        for found in imports(tree, path):
            first = found.name.split(".")[0]
            if not found.relative and (first == "heddle" or (first in FLOORS and (tree / first).is_dir())):
                wrong.append(f"{found}: by an absolute name")
            elif (floor := floor_of(found.name)) and floor not in allowed:
                wrong.append(f"{found}: {floor} is above {mine}")
    return wrong


def heavy_imports(tree: Path) -> list[str]:
    """Imports of packages that a floor does not have yet. An op's `reference.py` may use torch: it is its meaning."""
    wrong = []
    for path in sources(tree):
        mine = path.relative_to(tree).parts[0]
        if mine not in ADDS:
            continue
        allowed = set(sys.stdlib_module_names).union(*(ADDS[f] for f in FLOORS[: FLOORS.index(mine) + 1]))
        if mine == "lowering" and path.name == "reference.py":
            allowed |= {"torch"}
        wrong += [
            str(found)
            for found in imports(tree, path)
            if not found.relative and (first := found.name.split(".")[0]) not in allowed and first != "heddle"
        ]
    return wrong


def lib_imports(tree: Path) -> list[str]:
    """Imports of `runtime/lib` that would break where the compiler is deleted: all but itself, torch and Python."""
    allowed = {*sys.stdlib_module_names, "torch"}
    inside = tree / "runtime" / "lib"
    return [
        str(found)
        for path in sorted(inside.rglob("*.py"))
        for found in imports(tree, path)
        if (found.name != LIB and not found.name.startswith(LIB + "."))
        and (found.relative or found.name.split(".")[0] not in allowed)
    ]


def family_names(tree: Path, named: Mapping[tuple[str, str], str] = NAMED) -> list[str]:
    """Lines of the compiler that name a model family, in code or prose, and permissions that nobody needs.

    An op's citation (its line `source="..."`) may say whose convention it follows.
    """
    word = re.compile(r"(?<![A-Za-z])(?:" + "|".join(FAMILIES) + r")(?![a-z])", re.IGNORECASE)
    camel = re.compile("|".join(f"{f.capitalize()}(?=[A-Z])" for f in FAMILIES))
    found = [
        (path.relative_to(tree).as_posix(), match[0].lower(), number)
        for path in sources(tree, ".py", ".lark", ".jinja")
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if not (path.name == "op.py" and line.lstrip().startswith('source="'))
        for match in (*word.finditer(line), *camel.finditer(line))
    ]
    used = {(path, family) for path, family, _ in found}
    wrong = [f"{path}:{line} names {family}" for path, family, line in sorted({*found}) if (path, family) not in named]
    return wrong + [f"{path} no longer names {family}" for path, family in named if (path, family) not in used]


def undescribed(tree: Path) -> list[str]:
    """Files without a first docstring, and files whose name says nothing."""
    beside = ("tests", "examples", "benchmarks")
    files = [*sources(tree), *(path for folder in beside for path in sorted((tree / folder).rglob("*.py")))]
    wrong = [f"{p.relative_to(tree)} has no docstring" for p in files if not _docstring(p)]
    return wrong + [
        f"{p.relative_to(tree)} says nothing by its name"
        for p in files
        if re.search(r"(?:^|_)(?:utils?|helpers?|managers?)(?:_|$)", p.stem)
    ]


def _docstring(path: Path) -> str | None:
    return ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))


def twice_loaded(loaded: Mapping[str, str | None], tree: Path) -> list[str]:
    """Files of the tree that were loaded under two names: their classes and registries would exist twice."""
    names = defaultdict(set)
    for name, file in loaded.items():
        # `.venv` lies in the tree too, and what others load twice is theirs. Generated text has a name, and is no file.
        if file and (path := Path(file).resolve()).is_relative_to(tree) and ".venv" not in path.parts and path.is_file():
            names[path].add(name)
    return [f"{file} is {' and '.join(sorted(found))}" for file, found in sorted(names.items()) if len(found) > 1]


def module_names(tree: Path, under: str = "") -> list[str]:
    """The dotted names of all modules below a folder of the tree. `__main__` is a script and left out."""
    names = []
    for path in sources(tree):
        parts = path.relative_to(tree).with_suffix("").parts
        if parts[-1] != "__main__" and path.is_relative_to(tree / under):
            names.append(".".join(("heddle", *parts[: -1 if parts[-1] == "__init__" else None])))
    return names


def loaded_after(code: str, cwd: Path = ROOT) -> dict[str, str | None]:
    """The modules that are loaded, with their files, after a fresh Python in `cwd` ran the code."""
    report = "import json, sys; print(json.dumps({n: getattr(m, '__file__', None) for n, m in sys.modules.items()}))"
    run = subprocess.run([sys.executable, "-c", f"{code}\n{report}"], cwd=cwd, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


def packages_among(loaded: Iterable[str], *unwanted: str) -> list[str]:
    """Which of these top-level packages were loaded."""
    return sorted({name.split(".")[0] for name in loaded} & set(unwanted))


# --- the laws hold for this tree ----------------------------------------------------------------------------------


def test_there_is_something_to_check() -> None:
    assert {p.relative_to(ROOT).parts[0] for p in sources(ROOT)} == set(FLOORS)
    assert sum(1 for p in sources(ROOT) for _ in imports(ROOT, p)) > 100


@pytest.mark.parametrize("law", [upward_imports, heavy_imports, lib_imports, family_names, undescribed])
def test_law(law: Callable[[Path], list[str]]) -> None:
    assert law(ROOT) == []


def test_the_language_loads_neither_graphs_nor_tensors() -> None:
    modules = module_names(ROOT, "dsl")
    loaded = loaded_after(f"import heddle.dsl, {', '.join(modules)}")
    assert set(modules) <= set(loaded)
    assert packages_among(loaded, "torch", "networkx", "jinja2", "numpy", "triton", "transformers") == []


def test_the_api_is_lazy() -> None:
    loaded = loaded_after("import heddle; heddle.__version__; heddle.SpecError; dir(heddle)")
    assert packages_among(loaded, "torch", "networkx", "pydantic", "lark", "numpy") == []
    assert "heddle.runtime" not in loaded


def test_checking_a_spec_loads_no_tensors(tmp_path: Path) -> None:
    spec = tmp_path / "one.spec"
    spec.write_text(
        "model one(vocab = 11, hidden = 8):\n"
        "    tokens[batch, seq]: token\n"
        "    embedding = embed(tokens, vocab -> hidden)\n"
        "    logits = linear(embedding, hidden -> vocab)\n"
        "    return logits\n"
    )
    loaded = loaded_after(f"import heddle; heddle.check({str(spec)!r})", tmp_path)
    assert packages_among(loaded, "torch", "triton", "transformers") == []


def test_the_page_of_an_error_loads_no_tensors() -> None:
    loaded = loaded_after("from heddle.runtime.explain import explain_code; assert explain_code('unknown-name')")
    assert packages_among(loaded, "torch", "triton", "transformers") == []


def test_the_library_does_not_load_the_compiler_of_torch() -> None:
    assert "torch._dynamo" not in loaded_after("import heddle.runtime.lib, heddle.runtime.compile")


def test_no_file_is_loaded_twice_in_a_fresh_python() -> None:
    """From the root, where `import dsl` would be found too if anybody wrote it."""
    assert twice_loaded(loaded_after(f"import {', '.join(module_names(ROOT))}"), ROOT) == []


def test_no_file_is_loaded_twice_here() -> None:
    here = {name: getattr(module, "__file__", None) for name, module in list(sys.modules.items())}
    assert any(Path(file) == Path(__file__) for file in here.values() if file)
    assert twice_loaded(here, ROOT) == []


def test_public_names_exist() -> None:
    import heddle

    assert {"check", "compile", "load", "SpecError", "__version__"} == set(heddle.__all__) <= set(dir(heddle))
    assert all(getattr(heddle, name) is not None for name in heddle.__all__)
    with pytest.raises(AttributeError, match="no attribute `weave`"):
        heddle.weave  # noqa: B018


# --- and each can fail ----------------------------------------------------------------------------------------------


def plant(tree: Path, files: Mapping[str, str]) -> Path:
    """A small tree with these files, and an empty package on every floor."""
    for floor in FLOORS:
        (tree / floor).mkdir()
    for name, text in files.items():
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text(text)
    return tree


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("dsl/a.py", "from ..lowering.graph import Graph"),
        ("dsl/a.py", "from .. import lowering"),
        ("dsl/a.py", "from .. import check"),
        ("dsl/elaborate/a.py", "def late():\n    from ...lowering import graph"),
        ("dsl/a.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from ..codegen import emit"),
        ("lowering/ops/linear/op.py", "from ....codegen.emit import emit"),
        ("lowering/a.py", "from importlib import import_module\nimport_module('..runtime', __name__)"),
        ("lowering/a.py", "import importlib\nimportlib.import_module(f'..runtime.{1}', __package__)"),
        ("codegen/a.py", "try:\n    from ..runtime import lib\nexcept ImportError:\n    pass"),
        ("codegen/a.py", "import heddle.lowering.graph"),
        ("codegen/a.py", "from heddle.dsl import source"),
        ("runtime/a.py", "from dsl.source import Source"),
        ("runtime/a.py", "__import__('heddle.dsl')"),
    ],
)
def test_an_upward_or_absolute_import_is_found(tmp_path: Path, path: str, text: str) -> None:
    assert upward_imports(plant(tmp_path, {path: text})) != []


def test_a_downward_import_is_allowed(tmp_path: Path) -> None:
    tree = plant(
        tmp_path,
        {
            "dsl/a.py": "import re\nfrom . import source\nfrom .source import Source",
            "lowering/ops/linear/op.py": "from ....dsl.source import Source\nfrom ...op import Op",
            "lowering/ops/linear/reference.py": "import torch\nfrom ..embed import reference",
            "codegen/a.py": "from ..lowering import graph\nfrom ..dsl import source\nimport jinja2",
            "runtime/api.py": "from .. import __version__\nfrom ..codegen.emit import emit\nimport torch",
            "runtime/lib/a.py": "import math\nimport torch\nfrom torch import nn\nfrom .b import c\nfrom . import b",
        },
    )
    assert [law(tree) for law in (upward_imports, heavy_imports, lib_imports)] == [[], [], []]


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("dsl/a.py", "import torch"),
        ("dsl/a.py", "from networkx import DiGraph"),
        ("lowering/a.py", "def late():\n    import torch.nn"),
        ("lowering/ops/linear/op.py", "import torch"),
        ("lowering/ops/linear/reference.py", "import triton"),
        ("codegen/a.py", "import torch"),
    ],
)
def test_a_package_of_a_higher_floor_is_found(tmp_path: Path, path: str, text: str) -> None:
    assert heavy_imports(plant(tmp_path, {path: text})) != []


@pytest.mark.parametrize(
    "text",
    [
        "from ..api import compile",
        "from ... import dsl",
        "from .. import api",
        "import heddle.dsl",
        "import numpy",
        "def late():\n    import triton",
        "from heddle.dsl.source import Source",
    ],
)
def test_an_import_that_leaves_lib_is_found(tmp_path: Path, text: str) -> None:
    assert lib_imports(plant(tmp_path, {"runtime/lib/a.py": text})) != []


@pytest.mark.parametrize(
    "text",
    [
        "# as in Llama",
        "class NemotronH: ...",
        "x = 'LlamaForCausalLM'",
        "x = TinyLlamaModel",
        "gpt2 = 1",
        "is_retro = 1",
        '"""The Retro."""',
        "MEGATRON = 1",
        'source="not an op: Megatron-LM"',
    ],
)
def test_a_family_name_is_found(tmp_path: Path, text: str) -> None:
    assert len(family_names(plant(tmp_path, {"runtime/a.py": text}), {})) >= 1


def test_other_words_are_not_family_names(tmp_path: Path) -> None:
    words = "# retroactive, blooming, a mistralic wind; mamba2 is a standard block"
    cited = 'OP = Op(\n    source="the pairing of GPT-NeoX",\n)'
    assert family_names(plant(tmp_path, {"runtime/a.py": words, "lowering/ops/rotate/op.py": cited}), {}) == []


def test_a_permission_must_be_needed(tmp_path: Path) -> None:
    tree = plant(tmp_path, {"runtime/a.py": "# llama"})
    assert family_names(tree, {("runtime/a.py", "llama"): "a reason"}) == []
    assert family_names(tree, {("runtime/a.py", "llama"): "a reason", ("runtime/b.py", "gpt"): "none"}) != []


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("dsl/a.py", "x = 1"),
        ("tests/test_a.py", "# no docstring"),
        ("dsl/utils.py", '"""Says a lot."""'),
        ("runtime/graph_helpers.py", '"""Says a lot."""'),
        ("runtime/manager.py", '"""Says a lot."""'),
    ],
)
def test_an_undescribed_file_is_found(tmp_path: Path, path: str, text: str) -> None:
    assert len(undescribed(plant(tmp_path, {path: text, "dsl/b.py": '"""Why it is opened."""'}))) == 1


def test_a_file_with_two_names_is_found(tmp_path: Path) -> None:
    (tmp_path / "fabric.py").write_text("")
    code = (
        f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(tmp_path.parent)!r}]\n"
        f"import fabric; from importlib import import_module; import_module('{tmp_path.name}.fabric')"
    )
    assert len(twice_loaded(loaded_after(code, tmp_path), tmp_path.resolve())) == 1


def test_a_loaded_package_is_found(tmp_path: Path) -> None:
    assert packages_among(loaded_after("import networkx.algorithms", tmp_path), "torch", "networkx") == ["networkx"]
