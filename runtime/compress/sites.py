"""Where a dim is scored: at every distinct activation that carries it into a product with a weight.

That is what the roles of an op say: a formal that an activation and a weight share, and that is summed away. So
`hidden` is scored at what norms give, a feed-forward's width at what its second matrix reads, heads at what the output
projection reads. An op may say that its dims are ranked by an operand of its own (`Op.scored`), a caller by any
variable.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from ...dsl.diagnostics import did_you_mean, fail
from ...dsl.program import Node
from ...lowering.graph import STRUCTURE, op_of
from .dims import Dims, Path, Place, text


@dataclass
class Where:
    """An activation: variable `value` of the body at `path`; the axes behind its leading ones are `dims` of the model.

    `readers` are the uses that multiply it with a weight. `chosen` says that someone asked for this one.
    """

    path: Path
    value: str
    local: tuple[str, ...]
    dims: tuple[str, ...]
    readers: list[tuple[Path, Node]] = field(default_factory=list)
    chosen: bool = False

    @property
    def name(self) -> str:
        return text((*self.path, self.value))


def contractions(op: Any) -> dict[str, tuple[str, ...]]:
    """{activation: its formals that are summed away with a weight} of an op."""
    owned = {w.operand for w in op.weights}
    weighed = {f.name for o in op.signature.operands if o.name in owned for f in o.formals}
    found = {}
    for operand in op.inputs:
        formals = tuple(f.name for f in operand.formals if f.role == "contract" and f.name in weighed)
        if formals:
            found[operand.name] = formals
    return found


def sites(dims: Dims, at: Mapping[str, str] | None = None) -> list[Where]:
    """Every activation at which a dim is scored. `at` gives a variable for a block, `{"mamba2": "u", "mlp": "up"}`:
    the dims that the block alone has and the variable carries are scored there and nowhere else.

    Raises `SpecError` `unknown-name` for a block or variable that the model has not.
    """
    chosen = {w.name: w for w in (*_declared(dims, at or {}), *_asked(dims, at or {}))}
    taken = {d for w in chosen.values() for d in w.dims}
    found: dict[str, Where] = dict(chosen)
    for place, node in dims.nodes():
        op = op_of(node)
        names = [o.name for o in op.signature.operands]
        for operand, formals in contractions(op).items():
            value = node.operands[names.index(operand)]
            local = tuple(d for f in formals for d in node.bound(f))
            keys = tuple(dims.key(place.path, d) for d in local)
            if value is None or taken & set(keys):
                continue
            path, name = source(dims, place.path, value)
            where = found.setdefault(text((*path, name)), Where(path, name, local, keys))
            where.readers.append((place.path, node))
    return list(found.values())


def source(dims: Dims, path: Path, value: str) -> tuple[Path, str]:
    """Where a value comes from: up through the inputs of bodies that are called at one place, and through what changes
    something in training only."""
    while True:
        place = dims.places[path]
        value = _as_it_runs(place, value)
        inputs = [v.name for v in place.body.inputs]
        if value not in inputs or place.caller is None or not dims.called_once(path):
            return path, value
        above, node = place.caller
        i = inputs.index(value)
        given = node.operands[i] if i < len(node.operands) else None
        if given is None:
            return path, value
        if node.op == "loop" and i < len(node.results) and path[-1] != 0:
            return path, value  # what the iteration before gave
        path, value = above, given


def _as_it_runs(place: Place, value: str) -> str:
    """The value that another one is outside of training: an op that draws and is linear in one operand hands it on."""
    made = {r.name: n for n in place.body.nodes for r in n.results}
    while value in made and made[value].op not in STRUCTURE:
        node = made[value]
        op, before = op_of(node), node.operands[0] if node.operands else None
        if not op.random or op.linear != ((op.inputs[0].name,),) or before is None:
            break
        value = before
    return value


def _declared(dims: Dims, at: Mapping[str, str]) -> Iterator[Where]:
    """Sites that ops ask for: the product that their operand comes from, through what works on each channel alone."""
    for place, node in dims.nodes():
        op = op_of(node)
        if op.scored is None or place.body.block in at:
            continue
        operand = op.signature.operand(op.scored)
        value = node.operands[[o.name for o in op.signature.operands].index(op.scored)]
        grouped = {h for pair in op.grouped for h in pair}
        formals = [f.name for f in operand.formals if f.role == "parallel" or f.name in grouped]
        local = tuple(d for f in formals for d in node.bound(f))
        if value is not None:
            yield _where(dims, place, _product_behind(place, value), local)


def _product_behind(place: Place, value: str) -> str:
    made = {r.name: n for n in place.body.nodes for r in n.results}
    kind = place.body.values()[value].type
    while value in made and made[value].op not in STRUCTURE:
        node = made[value]
        if contractions(op_of(node)):
            return value
        before = node.operands[0] if node.operands else None
        if before is None or place.body.values()[before].type != kind:
            return value
        value = before
    return value


def _asked(dims: Dims, at: Mapping[str, str]) -> Iterator[Where]:
    for block, value in at.items():
        places = [p for p in dims.places.values() if p.body.block == block]
        if not places:
            known = {p.body.block for p in dims.places.values()}
            raise fail(
                "unknown-name",
                f"`{dims.program.name}` has no block `{block}`",
                dims.program.span,
                help=did_you_mean(block, known, "a block"),
            )
        for place in places:
            known_values = place.body.values()
            if value not in known_values:
                raise fail(
                    "unknown-name",
                    f"`{block}` has no variable `{value}`",
                    place.body.span,
                    help=did_you_mean(value, known_values, "a variable"),
                )
            of = known_values[value].type.dims
            outer = {d for v in place.body.inputs for d in v.type.dims}
            local = tuple(d for d in of if place.body.dim(d).size is not None and d not in outer)
            if not local:
                raise fail(
                    "unknown-name", f"`{value}` of `{block}` has no dim that the block alone has", place.body.span
                )
            yield _where(dims, place, value, local)


def _where(dims: Dims, place: Place, value: str, local: tuple[str, ...]) -> Where:
    return Where(place.path, value, local, tuple(dims.key(place.path, d) for d in local), chosen=True)
