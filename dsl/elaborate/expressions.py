"""Expressions: from syntax to values."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

from .. import syntax as sx
from ..arithmetic import binary, check_length, is_number, kind, negate, tidy, whole
from ..diagnostics import Diagnostic, Label, SpecError, did_you_mean, fail
from ..program import Clock, Init
from ..source import Span
from ..vocabulary import BUILTINS
from .environment import Environment
from .machine import Machine
from .values import POISON, Cell, Dim, Lazy, Picked, Poison, SequenceName, Sloped, Symbolic, TableOf, Tensor, Waiting

COORDINATES = ("position", "document", "valid")
"""What every sequence has."""

OPERATORS = {
    "+": "add", "-": "sub", "*": "mul", "/": "div", "//": "floordiv", "^": "pow",
    "<": "lt", "<=": "le", ">": "gt", ">=": "ge", "==": "eq", "!=": "ne",
}  # fmt: skip
CONSTANTS: dict[str, Any] = {"pi": math.pi, "query": SequenceName("query"), "key": SequenceName("key")}


def _length(value: Any) -> int:
    """Layers of a pattern string (stage bars `|` do not count, a `/` ends the main stack), items of a list."""
    return len(main_stack(value)) if isinstance(value, str) else len(value)


def main_stack(pattern: str) -> str:
    """The layers of a hybrid pattern string as Megatron-LM writes them: `|` marks a pipeline stage and is no layer."""
    return pattern.partition("/")[0].replace("|", "")


STATIC: dict[str, Callable[..., Any]] = {
    "length": _length,
    "floor": math.floor,
    "ceil": math.ceil,
    "round": round,
    "sqrt": math.sqrt,
    "exp": math.exp,
    "log": math.log,
    "abs": abs,
    "max": max,
    "min": min,
}
DISTRIBUTIONS = {"normal": 1, "uniform": 2, "zero": 0, "one": 0, "constant": 1}
_SPELLED = {"zero": "zeros", "one": "ones"}


def truth(value: Any) -> bool:
    """What counts as true in `if`, `and`, `or`, `not`: all but none, false, 0 and what is empty."""
    if isinstance(value, Dim):
        return True
    if isinstance(value, (int, float, str, list, tuple, dict)):
        return bool(value)
    return value is not None


def number_of(value: Any, span: Span) -> Any:
    """Dims stand for their size in arithmetic."""
    if isinstance(value, Dim):
        if value.size is None:
            raise fail(
                "size-unknown",
                f"the size of `{value.name}` is not known before the data are",
                span,
                "expected a size that parameters give",
            )
        return value.size
    return value


class Expressions(Machine):
    """Evaluation of expressions; a part of `Elaborator`."""

    def value(self, expr: sx.Expr, env: Environment, hint: str | None = None) -> Any:
        """The value of an expression. `hint` is the variable that it is bound to, if it is the whole right side."""
        handler = getattr(self, f"_{type(expr).__name__.lower()}")
        return handler(expr, env, hint)

    # --- leaves -----------------------------------------------------------------------------------

    def _name(self, expr: sx.Name, env: Environment, hint: str | None) -> Any:
        cell = env.cell(expr.id)
        if cell is not None:
            if isinstance(cell.value, Poison):
                raise SpecError([])
            return cell.value
        found = env.file.lookup(expr.id)
        if found is not None:
            return self.declared(found, expr.span)
        if expr.id in self.ops:
            return Waiting(op=self.ops[expr.id], span=expr.span)
        if expr.id == "identity":
            return Waiting(span=expr.span)
        if expr.id in CONSTANTS:
            return CONSTANTS[expr.id]
        raise self.unknown(expr.id, expr.span, env)

    def unknown(self, name: str, span: Span, env: Environment) -> SpecError:
        if name in BUILTINS or name in DISTRIBUTIONS or name in STATIC:
            what = BUILTINS.get(name, ("function", "a function"))
            return fail("not-built-yet", f"`{name}` ({what[1]}) cannot run yet", span, "known, but not built yet")
        names = env.names() | set(self.ops) | set(BUILTINS) | set(env.file.declared)
        return fail(
            "unknown-name",
            f"nothing is named `{name}` here",
            span,
            "not found",
            help=did_you_mean(name, names, "something"),
        )

    def _number(self, expr: sx.Number, env: Environment, hint: str | None) -> Any:
        return expr.value

    def _string(self, expr: sx.String, env: Environment, hint: str | None) -> str:
        return expr.value

    def _constant(self, expr: sx.Constant, env: Environment, hint: str | None) -> Any:
        return expr.value

    # --- collections ------------------------------------------------------------------------------

    def _listof(self, expr: sx.ListOf, env: Environment, hint: str | None) -> list[Any]:
        items: list[Any] = []
        for argument in expr.items:
            value = argument.value
            if isinstance(value, sx.Range):
                items.extend(self._range(value, env, None))
            else:
                items.append(self.value(value, env))
            check_length(len(items), expr.span)
        return items

    def _tupleof(self, expr: sx.TupleOf, env: Environment, hint: str | None) -> tuple[Any, ...]:
        return tuple(self.value(a.value, env) for a in expr.items if a.name is None)

    def _range(self, expr: sx.Range, env: Environment, hint: str | None) -> list[int]:
        first, last = (
            whole(self.number(e, env), "an end of a range", e.span, -(2**31)) for e in (expr.first, expr.last)
        )
        step = 1 if expr.step is None else whole(self.number(expr.step, env), "the step of a range", expr.step.span)
        check_length((last - first) // step + 1, expr.span)
        return list(range(first, last + 1, step))

    def _comprehension(self, expr: sx.Comprehension, env: Environment, hint: str | None) -> list[Any]:
        made = []
        for item in self.items(expr.source, env):
            inner = Environment(env.file, env.builder, env)
            self.unpack(expr.names, item, inner, expr.span)
            if expr.condition is None or truth(self.value(expr.condition, inner)):
                made.append(self.value(expr.body, inner))
        return made

    def _table(self, expr: sx.Table, env: Environment, hint: str | None) -> TableOf:
        entries: dict[str, Lazy] = {}
        seen: dict[str, Span] = {}
        for pair in expr.pairs:
            if pair.key in entries:
                raise fail(
                    "duplicate-name",
                    f'the table has two entries for "{pair.key}"',
                    pair.span,
                    "the second",
                    [Label(seen[pair.key], "the first")],
                )
            seen[pair.key] = pair.span
            entries[pair.key] = Lazy(partial(self.value, pair.value, env))
        return TableOf(entries, expr.span)

    def _index(self, expr: sx.Index, env: Environment, hint: str | None) -> Any:
        base = self.value(expr.value, env)
        if len(expr.arguments) != 1:
            raise fail("wrong-arity", f"an index takes one value, this has {len(expr.arguments)}", expr.span)
        argument = expr.arguments[0].value
        at = self._range(argument, env, None) if isinstance(argument, sx.Range) else self.value(argument, env)
        if isinstance(base, TableOf):
            return self.entries(base, at, argument.span)
        if isinstance(base, (list, str)):
            return self._items_at(base, at, argument.span)
        if isinstance(base, Tensor) and isinstance(at, Symbolic) and not at.is_mask:
            return Picked(base, at.expr)
        raise fail("wrong-type", f"{kind(base)} cannot be indexed", expr.span)

    def entries(self, table: TableOf, at: Any, span: Span) -> Any:
        """One entry for each character of a string (`kinds["M*-"]`) or item of a list; a word that is a key: that
        one."""
        if isinstance(at, str) and at in table.entries and len(at) > 1:
            return table.entries[at].get()
        if isinstance(at, str):
            symbols = list(at if "|" in table.entries or "/" in table.entries else main_stack(at))
            if "/" in at and "/" not in table.entries:
                raise fail(
                    "not-built-yet",
                    "the layers behind `/` predict further tokens, which is not built yet",
                    span,
                    help="leave out the part from `/` on",
                )
        elif isinstance(at, list):
            symbols = at
        else:
            raise fail("wrong-type", f"a table is indexed by a string or a list, this is {kind(at)}", span)
        check_length(len(symbols), span)
        bad = next((i for i, s in enumerate(symbols) if s not in table.entries), None)
        if bad is not None:
            known = ", ".join(f'"{k}"' for k in table.entries)
            raise fail(
                "unknown-symbol",
                f'layer {bad} of the pattern is "{symbols[bad]}", which the table does not have',
                span,
                "in this pattern",
                [Label(table.span, f"this table has {known}")],
            )
        return [table.entries[s].get() for s in symbols]

    def _items_at(self, base: list[Any] | str, at: Any, span: Span) -> Any:
        if isinstance(at, list):
            return [self._items_at(base, i, span) for i in at]
        place = whole(at, "an index", span, 0)
        if place >= len(base):
            raise fail("out-of-range", f"index {place} is behind the end, there are {len(base)} items", span)
        return base[place]

    # --- operators --------------------------------------------------------------------------------

    def _unary(self, expr: sx.Unary, env: Environment, hint: str | None) -> Any:
        value = self.value(expr.value, env)
        if expr.operator == "not":
            if _is_mask(value):
                return self.pointwise("logical_not", [value], env, expr.span, hint)
            return self._symbolic(expr, value) if isinstance(value, Symbolic) else not truth(value)
        if isinstance(value, Tensor):
            return self.pointwise("neg", [value], env, expr.span, hint)
        if isinstance(value, Symbolic):
            return Symbolic(sx.Unary("-", value.expr, span=expr.span))
        if isinstance(value, Sloped):
            return Sloped(value.tensor, sx.Unary("-", value.expr, span=expr.span))
        return negate(number_of(value, expr.value.span), expr.span)

    def _symbolic(self, expr: sx.Unary, value: Symbolic) -> Symbolic:
        return Symbolic(sx.Unary("not", value.expr, span=expr.span), is_mask=True)

    def _binary(self, expr: sx.Binary, env: Environment, hint: str | None) -> Any:
        op = expr.operator
        left = self.value(expr.left, env)
        if op in ("and", "or") and not isinstance(left, Symbolic):
            if _is_mask(left):
                right = self.value(expr.right, env)
                if _is_mask(right):
                    return self.pointwise(f"logical_{op}", [left, right], env, expr.span, hint)
                if isinstance(right, bool):
                    return left if right == (op == "and") else right
                return right if op == "and" else left
            if truth(left) == (op == "or"):
                return left
            return self.value(expr.right, env)
        right = self.value(expr.right, env)
        for tensor, distance in ((left, right), (right, left)):
            if op == "*" and isinstance(tensor, Tensor) and isinstance(distance, Symbolic) and not distance.is_mask:
                return Sloped(tensor, distance.expr)
        if isinstance(left, Symbolic) or isinstance(right, Symbolic):
            return self._mask_term(expr, left, right)
        if op in ("==", "!=") and (left is None or right is None):
            return (left is right) == (op == "==")
        if isinstance(left, Tensor) or isinstance(right, Tensor):
            if op not in OPERATORS:
                raise fail("wrong-type", f"`{op}` does not work on tensors", expr.span, help="a tensor is no list")
            return self.pointwise(OPERATORS[op], [left, right], env, expr.span, hint)
        if op in ("==", "!=", "in"):
            return binary(op, _plain(left), _plain(right), expr.span)
        return binary(op, number_of(left, expr.left.span), number_of(right, expr.right.span), expr.span)

    def _mask_term(self, expr: sx.Binary, left: Any, right: Any) -> Any:
        op = expr.operator
        if op in ("and", "or"):
            for plain, other in ((left, right), (right, left)):
                if not isinstance(plain, Symbolic):
                    return other if truth(plain) == (op == "and") else truth(plain)
        if op in ("/", "^"):
            raise fail(
                "wrong-type",
                f"coordinates are whole numbers, `{op}` does not keep them whole",
                expr.span,
                help="`//` divides and rounds down" if op == "/" else None,
            )
        if op == "//" and not isinstance(right, Symbolic) and number_of(right, expr.right.span) == 0:
            raise fail("divide-by-zero", "a coordinate is divided by 0", expr.right.span)
        sides = [self.term(v, e.span) for v, e in ((left, expr.left), (right, expr.right))]
        made = sx.Binary(op, sides[0], sides[1], span=expr.span)
        return Symbolic(made, is_mask=op in ("and", "or", "==", "!=", "<", "<=", ">", ">="))

    def term(self, value: Any, span: Span) -> sx.Expr:
        value = number_of(value, span)
        if isinstance(value, Symbolic):
            return value.expr
        if is_number(value):
            return sx.Number(tidy(value), span=span)
        if isinstance(value, Tensor):
            raise fail("not-built-yet", "score biases and masks made of tensors are not built yet", span)
        raise fail("wrong-type", f"a mask compares coordinates with numbers, this is {kind(value)}", span)

    def _choose(self, expr: sx.Choose, env: Environment, hint: str | None) -> Any:
        return self.value(expr.yes if truth(self.value(expr.condition, env)) else expr.no, env, hint)

    def _arrow(self, expr: sx.Arrow, env: Environment, hint: str | None) -> Any:
        return self.arrow(expr, env)

    def arrow(self, expr: sx.Arrow, env: Environment) -> tuple[tuple[Dim, ...], ...]:
        """The dims on both sides of `a -> b`."""
        return tuple(self._side(side, env) for side in (expr.source, expr.target))

    def _side(self, expr: sx.Expr, env: Environment) -> tuple[Dim, ...]:
        dims = self.dims(expr, env)
        if not dims:
            raise fail("too-few-dims", "a side of an arrow names at least one dim", expr.span)
        return dims

    def pointwise(self, name: str, values: list[Any], env: Environment, span: Span, hint: str | None) -> Any:
        """Apply an elementwise op to tensors and numbers."""
        values = [number_of(v, span) for v in values]
        for value in values:
            if not isinstance(value, Tensor) and not is_number(value):
                raise fail("wrong-type", f"`{name}` computes with tensors and numbers, this is {kind(value)}", span)
        return self.apply_op(self.ops[name], dict(zip("xy", values, strict=False)), {}, {}, env, span, hint)

    # --- members ----------------------------------------------------------------------------------

    def _member(self, expr: sx.Member, env: Environment, hint: str | None) -> Any:
        base = self.value(expr.value, env)
        if isinstance(base, SequenceName):
            return Symbolic(sx.Member(sx.Name(base.which), expr.name, span=expr.span))
        if isinstance(base, Dim):
            return self._coordinate_of(base, expr, env)
        if isinstance(base, Tensor):
            return self._part_of(base, expr, env)
        if isinstance(base, Waiting) and base.op is not None and expr.name in ("ins", "outs"):
            return self._side_of(base, expr)
        raise fail("no-such-member", f"{kind(base)} has no part named `{expr.name}`", expr.span)

    def _members(self, expr: sx.Members, env: Environment, hint: str | None) -> Any:
        raise fail("wrong-type", "a list of members is for selectors and checkpoint maps", expr.span)

    def _coordinate_of(self, dim: Dim, expr: sx.Member, env: Environment) -> Tensor:
        if not dim.sequence:
            raise fail(
                "no-sequence",
                f"`{dim.name}` is no sequence, it has no `{expr.name}`",
                expr.span,
                help="coordinates exist on the last dim of an input of kind `token`",
            )
        builder = env.builder
        if expr.name not in COORDINATES:
            return self._computed(dim, expr, env)
        if (id(dim), expr.name) not in builder.coordinates:
            made = self.apply_op(
                self.ops["coordinate"], {}, {"dim": (dim,), "which": expr.name}, {}, env, expr.span, expr.name
            )
            builder.coordinates[id(dim), expr.name] = made
        return builder.coordinates[id(dim), expr.name]

    def _computed(self, dim: Dim, expr: sx.Member, env: Environment) -> Any:
        """A computed coordinate as a tensor, or as a number where it is one everywhere."""
        asked = Environment(env.file, env.builder)
        asked.bind("query", dim, expr.span)
        return self.value(self._definition(dim, expr), asked)

    def _definition(self, dim: Dim, expr: sx.Member) -> sx.Expr:
        """What a computed coordinate of a dim is, in the coordinates that every sequence has, of `query`."""
        if (id(dim), expr.name) not in self.coordinates and dim.clock is not None and dim.clock.name == expr.name:
            position = sx.Member(sx.Name("query"), "position", span=expr.span)
            times = dim.clock.times
            return position if times == 1 else sx.Binary("//", position, sx.Number(times), span=expr.span)
        if (id(dim), expr.name) not in self.coordinates:
            here = [name for i, name in self.coordinates if i == id(dim)]
            raise fail(
                "no-such-member",
                f"`{dim.name}` has no coordinate `{expr.name}` here",
                expr.span,
                help=did_you_mean(expr.name, (*COORDINATES, *here), "a coordinate")
                or f"`{dim.name}.{expr.name} = ...` computes one",
            )
        made = self.coordinates[id(dim), expr.name][1]
        if made is None:
            raise SpecError([])
        return made

    def resolved(self, expr: sx.Expr, query: Dim, key: Dim) -> sx.Expr:
        """An expression of `query` and `key` in the coordinates that every sequence has: position and document."""
        match expr:
            case sx.Member(value=sx.Name(id="query" | "key" as which), name=name):
                if name in ("position", "document"):
                    return expr
                if name == "valid":
                    raise fail(
                        "no-such-member", "attention never sees what is not valid, no mask has to say it", expr.span
                    )
                made = self._definition(query if which == "query" else key, expr)
                return made if which == "query" else _asked_of_key(made)
            case sx.Binary():
                sides = (self.resolved(expr.left, query, key), self.resolved(expr.right, query, key))
                return sx.Binary(expr.operator, *sides, span=expr.span)
            case sx.Unary():
                return sx.Unary(expr.operator, self.resolved(expr.value, query, key), span=expr.span)
        return expr

    def grouped(self, expr: sx.Expr, env: Environment) -> tuple[Dim, Clock]:
        """`seq.piece` as what groups the rows of `seq`: those of one value, which end with the last of them."""
        dim = self.value(expr.value, env) if isinstance(expr, sx.Member) else None
        if not isinstance(expr, sx.Member) or not isinstance(dim, Dim) or not dim.sequence:
            raise fail(
                "wrong-type",
                "rows are grouped by a coordinate of their sequence",
                expr.span,
                help="`seq.piece = seq.position // 16` computes one, `by = seq.piece` groups by it",
            )
        return dim, Clock(expr.name, self._definition(dim, expr), begins=False)

    def _side_of(self, waiting: Waiting, expr: sx.Member) -> tuple[Dim, ...]:
        """`it.ins`, `it.outs`: the dims that a linear map comes from and goes to."""
        sides = next((waiting.settings.get(s.name) for s in waiting.op.settings if s.kind == "map"), None)
        if sides is None:
            raise fail("no-such-member", f"`{waiting.name}` maps no dims to others, it has no `{expr.name}`", expr.span)
        return sides[expr.name == "outs"]

    def _part_of(self, tensor: Tensor, expr: sx.Member, env: Environment) -> Any:
        if tensor.owner is not None:
            weight = tensor.builder.weight_tensors.get(f"{tensor.owner}.{expr.name}")
            if weight is not None:
                return weight
        if tensor.run is not None:
            return tensor.run(expr.name, expr.span)
        raise fail(
            "no-such-member",
            f"`{tensor.name}` has no part named `{expr.name}`",
            expr.span,
            help="a call that owns weights has them as parts: `embedding.weight`",
        )

    # --- helpers for the other parts --------------------------------------------------------------

    def number(self, expr: sx.Expr, env: Environment) -> Any:
        value = number_of(self.value(expr, env), expr.span)
        if not is_number(value):
            raise fail("wrong-type", f"a number is needed here, this is {kind(value)}", expr.span)
        return value

    def whole_numbers(self, expr: sx.Expr, env: Environment) -> list[int]:
        """What picks iterations: a whole number, a list of them, or a range."""
        value = self.value(expr, env)
        values = value if isinstance(value, list) else [value]
        return [whole(number_of(v, expr.span), "an iteration", expr.span, 0) for v in values]

    def items(self, expr: sx.Expr, env: Environment) -> list[Any]:
        """What a loop runs over: a list, the letters of a string, or 0 .. n - 1."""
        value = number_of(self.value(expr, env), expr.span)
        if isinstance(value, (list, tuple)):
            return list(value)
        if isinstance(value, str):
            check_length(len(value), expr.span)
            return list(value)
        count = whole(value, "the number of iterations", expr.span, 0)
        check_length(count, expr.span)
        return list(range(count))

    def unpack(self, names: tuple[str, ...], item: Any, env: Environment, span: Span) -> None:
        values = [item] if len(names) == 1 else item
        if not isinstance(values, (list, tuple)) or len(values) != len(names):
            raise fail("wrong-arity", f"{len(names)} names cannot be bound to {kind(item)}", span)
        for name, value in zip(names, values, strict=True):
            env.bind(name, value, span)

    def dims(self, expr: sx.Expr, env: Environment) -> tuple[Dim, ...]:
        """Dims that an expression names; a number's name becomes a new dim here. Raises `unknown-dim`, `not-exact`."""
        if isinstance(expr, sx.Name):
            return self._dims_of_name(expr, env)
        if isinstance(expr, sx.ListOf):
            return tuple(d for a in expr.items for d in self._dims_of_item(a, env))
        value = self.value(expr, env)
        if isinstance(value, Dim):
            return (value,)
        if isinstance(value, tuple) and value and all(isinstance(v, Dim) for v in value):
            return value
        return (Dim("units", whole(value, "the size of a dim", expr.span), span=expr.span),)

    def _dims_of_item(self, item: sx.Argument, env: Environment) -> tuple[Dim, ...]:
        if item.name is None:
            return self.dims(item.value, env)
        size = whole(self.number(item.value, env), f"the size of `{item.name}`", item.span)
        dim = Dim(item.name, size, span=item.span)
        env.bind(item.name, dim, item.span)
        return (dim,)

    def _dims_of_name(self, expr: sx.Name, env: Environment) -> tuple[Dim, ...]:
        cell = env.cell(expr.id)
        if cell is None:
            names = env.names()
            raise fail(
                "unknown-dim",
                f"no dim or parameter is named `{expr.id}` here",
                expr.span,
                "not found",
                help=did_you_mean(expr.id, names, "a dim or parameter"),
            )
        return self.promote(cell, expr.span)

    def promote(self, cell: Cell, span: Span) -> tuple[Dim, ...]:
        """The dims that a name stands for: a number's name becomes a dim, once."""
        if isinstance(cell.value, Poison):
            raise SpecError([])
        if isinstance(cell.value, (list, tuple)) and cell.value and all(isinstance(v, Dim) for v in cell.value):
            return tuple(cell.value)
        if not isinstance(cell.value, Dim):
            if cell.value is None or isinstance(cell.value, (Tensor, Waiting, str, list, tuple)):
                raise fail(
                    "wrong-type",
                    f"`{cell.name}` is used as a dim, but it is {kind(cell.value)}",
                    span,
                    help=f"give `{cell.name}` a size" if cell.value is None else None,
                )
            try:
                size = whole(cell.value, f"the size of `{cell.name}`", span)
            except SpecError:
                cell.value = POISON  # said once is enough
                raise
            cell.value = Dim(cell.name, size, span=cell.span)
        return (cell.value,)

    def distribution(self, expr: sx.Expr, env: Environment) -> Init:
        """`normal(std)`, `uniform(a, b)`, `zero`, `one`, `constant(v)` or a number."""
        call = expr if isinstance(expr, sx.Call) else sx.Call(expr, (), span=expr.span)
        name = call.function.id if isinstance(call.function, sx.Name) else None
        if name in DISTRIBUTIONS and not env.has(name):
            values = tuple(float(self.number(a.value, env)) for a in call.arguments)
            if len(values) != DISTRIBUTIONS[name]:
                raise fail(
                    "wrong-arity", f"`{name}` takes {DISTRIBUTIONS[name]} numbers, this has {len(values)}", expr.span
                )
            return Init(_SPELLED.get(name, name), values)
        return Init("constant", (float(self.number(expr, env)),))


def _asked_of_key(expr: sx.Expr) -> sx.Expr:
    """A coordinate of `query` as that of `key`."""
    match expr:
        case sx.Name(id="query"):
            return sx.Name("key", span=expr.span)
        case sx.Member():
            return sx.Member(_asked_of_key(expr.value), expr.name, span=expr.span)
        case sx.Binary():
            return sx.Binary(expr.operator, _asked_of_key(expr.left), _asked_of_key(expr.right), span=expr.span)
        case sx.Unary():
            return sx.Unary(expr.operator, _asked_of_key(expr.value), span=expr.span)
    return expr


def _is_mask(value: Any) -> bool:
    return isinstance(value, Tensor) and value.kind == "mask"


def _plain(value: Any) -> Any:
    """Dims compare by size, everything else as it is."""
    return value.size if isinstance(value, Dim) else value


__all__ = ["Diagnostic", "Expressions", "main_stack", "number_of", "truth"]
