"""Statements: assignments, branches, loops, and what a block declares."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from .. import program as pg
from .. import syntax as sx
from ..arithmetic import is_number, kind, whole
from ..diagnostics import Label, SpecError, did_you_mean, fail
from ..load import Found
from ..selectors import read
from ..source import Span
from .builder import Builder
from .environment import Environment, Scope
from .expressions import COORDINATES, truth
from .machine import Machine
from .rewriting import advance, scope_key
from .values import POISON, Dim, Lazy, SequenceName, Shared, Symbolic, Tensor, Waiting


class Returned(Exception):
    """A `return` was reached."""

    def __init__(self, values: list[Any]):
        self.values = values


class Unreturned(SpecError):
    """A `return` was reached that is wrong: what stands behind it never runs."""


class Statements(Machine):
    """Running statements; a part of `Elaborator`."""

    def run_body(self, declaration: sx.Function, env: Environment, hint: str | None) -> list[Any]:
        """Run a function's statements in order; gives what it returns. All independent errors are collected."""
        before = len(self.collector.found)
        try:
            self.run(declaration.body, env, hint)
        except Returned as returned:
            if len(self.collector.found) > before:
                raise SpecError([]) from None
            return returned.values
        if len(self.collector.found) > before:
            raise SpecError([])
        if declaration.keyword == "block" and not env.builder.emits:
            raise fail(
                "missing-return",
                f"`{declaration.name}` returns nothing",
                declaration.name_span or declaration.span,
                "expected `return` in its body",
                help="the last line says what comes out: `return y`",
            )
        return []

    def run(self, statements: tuple[sx.Statement, ...], env: Environment, hint: str | None = None) -> None:
        for statement in statements:
            try:
                self.statement(statement, env, hint)
            except SpecError as error:
                self.collector.add(error)
                if isinstance(statement, sx.Return) or isinstance(error, Unreturned):
                    raise Unreturned([]) from None
                for name in (*assigned([statement]), *([statement.name] if isinstance(statement, sx.Declare) else [])):
                    env.bind(name, POISON, statement.span)

    def statement(self, statement: sx.Statement, env: Environment, hint: str | None) -> None:
        match statement:
            case sx.Input():
                pass
            case sx.Assign():
                self._assign(statement, env)
            case sx.Return():
                self._return(statement, env, hint)
            case sx.If():
                self._if(statement, env, hint)
            case sx.For():
                self._for(statement, env)
            case sx.InitRule():
                self._init(statement, env)
            case sx.Emit(keyword="update"):
                self._update(statement, env)
            case sx.Emit():
                self._emit(statement, env)
            case sx.Declare():
                self._param(statement, env)
            case sx.Coordinate():
                self._coordinate(statement, env)
            case sx.CoordinateInput() if statement.optional:
                pass  # absent: whoever asks for it sees that no data give it
            case sx.CoordinateInput() if statement.default is not None:
                self._coordinate(
                    sx.Coordinate(statement.dim, statement.name, statement.default, span=statement.span), env
                )
            case _:
                raise fail("not-built-yet", _later(statement), statement.span)

    # --- assignments ------------------------------------------------------------------------------

    def _assign(self, statement: sx.Assign, env: Environment) -> None:
        names, values = statement.names, statement.values
        if statement.shared:
            self._shared(statement, env)
            return
        if len(values) == len(names):
            made = [self.value(v, env, self._hint(n, v, env)) for n, v in zip(names, values, strict=True)]
        elif len(values) == 1:
            result = self.value(values[0], env)
            if not isinstance(result, (tuple, list)) or len(result) != len(names):
                count = len(result) if isinstance(result, (tuple, list)) else 1
                raise fail(
                    "wrong-arity",
                    f"{len(names)} names are bound to {count} value{'s' if count != 1 else ''}",
                    statement.span,
                )
            made = list(result)
        else:
            raise fail("wrong-arity", f"{len(names)} names are bound to {len(values)} values", statement.span)
        for name, value in zip(names, made, strict=True):
            env.bind(name, value, statement.span)
        if statement.shape is not None:
            self._name_dims(statement, made[0], env)

    def _hint(self, name: str, value: sx.Expr, env: Environment) -> str | None:
        """A variable names the call that it is bound to first; a later binding leaves the name to what is called, but
        still names the value. Calls that are a part of an expression are named by what is called."""
        return None if name in env.cells and isinstance(value, (sx.Call, sx.Choose)) else name

    def _shared(self, statement: sx.Assign, env: Environment) -> None:
        for name, expr in zip(statement.names, statement.values, strict=True):
            value = self.value(expr, env)
            if not isinstance(value, Waiting):
                raise fail(
                    "wrong-type",
                    f"`shared` keeps one set of weights of a function that waits, this is {kind(value)}",
                    expr.span,
                )
            env.bind(name, replace(value, shared=Shared(name, env.builder, env.scope), span=expr.span), statement.span)

    def _name_dims(self, statement: sx.Assign, value: Any, env: Environment) -> None:
        shape = statement.shape or ()
        if not isinstance(value, Tensor) or len(value.dims) < len(shape):
            raise fail("too-few-dims", f"`{statement.names[0]}` has no {len(shape)} dims to name", statement.span)
        for item, dim in zip(reversed(shape), reversed(value.dims), strict=False):
            if item.name is not None:
                env.bind(item.name, dim, item.span)

    def _return(self, statement: sx.Return, env: Environment, hint: str | None) -> None:
        values = []
        for expr in statement.values:
            name = hint or ("out" if isinstance(expr, (sx.Call, sx.Choose)) else None)
            values.append(self.value(expr, env, name if len(statement.values) == 1 else None))
        raise Returned(values)

    def _if(self, statement: sx.If, env: Environment, hint: str | None) -> None:
        for condition, body in statement.branches:
            if truth(self.value(condition, env)):
                self.run(body, env, hint)
                return
        self.run(statement.otherwise, env, hint)

    # --- what a block declares --------------------------------------------------------------------

    def _init(self, statement: sx.InitRule, env: Environment) -> None:
        selectors = tuple(read(s, lambda e: self.whole_numbers(e, env)) for s in statement.selectors)
        init = self.distribution(statement.value, env)
        env.builder.rules.append(pg.Rule(selectors, init, statement.span))

    def _emit(self, statement: sx.Emit, env: Environment) -> None:
        value = self.value(statement.value, env, statement.name)
        kinds = ("loss", "real") if statement.keyword == "metric" else ("loss",)
        if not isinstance(value, Tensor) or value.kind not in kinds or value.dims:
            raise fail(
                "wrong-type",
                f"`{statement.keyword}` needs a sum over scored places, such as `cross_entropy`, or a mean "
                f"over all places, this is {kind(value)}",
                statement.value.span,
            )
        env.builder.emits.append((statement.keyword, statement.name, env.builder.local(value)))

    def _update(self, statement: sx.Emit, env: Environment) -> None:
        """`update bias = ...`: the value of a buffer of this block after a step."""
        cell = env.cell(statement.name)
        buffer = cell.value if cell is not None else None
        if not isinstance(buffer, Tensor) or statement.name not in env.builder.buffers:
            raise fail(
                "not-a-buffer",
                f"`{statement.name}` is no buffer of this block",
                statement.span,
                help=did_you_mean(statement.name, env.builder.buffers, "a buffer")
                or f"`buffer {statement.name}[...] = 0` declares one",
            )
        value = self.value(statement.value, env, f"next_{statement.name}")
        if (
            not isinstance(value, Tensor)
            or value.kind != "real"
            or {id(d) for d in value.dims} != {id(d) for d in buffer.dims}
        ):
            shown = ", ".join(d.name for d in buffer.dims)
            have = f"[{', '.join(d.name for d in value.dims)}]" if isinstance(value, Tensor) else kind(value)
            raise fail(
                "dim-mismatch",
                f"the buffer `{statement.name}` has the dims [{shown}], its new value has others",
                statement.value.span,
                f"this is {have}",
            )
        env.builder.emits.append(("update", statement.name, env.builder.local(value)))

    def _param(self, statement: sx.Declare, env: Environment) -> None:
        dims = tuple(d for item in statement.shape for d in self._dims_of_shape(item, env))
        trained = statement.keyword == "param"
        init = pg.Init("zeros") if statement.value is None else self.distribution(statement.value, env)
        if not trained and init.kind not in ("zeros", "ones", "constant"):
            raise fail(
                "wrong-type",
                "a buffer starts with one number everywhere",
                (statement.value or statement).span,
                "this is random",
            )
        env.builder.own(statement.name, statement.span)
        tensor = env.builder.add_weight(
            statement.name, dims, init, statement.keyword, False, tuple((d,) for d in dims), statement.span, trained
        )
        if not trained:
            env.builder.buffers[statement.name] = tensor
        env.bind(statement.name, tensor, statement.span)

    def _coordinate(self, statement: sx.Coordinate, env: Environment) -> None:
        """`seq.piece = seq.position // 16`: seen by this block and what it calls, from here on."""
        cell = env.cell(statement.dim)
        dim = None if cell is None else cell.value
        if not isinstance(dim, Dim):
            raise fail(
                "unknown-dim",
                f"`{statement.dim}` is no dim of an input of this block",
                statement.span,
                help=did_you_mean(statement.dim, env.names(), "a dim"),
            )
        if not dim.sequence:
            raise fail(
                "no-sequence",
                f"`{dim.name}` is no sequence, it has no position to compute `{statement.name}` from",
                statement.span,
                help="coordinates exist on the last dim of an input of kind `token`",
            )
        if statement.name in COORDINATES:
            raise fail(
                "bound-twice",
                f"every sequence has a `{statement.name}` already",
                statement.span,
                help="choose another name for this coordinate",
            )
        self.coordinates[id(dim), statement.name] = (dim, None)  # if it is wrong, using it says nothing more
        asking = Environment(env.file, env.builder, env)
        asking.bind(statement.dim, SequenceName("query"), statement.span)
        value = self.value(statement.value, asking)
        if not (is_number(value) or isinstance(value, Symbolic) and not value.is_mask):
            raise fail(
                "wrong-type",
                f"a coordinate is a whole number along `{statement.dim}`, this is {kind(value)}",
                statement.value.span,
            )
        if is_number(value):
            value = whole(value, f"the coordinate `{statement.name}`", statement.value.span, -(2**31))
        made = self.resolved(self.term(value, statement.value.span), dim, dim)
        self.coordinates[id(dim), statement.name] = (dim, made)
        self._follow(statement, dim, made, env)

    def _follow(self, statement: sx.Coordinate, dim: Dim, made: sx.Expr, env: Environment) -> None:
        """A dim of the model's inputs that is named as a coordinate of the stream has a row for each of its values."""
        cell = env.cell(statement.name)
        follower = None if cell is None else cell.value
        if dim.clock == pg.TOKENS and len(self.running) == 1 and isinstance(follower, Dim) and follower.clock is None:
            self.followers[statement.name] = pg.Clock(statement.name, made)
            follower.sequence, follower.lead, follower.clock = True, dim.lead, self.followers[statement.name]

    def _dims_of_shape(self, item: sx.DimItem, env: Environment) -> tuple[Dim, ...]:
        if item.name is None:
            return (Dim("one", whole(self.number(sized(item), env), "the size of a dim", item.span), span=item.span),)
        dims = self.dims(sx.Name(item.name, span=item.span), env)
        for dim in dims:
            if dim.size is None:
                raise fail(
                    "weight-of-unknown-size",
                    f"a weight would have the size of `{dim.name}`, which the data decide",
                    item.span,
                    "weights may depend on parameters only",
                )
        return dims

    # --- loops ------------------------------------------------------------------------------------

    def _for(self, statement: sx.For, env: Environment) -> None:
        items = self.items(statement.source, env)
        carried = [n for n in assigned(statement.body) if env.has(n)]
        loop = _Loop(statement, env, carried)
        self.segments.add(statement.names[0])
        for i, item in enumerate(items):
            self._iteration(loop, item, advance(env.scope, statement.names[:1], (i, len(items))))
        self._close_part(loop)
        self._close(loop)

    def _iteration(self, loop: _Loop, item: Any, scope: Scope) -> None:
        values = [loop.env.known(n).value for n in loop.carried]
        for value in values:
            if value is POISON:
                raise SpecError([])
        item = item.get() if isinstance(item, Lazy) else item
        state = (scope_key(scope), *(self.key(v, []) for v in values))
        key = (state, self.key(item, []))
        done = loop.memo.get((state, None)) or loop.memo.get(key)
        if done is None:
            done = self._elaborate_iteration(loop, item, values, scope)
            loop.memo[key if done.reads_item else (state, None)] = done
        arising = [n for n, a, b in zip(loop.carried, values, done.after, strict=True)
                   if isinstance(b, Tensor) and not isinstance(a, Tensor)]  # fmt: skip
        if arising:  # what comes into being here is carried from here on: the loop goes in parts
            self._close_part(loop)
        loop.schedule.append(done)
        for name, before, after in zip(loop.carried, values, done.after, strict=True):
            if name in arising:
                continue
            if isinstance(after, Tensor) != isinstance(before, Tensor):
                raise fail(
                    "not-built-yet",
                    f"`{name}` turns from {kind(before)} into {kind(after)} inside the loop, which is not built yet",
                    loop.statement.span,
                )
            if isinstance(after, Tensor) and [id(d) for d in after.dims] != [id(d) for d in before.dims]:
                raise fail(
                    "dim-mismatch",
                    f"`{name}` has other dims after an iteration than before it",
                    loop.statement.span,
                    f"[{', '.join(d.name for d in before.dims)}] becomes [{', '.join(d.name for d in after.dims)}]",
                )
            if not isinstance(after, Tensor):
                loop.env.bind(name, after, loop.statement.span)
        if arising:
            self._close_part(loop, arising)

    def _elaborate_iteration(self, loop: _Loop, item: Any, values: list[Any], scope: Scope) -> _Iteration:
        statement, outer = loop.statement, loop.env
        builder = Builder(statement.names[0], parent=outer.builder, span=statement.span)
        env = Environment(outer.file, builder, outer, scope=scope)
        inputs = {}
        for name, value in zip(loop.carried, values, strict=True):
            if isinstance(value, Tensor):
                inputs[name] = builder.add_input(name, value.kind, value.dims, value.span)
                env.bind(name, inputs[name], statement.span)
            else:
                env.bind(name, value, statement.span)
        self.unpack(statement.names, item, env, statement.span)
        cells = [env.cells[n] for n in statement.names]
        for cell in cells:
            cell.read = False
        before = len(self.collector.found)
        self.run(statement.body, env)
        if len(self.collector.found) > before:
            raise SpecError([])
        after = [env.cells[n].value for n in loop.carried]
        if any(value is POISON for value in after):
            raise SpecError([])
        suffix = f"_{item.name}" if isinstance(item, Waiting) else ""
        return _Iteration(builder, f"{statement.names[0]}{suffix}", after, any(c.read for c in cells))

    def _close_part(self, loop: _Loop, arising: Sequence[str] = ()) -> None:
        """One node for the iterations since the last one: carried values go through them, others are given to each."""
        first, part = loop.closed, loop.schedule[loop.closed :]
        loop.closed = len(loop.schedule)
        distinct = list(dict.fromkeys(part))
        env = loop.env
        tensors = [n for n in loop.carried if isinstance(env.known(n).value, Tensor)]
        given = [n for n in loop.carried if n in tensors or n in arising]
        captured: dict[int, Tensor] = {}
        for done in distinct:
            captured.update({i: outer for i, (outer, _) in done.builder.captured.items()})
            loop.borrowed.update(done.builder.borrowed)
        befores = [env.known(n).value for n in tensors]
        afters = {n: a for d in distinct[-1:] for n, a in zip(loop.carried, d.after, strict=True)}
        for tensor in [*befores, *captured.values(), *(afters[n] for n in arising)]:
            env.builder.names_of(tensor.dims)
        for done in distinct:
            inputs = [done.builder.inputs[i] for i in range(len(tensors))]
            for i, outer in captured.items():
                if i not in done.builder.captured:
                    inner = Tensor(
                        done.builder.fresh(outer.name), outer.kind, outer.dims, done.builder, span=outer.span
                    )
                    done.builder.captured[i] = (outer, inner)
                inputs.append(done.builder.captured[i][1])
            outputs = [a for n, a in zip(loop.carried, done.after, strict=True) if n in given]
            loop.bodies[id(done)] = self.fresh_body(done.name)
            self.finish_later(loop.bodies[id(done)], done.builder, inputs, outputs)
        kept = dict(zip(tensors, befores, strict=True)) | {n: afters[n] for n in arising}
        results = tuple((n, kept[n].kind, kept[n].dims) for n in given)
        if not results or not any(d.builder.nodes for d in distinct):
            return
        attrs = {"instance": loop.statement.names[0], "part": (first, loop.closed)}
        made = env.builder.add_node("loop", (*befores, *captured.values()), results, attrs, {}, loop.statement.span)
        loop.nodes.append(env.builder.nodes[-1])
        for name, tensor in zip(given, made, strict=True):
            self._rebind(env, name, tensor)

    def _close(self, loop: _Loop) -> None:
        """The instance that all parts of a loop run."""
        distinct = list(dict.fromkeys(loop.schedule))
        if not any(d.builder.nodes for d in distinct):
            return
        env, statement = loop.env, loop.statement
        for done in distinct:
            for shared in (n for n in loop.borrowed if n not in done.builder.borrowed):
                done.builder.borrow(shared, loop.borrowed[shared])
        place = {id(d): i for i, d in enumerate(distinct)}
        instance = statement.names[0]
        env.builder.own(instance, statement.span)
        schedule = tuple(place[id(d)] for d in loop.schedule)
        names = tuple(loop.bodies[id(d)] for d in distinct)
        env.builder.instances.append(pg.Instance(instance, names, schedule, lends=tuple(loop.borrowed)))
        if len(loop.nodes) == 1 and loop.nodes[0]["attrs"]["part"] == (0, len(schedule)):
            del loop.nodes[0]["attrs"]["part"]

    def _rebind(self, env: Environment, name: str, tensor: Tensor) -> None:
        env.bind(name, tensor, env.known(name).span)


