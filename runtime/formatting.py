"""Formatting files in place."""

from __future__ import annotations

from pathlib import Path

from ..dsl.diagnostics import Collector
from ..dsl.format import format_source
from ..dsl.load import read_source
from .paths import write_text


def format_files(paths: list[Path], write: bool) -> list[Path]:
    """Format spec files; gives those that change. Nothing is written if any of them has a syntax error."""
    collector = Collector()
    texts: list[tuple[Path, str]] = []
    for path in paths:
        with collector.collecting():
            source = read_source(path)
            formatted = format_source(source)
            if formatted != source.text:
                texts.append((path, formatted))
    collector.finish()
    if write:
        for path, text in texts:
            write_text(path, text)
    return [path for path, _ in texts]
