"""What users type to name a model, and files that they are given."""

from __future__ import annotations

import os
from pathlib import Path

from .errors import UserError


def split_entry(path: str | Path, model: str | None = None) -> tuple[Path, str | None]:
    """`FILE:MODEL` or `FILE` into both parts."""
    text = str(path)
    if model is None and ".spec:" in text:
        text, _, model = text.rpartition(":")
    return Path(text), model


def write_text(path: Path, text: str, mode: int | None = None) -> None:
    """Write a file, UTF-8, whole or not at all; `mode` are its permissions. Raises `UserError` (`cannot-write`)."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        if mode is not None:
            partial.chmod(mode)
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise UserError("cannot-write", f"cannot write `{path}`: {error.strerror}") from None
