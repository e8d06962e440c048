"""Files and scopes: what `use` finds, what it refuses, and that a bad file is a diagnostic."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

import pytest

from heddle.dsl.diagnostics import Diagnostic, SpecError
from heddle.dsl.load import load, load_text, read_source, shipped_folder, standard_file, standard_index
from heddle.dsl.parse import MOST_CHARACTERS

ONE = "block {name}():\n    x[hidden]\n    return x\n"


def write(folder: Path, files: Mapping[str, str | bytes]) -> Path:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder


def errors(path: Path, root: Path | None = None) -> list[Diagnostic]:
    with pytest.raises(SpecError) as caught:
        load(path, root)
    return list(caught.value.diagnostics)


def codes(path: Path, root: Path | None = None) -> list[str]:
    return [d.code for d in errors(path, root)]


# --- what a name stands for ----------------------------------------------------------------------


def test_a_shipped_file_without_its_folder_is_found_for_who_asked(tmp_path: Path) -> None:
    (tmp_path / "a.spec").write_text('use nemotron_h from "nemotron_h.spec"\n', encoding="utf-8")
    with pytest.raises(SpecError) as error:
        load(tmp_path / "a.spec")
    assert error.value.diagnostics[0].help == "shipped: `nemotron_h/nemotron_h.spec`"


def test_own_names_then_used_then_standard(tmp_path: Path) -> None:
    write(tmp_path, {"a.spec": 'use two from "b.spec"\n' + ONE.format(name="one"), "b.spec": ONE.format(name="two")})
    file = load(tmp_path / "a.spec")
    one, two, mlp = file.lookup("one"), file.lookup("two"), file.lookup("mlp")
    assert one is not None
    assert two is not None
    assert mlp is not None
    assert (one.file, two.file.path.name, mlp.file.is_standard) == (file, "b.spec", True)
    assert two.declaration.name_span.source.name.endswith("b.spec")
    assert file.lookup("three") is None
    assert {"one", "two", "mlp"} <= file.names()


def test_paths_are_relative_to_the_file_that_uses_them(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "top.spec": 'use a from "deep/a.spec"\nmodel m = a()\n',
            "deep/a.spec": 'use b from "../b.spec"\n' + ONE.format(name="a"),
            "b.spec": ONE.format(name="b"),
        },
    )
    file = load(tmp_path / "top.spec")
    assert {f.path.name for f in file.all_files()} == {"top.spec", "a.spec", "b.spec"}


def test_shipped_specs_are_in_reach_from_anywhere(tmp_path: Path) -> None:
    path = next(
        p for p in sorted(shipped_folder().rglob("*.spec")) if p.parent.name != "std" and "model " in p.read_text()
    )
    name = next(line.split()[1].split("(")[0] for line in path.read_text().splitlines() if line.startswith("model "))
    text = f'use {name} from "{path.relative_to(shipped_folder()).as_posix()}"\n'
    found = load_text(text, folder=tmp_path).lookup(name)
    assert found is not None
    assert found.file.path == path


def test_a_file_beside_comes_before_a_shipped_one(tmp_path: Path) -> None:
    write(
        tmp_path,
        {"std/blocks.spec": ONE.format(name="mine"), "a.spec": 'use mine from "std/blocks.spec"\nmodel m = mine()\n'},
    )
    assert load(tmp_path / "a.spec").lookup("mine")


def test_each_file_is_parsed_once(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "a.spec": 'use b from "b.spec"\nuse c from "c.spec"\nmodel m = b()\n',
            "b.spec": 'use d from "d.spec"\n' + ONE.format(name="b"),
            "c.spec": 'use d from "d.spec"\n' + ONE.format(name="c"),
            "d.spec": ONE.format(name="d"),
        },
    )
    file = load(tmp_path / "a.spec")
    assert file.used["b"].used["d"] is file.used["c"].used["d"]


def test_standard_files_are_parsed_when_asked_for() -> None:
    index = standard_index()
    assert {"mlp", "attention", "mamba2", "causal", "next_token"} <= set(index)
    for name in index:
        file = standard_file(name)
        assert file is not None
        assert name in file.declared
    assert standard_file("nothing") is None


# --- what `use` refuses --------------------------------------------------------------------------


def test_a_circle_is_shown_with_its_files(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "a.spec": 'use b from "b.spec"\n' + ONE.format(name="a"),
            "b.spec": 'use c from "c.spec"\n' + ONE.format(name="b"),
            "c.spec": 'use a from "a.spec"\n' + ONE.format(name="c"),
        },
    )
    (error,) = errors(tmp_path / "a.spec")
    assert error.code == "use-cycle"
    assert "a.spec -> b.spec -> c.spec -> a.spec" in error.message
    assert error.primary.span.source.name.endswith("c.spec")


def test_a_file_that_uses_itself(tmp_path: Path) -> None:
    write(tmp_path, {"a.spec": 'use a from "a.spec"\n' + ONE.format(name="a")})
    assert codes(tmp_path / "a.spec") == ["use-cycle"]


def test_missing_files_and_names_with_the_nearest(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "a.spec": 'use one from "blocs.spec"\nuse tow, three, one from "blocks.spec"\nmodel m = one()\n',
            "blocks.spec": ONE.format(name="one") + "\n" + ONE.format(name="two"),
        },
    )
    found = errors(tmp_path / "a.spec")
    assert [(d.code, d.primary.span.text) for d in found] == [
        ("no-such-file", '"blocs.spec"'),
        ("unknown-name", "tow"),
        ("unknown-name", "three"),
    ]
    assert "`blocks.spec`" in (found[0].help or "")
    assert "`two`" in (found[1].help or "")


def test_a_name_that_comes_from_elsewhere_says_from_where(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "a.spec": 'use deep from "b.spec"\nmodel m = deep()\n',
            "b.spec": 'use deep from "c.spec"\n' + ONE.format(name="b"),
            "c.spec": ONE.format(name="deep"),
        },
    )
    (error,) = errors(tmp_path / "a.spec")
    assert "`c.spec`" in (error.help or "")


@pytest.mark.parametrize("path", ["../out.spec", "deep/../../out.spec", "/etc/hosts", "C:/a.spec", "\\\\host\\a.spec"])
def test_paths_do_not_leave_the_project(tmp_path: Path, path: str) -> None:
    write(tmp_path, {"out.spec": ONE.format(name="x"), "project/a.spec": f'use x from "{path}"\nmodel m = x()\n'})
    assert codes(tmp_path / "project" / "a.spec", tmp_path / "project") == ["path-escape"]


def test_links_do_not_leave_the_project_either(tmp_path: Path) -> None:
    write(tmp_path, {"out.spec": ONE.format(name="x"), "project/a.spec": 'use x from "link.spec"\nmodel m = x()\n'})
    (tmp_path / "project" / "link.spec").symlink_to(tmp_path / "out.spec")
    assert codes(tmp_path / "project" / "a.spec", tmp_path / "project") == ["path-escape"]


@pytest.mark.parametrize(
    "path", ["", ".", "..", "a" * 5000, "circle.spec", "folder", "a.spec/b.spec", "é\u202e.spec", "a\tb"]
)
def test_odd_paths_are_diagnostics(tmp_path: Path, path: str) -> None:
    write(tmp_path, {"a.spec": f'use x from "{path}"\n' + ONE.format(name="a"), "folder/b.spec": ""})
    (tmp_path / "circle.spec").symlink_to(tmp_path / "circle.spec")
    assert codes(tmp_path / "a.spec")[0] in ("no-such-file", "path-escape")


def test_declared_twice_shows_both(tmp_path: Path) -> None:
    write(
        tmp_path, {"a.spec": 'use one from "b.spec"\n' + ONE.format(name="one") * 2, "b.spec": ONE.format(name="one")}
    )
    found = errors(tmp_path / "a.spec")
    assert [d.code for d in found] == ["duplicate-name", "duplicate-name"]
    assert [d.secondary[0].span.line for d in found] == [2, 2]


def test_standard_names_are_taken(tmp_path: Path) -> None:
    write(tmp_path, {"a.spec": ONE.format(name="mlp")})
    assert codes(tmp_path / "a.spec") == ["duplicate-name"]


def test_errors_of_all_files_come_together(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "a.spec": 'use b from "b.spec"\nuse c from "c.spec"\nuse d from "d.spec"\n' + ONE.format(name="a") * 2,
            "b.spec": "block b(:\n",
            "c.spec": 'use z from "z.spec"\n' + ONE.format(name="c"),
            "d.spec": ONE.format(name="e"),
        },
    )
    assert sorted(codes(tmp_path / "a.spec")) == ["duplicate-name", "no-such-file", "unclosed-bracket", "unknown-name"]


# --- files that are no specs ---------------------------------------------------------------------


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    write(tmp_path, {"a.spec": b"block a(): return 1\n# caf\xe9\n"})
    (error,) = errors(tmp_path / "a.spec")
    assert error.code == "not-text"
    assert re.match("byte 25 .* 0xe9", error.message)
    assert error.primary.span.line == 2


def test_a_mark_at_the_start_is_no_text(tmp_path: Path) -> None:
    write(tmp_path, {"a.spec": "\ufeff".encode() + ONE.format(name="a").encode()})
    assert load(tmp_path / "a.spec").declared.keys() == {"a"}


def test_folders_devices_and_missing_files(tmp_path: Path) -> None:
    write(tmp_path, {"model.spec": ONE.format(name="a")})
    assert codes(tmp_path) == ["no-such-file"]
    assert codes(Path(os.devnull)) == ["no-such-file"]
    (error,) = errors(tmp_path / "modle.spec")
    assert error.code == "no-such-file"
    assert "`model.spec`" in (error.help or "")
    assert codes(tmp_path / "model.spec" / "a.spec") == ["no-such-file"]


def test_a_large_file_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "a.spec").open("wb") as file:
        file.truncate(MOST_CHARACTERS * 100)
    assert codes(tmp_path / "a.spec") == ["too-large"]
    with pytest.raises(SpecError):
        read_source(tmp_path / "a.spec")
