"""What names stand for while a program is elaborated."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from .. import syntax as sx
from ..load import File, Found
from ..program import Clock, Init
from ..source import NOWHERE, Span


@dataclass(eq=False)
class Dim:
    """A dim: identity is identity, whatever its spelling. `lead` are the dims that its coordinates also vary along,
    `clock` says how the rows of a sequence follow the stream."""

    name: str
    size: int | None
    sequence: bool = False
    lead: tuple[Dim, ...] = ()
    span: Span | None = None
    factors: tuple[Dim, ...] = ()
    clock: Clock | None = None
    kind_word = "a dim"


@dataclass(eq=False)
class Cell:
    """A name's value. A number turns into a dim where the name first stands in a shape; aliases share the cell."""

    value: Any
    name: str
    span: Span = NOWHERE
    read: bool = False


@dataclass(eq=False)
class Tensor:
    """A value computed when the model runs. `owner` is the instance whose weights made it."""

    name: str
    kind: str
    dims: tuple[Dim, ...]
    builder: Any
    owner: str | None = None
    run: Any = None
    span: Span = NOWHERE
    kind_word = "a tensor"


class Shared(NamedTuple):
    """One set of weights: its name, the builder that owns it, and the rules in force where it is declared."""

    name: str
    builder: Any
    scope: Any


@dataclass(eq=False)
class Waiting:
    """A function that waits for its inputs: an op (`op`), a block (`found`), or what changes nothing (neither).

    `settings` are parameters given so far, as cells by name; `shared` is its one set of weights, if it has one.
    `sheets` are the rules of the variant that it is; `place` are the rules in force in its body where a rule has
    already been applied to it, `is_it` whether it stands inside what that rule built. `model` is the parameter of an
    objective that a whole model is given as, `lent` says that it is another model than the one that is trained.
    """

    op: Any = None
    found: Found | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    spans: dict[str, Span] = field(default_factory=dict)
    shared: Shared | None = None
    span: Span = NOWHERE
    sheets: tuple[Any, ...] = ()
    place: Any = None
    is_it: bool = False
    model: str | None = None
    lent: bool = False
    kind_word = "a function that waits for its input"

    @property
    def block(self) -> sx.Function:
        """The declaration of a block that waits."""
        assert self.found is not None
        assert isinstance(self.found.declaration, sx.Function)
        return self.found.declaration

    @property
    def file(self) -> File:
        """Where a block that waits is declared."""
        assert self.found is not None
        return self.found.file

    @property
    def name(self) -> str:
        if self.op is not None:
            return self.op.name
        return self.found.declaration.name if self.found else "identity"


@dataclass(frozen=True)
class Symbolic:
    """An expression of the coordinates of `query` and `key`: a mask, or a term of one."""

    expr: sx.Expr
    is_mask: bool = False
    kind_word = "an expression of `query` and `key`"


@dataclass(eq=False)
class Lazy:
    """An entry of a table: elaborated when it is used, once."""

    make: Callable[[], Any]
    made: bool = False
    value: Any = None

    def get(self) -> Any:
        if not self.made:
            self.value, self.made = self.make(), True
        return self.value


@dataclass(eq=False)
class TableOf:
    """A table of the language: entries are elaborated when they are used."""

    entries: dict[str, Lazy]
    span: Span
    kind_word = "a table"


@dataclass(frozen=True)
class Picked:
    """`b[query.position - key.position]`: of a tensor's last dim the place that an expression of positions says."""

    tensor: Tensor
    expr: sx.Expr
    kind_word = "scores that the distance picks"


@dataclass(frozen=True)
class Sloped:
    """`s * (key.position - query.position)`: an expression of positions, times a tensor."""

    tensor: Tensor
    expr: sx.Expr
    kind_word = "a tensor times a distance"


@dataclass(frozen=True)
class SequenceName:
    """`query` or `key` in a mask."""

    which: str
    kind_word = "the position of a query or key"


@dataclass(frozen=True)
class Poison:
    """The value of a name whose definition was wrong: using it says nothing more."""

    kind_word = "unknown"


POISON = Poison()
InitValue = Init
