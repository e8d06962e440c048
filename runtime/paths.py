"""What users type to name a model."""

from __future__ import annotations

from pathlib import Path


def split_entry(path: str | Path, model: str | None = None) -> tuple[Path, str | None]:
    """`FILE:MODEL` or `FILE` into both parts."""
    text = str(path)
    if model is None and ".spec:" in text:
        text, _, model = text.rpartition(":")
    return Path(text), model
