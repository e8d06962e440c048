"""What a file declares, as plain data with a JSON schema: for editors, sites and other programs.

`describe(load(path)).model_dump_json()` is the data, `schema()` says what it may hold. Expressions are text in the
language; places are `file:line:column`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from . import syntax as sx
from .load import File
from .printer import print_expr
from .source import Span


class _Data(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ParameterSpec(_Data):
    """A parameter; `default` is an expression, or None where the caller must say."""

    name: str
    default: str | None = None


class DimSpec(_Data):
    """A dim of an input; `size` is given where the program fixes or defaults it; `name` is None for a bare number."""

    name: str | None
    size: str | None = None


class InputSpec(_Data):
    """An input. `dims` is None where it has no brackets; `kind` is `real` if not said."""

    name: str
    dims: tuple[DimSpec, ...] | None = None
    kind: str = "real"
    optional: bool = False
    default: str | None = None


class CodeSpec(_Data):
    """A statement, rule or equation: its kind, its text (the head of it if it has a body), and its body."""

    kind: str
    text: str
    place: str
    body: tuple[CodeSpec, ...] = ()


class _Declared(_Data):
    name: str
    doc: str = ""
    place: str


class _FunctionSpec(_Declared):
    parameters: tuple[ParameterSpec, ...] = ()
    inputs: tuple[InputSpec, ...] = ()
    coordinates: tuple[InputSpec, ...] = ()
    statements: tuple[CodeSpec, ...] = ()


class BlockSpec(_FunctionSpec):
    """A function over tensors."""

    keyword: Literal["block"] = "block"


class ModelSpec(_FunctionSpec):
    """A function over tensors that can be trained and run."""

    keyword: Literal["model"] = "model"


class PipelineSpec(_FunctionSpec):
    """A function of one record."""

    keyword: Literal["pipeline"] = "pipeline"


class RecipeSpec(_FunctionSpec):
    """A function over models, data and indexes."""

    keyword: Literal["recipe"] = "recipe"


class PrecisionSpec(_Declared):
    """In which format each part of a model is kept and computed."""

    keyword: Literal["precision"] = "precision"
    rules: tuple[CodeSpec, ...] = ()


class LayoutSpec(_Declared):
    """How a model lies on a mesh of processes."""

    keyword: Literal["layout"] = "layout"
    rules: tuple[CodeSpec, ...] = ()


class VariantSpec(_Declared):
    """A declaration made from another: `model a = b(...)`, `layout a = b with: rules`. `of` is the keyword."""

    keyword: Literal["variant"] = "variant"
    of: str
    value: str
    rules: tuple[CodeSpec, ...] = ()


class CheckpointSpec(_Declared):
    """Which of our names are which of theirs. `target` is their class, `model` our model or block."""

    keyword: Literal["checkpoint"] = "checkpoint"
    target: str
    model: str
    equations: tuple[CodeSpec, ...] = ()


DeclarationSpec = Annotated[
    BlockSpec | ModelSpec | PipelineSpec | RecipeSpec | PrecisionSpec | LayoutSpec | VariantSpec | CheckpointSpec,
    Field(discriminator="keyword"),
]


class UseSpec(_Data):
    """Names taken from another file."""

    names: tuple[str, ...]
    path: str


class FileSpec(_Data):
    """A file: what it uses and what it declares, in order."""

    name: str
    uses: tuple[UseSpec, ...] = ()
    declarations: tuple[DeclarationSpec, ...] = ()


_FUNCTIONS: dict[str, type[_FunctionSpec]] = {
    "block": BlockSpec, "model": ModelSpec, "pipeline": PipelineSpec, "recipe": RecipeSpec,
}  # fmt: skip


def describe(file: File) -> FileSpec:
    """A loaded file as data."""
    uses = tuple(UseSpec(names=tuple(n.id for n in u.names), path=u.path) for u in file.module.uses)
    return FileSpec(name=file.source.name, uses=uses, declarations=tuple(map(_declaration, file.module.declarations)))


def schema() -> dict[str, Any]:
    """The JSON schema of `FileSpec`."""
    return FileSpec.model_json_schema()


def _declaration(d: sx.Declaration) -> Any:
    common: dict[str, Any] = {"name": d.name, "doc": d.doc, "place": str(d.name_span)}
    if isinstance(d, sx.Variant):
        return VariantSpec(**common, of=d.keyword, value=print_expr(d.value), rules=_rules(d.rules))
    if isinstance(d, sx.Sheet):
        made = PrecisionSpec if d.keyword == "precision" else LayoutSpec
        return made(**common, rules=_rules(d.rules))
    if isinstance(d, sx.Checkpoint):
        equations = tuple(_code(e) for e in d.equations)
        return CheckpointSpec(**common, target=d.target, model=d.model.id, equations=equations)
    return _FUNCTIONS[d.keyword](
        **common,
        parameters=tuple(ParameterSpec(name=p.name, default=_text(p.default)) for p in d.parameters),
        inputs=tuple(_input(s) for s in d.body if isinstance(s, sx.Input)),
        coordinates=tuple(_coordinate(s) for s in d.body if isinstance(s, sx.CoordinateInput)),
        statements=tuple(_statement(s) for s in d.body if not isinstance(s, (sx.Input, sx.CoordinateInput))),
    )


def _text(expr: sx.Expr | None) -> str | None:
    return None if expr is None else print_expr(expr)


def _input(s: sx.Input) -> InputSpec:
    dims = None if s.shape is None else tuple(DimSpec(name=i.name, size=_text(i.size)) for i in s.shape)
    kind = _text(s.kind) or "real"
    return InputSpec(name=s.name, dims=dims, kind=kind, optional=s.optional, default=_text(s.default))


def _coordinate(s: sx.CoordinateInput) -> InputSpec:
    return InputSpec(name=f"{s.dim}.{s.name}", kind=print_expr(s.kind), optional=s.optional, default=_text(s.default))


def _code(node: sx.Syntax) -> CodeSpec:
    return CodeSpec(kind=type(node).__name__.lower(), text=_joined(node.span), place=str(node.span))


def _joined(span: Span) -> str:
    """The text of a node without the indentation of where it stands."""
    indent = " " * (span.column - 1)
    return "\n".join(line.removeprefix(indent).rstrip() for line in span.text.splitlines())


def _statement(s: sx.Statement) -> CodeSpec:
    place = str(s.span)
    if isinstance(s, sx.For):
        body = tuple(map(_statement, s.body))
        return CodeSpec(kind="for", text=f"for {', '.join(s.names)} in {print_expr(s.source)}", place=place, body=body)
    if isinstance(s, sx.If):
        parts = [
            CodeSpec(kind="branch", text=print_expr(test), place=str(test.span), body=tuple(map(_statement, body)))
            for test, body in s.branches
        ]
        if s.otherwise:
            otherwise = tuple(map(_statement, s.otherwise))
            parts.append(CodeSpec(kind="else", text="else", place=otherwise[0].place, body=otherwise))
        return CodeSpec(kind="if", text=f"if {print_expr(s.branches[0][0])}", place=place, body=tuple(parts))
    return _code(s)


def _rules(rules: tuple[sx.Rule, ...]) -> tuple[CodeSpec, ...]:
    made = []
    for r in rules:
        if isinstance(r, sx.Scoped):
            head = "in " + ", ".join(print_expr(s.value) + "?" * s.optional for s in r.selectors)
            made.append(CodeSpec(kind="scoped", text=head, place=str(r.span), body=_rules(r.rules)))
        else:
            made.append(_code(r))
    return tuple(made)
