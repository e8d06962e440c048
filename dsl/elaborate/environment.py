"""Names in scope while a body is elaborated."""

from __future__ import annotations

from typing import Any

from ..load import File
from ..source import NOWHERE, Span
from .builder import Builder
from .values import Cell

Scope = tuple[tuple[Any, Any], ...]
"""The sheets in force with the states of their selectors, the innermost first: see `rewriting.py`."""


class Environment:
    """Variables of one block or loop iteration; `parent` are those around a loop. Declarations come from `file`.

    `is_inline` is true for a block whose statements go into its caller's body: it does not name that body's dims."""

    def __init__(
        self, file: File, builder: Builder, parent: Environment | None = None, is_inline: bool = False,
        scope: Scope | None = None,
    ):  # fmt: skip
        self.file = file
        self.builder = builder
        self.parent = parent
        self.is_inline = is_inline
        self.scope: Scope = scope if scope is not None else parent.scope if parent is not None else ()
        self.cells: dict[str, Cell] = {}

    def cell(self, name: str) -> Cell | None:
        found = self.cells.get(name)
        if found is None and self.parent is not None:
            found = self.parent.cell(name)
        if found is not None:
            found.read = True
        return found

    def known(self, name: str) -> Cell:
        """The cell of a name that is in scope."""
        found = self.cell(name)
        assert found is not None, name
        return found

    def bind(self, name: str, value: Any, span: Span = NOWHERE) -> Cell:
        """Bind a name here: over the outer binding where a loop carries it, the loop sees to the rest."""
        cell = value if isinstance(value, Cell) else Cell(value, name, span)
        self.cells[name] = cell
        return cell

    def has(self, name: str) -> bool:
        return name in self.cells or (self.parent is not None and self.parent.has(name))

    def names(self) -> set[str]:
        return set(self.cells) | (self.parent.names() if self.parent else set())
