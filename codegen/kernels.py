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
        line_statement_prefix="##",
    )  # fmt: skip


@cache
def _template(room: str, name: str) -> jinja2.Template:
    text = files("heddle.lowering.ops").joinpath(room, name).read_text(encoding="utf-8")
    return _environment().from_string(text)


def render(op: str, facts: Mapping[str, Any], template: str = "triton.py.jinja") -> str:
    """The text of a kernel's file: a template of the room of `op`, filled."""
    return _template(room_of(op), template).render(**facts)


def render_file(template: str, facts: Mapping[str, Any]) -> str:
    """The text of a kernel's file that no room owns: a template of this package, filled."""
    text = files("heddle.codegen").joinpath("templates", template).read_text(encoding="utf-8")
    return _environment().from_string(text).render(**facts)
