"""`route`: a layer of experts, each on the rows that are routed to it."""

from __future__ import annotations

from .. import program as pg
from .. import syntax as sx
from ..arithmetic import kind, whole
from ..diagnostics import fail
from .bodies import Given
from .builder import Builder
from .environment import Environment
from .expressions import number_of
from .machine import Machine
from .values import Tensor, Waiting


class Experts(Machine):
    """Evaluation of `route`; a part of `Elaborator`."""

    def route(self, expr: sx.Call, env: Environment, hint: str | None) -> Tensor:
        """`route(x, routing, expert, over = experts)`: the sum over experts of routing times expert(x)."""
        positional = [a for a in expr.arguments if a.name is None]
        over = next((a for a in expr.arguments if a.name == "over"), None)
        if len(positional) != 3 or over is None or len(expr.arguments) != 4:
            raise fail(
                "wrong-arity",
                "`route` takes an input, a weight for each expert, the expert, and the dim of the experts",
                expr.span,
                "expected route(x, routing, expert, over = experts)",
            )
        x, routing, expert = (self.value(a.value, env) for a in positional)
        for value, argument in zip((x, routing), positional, strict=False):
            if not isinstance(value, Tensor) or value.kind != "real":
                raise fail("wrong-type", f"`route` needs a real tensor here, this is {kind(value)}", argument.span)
        if not isinstance(expert, Waiting) or expert.found is None or len(self.input_names(expert)) != 1:
            raise fail(
                "wrong-type",
                f"an expert is a block that waits for its input, this is {kind(expert)}",
                positional[2].span,
                help="`expert = mlp(ffn)` is one",
            )
        (dim,) = self.dims(over.value, env)
        rows = tuple(d for d in routing.dims if d is not dim)
        if len(rows) == len(routing.dims) or tuple(x.dims[:-1]) != rows:
            raise fail(
                "dim-mismatch",
                f"`route` needs a weight for each place of its input and each of `{dim.name}`",
                positional[1].span,
                f"the input is [{', '.join(d.name for d in x.dims)}], the weights are "
                f"[{', '.join(d.name for d in routing.dims)}]",
            )
        name = positional[2].value.id if isinstance(positional[2].value, sx.Name) else expert.name
        expert, _ = self.rewritten(expert, env, name)
        tensors = dict(zip(self.input_names(expert), (x,), strict=True))
        given = Given(tensors, expert.settings, expert.spans)
        made = self.body_of(expert, given, env, expr.span)
        along = self._along_sequence(made.builder)
        if along is not None:
            raise fail(
                "not-built-yet",
                f"an expert that looks along the sequence, as `{along}` does, is not built yet",
                positional[2].span,
            )
        result = made.returned[0] if len(made.returned) == 1 else None
        if not isinstance(result, Tensor) or len(result.dims) != len(x.dims):
            raise fail("wrong-type", "an expert returns one tensor with as many dims as its input", positional[2].span)
        last = self.swap(made, given).get(id(result.dims[-1]), result.dims[-1])
        env.builder.own(name, expr.span)
        size = whole(number_of(dim, over.span), f"the size of `{dim.name}`", over.span)
        env.builder.instances.append(pg.Instance(name, (made.name,), (0,) * size))
        (out,) = env.builder.add_node(
            "route",
            (x, routing),
            ((hint or "route", "real", (*x.dims[:-1], last)),),
            {"instance": name, "over": (dim,)},
            {},
            expr.span,
        )
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
