"""Compound dims: what `[rows, cols] -> places` makes, and `places -> [rows, cols]` takes apart."""

from __future__ import annotations

import math
from dataclasses import replace

from .. import syntax as sx
from ..arithmetic import whole
from ..diagnostics import Label, fail
from ..source import Span
from .environment import Environment
from .machine import Machine
from .values import Cell, Dim


class Reshaping(Machine):
    """Evaluation of the maps of `reshape`; a part of `Elaborator`."""

    def split(self, expr: sx.Arrow, env: Environment) -> tuple[tuple[Dim, ...], ...]:
        """The dims on both sides; those on the right that have no name yet are made. Raises `dim-mismatch`,
        `not-exact`, `size-unknown`, `wrong-arity`."""
        old = self.dims(expr.source, env)
        names = expr.target.items if isinstance(expr.target, sx.ListOf) else (sx.Argument(expr.target),)
        if (len(old) == 1) == (len(names) == 1):
            raise fail(
                "wrong-arity",
                "one side of the map is one dim, the other are its parts",
                expr.span,
                f"{len(old)} become {len(names)}",
            )
        if len(names) == 1:
            return old, (self._merged(old, names[0], env),)
        return old, self._parts(old[0], names, expr, env)

    def join(self, expr: sx.Arrow, env: Environment) -> tuple[tuple[Dim, ...], ...]:
        """`[a, b] -> both`: a new dim with the rows of both. Raises `wrong-arity`, `bound-twice`, `not-built-yet`."""
        parts = self.dims(expr.source, env)
        if len(parts) != 2 or not isinstance(expr.target, sx.Name):
            raise fail("wrong-arity", "two dims become one", expr.span, "expected `[a, b] -> both`")
        slower = next((d for d in parts if d.sequence), None)
        if slower is not None:
            raise fail("not-built-yet", f"joining the sequence `{slower.name}` with another dim is not built yet",
                       expr.source.span)  # fmt: skip
        sizes = [d.size for d in parts]
        size = None if None in sizes else sum(s or 0 for s in sizes)
        if env.cell(expr.target.id) is None:
            env.bind(expr.target.id, Dim(expr.target.id, size, span=expr.target.span), expr.target.span)
        (made,) = self.dims(expr.target, env)
        if made.size != size:
            raise fail(
                "dim-mismatch",
                f"`{made.name}` is {made.size or 'as long as the data say'}, both parts together are {size}",
                expr.span,
                secondary=[Label(made.span, f"`{made.name}` was bound here")] if made.span else [],
            )
        return parts, (made,)

    def _merged(self, parts: tuple[Dim, ...], item: sx.Argument, env: Environment) -> Dim:
        name = _spelled(item)
        known = _dim(env.cell(name))
        if known is not None and known.factors == parts:
            return known
        inner = [d.size for d in parts[1:]]
        outer = parts[0]
        made = Dim(name, None, span=item.span, factors=parts)
        if outer.size is not None and None not in inner:
            made.size = outer.size * math.prod(s for s in inner if s is not None)
        if any(d.sequence for d in parts):
            made.sequence, made.lead = True, outer.lead
        if outer.clock is not None:
            unknown = next((d for d in parts[1:] if d.size is None), None)
            if unknown is not None:
                raise fail(
                    "size-unknown",
                    f"`{name}` has as many rows for each of `{outer.name}` as `{unknown.name}` says, which the data "
                    "decide",
                    item.span,
                    help=f"give `{unknown.name}` a size where the input is declared",
                )
            times = outer.clock.times * math.prod(s for s in inner if s is not None)
            made.clock = replace(outer.clock, times=times)
        env.bind(name, made, item.span)
        return made

    def _parts(self, dim: Dim, items: tuple[sx.Argument, ...], expr: sx.Arrow, env: Environment) -> tuple[Dim, ...]:
        """The parts that a dim was made of, or new ones: one of them has what size the others leave."""
        if dim.factors:
            names = [_spelled(i) for i in items]
            if len(names) != len(dim.factors) or any(
                (known := _dim(env.cell(n))) is not None and known is not f
                for n, f in zip(names, dim.factors, strict=True)
            ):
                made = ", ".join(f.name for f in dim.factors)
                raise fail(
                    "dim-mismatch",
                    f"`{dim.name}` was made of [{made}], it becomes these again",
                    expr.target.span,
                    secondary=[Label(dim.span, "made here")] if dim.span else [],
                )
            for name, factor, item in zip(names, dim.factors, items, strict=True):
                if env.cell(name) is None:
                    env.bind(name, factor, item.span)
            return dim.factors
        return self._new_parts(dim, items, expr.target.span, env)

    def _new_parts(self, dim: Dim, items: tuple[sx.Argument, ...], span: Span, env: Environment) -> tuple[Dim, ...]:
        sizes = [self._size(item, env) for item in items]
        open_ = [i for i, size in enumerate(sizes) if size is None]
        if len(open_) > 1 or (open_ and dim.size is None):
            raise fail("size-unknown", f"the sizes of the parts of `{dim.name}` are not known", span,
                       help=f"give all but one a size: `{_spelled(items[-1])} = 2`")  # fmt: skip
        rest = math.prod(s for s in sizes if s is not None)
        if dim.size is not None and (dim.size % rest if open_ else dim.size != rest):
            raise fail(
                "not-exact", f"`{dim.name}` = {dim.size} cannot be split into parts of {rest}", span,
                f"{dim.size} divided by {rest} leaves {dim.size % rest}",
            )  # fmt: skip
        made = []
        for item, size in zip(items, sizes, strict=True):
            name = _spelled(item)
            known = _dim(env.cell(name))
            made.append(known or Dim(name, (dim.size or 0) // rest if size is None else size, span=item.span))
            env.bind(name, made[-1], item.span)
        dim.factors = tuple(made)
        return dim.factors

    def _size(self, item: sx.Argument, env: Environment) -> int | None:
        if item.name is not None:
            return whole(self.number(item.value, env), f"the size of `{item.name}`", item.span)
        cell = env.cell(_spelled(item))
        if cell is None:
            return None
        value = cell.value.size if isinstance(cell.value, Dim) else cell.value
        return whole(value, f"the size of `{_spelled(item)}`", item.span)


def _spelled(item: sx.Argument) -> str:
    if item.name is not None:
        return item.name
    if isinstance(item.value, sx.Name):
        return item.value.id
    raise fail("unknown-dim", "the parts of a compound dim are names", item.span)


def _dim(cell: Cell | None) -> Dim | None:
    return cell.value if cell is not None and isinstance(cell.value, Dim) else None
