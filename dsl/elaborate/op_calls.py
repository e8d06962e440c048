"""Calls of ops: arguments, settings and masks, and the node of one use."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from .. import syntax as sx
from ..arithmetic import as_float, is_number, kind, whole
from ..diagnostics import Label, did_you_mean, fail
from ..source import Span
from .bodies import Given
from .builder import Builder
from .environment import Environment
from .expressions import number_of
from .machine import Machine
from .values import Dim, Picked, Shared, Sloped, Symbolic, Tensor, Waiting
from .wording import count_of, given_twice


class OpCalls(Machine):
    """Evaluation of calls of ops; a part of `Elaborator`."""

    def call_op(self, callee: Waiting, expr: sx.Call, env: Environment, hint: str | None) -> Any:
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

    def _op_arguments(self, op: Any, expr: sx.Call, env: Environment, given: Given) -> None:
        inputs = [o.name for o in op.inputs]
        slots = inputs + [s.name for s in op.settings]
        positional = [a for a in expr.arguments if a.name is None]
        first: Any = None
        if positional and inputs:
            if not isinstance(positional[0].value, sx.Arrow):
                first = self.value(positional[0].value, env)
            if not isinstance(first, Tensor) and not elementwise(op):
                slots = [s.name for s in op.settings if s.name not in given.settings]
                maps = bool(slots) and op.setting(slots[0]).kind in ("map", "split", "join")
                if maps and not isinstance(positional[0].value, sx.Arrow):
                    raise fail(
                        "wrong-type",
                        f"`{inputs[0]}` of `{op.name}` must be a tensor, this is {kind(first)}",
                        positional[0].span,
                    )
                first = None
        if len(positional) > len(slots):
            raise fail(
                "too-many-arguments",
                f"`{op.name}` takes {count_of(slots)}, this is one more",
                positional[len(slots)].span,
            )
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
                raise fail(
                    "wrong-type", f"`{name}` of `{op.name}` must be a tensor, this is {kind(value)}", argument.span
                )
            given.tensors[name] = value
        elif op.setting(name):
            given.settings[name] = self._setting(op.setting(name), argument, env)
        else:
            raise fail(
                "no-such-parameter",
                f"`{op.name}` has no parameter `{name}`",
                argument.span,
                help=did_you_mean(name, [*inputs, *op_settings(op)], "a parameter"),
            )

    def _repeated_arguments(self, op: Any, expr: sx.Call, env: Environment, given: Given) -> None:
        """`attend(q, (k, v, mask), (k2, v2, mask2, query = q2), bias = b, scale = s)`: a tuple for each source; what
        stands behind the tuples holds for all sources that do not say otherwise."""
        plain = [o.name for o in op.inputs if not o.repeated]
        repeated = [o.name for o in op.inputs if o.repeated and not o.optional]
        options = [o.name for o in op.inputs if o.repeated and o.optional]
        words = [name for name in options if name != "slope"]  # which is a kind of `bias`
        sources: list[tuple[tuple[Any, ...], dict[str, Any], Span]] = []
        common: dict[str, Any] = {}
        taken = 0
        for argument in expr.arguments:
            if argument.name in words:
                common[str(argument.name)] = self._option(op, argument, env)
            elif argument.name is not None:
                self._op_argument(op, argument.name, argument, env, given)
            elif isinstance(argument.value, sx.TupleOf):
                sources.append(self._source(op, argument.value, words, env))
            elif taken < len(plain):
                self._op_argument(op, plain[taken], argument, env, given)
                taken += 1
            else:
                raise fail("wrong-arity", f"the sources of `{op.name}` are tuples: (k, v, mask)", argument.span)
        if not sources and not given.tensors:
            return
        for values, _, span in sources:
            if len(values) != len(repeated) + 1:
                raise fail(
                    "wrong-arity",
                    f"a source of `{op.name}` has {len(repeated) + 1} parts, this has {len(values)}",
                    span,
                    f"expected ({', '.join([*repeated, 'mask'])})",
                )
        for i, name in enumerate(repeated):
            column = [values[i] for values, _, _ in sources]
            for value, (_, _, span) in zip(column, sources, strict=True):
                if not isinstance(value, Tensor):
                    raise fail("wrong-type", f"`{name}` of `{op.name}` must be a tensor, this is {kind(value)}", span)
            given.tensors[name] = column
        given.settings["masks"] = tuple(self._mask(values[-1], span) for values, _, span in sources)
        self._options(options, [{**common, **own} for _, own, _ in sources], given)

    def _source(
        self, op: Any, expr: sx.TupleOf, options: list[str], env: Environment
    ) -> tuple[tuple[Any, ...], dict[str, Any], Span]:
        own: dict[str, Any] = {}
        for item in expr.items:
            if item.name is not None and item.name not in options:
                raise fail(
                    "no-such-parameter",
                    f"a source of `{op.name}` has no `{item.name}`",
                    item.span,
                    help=did_you_mean(item.name, options, "an option of a source"),
                )
            if item.name is not None:
                own[item.name] = self._option(op, item, env)
        return self.value(expr, env), own, expr.span

    def _option(self, op: Any, item: sx.Argument, env: Environment) -> Tensor | Picked | Sloped | None:
        """What a source may have beside its keys: a query of its own, or what its distance adds to scores."""
        value = self.value(item.value, env)
        if value is None or is_number(value) and not value:
            return None
        if item.name == "bias" and not isinstance(value, (Picked, Sloped)):
            what = "score biases of this kind are not built yet" if isinstance(value, (Symbolic, Tensor)) else None
            raise fail(
                "not-built-yet" if what else "wrong-type",
                what or f"a score bias is a tensor that a distance picks from or is times, this is {kind(value)}",
                item.span,
                help="`b[query.position - key.position]` picks from the last dim of `b`; "
                "`s * (key.position - query.position)` has a slope for each head",
            )
        if item.name != "bias" and not isinstance(value, Tensor):
            raise fail("wrong-type", f"`{item.name}` of a source must be a tensor, this is {kind(value)}", item.span)
        return value

    def _options(self, options: list[str], sources: list[dict[str, Any]], given: Given) -> None:
        """A bias is an operand of its own kind, and each source has one distance for whichever it has."""
        biases = [own.pop("bias", None) for own in sources]
        columns = {name: [own.get(name) for own in sources] for name in options}
        for name, sort in (("bias", Picked), ("slope", Sloped)):
            columns[name] = [v.tensor if isinstance(v, sort) else None for v in biases]
        for name in options:
            if any(v is not None for v in columns[name]):
                given.settings["options"] = (*given.settings.get("options", ()), name)
                given.tensors[name] = columns[name]
        if any(v is not None for v in biases):
            given.settings["distances"] = tuple(sx.Constant(None) if v is None else v.expr for v in biases)

    def _mask(self, value: Any, span: Span) -> sx.Expr:
        if isinstance(value, bool):
            return sx.Constant(value)
        if isinstance(value, Symbolic) and value.is_mask:
            return value.expr
        raise fail(
            "wrong-type",
            f"a mask compares coordinates of `query` and `key`, this is {kind(value)}",
            span,
            help="`causal`, `full` and `window(span)` are masks",
        )

    def _setting(self, setting: Any, argument: sx.Argument, env: Environment) -> Any:
        expr = argument.value
        if setting.kind in ("map", "split", "join"):
            if not isinstance(expr, sx.Arrow):
                raise fail(
                    "wrong-type",
                    f"`{setting.name}` must say which dims become which",
                    argument.span,
                    "expected `dims -> dims`",
                )
            reading = {"map": self.arrow, "split": self.split, "join": self.join}[setting.kind]
            return reading(expr, env)
        if setting.kind == "coordinate":
            return self.grouped(expr, env)
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
                raise fail(
                    "wrong-type",
                    f"`{setting.name}` must be the weight of another call, this is {kind(value)}",
                    argument.span,
                    help="`embedding.weight`",
                )
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
        shared: Shared | None = None,
    ) -> Any:
        """Add the node of one use of an op; gives its result."""
        full = {}
        for setting in op.settings:
            full[setting.name] = settings.get(setting.name, setting.default)
            if full[setting.name] is self.required:
                raise fail("missing-argument", f"`{op.name}` needs `{setting.name}`", span, setting.meaning)
        builder: Builder = shared.builder if shared else env.builder
        local = {name: self._localise(value, env.builder) for name, value in tensors.items()}
        numbers = {name: as_float(value) for name, value in local.items() if is_number(value)}
        # Dims that an op makes (taps) are those of its weights, so uses of a shared op have them in common.
        dims = builder.op_dims.setdefault(shared.name, {}) if shared else {}
        call = self.new_op_call(op, _only_tensors(local), {**full, **numbers}, span, spans, dims)
        typing = op.infer(call)
        if typing.sequences:
            full["masks"] = tuple(
                self.resolved(mask, query, key)
                for mask, (query, key) in zip(full["masks"], typing.sequences, strict=True)
            )
            full["distances"] = tuple(
                self.resolved(distance, query, key)
                for distance, (query, key) in zip(full["distances"], typing.sequences, strict=False)
            )
        owner = None
        if any(self.is_owned(o) for o in typing.operands):
            owner = shared.name if shared else hint or op.name
        operands = self._operands(op, typing, owner, builder, shared, span)
        attrs = {
            name: value
            for name, value in full.items()
            if op.setting(name).kind != "weight" and value is not None and value != op.setting(name).default
        }
        attrs.update(numbers)
        results = tuple((hint or op.name, kind_, dims) for kind_, dims in typing.results)
        made = env.builder.add_node(op.name, operands, results, attrs, typing.bindings, span)
        made[0].owner = owner
        if owner is not None and builder is not env.builder:
            made[0].owner = None
        return made[0]

    def _localise(self, value: Any, builder: Builder) -> Any:
        if isinstance(value, list):
            return [None if v is None else builder.local(v) for v in value]
        return builder.local(value) if isinstance(value, Tensor) else value

    def _operands(
        self, op: Any, typing: Any, owner: str | None, builder: Builder, shared: Any, span: Span
    ) -> tuple[Tensor | None, ...]:
        if owner is not None and not (shared and f"{owner}." in builder.shared):
            builder.own(owner, span)
            if shared:
                builder.shared[f"{owner}."] = span
        made: list[Tensor | None] = []
        for operand in typing.operands:
            if self.is_owned(operand):
                name = f"{owner}.{operand.part}"
                known = builder.weight_tensors.get(name)
                if known is not None and known.dims != operand.dims:
                    raise fail(
                        "dim-mismatch",
                        f"the shared weight `{name}` has other dims here than at its first use",
                        span,
                        secondary=[Label(known.span, "first used here")],
                    )
                made.append(
                    known
                    or builder.add_weight(name, operand.dims, operand.init, op.name, operand.keep, operand.layout, span)
                )
            else:
                made.append(operand if isinstance(operand, Tensor) else None)
        return tuple(made)


def _only_tensors(values: Mapping[str, Any]) -> dict[str, Any]:
    return {n: v if isinstance(v, (Tensor, list)) else None for n, v in values.items()}


def elementwise(op: Any) -> bool:
    """Whether an op computes place by place, so that numbers may stand for tensors."""
    return bool(op.inputs) and all(not o.leading for o in op.inputs)


def op_settings(op: Any) -> list[str]:
    return [s.name for s in op.settings]
