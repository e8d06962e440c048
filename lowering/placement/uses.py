"""What a cut of a dim means for one use of an op: read off its signature, the same for every op.

A dim that is parallel everywhere stays cut; one that is contracted leaves partial sums; one whose statistic comes back
is worked out in parts; one that is read as a whole (keys under a mask) is needed whole where it is read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from ...dsl.program import Node, Value
from ..graph import op_of
from ..op import Op

Slot = tuple[str, str, tuple[tuple[str, str | None], ...]]


class Values(Protocol):
    """What is asked of a graph: its values by name, on whole dims."""

    @property
    def values(self) -> dict[str, Value]: ...


@dataclass(frozen=True)
class Cut:
    """One way to compute a use in parts: `dims` are cut together wherever a slot of `cut` has them; operands of `mates`
    lack them and must be partial sums like the result; `parts` a setting that counts groups, which becomes smaller.

    kind: "parallel" (the result is cut), "met" (it is, and ranks tell each other the rest in the op), "sum" (the result
    is partial), "most" (the largest over ranks), "own" (each rank has a result of its own), "lift" (the op must be
    taken apart first).
    """

    dims: tuple[str, ...]
    kind: str
    whole: frozenset[tuple[int, str]] = frozenset()
    mates: frozenset[str] = frozenset()
    parts: str | None = None


def slots(node: Node, graph: Values) -> tuple[tuple[str, tuple[tuple[str, str | None], ...]] | None, ...]:
    """For each operand its name in the signature, and (dim, formal) for each of its dims; leading dims have None."""
    op = op_of(node)
    named = [o for o in op.signature.operands if not o.repeated]
    options = node.attr("options", ())
    repeated = [o for o in op.signature.operands if o.repeated and (not o.optional or o.name in options)]
    found: list[tuple[str, tuple[tuple[str, str | None], ...]] | None] = []
    for i, name in enumerate(node.operands):
        plain = i < len(named)
        operand = named[i] if plain else repeated[(i - len(named)) % len(repeated)]
        if name is None:
            found.append(None)
            continue
        dims = graph.values[name].type.dims
        which = 0 if plain else (i - len(named)) // len(repeated)
        found.append((operand.name, _formals(op, node, operand, dims, which)))
    return tuple(found)


def _formals(op: Op, node: Node, operand: Any, dims: tuple[str, ...], which: int) -> tuple[tuple[str, str | None], ...]:
    """A dim is that of the formal that is bound to it; pointwise operands may lack some; the rest lead."""
    bindings, found = dict(node.bindings), dict.fromkeys(dims)
    for formal in operand.formals:
        bound = bindings.get(f"{formal.name}{which + 1}" if which else formal.name, bindings.get(formal.name, ()))
        found.update((d, formal.name) for d in bound if d in found)
    if not operand.leading and len(operand.formals) == 1:
        found = dict.fromkeys(dims, operand.formals[0].name)
    return tuple(found.items())


def cut_of(node: Node, graph: Values, dim: str, together: Any) -> Cut | None:
    """How a use is computed with a dim cut over a factor of the mesh, None where it cannot be.

    `together(first, other)` says of two grouped dims how they meet on this factor: "both" are cut, only the "first"
    (the other has one place left on each rank), or None.
    """
    op = op_of(node)
    where = [(i, s[0], formal) for i, s in enumerate(slots(node, graph)) if s for d, formal in s[1] if d == dim]
    if not where:
        return None
    formals = {f for _, _, f in where}
    result = any(dim in r.type.dims for r in node.results)
    if formals == {None}:
        if result:
            return Cut((dim,), "parallel")
        return Cut((dim,), "sum") if node.results[0].type.kind == "loss" else None
    roles = {f: op.signature.role(f) for f in formals if f is not None}
    attended = any(role == "attend" for role in roles.values())
    whole = frozenset((i, dim) for i, _, f in where if f is not None and roles[f] == "attend" and not op.meets)
    cut = {f for f in roles if roles[f] != "attend"}
    if not cut or {roles[f] for f in cut} - {"parallel", "contract", "reduce", "window", "scan"}:
        return None
    if any(roles[f] in ("window", "scan") for f in cut):
        return Cut((dim,), "lift") if op.lift is not None else None
    if any(roles[f] == "reduce" for f in cut):
        if (parts := _parts(op, node, dim, together)) is not None:
            return Cut((dim,), "parallel", parts=parts)
        return Cut((dim,), "lift") if op.lift is not None else None
    if len({roles[f] for f in cut}) > 1 and any(roles[f] == "contract" for f in cut):
        return None  # one dim in two places: summed away in one (scores), kept in the other (values)
    if any(f in op.rigid or f in op.coupled or f in op.index and f not in op.offset for f in cut):
        return None
    joint = _joint(op, node, graph, dim, together)
    if joint is None:
        return None
    if any(d in r.type.dims for d in joint for r in node.results):
        return Cut(joint, "met" if attended and op.meets else "parallel", whole)
    if any(roles[f] == "contract" for f in cut):
        return _contracted(op, node, joint, {name for _, name, _ in where})
    return None


SEQUENCE_ROLES = ("attend", "window", "scan")
"""Roles along which a place reads others, so that a rank needs more than its own."""


def runs_along(node: Node, graph: Values, cut: Cut) -> bool:
    """Whether a cut is one of a sequence that the use runs along: what ranks have of it is not enough."""
    op = op_of(node)
    formals = {f for s in slots(node, graph) if s for d, f in s[1] if d in cut.dims and f is not None}
    return (bool(cut.whole) or cut.kind == "lift") and any(op.signature.role(f) in SEQUENCE_ROLES for f in formals)


def _parts(op: Op, node: Node, dim: str, together: Any) -> str | None:
    """The setting that counts equal runs of a dim, each with a statistic of its own, where a cut falls between runs."""
    for formal, name in op.grouped:
        if op.setting(name) is not None and node.bound(formal)[0] == dim:
            return name if together(dim, (name, node.attr(name, 1))) == "both" else None
    return None


def _joint(op: Op, node: Node, graph: Values, dim: str, together: Any) -> tuple[str, ...] | None:
    """The dims that are cut with one: what divides it into runs, and what it divides."""
    for formal, other in op.grouped:
        if op.setting(other) is not None:
            continue
        first, second = node.bound(formal)[0], node.bound(other)[0]
        if dim not in (first, second):
            continue
        if first == second:
            return (first,)
        how = together(first, second)
        return (first, second) if how == "both" else (first,) if how == "first" and dim == first else None
    return (dim,)


def _contracted(op: Op, node: Node, dims: tuple[str, ...], names: set[str]) -> Cut | None:
    """A contracted dim leaves a partial sum where the op is linear in what has it, or is itself a sum."""
    if op.hands_over:
        return Cut(dims, "own")
    if op.monoid is not None and op.monoid.state == ("max",):
        return Cut(dims, "most")
    is_sum = op.monoid is not None and (op.monoid.state == ("sum",) or node.results[0].type.kind == "loss")
    if is_sum:
        return Cut(dims, "sum")
    if op.monoid is not None and len(op.monoid.state) > 1 and op.monoid.formal in _marked(op):
        return None  # a mean of parts is no part of the mean
    groups = [g for g in op.linear if names & set(g)]
    if not names <= {name for g in groups for name in g}:
        return None
    return Cut(dims, "sum", mates=frozenset(name for g in groups for name in g) - names)


def _marked(op: Op) -> set[str]:
    """The formals that an op contracts."""
    return {f.name for o in op.signature.operands for f in o.formals if f.role == "contract"}
