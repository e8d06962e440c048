"""Calls: of ops, of blocks, and of functions that wait."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from .. import program as pg
from .. import syntax as sx
from ..arithmetic import as_float, is_number, kind, whole
from ..diagnostics import Diagnostic, Label, SpecError, did_you_mean, fail
from ..load import Found
from ..source import Span
from .builder import Builder
from .environment import Environment
from .expressions import STATIC, number_of, truth
from .rewriting import scope_key, scope_of
from .values import Cell, Dim, Symbolic, TableOf, Tensor, Waiting


@dataclass
class Elaborated:
    """A body under a key: its builder, what it returned, and the dims that its callers' dims take the place of.

    `asked` are variables that some run of it was asked for (`f(x).final`): it gives them behind what it returns.
    """

    name: str
    builder: Builder
    inputs: list[Tensor]
    returned: list[Any]
    formals: list[Dim]
    variables: dict[str, Any]
    asked: dict[str, Tensor] = field(default_factory=dict)
    runs: list[Run] = field(default_factory=list)

    @property
    def outputs(self) -> list[Tensor]:
        """What it gives, in order."""
        return [*(r for r in self.returned if isinstance(r, Tensor)), *self.asked.values()]

    def settle(self) -> None:
        """Let every call take all that the body gives, now that no one will ask for more."""
        for run in self.runs:
            run.node["results"] += tuple(run.asked(name) for name in self.asked)


@dataclass
class Given:
    """Arguments of one call: values by parameter, and where they stand."""

    tensors: dict[str, Any]
    settings: dict[str, Any]
    spans: dict[str, Span]


class Calls:
    """Evaluation of calls; a part of `Elaborator`."""

    def _call(self, expr: sx.Call, env: Environment, hint: str | None) -> Any:
        function = expr.function
        if isinstance(function, sx.Name) and not env.has(function.id):
            if env.file.lookup(function.id) is None and function.id in STATIC:
                made = self._static_call(function.id, expr, env)
                if made is not None:
                    return made[0]
            if function.id == "route" and env.file.lookup("route") is None:
                return self._route(expr, env, hint)
            if function.id == "constant" and len(expr.arguments) == 1:
                raise self.unknown("constant", function.span, env)
        callee = self.value(function, env)
        if not isinstance(callee, Waiting):
            what = f"`{function.id}` is {kind(callee)} and" if isinstance(function, sx.Name) else kind(callee)
            raise fail("not-a-function", f"{what} cannot be called", function.span, "expected a function or a block")
        given = next((a for a in expr.arguments if a.given), None)
        if given is not None:
            raise fail("not-built-yet", "`given` is not built yet", given.span)
        return self.call(callee, expr, env, hint)

    def _route(self, expr: sx.Call, env: Environment, hint: str | None) -> Tensor:
        """`route(x, routing, expert, over = experts)`: the sum over experts of routing times expert(x)."""
        positional = [a for a in expr.arguments if a.name is None]
        over = next((a for a in expr.arguments if a.name == "over"), None)
        if len(positional) != 3 or over is None or len(expr.arguments) != 4:
            raise fail("wrong-arity", "`route` takes an input, a weight for each expert, the expert, and the dim of the experts",
                       expr.span, "expected route(x, routing, expert, over = experts)")
        x, routing, expert = (self.value(a.value, env) for a in positional)
        for value, argument in zip((x, routing), positional, strict=False):
            if not isinstance(value, Tensor) or value.kind != "real":
                raise fail("wrong-type", f"`route` needs a real tensor here, this is {kind(value)}", argument.span)
        if not isinstance(expert, Waiting) or expert.found is None or len(self.input_names(expert)) != 1:
            raise fail("wrong-type", f"an expert is a block that waits for its input, this is {kind(expert)}", positional[2].span,
                       help="`expert = mlp(ffn)` is one")
        (dim,) = self.dims(over.value, env)
        rows = tuple(d for d in routing.dims if d is not dim)
        if len(rows) == len(routing.dims) or tuple(x.dims[:-1]) != rows:
            raise fail("dim-mismatch", f"`route` needs a weight for each place of its input and each of `{dim.name}`",
                       positional[1].span, f"the input is [{', '.join(d.name for d in x.dims)}], the weights are "
                       f"[{', '.join(d.name for d in routing.dims)}]")
        name = positional[2].value.id if isinstance(positional[2].value, sx.Name) else expert.name
        expert, _ = self.rewritten(expert, env, name)
        tensors = dict(zip(self.input_names(expert), (x,), strict=True))
        made = self.body_of(expert, Given(tensors, expert.settings, expert.spans), env, expr.span)
        along = self._along_sequence(made.builder)
        if along is not None:
            raise fail("not-built-yet", f"an expert that looks along the sequence, as `{along}` does, is not built yet",
                       positional[2].span)
        result = made.returned[0] if len(made.returned) == 1 else None
        if not isinstance(result, Tensor) or len(result.dims) != len(x.dims):
            raise fail("wrong-type", "an expert returns one tensor with as many dims as its input", positional[2].span)
        dims: list[Dim] = []
        for values in (tensors, expert.settings):
            for _, value in sorted(values.items()):
                self.key(value, dims)
        swap = {id(a): b for a, b in zip(made.formals, dims, strict=True)}
        last = swap.get(id(result.dims[-1]), result.dims[-1])
        env.builder.own(name, expr.span)
        size = whole(number_of(dim, over.span), f"the size of `{dim.name}`", over.span)
        env.builder.instances.append(pg.Instance(name, (made.name,), (0,) * size))
        (out,) = env.builder.add_node("route", (x, routing), ((hint or "route", "real", (*x.dims[:-1], last)),),
                                      {"instance": name, "over": (dim,)}, {}, expr.span)
        return out

    def _along_sequence(self, builder: Builder) -> str | None:
        """An op of a body or below it that reads other places of a sequence."""
        for node in builder.nodes:
            op = self.ops.get(node["op"])
            if op is not None and op.coordinates and any(d.sequence for ds in node["bindings"].values() for d in ds):
                return op.name
        for instance in builder.instances:
            for name in instance.bodies:
                inner = self.finished[name].builder if name in self.finished else self.loops.get(name)
                found = None if inner is None else self._along_sequence(inner)
                if found is not None:
                    return found
        return None

    def _static_call(self, name: str, expr: sx.Call, env: Environment) -> tuple[Any] | None:
        """A function of numbers, strings and lists; None if an argument is a tensor."""
        values = [number_of(self.value(a.value, env), a.span) for a in expr.arguments]
        if any(isinstance(v, Tensor) for v in values):
            return None
        try:
            return (STATIC[name](*(as_float(v) for v in values)),)
        except (TypeError, ValueError, OverflowError):
            shown = ", ".join(kind(v) for v in values)
            raise fail("wrong-type", f"`{name}` does not work on {shown or 'nothing'}", expr.span) from None

    def call(self, callee: Waiting, expr: sx.Call, env: Environment, hint: str | None) -> Any:
        """Call a function with the arguments that stand in `expr`."""
        if callee.op is not None:
            return self._call_op(callee, expr, env, hint)
        if callee.found is None:
            return self._call_identity(expr, env)
        return self._call_block(callee, expr, env, hint)

    def _call_identity(self, expr: sx.Call, env: Environment) -> Any:
        if not expr.arguments:
            return Waiting(span=expr.span)
        if len(expr.arguments) > 1:
            raise fail("too-many-arguments", "`identity` takes one input", expr.arguments[1].span)
        return self.value(expr.arguments[0].value, env)

    # --- ops --------------------------------------------------------------------------------------

    def _call_op(self, callee: Waiting, expr: sx.Call, env: Environment, hint: str | None) -> Any:
        op = callee.op
        given = Given({}, dict(callee.settings), dict(callee.spans))
        if any(o.repeated for o in op.inputs):
            self._repeated_arguments(op, expr, env, given)
        else:
            self._op_arguments(op, expr, env, given)
        waiting = replace(callee, settings=given.settings, spans=given.spans, span=expr.span)
        if op.inputs and not given.tensors:
            return waiting
        self._all_inputs(op, given, expr)
        if elementwise(op) and not any(isinstance(t, Tensor) for t in given.tensors.values()):
            raise fail("wrong-type", f"`{op.name}` needs a tensor among its arguments", expr.span)
        waiting, hint = self.rewritten(waiting, env, hint)
        return self.invoke(waiting, given.tensors, env, expr.span, hint)

    def apply(
        self, callee: Waiting, tensors: dict[str, Any], env: Environment, span: Span, hint: str | None
    ) -> Any:
        """Call a function that has its settings with its inputs, given by name."""
        if callee.op is not None:
            return self.apply_op(callee.op, tensors, callee.settings, callee.spans, env, span, hint, callee.shared)
        return self.run_block(callee, Given(tensors, callee.settings, callee.spans), env, span, hint)

    def input_names(self, callee: Waiting) -> list[str]:
        """The names of a function's inputs, in order."""
        if callee.op is not None:
            return [o.name for o in callee.op.inputs]
        return [i.name for i in inputs_of(callee.found.declaration)]

    def _op_arguments(self, op: Any, expr: sx.Call, env: Environment, given: Given) -> None:
        inputs = [o.name for o in op.inputs]
        slots = inputs + [s.name for s in op.settings]
        positional = [a for a in expr.arguments if a.name is None]
        first: Any = None
        if positional and inputs:
            if not isinstance(positional[0].value, sx.Arrow):
                first = self.value(positional[0].value, env)
            if not isinstance(first, Tensor) and not elementwise(op):
                first = None
                slots = [s.name for s in op.settings if s.name not in given.settings]
        if len(positional) > len(slots):
            raise fail("too-many-arguments", f"`{op.name}` takes {_arguments(slots)}, this is one more",
                       positional[len(slots)].span)
        for i, (name, argument) in enumerate(zip(slots, positional, strict=False)):
            self._op_argument(op, name, argument, env, given, first if i == 0 else None)
        for argument in expr.arguments:
            if argument.name:
                self._op_argument(op, argument.name, argument, env, given)

    def _op_argument(
        self, op: Any, name: str, argument: sx.Argument, env: Environment, given: Given, value: Any = None
    ) -> None:
        inputs = [o.name for o in op.inputs]
        if name in given.tensors or name in given.spans and name not in op_settings(op):
            raise given_twice(name, given.spans[name], argument.span)
        given.spans[name] = argument.span
        if name in inputs:
            value = self.value(argument.value, env) if value is None else value
            if isinstance(value, Dim):
                value = number_of(value, argument.span)
            if not isinstance(value, Tensor) and not (is_number(value) and elementwise(op)):
                raise fail("wrong-type", f"`{name}` of `{op.name}` must be a tensor, this is {kind(value)}", argument.span)
            given.tensors[name] = value
        elif op.setting(name):
            given.settings[name] = self._setting(op.setting(name), argument, env)
        else:
            raise fail("no-such-parameter", f"`{op.name}` has no parameter `{name}`", argument.span,
                       help=did_you_mean(name, [*inputs, *op_settings(op)], "a parameter"))

    def _repeated_arguments(self, op: Any, expr: sx.Call, env: Environment, given: Given) -> None:
        """`attend(q, (k, v, mask), (k2, v2, mask2), scale = s)`: a tuple for each source."""
        plain = [o.name for o in op.inputs if not o.repeated]
        repeated = [o.name for o in op.inputs if o.repeated]
        sources: list[tuple[Any, ...]] = []
        taken = 0
        for argument in expr.arguments:
            if argument.name is not None:
                self._op_argument(op, argument.name, argument, env, given)
            elif isinstance(argument.value, sx.TupleOf):
                extra = next((a for a in argument.value.items if a.name), None)
                if extra is not None:
                    raise fail("not-built-yet", f"`{extra.name}` of one source of `{op.name}` is not built yet", extra.span)
                sources.append((self.value(argument.value, env), argument.span))
            elif taken < len(plain):
                self._op_argument(op, plain[taken], argument, env, given)
                taken += 1
            else:
                raise fail("wrong-arity", f"the sources of `{op.name}` are tuples: (k, v, mask)", argument.span)
        if not sources and not given.tensors:
            return
        for values, span in sources:
            if len(values) != len(repeated) + 1:
                raise fail("wrong-arity", f"a source of `{op.name}` has {len(repeated) + 1} parts, this has {len(values)}",
                           span, f"expected ({', '.join([*repeated, 'mask'])})")
        for i, name in enumerate(repeated):
            column = [values[i] for values, _ in sources]
            for value, (_, span) in zip(column, sources, strict=True):
                if not isinstance(value, Tensor):
                    raise fail("wrong-type", f"`{name}` of `{op.name}` must be a tensor, this is {kind(value)}", span)
            given.tensors[name] = column
        given.settings["masks"] = tuple(self._mask(values[-1], span) for values, span in sources)

    def _mask(self, value: Any, span: Span) -> sx.Expr:
        if isinstance(value, bool):
            return sx.Constant(value)
        if isinstance(value, Symbolic) and value.is_mask:
            return value.expr
        raise fail("wrong-type", f"a mask compares coordinates of `query` and `key`, this is {kind(value)}", span,
                   help="`causal`, `full` and `window(span)` are masks")

    def _setting(self, setting: Any, argument: sx.Argument, env: Environment) -> Any:
        expr = argument.value
        if setting.kind == "map":
            if not isinstance(expr, sx.Arrow):
                raise fail("wrong-type", f"`{setting.name}` must say which dims become which", argument.span,
                           "expected `dims -> dims`")
            return self._arrow(expr, env, None)
        if setting.kind == "dims":
            cell = env.cell(expr.id) if isinstance(expr, sx.Name) else None
            if cell is not None and cell.value is None:
                return None
            dims = self.dims(expr, env)
            if not dims:
                raise fail("too-few-dims", f"`{setting.name}` names at least one dim", argument.span)
            return dims
        value = self.value(expr, env)
        if setting.kind == "flag":
            if value is not None and not isinstance(value, bool):
                raise fail("wrong-type", f"`{setting.name}` is true or false, this is {kind(value)}", argument.span)
            return bool(value)
        if setting.kind == "weight":
            if value is not None and not isinstance(value, Tensor):
                raise fail("wrong-type", f"`{setting.name}` must be the weight of another call, this is {kind(value)}",
                           argument.span, help="`embedding.weight`")
            return value
        value = number_of(value, argument.span)
        if setting.kind == "whole":
            return whole(value, f"`{setting.name}`", argument.span, setting.least)
        if setting.kind == "number" and (value is not None or setting.default is not None):
            if not is_number(value):
                raise fail("wrong-type", f"`{setting.name}` must be a number, this is {kind(value)}", argument.span)
            return as_float(value)
        return value

    def _all_inputs(self, op: Any, given: Given, expr: sx.Call) -> None:
        missing = [o.name for o in op.inputs if o.name not in given.tensors and not o.optional]
        if missing:
            raise fail("missing-argument", f"`{op.name}` needs `{missing[0]}` too", expr.span)

    def apply_op(
        self,
        op: Any,
        tensors: Mapping[str, Any],
        settings: Mapping[str, Any],
        spans: Mapping[str, Span],
        env: Environment,
        span: Span,
        hint: str | None,
        shared: tuple[str, Builder] | None = None,
    ) -> Any:
        """Add the node of one use of an op; gives its result."""
        full = {}
        for setting in op.settings:
            full[setting.name] = settings.get(setting.name, setting.default)
            if full[setting.name] is self.required:
                raise fail("missing-argument", f"`{op.name}` needs `{setting.name}`", span, setting.meaning)
        builder = shared[1] if shared else env.builder
        local = {name: self._localise(value, env.builder) for name, value in tensors.items()}
        numbers = {name: as_float(value) for name, value in local.items() if is_number(value)}
        call = self.op_call(op, _only_tensors(local), {**full, **numbers}, span, spans)
        typing = op.infer(call)
        if typing.sequences:
            full["masks"] = tuple(
                self.resolved(mask, query, key) for mask, (query, key) in zip(full["masks"], typing.sequences, strict=True)
            )
        owner = None
        if any(self.is_owned(o) for o in typing.operands):
            owner = shared[0] if shared else hint or op.name
        operands = self._operands(op, typing, owner, builder, shared, span)
        attrs = {name: value for name, value in full.items() if op.setting(name).kind != "weight"
                 and value is not None and value != op.setting(name).default}
        attrs.update(numbers)
        results = tuple((hint or op.name, kind_, dims) for kind_, dims in typing.results)
        made = env.builder.add_node(op.name, operands, results, attrs, typing.bindings, span)
        made[0].owner = owner
        if owner is not None and builder is not env.builder:
            made[0].owner = None
        return made[0]

    def _localise(self, value: Any, builder: Builder) -> Any:
        if isinstance(value, list):
            return [builder.local(v) for v in value]
        return builder.local(value) if isinstance(value, Tensor) else value

    def _operands(
        self, op: Any, typing: Any, owner: str | None, builder: Builder, shared: Any, span: Span
    ) -> tuple[Tensor | None, ...]:
        if owner is not None and not (shared and f"{owner}." in builder.shared):
            builder.own(owner, span)
            if shared:
                builder.shared[f"{owner}."] = span
        made = []
        for operand in typing.operands:
            if self.is_owned(operand):
                name = f"{owner}.{operand.part}"
                known = builder.weight_tensors.get(name)
                if known is not None and known.dims != operand.dims:
                    raise fail("dim-mismatch", f"the shared weight `{name}` has other dims here than at its first use", span,
                               secondary=[Label(known.span, "first used here")])
                made.append(known or builder.add_weight(
                    name, operand.dims, operand.init, op.name, operand.keep, operand.layout, span))
            else:
                made.append(operand if isinstance(operand, Tensor) else None)
        return tuple(made)

    # --- blocks -----------------------------------------------------------------------------------

    def declared(self, found: Found, span: Span) -> Any:
        """What the bare name of a declaration stands for: a function that waits, or its value if it needs nothing."""
        declaration = found.declaration
        if isinstance(declaration, sx.Variant):
            return self.variant(found, span)
        if not isinstance(declaration, sx.Function):
            raise fail("not-built-yet", f"a {getattr(declaration, 'keyword', 'checkpoint map')} cannot be used as a value",
                       span)
        if declaration.keyword in ("pipeline", "recipe"):
            raise fail("not-built-yet", f"{declaration.keyword}s are not built yet", span)
        waiting = Waiting(found=found, span=span)
        if not declaration.parameters and not inputs_of(declaration):
            return self._run_inline(waiting, Given({}, {}, {}), None, span, None)
        return waiting

    def variant(self, found: Found, span: Span) -> Waiting:
        """`model b = a(x = 1)`: the function that it names, with those arguments."""
        declaration = found.declaration
        if declaration.keyword not in ("model", "block"):
            raise fail("not-built-yet", f"{declaration.keyword}s are not built yet", span)
        if found in self.resolving:
            raise _cycle(self.resolving[self.resolving.index(found) :])
        self.resolving.append(found)
        env = Environment(found.file, Builder(declaration.name))
        try:
            value = self.value(declaration.value, env)
        finally:
            self.resolving.pop()
        if not isinstance(value, Waiting):
            raise fail("wrong-type", f"a {declaration.keyword} is a call of another, this is {kind(value)}",
                       declaration.value.span)
        if declaration.rules:
            value = replace(value, sheets=(*value.sheets, self.sheet_of(found, env)))
        return value

    def _call_block(self, callee: Waiting, expr: sx.Call, env: Environment, hint: str | None) -> Any:
        declaration = callee.found.declaration
        inputs = [i.name for i in inputs_of(declaration)]
        parameters = [p.name for p in declaration.parameters]
        given = Given({}, dict(callee.settings), dict(callee.spans))
        self._block_arguments(declaration, inputs, parameters, expr, env, given)
        waiting = replace(callee, settings=given.settings, spans=given.spans, span=expr.span)
        if inputs and not given.tensors:
            return waiting
        required = [i.name for i in inputs_of(declaration) if not i.optional and i.default is None]
        missing = [n for n in required if n not in given.tensors]
        if missing:
            raise fail("missing-argument", f"`{declaration.name}` needs the input `{missing[0]}` too", expr.span,
                       secondary=[Label(declaration.name_span, f"`{declaration.name}` is declared here")])
        waiting, hint = self.rewritten(waiting, env, hint)
        return self.invoke(waiting, given.tensors, env, expr.span, hint)

    def _block_arguments(
        self, declaration: sx.Function, inputs: list[str], parameters: list[str], expr: sx.Call, env: Environment,
        given: Given,
    ) -> None:  # fmt: skip
        positional = [a for a in expr.arguments if a.name is None]
        values = [self.value(a.value, env) for a in positional]
        slots = inputs + parameters
        if inputs and not (values and (isinstance(values[0], Tensor) or values[0] is None and len(values) > 1)):
            slots = [p for p in parameters if p not in given.settings]
        if len(values) > len(slots):
            raise fail("too-many-arguments", f"`{declaration.name}` takes {_arguments(slots)}, this is one more",
                       positional[len(slots)].span, secondary=[Label(declaration.name_span, "declared here")])
        named = [(slot, value, a) for slot, value, a in zip(slots, values, positional, strict=False)]
        named += [(a.name, self.value(a.value, env), a) for a in expr.arguments if a.name]
        seen: dict[str, Span] = {}
        for name, value, argument in named:
            if name in seen:
                raise given_twice(name, seen[name], argument.span)
            seen[name] = argument.span
            if name in inputs:
                if value is not None and not isinstance(value, Tensor):
                    raise fail("wrong-type", f"the input `{name}` of `{declaration.name}` must be a tensor, this is "
                               f"{kind(value)}", argument.span)
                given.tensors[name] = value
            elif name in parameters:
                given.settings[name] = value
            else:
                raise fail("no-such-parameter", f"`{declaration.name}` has no parameter `{name}`", argument.span,
                           secondary=[Label(declaration.name_span, "declared here")],
                           help=did_you_mean(name, slots, "a parameter"))
            given.spans[name] = argument.span

    def run_block(self, callee: Waiting, given: Given, env: Environment, span: Span, hint: str | None) -> Any:
        """Call a block with inputs: a body of its own if it owns weights, else its statements in the caller's body."""
        declaration = callee.found.declaration
        if declaration.name in self.running:
            raise fail("recursion", f"`{declaration.name}` calls itself", span, "programs of this language always end")
        if len(self.running) > 60:
            raise fail("too-deep", "blocks call each other more than 60 deep", span)
        if not inputs_of(declaration):
            return self._run_inline(callee, given, env, span, hint)
        made = self.body_of(callee, given, env, span)
        if not made.builder.owns_anything():
            return self._run_inline(callee, given, env, span, hint)
        return self._add_call(callee, made, given, env, span, hint)

    def body_of(self, callee: Waiting, given: Given, env: Environment, span: Span) -> Elaborated:
        """The elaborated body for these arguments, made once."""
        declaration = callee.found.declaration
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
            inner = Environment(callee.found.file, builder, scope=scope)
            tensors = {
                name: None if t is None else builder.add_input(name, t.kind, t.dims, t.span)
                for name, t in given.tensors.items()
            }
            settings = {name: _inside(v, name, builder) for name, v in given.settings.items()}
            returned = self.run_function(callee.found, Given(tensors, settings, given.spans), inner, span)
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
        dims: list[Dim] = []
        for values in (given.tensors, given.settings):
            for _, value in sorted(values.items()):
                self.key(value, dims)
        swap = {id(a): b for a, b in zip(made.formals, dims, strict=True)}
        outputs = [r for r in made.returned if isinstance(r, Tensor)]
        base = [hint] if hint and len(outputs) == 1 else [t.name if hint is None else f"{hint}_{t.name}" for t in outputs]
        if hint is None and len(outputs) == 1:
            base = [made.builder.block]
        results = tuple(
            (b, t.kind, tuple(swap.setdefault(id(d), _fresh(d)) for d in t.dims)) for b, t in zip(base, outputs, strict=True)
        )
        values = [*given.tensors.values(), *(t for v in given.settings.values() for t in _tensors_in(v))]
        operands = tuple(v for v in values if v is not None)
        bindings = {made.builder.dim_name(f): (swap[id(f)],) for f in made.formals}
        tensors = builder.add_node("call", operands, results, {"instance": name}, bindings, span)
        made.runs.append(Run(made, builder, builder.nodes[-1], tensors, swap))
        for tensor in tensors:
            tensor.run = made.runs[-1]
        rest = iter(tensors)
        values = [next(rest) if isinstance(r, Tensor) else r for r in made.returned]
        return values[0] if len(values) == 1 else tuple(values)

    def _instance(self, callee: Waiting, made: Elaborated, builder: Builder, span: Span, hint: str | None) -> str:
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
                raise fail("not-built-yet", f"`{name}` is shared by a block around this one, which only works inside loops yet",
                           span, help="declare it `shared` in the block that calls it")
            if name not in builder.borrowed:
                builder.own(name, span)
                builder.borrow(name, made.name)
            builder = builder.parent

    def _run_inline(self, callee: Waiting, given: Given, env: Environment | None, span: Span, hint: str | None) -> Any:
        builder = env.builder if env is not None else Builder(callee.name)
        inner = Environment(callee.found.file, builder, is_inline=True, scope=scope_of(callee))
        tensors = {n: None if t is None else builder.local(t) for n, t in given.tensors.items()}
        returned = self.run_function(callee.found, Given(tensors, given.settings, given.spans), inner, span, hint)
        return returned[0] if len(returned) == 1 else tuple(returned)

    def run_function(
        self, found: Found, given: Given, env: Environment, span: Span, hint: str | None = None
    ) -> list[Any]:
        """Bind inputs and parameters, run the statements; gives the returned values."""
        declaration = found.declaration
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
                if parameter.name not in given.settings:
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
            raise fail("missing-argument", f"`{declaration.name}` needs `{parameter.name}`", span, "not given here",
                       [Label(parameter.span, "declared without a default")])
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
            raise fail("too-few-dims", f"the input `{statement.name}` needs the dims [{wanted}]", where, f"this has [{have}]",
                       [Label(statement.span, "declared here")])
        for item, dim in zip(reversed(shape), reversed(tensor.dims), strict=False):
            self._bind_dim(item, dim, statement, env, where)

    def _bind_dim(self, item: sx.DimItem, dim: Dim, statement: sx.Input, env: Environment, where: Span) -> None:
        if item.size is not None:
            size = whole(self.number(item.size, env), f"the size of `{item.name}`", item.span)
            if dim.size is not None and dim.size != size:
                raise fail("dim-mismatch", f"`{item.name}` must be {size}, this has {dim.size}", where,
                           f"`{dim.name}` = {dim.size}", [Label(item.span, "declared here")])
        if item.name is None:
            return
        cell = env.cells.get(item.name)
        if cell is not None and cell.value is not dim:
            known = number_of(cell.value, where) if isinstance(cell.value, Dim) and cell.value.size else cell.value
            if isinstance(cell.value, Dim) or known != dim.size:
                first = cell.value.size if isinstance(cell.value, Dim) else known
                labels = [Label(cell.span, f"`{item.name}` was first bound to {first or 'another dim'} here")]
                raise fail("dim-mismatch", f"`{item.name}` is {first or 'one dim'} in one place and {dim.size or 'another'} "
                           f"in `{statement.name}`", where, f"`{dim.name}` = {dim.size or '?'}", labels)
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
            leads = tuple(self.key(d, dims) for d in value.lead)
            return ("dim", place, value.name, value.size, value.sequence, leads, coordinates)
        if isinstance(value, Tensor):
            return ("tensor", value.kind, tuple(self.key(d, dims) for d in value.dims))
        if isinstance(value, Waiting):
            target = value.op.name if value.op is not None else id(value.found.declaration) if value.found else None
            settings = tuple((n, self.key(v, dims)) for n, v in sorted(value.settings.items()))
            shared = None if value.shared is None else (value.shared[0], id(value.shared[1]))
            return ("waiting", target, settings, shared, scope_key(scope_of(value)), value.is_it)
        if isinstance(value, (list, tuple)):
            return ("list", tuple(self.key(v, dims) for v in value))
        if isinstance(value, TableOf):
            return ("table", id(value))
        return (type(value).__name__, value)