class _Iteration:
    """A distinct iteration of a loop."""

    def __init__(self, builder: Builder, name: str, after: list[Any], reads_item: bool):
        self.builder, self.name, self.after, self.reads_item = builder, name, after, reads_item


class _Loop:
    """A loop while it is elaborated: `memo` has the distinct iterations, `schedule` all of them in order."""

    def __init__(self, statement: sx.For, env: Environment, carried: list[str]):
        self.statement, self.env, self.carried = statement, env, carried
        self.memo: dict[Any, _Iteration] = {}
        self.schedule: list[_Iteration] = []
        self.closed = 0
        self.nodes: list[dict[str, Any]] = []
        self.bodies: dict[int, str] = {}
        self.borrowed: dict[str, str] = {}


def assigned(statements: Any) -> list[str]:
    """Names that statements assign, in order, loops and branches included."""
    found: dict[str, None] = {}
    for s in statements:
        match s:
            case sx.Assign():
                found.update(dict.fromkeys(s.names))
            case sx.If():
                bodies = [body for _, body in s.branches] + [s.otherwise]
                found.update(dict.fromkeys(n for body in bodies for n in assigned(body)))
            case sx.For():
                found.update(dict.fromkeys(assigned(s.body)))
    return list(found)


def sized(item: sx.DimItem) -> sx.Expr:
    """The size that stands in a shape in place of a name."""
    assert item.size is not None
    return item.size


def _later(statement: sx.Statement) -> str:
    if isinstance(statement, sx.CoordinateInput):
        return "coordinates from the data are not built yet"
    return f"`{getattr(statement, 'keyword', 'this')}` is not built yet"


__all__ = ["Found", "Label", "Returned", "Span", "Statements", "assigned"]
