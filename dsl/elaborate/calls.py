"""Calls: what is called, and whether it is called yet; and what the name of a declaration stands for."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from .. import syntax as sx
from ..arithmetic import as_float, kind
from ..diagnostics import Label, SpecError, fail
from ..load import Found
from ..source import Span
from .bodies import Given, inputs_of
from .builder import Builder
from .environment import Environment
from .expressions import STATIC, number_of
from .machine import Machine
from .values import Tensor, Waiting


class Calls(Machine):
    """Evaluation of calls; a part of `Elaborator`."""

    def _call(self, expr: sx.Call, env: Environment, hint: str | None) -> Any:
        function = expr.function
        if isinstance(function, sx.Name) and not env.has(function.id):
            if env.file.lookup(function.id) is None and function.id in STATIC:
                made = self._static_call(function.id, expr, env)
                if made is not None:
                    return made[0]
            if function.id == "route" and env.file.lookup("route") is None:
                return self.route(expr, env, hint)
        callee = self.value(function, env)
        if not isinstance(callee, Waiting):
            what = f"`{function.id}` is {kind(callee)} and" if isinstance(function, sx.Name) else kind(callee)
            raise fail("not-a-function", f"{what} cannot be called", function.span, "expected a function or a block")
        given = next((a for a in expr.arguments if a.given), None)
        if given is not None:
            raise fail("not-built-yet", "`given` is not built yet", given.span)
        return self.call(callee, expr, env, hint)

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
            return self.call_op(callee, expr, env, hint)
        if callee.found is None:
            return self._call_identity(expr, env)
        return self.call_block(callee, expr, env, hint)

    def _call_identity(self, expr: sx.Call, env: Environment) -> Any:
        if not expr.arguments:
            return Waiting(span=expr.span)
        if len(expr.arguments) > 1:
            raise fail("too-many-arguments", "`identity` takes one input", expr.arguments[1].span)
        return self.value(expr.arguments[0].value, env)

    def apply(self, callee: Waiting, tensors: dict[str, Any], env: Environment, span: Span, hint: str | None) -> Any:
        """Call a function that has its settings with its inputs, given by name."""
        if callee.op is not None:
            return self.apply_op(callee.op, tensors, callee.settings, callee.spans, env, span, hint, callee.shared)
        return self.run_block(callee, Given(tensors, callee.settings, callee.spans), env, span, hint)

    def input_names(self, callee: Waiting) -> list[str]:
        """The names of a function's inputs, in order."""
        if callee.op is not None:
            return [o.name for o in callee.op.inputs]
        return [i.name for i in inputs_of(callee.block)]

    def declared(self, found: Found, span: Span) -> Any:
        """What the bare name of a declaration stands for: a function that waits, or its value if it needs nothing."""
        declaration = found.declaration
        if isinstance(declaration, sx.Variant):
            return self.variant(found, span)
        if not isinstance(declaration, sx.Function):
            raise fail(
                "not-built-yet",
                f"a {getattr(declaration, 'keyword', 'checkpoint map')} cannot be used as a value",
                span,
            )
        if declaration.keyword in ("pipeline", "recipe"):
            raise fail("not-built-yet", f"{declaration.keyword}s are not built yet", span)
        waiting = Waiting(found=found, span=span)
        if not declaration.parameters and not inputs_of(declaration):
            return self.run_inline(waiting, Given({}, {}, {}), None, span, None)
        return waiting

    def variant(self, found: Found, span: Span) -> Waiting:
        """`model b = a(x = 1)`: the function that it names, with those arguments."""
        declaration = found.declaration
        assert isinstance(declaration, sx.Variant)
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
            raise fail(
                "wrong-type",
                f"a {declaration.keyword} is a call of another, this is {kind(value)}",
                declaration.value.span,
            )
        if declaration.rules:
            value = replace(value, sheets=(*value.sheets, self.sheet_of(found, env)))
        return value


def _cycle(chain: list[Found]) -> SpecError:
    """One error for a circle of definitions, whichever of them was asked for."""
    first = min(range(len(chain)), key=lambda i: (chain[i].declaration.name_span.start, chain[i].declaration.name))
    turned = chain[first:] + chain[:first]
    names = [f.declaration.name for f in turned]
    what = (
        f"`{names[0]}` is defined by itself"
        if len(names) == 1
        else f"{' and '.join(f'`{n}`' for n in names)} are defined by each other"
    )
    return fail(
        "cyclic-definition",
        f"{what}: {' -> '.join([*names, names[0]])}",
        turned[0].declaration.name_span,
        secondary=[Label(f.declaration.name_span) for f in turned[1:]],
        help=f"one of them needs a body: `{getattr(turned[0].declaration, 'keyword', 'block')} {names[0]}(...):`",
    )