class Run:
    """One call of a body: its variables can be asked for, `f(x).final`."""

    def __init__(
        self, made: Elaborated, builder: Builder, node: dict[str, Any], tensors: Sequence[Tensor], swap: dict[int, Dim]
    ):
        self.made, self.builder, self.node, self.tensors, self.swap = made, builder, node, tensors, swap
        self.given: dict[str, Tensor] = {}

    def __call__(self, name: str, span: Span) -> Tensor:
        made = self.made
        value = made.variables.get(name)
        if value is None:
            raise fail("no-such-member", f"`{made.builder.block}` has no variable `{name}`", span,
                       help=did_you_mean(name, made.variables, "a variable"))
        for tensor, output in zip(self.tensors, made.outputs, strict=False):
            if output is value:
                return tensor
        if not isinstance(value, Tensor):
            raise fail("wrong-type", f"`{name}` of `{made.builder.block}` is {kind(value)}, a run has tensors only", span)
        made.asked[name] = made.builder.local(value)
        return self.asked(name)

    def asked(self, name: str) -> Tensor:
        """A variable of this run, as its caller knows it."""
        if name not in self.given:
            inner = self.made.asked[name]
            dims = tuple(self.swap.setdefault(id(d), _fresh(d)) for d in inner.dims)
            made = Tensor(self.builder.fresh(f"{self.tensors[0].name}_{name}"), inner.kind, dims, self.builder, span=inner.span)
            self.given[name] = made
        return self.given[name]


