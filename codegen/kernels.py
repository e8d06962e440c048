"""The files of kernels: a room's template, filled with plain facts."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import Any

import jinja2

from ..lowering.ops import room_of


@cache
def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
        line_statement_prefix="##", loader=jinja2.FunctionLoader(_text),
    )  # fmt: skip


def _text(name: str) -> str:
    """A template by its name: `room/file` of a room of ops, or a file of this package's."""
    room, _, file = name.rpartition("/")
    folder = files("heddle.lowering.ops").joinpath(room) if room else files("heddle.codegen").joinpath("templates")
    return folder.joinpath(file).read_text(encoding="utf-8")


def render(op: str, facts: Mapping[str, Any], template: str = "triton.py.jinja") -> str:
    """The text of a kernel's file: a template of the room of `op`, filled."""
    return _environment().get_template(f"{room_of(op)}/{template}").render(**facts)


def render_file(template: str, facts: Mapping[str, Any]) -> str:
    """The text of a kernel's file that no room owns: a template of this package, filled."""
    return _environment().get_template(template).render(**facts)
