"""The op table: every folder here is a room, and its `op.py` states `OPS`. Adding an op is adding a folder."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from importlib.resources import files
from types import ModuleType

from ..op import Op


@cache
def rooms() -> tuple[str, ...]:
    """The names of the rooms, sorted."""
    here = files(__name__)
    return tuple(sorted(p.name for p in here.iterdir() if p.is_dir() and p.joinpath("op.py").is_file()))


@cache
def table() -> dict[str, Op]:
    """Every op by its name in the language."""
    found: dict[str, Op] = {}
    for room in rooms():
        for op in import_module(f".{room}.op", __name__).OPS:
            if op.name in found:
                raise ValueError(f"two rooms define `{op.name}`")
            found[op.name] = op
    return found


@cache
def _rooms_of_ops() -> dict[str, str]:
    return {op.name: room for room in rooms() for op in import_module(f".{room}.op", __name__).OPS}


def room_of(op: str) -> str:
    """The room that defines an op."""
    return _rooms_of_ops()[op]


@cache
def has_part(op: str, module: str) -> bool:
    """Whether an op's room has a module of this name."""
    return files(__name__).joinpath(room_of(op), f"{module}.py").is_file()


def part(op: str, module: str) -> ModuleType:
    """A module of an op's room: `reference` (fp64 math, torch) or `cpu` (what the module emitter prints)."""
    return import_module(f".{room_of(op)}.{module}", __name__)