def _called_from(diagnostic: Diagnostic, where: Label) -> Diagnostic:
    """What went wrong in another file also shows the call that led there: the first one in a file not shown yet."""
    shown = {label.span.source for label in (diagnostic.primary, *diagnostic.secondary)}
    if where.span.source in shown or not where.span.source.text:
        return diagnostic
    return replace(diagnostic, secondary=(*diagnostic.secondary, where))


def given_twice(name: str, first: Span, second: Span) -> SpecError:
    """The `duplicate-argument` of two arguments for one parameter."""
    how = "the first" if re.match(rf"{re.escape(name)}\s*=", first.text) else f"the first: this is `{name}`, by its place"
    return fail("duplicate-argument", f"`{name}` is given twice", second, "the second", [Label(first, how)])


def _arguments(slots: Sequence[str]) -> str:
    return f"{len(slots)} argument{'s' * (len(slots) != 1)}"


def _cycle(chain: list[Found]) -> SpecError:
    """One error for a circle of definitions, whichever of them was asked for."""
    first = min(range(len(chain)), key=lambda i: (chain[i].declaration.name_span.start, chain[i].declaration.name))
    turned = chain[first:] + chain[:first]
    names = [f.declaration.name for f in turned]
    what = f"`{names[0]}` is defined by itself" if len(names) == 1 else f"{' and '.join(f'`{n}`' for n in names)} are defined by each other"
    return fail("cyclic-definition", f"{what}: {' -> '.join([*names, names[0]])}", turned[0].declaration.name_span,
                secondary=[Label(f.declaration.name_span) for f in turned[1:]],
                help=f"one of them needs a body: `{turned[0].declaration.keyword} {names[0]}(...):`")


