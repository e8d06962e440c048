"""Errors of users that are not about a spec: missing files, damaged checkpoints, full disks."""

from __future__ import annotations


class UserError(Exception):
    """What the user can mend. `code` is stable and has a page (`heddle explain CODE`); the command line exits with 2."""

    def __init__(self, code: str, message: str, help: str | None = None):
        super().__init__(message)
        self.code, self.message, self.help = code, message, help
