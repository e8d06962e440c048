"""What the parts of the elaborator share: its state, and what they ask of each other."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from .. import program as pg
from .. import syntax as sx
from ..diagnostics import Collector, SpecError
from ..load import Found
from ..program import Init
from ..selectors import Selector
from ..source import Span
from .bodies import Elaborated, Given
from .builder import Builder
from .environment import Environment
from .values import Dim, Tensor, Waiting

if TYPE_CHECKING:
    from .rewriting import Rewrites


class Machine(ABC):
    """State of one elaboration. `ops` is the table of the floor above, `required` its mark of a setting without
    default."""

    ops: Mapping[str, Any]
    required: Any
    collector: Collector
    memo: dict[Any, Elaborated]
    finished: dict[str, Elaborated]
    bodies: dict[str, pg.Body]
    loops: dict[str, Builder]
    ends: list[Callable[[], None]]
    running: list[str]
    resolving: list[Found]
    sheets: dict[int, Rewrites]
    segments: set[str]
    standard: frozenset[str]
    coordinates: dict[tuple[int, str], tuple[Dim, sx.Expr | None]]
    lent: dict[str, Elaborated]
    followers: dict[str, pg.Clock]

    # Of the elaborator itself.
    @abstractmethod
    def new_op_call(
        self, op: Any, tensors: Any, settings: Any, span: Span, spans: Any, made: dict[Any, Dim]
    ) -> Any: ...
    @abstractmethod
    def is_owned(self, value: Any) -> bool: ...
    @abstractmethod
    def fresh_body(self, base: str) -> str: ...
    @abstractmethod
    def finish_later(self, name: str, builder: Builder, inputs: list[Tensor], outputs: list[Tensor]) -> None: ...

    # Of expressions.
    @abstractmethod
    def value(self, expr: sx.Expr, env: Environment, hint: str | None = None) -> Any: ...
    @abstractmethod
    def number(self, expr: sx.Expr, env: Environment) -> Any: ...
    @abstractmethod
    def whole_numbers(self, expr: sx.Expr, env: Environment) -> list[int]: ...
    @abstractmethod
    def items(self, expr: sx.Expr, env: Environment) -> list[Any]: ...
    @abstractmethod
    def unpack(self, names: tuple[str, ...], item: Any, env: Environment, span: Span) -> None: ...
    @abstractmethod
    def dims(self, expr: sx.Expr, env: Environment) -> tuple[Dim, ...]: ...
    @abstractmethod
    def arrow(self, expr: sx.Arrow, env: Environment) -> tuple[tuple[Dim, ...], ...]: ...
    @abstractmethod
    def split(self, expr: sx.Arrow, env: Environment) -> tuple[tuple[Dim, ...], ...]: ...
    @abstractmethod
    def join(self, expr: sx.Arrow, env: Environment) -> tuple[tuple[Dim, ...], ...]: ...
    @abstractmethod
    def grouped(self, expr: sx.Expr, env: Environment) -> tuple[Dim, pg.Clock]: ...
    @abstractmethod
    def term(self, value: Any, span: Span) -> sx.Expr: ...
    @abstractmethod
    def resolved(self, expr: sx.Expr, query: Dim, key: Dim) -> sx.Expr: ...
    @abstractmethod
    def distribution(self, expr: sx.Expr, env: Environment) -> Init: ...
    @abstractmethod
    def unknown(self, name: str, span: Span, env: Environment) -> SpecError: ...

    # Of calls.
    @abstractmethod
    def declared(self, found: Found, span: Span) -> Any: ...
    @abstractmethod
    def apply(
        self, callee: Waiting, tensors: dict[str, Any], env: Environment, span: Span, hint: str | None
    ) -> Any: ...
    @abstractmethod
    def input_names(self, callee: Waiting) -> list[str]: ...
    @abstractmethod
    def call_op(self, callee: Waiting, expr: sx.Call, env: Environment, hint: str | None) -> Any: ...
    @abstractmethod
    def apply_op(
        self, op: Any, tensors: Mapping[str, Any], settings: Mapping[str, Any], spans: Mapping[str, Span],
        env: Environment, span: Span, hint: str | None, shared: Any = None,
    ) -> Any: ...  # fmt: skip
    @abstractmethod
    def call_block(self, callee: Waiting, expr: sx.Call, env: Environment, hint: str | None) -> Any: ...
    @abstractmethod
    def run_block(self, callee: Waiting, given: Given, env: Environment, span: Span, hint: str | None) -> Any: ...
    @abstractmethod
    def run_inline(
        self, callee: Waiting, given: Given, env: Environment | None, span: Span, hint: str | None
    ) -> Any: ...
    @abstractmethod
    def body_of(self, callee: Waiting, given: Given, env: Environment, span: Span) -> Elaborated: ...
    @abstractmethod
    def swap(self, made: Elaborated, given: Given) -> dict[int, Dim]: ...
    @abstractmethod
    def key(self, value: Any, dims: list[Dim]) -> Any: ...
    @abstractmethod
    def route(self, expr: sx.Call, env: Environment, hint: str | None) -> Tensor: ...

    # Of rules.
    @abstractmethod
    def sheet_of(self, found: Found, env: Environment) -> Rewrites: ...
    @abstractmethod
    def rewritten(self, callee: Waiting, env: Environment, hint: str | None) -> tuple[Waiting, str | None]: ...
    @abstractmethod
    def invoke(
        self, callee: Waiting, tensors: dict[str, Any], env: Environment, span: Span, hint: str | None
    ) -> Any: ...
    @abstractmethod
    def may_be_absent(self, selector: Selector) -> bool: ...

    # Of statements.
    @abstractmethod
    def run_body(self, declaration: sx.Function, env: Environment, hint: str | None) -> list[Any]: ...
