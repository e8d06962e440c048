"""Calls of blocks: bodies, made once for equal arguments; how dims and parameters are bound; who owns what is
shared."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from .. import program as pg
from .. import syntax as sx
from ..arithmetic import is_number, kind, whole
from ..diagnostics import Diagnostic, Label, SpecError, did_you_mean, fail
from ..source import Span
from .bodies import Elaborated, Given, Run, inputs_of, inside, required_inputs, swapped, tensors_in
from .builder import Builder
from .environment import Environment
from .expressions import number_of
from .machine import Machine
from .rewriting import scope_key, scope_of
from .values import Cell, Dim, Picked, Sloped, TableOf, Tensor, Waiting
from .wording import count_of, given_twice


class BlockCalls(Machine):
    """Evaluation of calls of blocks; a part of `Elaborator`."""

    def call_block(self, callee: Waiting, expr: sx.Call, env: Environment, hint: str | None) -> Any:
        declaration = callee.block
        inputs = [i.name for i in inputs_of(declaration)]
        parameters = [p.name for p in declaration.parameters]
        given = Given({}, dict(callee.settings), dict(callee.spans))
        self._block_arguments(declaration, inputs, parameters, expr, env, given)
        if inputs and not any(name in given.tensors for name in required_inputs(declaration) or inputs):
            # Inputs that may be absent can be given ahead: the call still waits for the others.
            return replace(callee, settings={**given.settings, **given.tensors}, spans=given.spans, span=expr.span)
        ahead = {n: given.settings.pop(n) for n in inputs if n in given.settings}
        given.tensors = {n: {**ahead, **given.tensors}[n] for n in inputs if n in ahead or n in given.tensors}
        waiting = replace(callee, settings=given.settings, spans=given.spans, span=expr.span)
        missing = [n for n in required_inputs(declaration) if n not in given.tensors]
        if missing:
            raise fail(
                "missing-argument",
                f"`{declaration.name}` needs the input `{missing[0]}` too",
                expr.span,
                secondary=[Label(declaration.name_span, f"`{declaration.name}` is declared here")],
            )
        waiting, hint = self.rewritten(waiting, env, hint)
        return self.invoke(waiting, given.tensors, env, expr.span, hint)

    def _block_arguments(
        self, declaration: sx.Function, inputs: list[str], parameters: list[str], expr: sx.Call, env: Environment,
        given: Given,
    ) -> None:  # fmt: skip
        positional = [a for a in expr.arguments if a.name is None]
        values = [self.value(a.value, env) for a in positional]
        slots = inputs + parameters
        absent = inputs and values and values[0] is None and inputs[0] not in required_inputs(declaration)
        if inputs and not (absent or values and isinstance(values[0], Tensor)):
            slots = [p for p in parameters if p not in given.settings]
        if len(values) > len(slots):
            raise fail(
                "too-many-arguments",
                f"`{declaration.name}` takes {count_of(slots)}, this is one more",
                positional[len(slots)].span,
                secondary=[Label(declaration.name_span, "declared here")],
            )
        named = [(slot, value, a) for slot, value, a in zip(slots, values, positional, strict=False)]
        named += [(a.name, self.value(a.value, env), a) for a in expr.arguments if a.name]
        named = [(name, self._alias(value, a.value, env, not inputs), a) for name, value, a in named]
        seen: dict[str, Span] = {}
        for name, value, argument in named:
            if name in seen:
                raise given_twice(name, seen[name], argument.span)
            seen[name] = argument.span
            if name in inputs:
                if value is not None and not isinstance(value, Tensor):
                    raise fail(
                        "wrong-type",
                        f"the input `{name}` of `{declaration.name}` must be a tensor, this is {kind(value)}",
                        argument.span,
                    )
                given.tensors[name] = value
            elif name in parameters:
                given.settings[name] = value
            else:
                raise fail(
                    "no-such-parameter",
                    f"`{declaration.name}` has no parameter `{name}`",
                    argument.span,
                    secondary=[Label(declaration.name_span, "declared here")],
                    help=did_you_mean(name, slots, "a parameter"),
                )
            given.spans[name] = argument.span

    def _alias(self, value: Any, expr: sx.Expr, env: Environment, inline: bool) -> Any:
        """A number by its name is what the name stands for when all arguments are known, of which one may have made a
        dim of it. A block whose statements stand in the caller's body shares the name, and may make one itself."""
        cell = env.cell(expr.id) if isinstance(expr, sx.Name) and is_number(value) else None
        if cell is None or cell.value is value and not inline:
            return value
        return cell if inline else cell.value

    def run_block(self, callee: Waiting, given: Given, env: Environment, span: Span, hint: str | None) -> Any:
        """Call a block with inputs: a body of its own if it owns weights, else its statements in the caller's body."""
        declaration = callee.block
        if declaration.name in self.running:
            raise fail("recursion", f"`{declaration.name}` calls itself", span, "programs of this language always end")
        if len(self.running) > 60:
            raise fail("too-deep", "blocks call each other more than 60 deep", span)
        if not inputs_of(declaration):
            return self.run_inline(callee, given, env, span, hint)
        made = self.body_of(callee, given, env, span)
        if not made.builder.owns_anything():
            return self.run_inline(callee, given, env, span, hint)
        return self._add_call(callee, made, given, env, span, hint)

    def body_of(self, callee: Waiting, given: Given, env: Environment, span: Span) -> Elaborated:
        """The elaborated body for these arguments, made once."""
        declaration = callee.block
        dims: list[Dim] = []
        scope = scope_of(callee)
        key = (
            id(declaration),
            scope_key(scope),
            tuple((n, self.key(v, dims)) for n, v in sorted(given.tensors.items())),
            tuple((n, self.key(v, dims)) for n, v in sorted(given.settings.items())),
        )
        if key not in self.memo:
            builder = Builder(declaration.name, span=declaration.span, doc=declaration.doc)
            inner = Environment(callee.file, builder, scope=scope)
            tensors = {
                name: None if t is None else builder.add_input(name, t.kind, t.dims, t.span)
                for name, t in given.tensors.items()
            }
            settings = {name: inside(v, name, builder) for name, v in given.settings.items()}
            returned = self.run_function(callee, Given(tensors, settings, given.spans), inner, span)
            name = self.fresh_body(declaration.name)
            variables = {n: c.value for n, c in inner.cells.items()}
            made = Elaborated(name, builder, list(builder.inputs), returned, dims, variables)
            self.memo[key] = made
            self.finished[name] = made
        found = self.memo[key]
        return found

    def _add_call(self, callee: Waiting, made: Elaborated, given: Given, env: Environment, span: Span, hint: str | None
                  ) -> Any:  # fmt: skip
        builder = env.builder
        name = self._instance(callee, made, builder, span, hint)
        swap = self.swap(made, given)
        common = builder.common if callee.model else None
        outputs = [r for r in made.returned if isinstance(r, Tensor)]
        base = [hint or made.builder.block]
        if len(outputs) > 1:
            base = [t.name if hint is None else f"{hint}_{t.name}" for t in outputs]
        results = tuple(
            (b, t.kind, tuple(swapped(d, swap, common) for d in t.dims)) for b, t in zip(base, outputs, strict=False)
        )
        brought = [t for v in given.settings.values() for t in tensors_in(v)]
        operands = tuple(t for t in (*given.tensors.values(), *brought) if t is not None)
        bindings: dict[str, tuple[Dim, ...]] = {made.builder.dim_name(f): (swap[id(f)],) for f in made.formals}
        tensors = builder.add_node("call", operands, results, {"instance": name}, bindings, span)
        made.runs.append(Run(made, builder, builder.nodes[-1], tensors, swap, common))
        for tensor in tensors:
            tensor.run = made.runs[-1]
        rest = iter(tensors)
        values = [next(rest) if isinstance(r, Tensor) else r for r in made.returned]
        return values[0] if len(values) == 1 else tuple(values)

    def swap(self, made: Elaborated, given: Given) -> dict[int, Dim]:
        """The caller's dims in the place of those that a body was made with, by identity."""
        dims: list[Dim] = []
        for values in (given.tensors, given.settings):
            for _, value in sorted(values.items()):
                self.key(value, dims)
        return {id(a): b for a, b in zip(made.formals, dims, strict=True)}

    def _instance(self, callee: Waiting, made: Elaborated, builder: Builder, span: Span, hint: str | None) -> str:
        if callee.lent and callee.model:
            if all(i.name != callee.model for i in builder.instances):
                builder.own(callee.model, span)
                builder.instances.append(pg.Instance(callee.model, (), owned=False))
            if self.lent.setdefault(callee.model, made) is not made:
                raise fail("not-built-yet", f"`{callee.model}` on inputs of two types is not built yet", span)
            return callee.model
        if callee.shared:
            name, owner, _ = callee.shared
            self._lend(name, owner, made, builder, span)
            if name in owner.shared:
                if owner.shared[name] is not made:
                    raise fail("dim-mismatch", f"the shared block `{name}` is called with inputs of other types", span)
                return name
            owner.shared[name] = made
            builder = owner
        else:
            name = hint or made.builder.block
        builder.own(name, span)
        builder.instances.append(pg.Instance(name, (made.name,)))
        return name

    def _lend(self, name: str, owner: Builder, made: Elaborated, builder: Builder, span: Span) -> None:
        """Let loops between the owner of a shared block and this body pass it on."""
        while builder is not owner:
            if builder.parent is None:
                raise fail(
                    "not-built-yet",
                    f"`{name}` is shared by a block around this one, which only works inside loops yet",
                    span,
                    help="declare it `shared` in the block that calls it",
                )
            if name not in builder.borrowed:
                builder.own(name, span)
                builder.borrow(name, made.name)
            builder = builder.parent

    def run_inline(self, callee: Waiting, given: Given, env: Environment | None, span: Span, hint: str | None) -> Any:
        builder = env.builder if env is not None else Builder(callee.name)
        inner = Environment(callee.file, builder, is_inline=True, scope=scope_of(callee))
        tensors = {n: None if t is None else builder.local(t) for n, t in given.tensors.items()}
        returned = self.run_function(callee, Given(tensors, given.settings, given.spans), inner, span, hint)
        return returned[0] if len(returned) == 1 else tuple(returned)

    def run_function(
        self, callee: Waiting, given: Given, env: Environment, span: Span, hint: str | None = None
    ) -> list[Any]:
        """Bind inputs and parameters, run the statements; gives the returned values."""
        declaration = callee.block
        self.running.append(declaration.name)
        outside = dict(self.coordinates)
        before = len(self.collector.found)
        try:
            for parameter in declaration.parameters:
                if parameter.name in given.settings:
                    env.bind(parameter.name, given.settings[parameter.name], given.spans.get(parameter.name, span))
            for statement in inputs_of(declaration):
                self.bind_input(statement, given, env, span)
            for parameter in declaration.parameters:
                bound = env.cells.get(parameter.name)
                if parameter.name not in given.settings and not (bound and isinstance(bound.value, Dim)):
                    self._default(declaration, parameter, env, span)
            return self.run_body(declaration, env, hint)
        except SpecError as error:
            where = Label(span, f"in this call of `{declaration.name}`")
            self.collector.found[before:] = [_called_from(d, where) for d in self.collector.found[before:]]
            raise SpecError(_called_from(d, where) for d in error.diagnostics) from None
        finally:
            self.running.pop()
            self.coordinates = outside

    def _default(self, declaration: sx.Function, parameter: sx.Parameter, env: Environment, span: Span) -> None:
        default = parameter.default
        if default is None:
            raise fail(
                "missing-argument",
                f"`{declaration.name}` needs `{parameter.name}`",
                span,
                "not given here",
                [Label(parameter.span, "declared without a default")],
            )
        if isinstance(default, sx.Name) and env.cell(default.id) is not None:
            env.bind(parameter.name, env.cell(default.id))
        else:
            env.bind(parameter.name, self.value(default, env), parameter.span)

    def bind_input(self, statement: sx.Input, given: Given, env: Environment, span: Span) -> None:
        """Unify the dims of an input with those of what is given, by position from the right."""
        tensor = given.tensors.get(statement.name)
        if tensor is None:
            if statement.default is not None:
                env.bind(statement.name, self.value(statement.default, env), statement.span)
            else:
                env.bind(statement.name, None, statement.span)
            return
        env.bind(statement.name, tensor, statement.span)
        env.builder._names.add(statement.name)
        shape = statement.shape or ()
        where = given.spans.get(statement.name, span)
        if len(tensor.dims) < len(shape):
            wanted = ", ".join(item.name or "..." for item in shape)
            have = ", ".join(d.name for d in tensor.dims)
            raise fail(
                "too-few-dims",
                f"the input `{statement.name}` needs the dims [{wanted}]",
                where,
                f"this has [{have}]",
                [Label(statement.span, "declared here")],
            )
        for item, dim in zip(reversed(shape), reversed(tensor.dims), strict=False):
            self._bind_dim(item, dim, statement, env, where)

    def _bind_dim(self, item: sx.DimItem, dim: Dim, statement: sx.Input, env: Environment, where: Span) -> None:
        if item.size is not None:
            size = whole(self.number(item.size, env), f"the size of `{item.name}`", item.span)
            if dim.size is not None and dim.size != size:
                raise fail(
                    "dim-mismatch",
                    f"`{item.name}` must be {size}, this has {dim.size}",
                    where,
                    f"`{dim.name}` = {dim.size}",
                    [Label(item.span, "declared here")],
                )
        if item.name is None:
            return
        cell = env.cells.get(item.name)
        if cell is not None and cell.value is not dim:
            known = number_of(cell.value, where) if isinstance(cell.value, Dim) and cell.value.size else cell.value
            if isinstance(cell.value, Dim) or known != dim.size:
                first = cell.value.size if isinstance(cell.value, Dim) else known
                labels = [Label(cell.span, f"`{item.name}` was first bound to {first or 'another dim'} here")]
                raise fail(
                    "dim-mismatch",
                    f"`{item.name}` is {first or 'one dim'} in one place and {dim.size or 'another'} "
                    f"in `{statement.name}`",
                    where,
                    f"`{dim.name}` = {dim.size or '?'}",
                    labels,
                )
        env.bind(item.name, dim, where)
        if not env.is_inline:
            env.builder.call_dim(dim, item.name)

    # --- keys -------------------------------------------------------------------------------------

    def key(self, value: Any, dims: list[Dim]) -> Any:
        """A hashable summary under which equal calls are one body; dims are numbered in order of appearance."""
        if isinstance(value, Cell):
            return self.key(value.value, dims)
        if isinstance(value, Dim):
            if not any(d is value for d in dims):
                dims.append(value)
            place = next(i for i, d in enumerate(dims) if d is value)
            coordinates = tuple((name, made[1]) for (i, name), made in self.coordinates.items() if i == id(value))
            parts = tuple(self.key(d, dims) for d in (*value.lead, *value.factors))
            return ("dim", place, value.name, value.size, value.sequence, parts, value.clock, coordinates)
        if isinstance(value, Tensor):
            return ("tensor", value.kind, tuple(self.key(d, dims) for d in value.dims))
        if isinstance(value, (Picked, Sloped)):
            return (type(value).__name__, self.key(value.tensor, dims), value.expr)
        if isinstance(value, Waiting):
            target = value.op.name if value.op is not None else id(value.found.declaration) if value.found else None
            settings = tuple((n, self.key(v, dims)) for n, v in sorted(value.settings.items()))
            shared = None if value.shared is None else (value.shared.name, id(value.shared.builder))
            return ("waiting", target, settings, shared, scope_key(scope_of(value)), value.is_it, value.model)
        if isinstance(value, (list, tuple)):
            return ("list", tuple(self.key(v, dims) for v in value))
        if isinstance(value, TableOf):
            return ("table", id(value))
        return (type(value).__name__, value)


def _called_from(diagnostic: Diagnostic, where: Label) -> Diagnostic:
    """What went wrong in another file also shows the call that led there: the first one in a file not shown yet."""
    shown = {label.span.source for label in (diagnostic.primary, *diagnostic.secondary)}
    if where.span.source in shown or not where.span.source.text:
        return diagnostic
    return replace(diagnostic, secondary=(*diagnostic.secondary, where))
