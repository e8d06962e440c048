"""The page of each error code: what it means, a broken spec, its rendering and the cure."""

from __future__ import annotations

from functools import cache
from importlib.resources import files


def explain(code: str) -> str | None:
    """The text of a code's page, or None for a code that does not exist."""
    if code not in codes():
        return None
    return files(__package__).joinpath("errors", f"{code}.md").read_text(encoding="utf-8")


def codes() -> list[str]:
    """Every code that has a page, sorted."""
    return list(_codes())


@cache
def _codes() -> tuple[str, ...]:
    folder = files(__package__).joinpath("errors")
    if not folder.is_dir():
        return ()
    return tuple(sorted(f.name.removesuffix(".md") for f in folder.iterdir() if f.name.endswith(".md")))