def _tensors_in(value: Any) -> list[Tensor]:
    """The tensors that a parameter brings along: itself, or those that a waiting function was given."""
    if isinstance(value, Tensor):
        return [value]
    return [t for v in value.settings.values() for t in _tensors_in(v)] if isinstance(value, Waiting) else []


def _inside(value: Any, name: str, builder: Builder) -> Any:
    """A parameter as a body sees it: tensors that it brings along are inputs of the body, in the same order."""
    if isinstance(value, Tensor):
        return builder.add_input(name, value.kind, value.dims, value.span)
    if isinstance(value, Waiting) and _tensors_in(value):
        settings = {n: _inside(v, f"{name}_{n}", builder) for n, v in value.settings.items()}
        return replace(value, settings=settings)
    return value


def _fresh(dim: Dim) -> Dim:
    return Dim(dim.name, dim.size, dim.sequence, dim.lead, dim.span, dim.factors)


def _only_tensors(values: Mapping[str, Any]) -> dict[str, Any]:
    return {n: v if isinstance(v, (Tensor, list)) else None for n, v in values.items()}


def elementwise(op: Any) -> bool:
    """Whether an op computes place by place, so that numbers may stand for tensors."""
    return bool(op.inputs) and all(not o.leading for o in op.inputs)


def op_settings(op: Any) -> list[str]:
    return [s.name for s in op.settings]


def inputs_of(declaration: sx.Function) -> list[sx.Input]:
    """The input lines of a function, in order."""
    return [s for s in declaration.body if isinstance(s, sx.Input)]


__all__ = ["Calls", "Elaborated", "Given", "SpecError", "inputs_of", "truth"]
