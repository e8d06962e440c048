"""Syntax nodes. Equality ignores places, so that printed and parsed again is equal.

The grammar is `grammar.lark`; each class names its rule. Nothing here has a meaning yet.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from .source import NOWHERE, Span


@dataclass(frozen=True, kw_only=True)
class Syntax:
    span: Span = field(default=NOWHERE, compare=False, repr=False)


# --- expressions ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Name(Syntax):
    id: str


@dataclass(frozen=True)
class Number(Syntax):
    """`text` keeps the spelling (`150_000_000`, `1e-5`); `value` is an int if it was written without `.` and `e`."""

    value: int | float
    text: str = field(default="", compare=False)


@dataclass(frozen=True)
class String(Syntax):
    """`value` is the text meant; `long` is true for triple quotes (first newline and common indentation dropped)."""

    value: str
    long: bool = False


@dataclass(frozen=True)
class Constant(Syntax):
    """`none`, `true`, `false`."""

    value: bool | None


@dataclass(frozen=True)
class ListOf(Syntax):
    """`[heads, head_dim]`, `[rows, py = patch]`, `[0 .. 14, 31]`."""

    items: tuple[Argument, ...]


@dataclass(frozen=True)
class TupleOf(Syntax):
    """`(k, v, causal, bias = b)`: a source of `attend`."""

    items: tuple[Argument, ...]


@dataclass(frozen=True)
class Range(Syntax):
    """`8 .. 23 step 3`, both ends included."""

    first: Expr
    last: Expr
    step: Expr | None = None


@dataclass(frozen=True)
class Comprehension(Syntax):
    """`[body for names in source if condition]`."""

    body: Expr
    names: tuple[str, ...]
    source: Expr
    condition: Expr | None = None


@dataclass(frozen=True)
class Table(Syntax):
    """`{"M": mamba2(...), code: 14.0}`; a bare name is its own text as a key (`quoted` False)."""

    pairs: tuple[Pair, ...]


@dataclass(frozen=True)
class Pair(Syntax):
    key: str
    value: Expr
    quoted: bool = True


@dataclass(frozen=True)
class Argument(Syntax):
    """An argument of a call, list or tuple. `name` for keywords, `given` for `given name = value`."""

    value: Expr
    name: str | None = None
    given: bool = False


@dataclass(frozen=True)
class Call(Syntax):
    function: Expr
    arguments: tuple[Argument, ...]


@dataclass(frozen=True)
class Index(Syntax):
    value: Expr
    arguments: tuple[Argument, ...]


@dataclass(frozen=True)
class Member(Syntax):
    value: Expr
    name: str


@dataclass(frozen=True)
class Members(Syntax):
    """`mamba2.[z, u, b, c, dt]`."""

    value: Expr
    items: tuple[Argument, ...]


@dataclass(frozen=True)
class Unary(Syntax):
    """`operator` is `-` or `not`."""

    operator: str
    value: Expr


@dataclass(frozen=True)
class Binary(Syntax):
    """`operator` is one of `+ - * / // % ^ == != <= >= < > in and or`; chains nest to the left."""

    operator: str
    left: Expr
    right: Expr


@dataclass(frozen=True)
class Choose(Syntax):
    """`yes if condition else no`."""

    condition: Expr
    yes: Expr
    no: Expr


@dataclass(frozen=True)
class Arrow(Syntax):
    """`hidden -> [heads, head_dim]`."""

    source: Expr
    target: Expr


Expr = (
    Name | Number | String | Constant | ListOf | TupleOf | Range | Comprehension | Table | Call | Index | Member
    | Members | Unary | Binary | Choose | Arrow
)  # fmt: skip


# --- statements of functions ---------------------------------------------------------------------


@dataclass(frozen=True)
class DimItem(Syntax):
    """A dim in a shape: `seq`, `pair = 2` (with `size`), or a bare number (`name` is None)."""

    name: str | None
    size: Expr | None = None


@dataclass(frozen=True)
class Input(Syntax):
    """`x[seq, hidden]`, `tokens[batch, seq]: token`, `question: text`. `shape` is None where no brackets stand."""

    name: str
    shape: tuple[DimItem, ...] | None
    kind: Expr | None = None
    optional: bool = False
    default: Expr | None = None


@dataclass(frozen=True)
class CoordinateInput(Syntax):
    """`seq.valid: coordinate?`, `seq.tile: coordinate = 0`."""

    dim: str
    name: str
    kind: Expr
    optional: bool = False
    default: Expr | None = None


@dataclass(frozen=True)
class Assign(Syntax):
    """`a, b = x, y`. `shape` names the last dims of the result (`y[out] = ...`); `shared` keeps one set of weights."""

    names: tuple[str, ...]
    values: tuple[Expr, ...]
    shape: tuple[DimItem, ...] | None = None
    shared: bool = False


@dataclass(frozen=True)
class Typed(Syntax):
    """A line of a graph dump: `q: real[seq, heads], k: real[seq, kv_heads] = value`, a kind and dims for each
    result."""

    names: tuple[str, ...]
    kinds: tuple[str, ...]
    shapes: tuple[tuple[DimItem, ...], ...]
    value: Expr


@dataclass(frozen=True)
class Coordinate(Syntax):
    """`seq.piece = seq.position // segment`."""

    dim: str
    name: str
    value: Expr


@dataclass(frozen=True)
class Declare(Syntax):
    """`param gate[1] = 0`, `buffer bias[experts] = 0`; `keyword` is `param` or `buffer`."""

    keyword: str
    name: str
    shape: tuple[DimItem, ...]
    value: Expr | None = None


@dataclass(frozen=True)
class Emit(Syntax):
    """`loss lm = ...`, `metric m = ...`, `update bias = ...`."""

    keyword: str
    name: str
    value: Expr


@dataclass(frozen=True)
class InitRule(Syntax):
    """`init out, moe.up: normal(std)`."""

    selectors: tuple[Selector, ...]
    value: Expr


@dataclass(frozen=True)
class Return(Syntax):
    values: tuple[Expr, ...]


@dataclass(frozen=True)
class If(Syntax):
    """`branches` are (condition, body); `otherwise` the body behind `else` (empty if none)."""

    branches: tuple[tuple[Expr, tuple[Statement, ...]], ...]
    otherwise: tuple[Statement, ...] = ()


@dataclass(frozen=True)
class For(Syntax):
    names: tuple[str, ...]
    source: Expr
    body: tuple[Statement, ...]


Statement = Input | CoordinateInput | Assign | Typed | Coordinate | Declare | Emit | InitRule | Return | If | For


@dataclass(frozen=True)
class Selector(Syntax):
    """A selector expression of a sheet, map or `init` (`linear in layer[first(2)]`, `moe.up`, `groups?`)."""

    value: Expr
    optional: bool = False


# --- declarations --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Use(Syntax):
    names: tuple[Name, ...]
    path: str
    path_span: Span = field(default=NOWHERE, compare=False, repr=False)


@dataclass(frozen=True)
class Parameter(Syntax):
    name: str
    default: Expr | None = None


@dataclass(frozen=True)
class Function(Syntax):
    """`block`, `model`, `pipeline` or `recipe` with a body. `doc` is the text of the `##` lines above it."""

    keyword: str
    name: str
    parameters: tuple[Parameter, ...]
    body: tuple[Statement, ...]
    doc: str = field(default="", compare=False)
    name_span: Span = field(default=NOWHERE, compare=False, repr=False)


@dataclass(frozen=True)
class Variant(Syntax):
    """`model a = b(...)`, `layout a = b with: rules`. `keyword` is any of the functions' or sheets' keywords."""

    keyword: str
    name: str
    value: Expr
    rules: tuple[Rule, ...] = ()
    doc: str = field(default="", compare=False)
    name_span: Span = field(default=NOWHERE, compare=False, repr=False)


@dataclass(frozen=True)
class Sheet(Syntax):
    """`precision` or `layout` with rules."""

    keyword: str
    name: str
    rules: tuple[Rule, ...]
    doc: str = field(default="", compare=False)
    name_span: Span = field(default=NOWHERE, compare=False, repr=False)


@dataclass(frozen=True)
class Setting(Syntax):
    """`compute = bf16`."""

    name: str
    value: Expr


@dataclass(frozen=True)
class Apply(Syntax):
    """`selectors: value`."""

    selectors: tuple[Selector, ...]
    value: Expr


@dataclass(frozen=True)
class Mesh(Syntax):
    axes: tuple[Setting, ...]


@dataclass(frozen=True)
class Shard(Syntax):
    """`shard heads, groups? over tensor between blocks`."""

    dims: tuple[Selector, ...]
    axes: tuple[str, ...]
    between: str | None = None


@dataclass(frozen=True)
class Stages(Syntax):
    axis: str
    settings: tuple[Setting, ...] = ()


@dataclass(frozen=True)
class Recompute(Syntax):
    selectors: tuple[Selector, ...]


@dataclass(frozen=True)
class Expect(Syntax):
    """`expect all_reduce per attention <= 1`."""

    what: str
    per: str | None
    comparison: str
    bound: Expr


@dataclass(frozen=True)
class Scoped(Syntax):
    """`in moe:` and its rules."""

    selectors: tuple[Selector, ...]
    rules: tuple[Rule, ...]


Rule = Setting | Apply | Mesh | Shard | Stages | Recompute | Expect | Scoped


@dataclass(frozen=True)
class Equation(Syntax):
    """`ours = theirs [as form] [if condition]` of a checkpoint map."""

    ours: tuple[Selector, ...]
    theirs: Expr
    form: ListOf | Name | None = None
    condition: Expr | None = None


@dataclass(frozen=True)
class Ignore(Syntax):
    """`ignore "rotary_emb.inv_freq", ...`: their tensors that are dropped."""

    patterns: tuple[String, ...]


@dataclass(frozen=True)
class Checkpoint(Syntax):
    """`checkpoint huggingface "ThatForCausalLM" for this:`."""

    name: str
    target: str
    model: Name
    equations: tuple[Equation | Ignore, ...]
    doc: str = field(default="", compare=False)
    name_span: Span = field(default=NOWHERE, compare=False, repr=False)


Declaration = Function | Variant | Sheet | Checkpoint


@dataclass(frozen=True)
class Module(Syntax):
    """A parsed file."""

    uses: tuple[Use, ...]
    declarations: tuple[Declaration, ...]
