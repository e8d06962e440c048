"""Sheets and names that are bound once: what is wrong is found, with its place, and nothing else is."""

from __future__ import annotations

from pathlib import Path

import pytest

from heddle.dsl.diagnostics import SpecError
from heddle.dsl.layout import layout_of
from heddle.dsl.load import load, load_text
from heddle.dsl.names import check_names

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = sorted((ROOT / "tests" / "programs").glob("*.spec"))
MESH = "layout a:\n    mesh data = 4, tensor = 2\n"


def found(text: str) -> list[tuple[str, str]]:
    return [(d.code, d.primary.span.text) for d in check_names(load_text(text))]


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda p: p.stem)
def test_every_program_is_fine(path: Path) -> None:
    assert [d.message for d in check_names(load(path))] == []


@pytest.mark.parametrize(
    ("text", "errors"),
    [
        (MESH + "    shard heads over tensor, data between blocks\n    stages over data\n", []),
        (MESH + "    shard heads over tensro\n", [("unknown-name", "tensro")]),
        (MESH + "    shard data over data, pipe\n", [("unknown-name", "pipe")]),
        (MESH + "    stages over pipe, microbatches = 2\n", [("unknown-name", "pipe")]),
        (MESH + "    shard seq over tensor between block\n", [("unknown-name", "block")]),
        (MESH + "    shard parameters over data between microbatches\n", []),
        (MESH + "    expect all_reduce per attention <= 1\n", []),
        (MESH + "    expect all_redcue per attention <= 1\n", [("unknown-name", "all_redcue")]),
        (MESH + "    in moe:\n        mesh expert = 8\n        shard experts over expert\n", []),
        (
            MESH + "    in moe:\n        mesh expert = 8\n        shard experts over tensor\n",
            [("unknown-name", "tensor")],
        ),
        (MESH + "    in moe:\n        shard experts over tensor\n", []),
        (MESH + "layout b = a with:\n    shard seq over tensor\n", []),
        (MESH + "layout b = a with:\n    shard seq over context\n", [("unknown-name", "context")]),
        (MESH + "layout b = a with:\n    mesh context = 2\n    shard seq over tensor\n", [("unknown-name", "tensor")]),
        ("layout a:\n    shard seq over data\n", [("unknown-name", "data")]),
        ("layout a:\n    mesh data = 4, data = 2\n", [("duplicate-name", "data")]),
        (MESH + "    storage = bf16\n", [("wrong-rule", "storage")]),
        ("precision a:\n    storage = bf16; cache = e4m3\n    linear: fp8\n", []),
        ("precision a:\n    storge = bf16\n", [("unknown-setting", "storge")]),
        (
            "precision a:\n    mesh data = 4\n    recompute attend\n",
            [("wrong-rule", "mesh"), ("wrong-rule", "recompute")],
        ),
        ("precision a:\n    storage = bf16\nlayout b = a with:\n    recompute attend\n", [("wrong-base", "a")]),
        (MESH + "layout b = a(1) with:\n    recompute attend\n", [("wrong-base", "a(1)")]),
        (
            "layout a = b with:\n    recompute x\nlayout b = a with:\n    recompute x\n",
            [("cyclic-definition", "b"), ("cyclic-definition", "a")],
        ),
        ("block n(): return 1\nmodel m = n() with:\n    mesh data = 4\n    attend: it\n", [("wrong-rule", "mesh")]),
    ],
)
def test_sheets(text: str, errors: list[tuple[str, str]]) -> None:
    assert found(text) == errors


@pytest.mark.parametrize(
    ("rules", "apart"),
    [
        ("shard parameters over data", "blocks"),
        ("shard parameters over data between blocks", "blocks"),
        ("shard parameters over data between microbatches", "microbatches"),
        ("shard parameters over data between microbatches; shard optimizer over data", "microbatches"),
        ("shard parameters over data between microbatches; shard parameters over data", "blocks"),
    ],
)
def test_parameters_are_split_between_blocks_or_microbatches(rules: str, apart: str) -> None:
    layout = layout_of(load_text(f"{MESH}    {rules}\n"))
    assert layout.apart == apart and layout.stored_over("parameters") == ("data",) and not layout.splits


@pytest.mark.parametrize(
    "rule",
    [
        "shard heads over tensor between microbatches",
        "shard optimizer over data between blocks",
        "shard parameters, heads over data between microbatches",
    ],
)
def test_nothing_else_is_split_between_microbatches(rule: str) -> None:
    with pytest.raises(SpecError) as caught:
        layout_of(load_text(f"{MESH}    {rule}\n"))
    (found,) = caught.value.diagnostics
    assert found.code == "unknown-name" and found.primary.span.text == rule


@pytest.mark.parametrize(
    ("body", "errors"),
    [
        ("    b = merge(a)\n    c = merge(b)\n    return c\n", []),
        ("    a = merge(a)\n    return a\n", [("bound-twice", "a")]),
        ("    b = merge(a)\n    b, c = merge(b), a\n    return b\n", [("bound-twice", "b")]),
        ("    if a: b = merge(a)\n    else: b = a\n    return b\n", []),
        ("    if a: b = merge(a)\n    b = a\n    return b\n", [("bound-twice", "b")]),
        ("    for i in 3: b = merge(a)\n    return a\n", []),
        ("    for i in 3: a = merge(a)\n    return a\n", [("bound-twice", "a")]),
        ("    for i in 3: i = merge(a)\n    return a\n", [("bound-twice", "i")]),
    ],
)
def test_names_are_bound_once(body: str, errors: list[tuple[str, str]]) -> None:
    assert found(f"recipe r(a):\n{body}") == errors
    assert found(f"pipeline p(a):\n    q: text\n{body}") == errors


def test_blocks_may_bind_again() -> None:
    assert found("block b(a):\n    x[hidden]\n    x = x + a\n    x = x + x\n    return x\n") == []
