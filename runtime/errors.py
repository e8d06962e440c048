"""Errors of users that are not about a spec: missing files, damaged checkpoints, full disks."""

from __future__ import annotations

from collections.abc import Sequence

from ..dsl.diagnostics import Diagnostic
from ..dsl.render import render_all


def said(error: BaseException) -> str:
    """What an error of something else is, on one line."""
    first = next((line for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


class SpecWarning(UserWarning):
    """What a user should know about a spec that works. The command line prints it as it prints errors."""

    def __init__(self, diagnostics: Sequence[Diagnostic]):
        super().__init__(render_all(diagnostics))
        self.diagnostics = tuple(diagnostics)


class UserError(Exception):
    """What the user can mend. `code` is stable and has a page (`heddle explain CODE`); the command line exits with 2.

    `message` is one line. What is given on further lines of it, such as the names of many tensors, goes to `help`, a
    line each, before what would help.
    """

    def __init__(self, code: str, message: str, help: str | None = None):
        super().__init__(message)
        first, *more = (line.strip() for line in message.split("\n"))
        self.code, self.message = code, first
        self.help = "\n".join([*more, *([help] if help else [])]) or None
