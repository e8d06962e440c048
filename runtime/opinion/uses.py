"""Uses of ops as a module runs: read by spmd_types where it can, else trusted to be what their ops declare."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...lowering.graph import GraphProgram, op_of
from ...lowering.ops import table
from ...lowering.placement.erase import Whole, erased, whole_dim
from ...lowering.placement.rules import Known, Unproved, Use
from .said import Opinion, Refused, first_line
from .types import Types


class Uses:
    """Of one program. `good` says what uses are parts of, `rows` what splits the rows of a batch. `trust`: the only ops
    that may be trusted for what spmd_types does not know, None for any."""

    def __init__(
        self, types: Types, program: GraphProgram, good: GraphProgram, trust: set[str] | None, rows: tuple[str, ...],
        device: str, said: Opinion,
    ) -> None:  # fmt: skip
        self.types, self.theirs, self.program, self.good, self.trust = types, types.theirs, program, good, trust
        self.rows, self.device, self.said = rows, device, said
        self.wholes: dict[str, Whole] = {}

    def use(self, graph: str, name: str, run: Callable[[], Any], operands: Callable[[], tuple[Any, ...]]) -> Any:
        """Worked out by spmd_types where it can, else by what the op declares."""
        if not self.theirs.is_type_checking():
            return run()  # a constant of the model, or a part of what is trusted
        node = self.program.graphs[graph].producers[name]
        why = self._why_not(node)
        if not why:
            try:
                made = self._product(graph, node, operands()) if _is_product(node) else run()
            except self.theirs.SpmdTypeError as wrong:
                why = self._unreadable(node.op, wrong)
                if not why:
                    raise
            else:
                self.said.read[node.op] += 1
                return made
        self.said.trusted[node.op] += 1
        self.said.why_not.setdefault(node.op, why)
        read = operands()
        have = [None if x is None else self.types.known(x) for x in read]
        with self.theirs.no_typecheck():
            blank = self._blank(graph, node, read) if self.device == "meta" else None
            made = run() if blank is None else blank
        places = self._declared(graph, node, have)
        results = list(made) if isinstance(made, tuple) else [made]
        typed = tuple(self.types.stamp(x, k.place) for x, k in zip(results, places, strict=True))
        return typed if isinstance(made, tuple) else typed[0]

    def _blank(self, graph: str, node: Any, read: tuple[Any, ...]) -> Any:
        """What a use gives, by its dims alone; None where no operand tells how large one is."""
        own = self.program.graphs[graph]
        sizes = {d.name: d.size for d in own.dims.values()}
        for name, x in zip(node.operands, read, strict=True):
            if x is not None:
                sizes.update(zip(own.values[name].type.dims, x.shape, strict=True))
        shapes = [[sizes[d] for d in r.type.dims] for r in node.results]
        if any(n is None for shape in shapes for n in shape):
            return None
        flows = not op_of(node).detached and any(x is not None and x.requires_grad for x in read)
        wide = next((x.dtype for x in read if x is not None and x.is_floating_point()), torch.float32)
        kinds = {"real": wide, "loss": wide, "mask": torch.bool}
        made = []
        for r, shape in zip(node.results, shapes, strict=True):
            kind = kinds.get(r.type.kind, torch.int64)
            x = torch.empty(shape, dtype=kind, device=self.device)  # type: ignore[arg-type]
            made.append(x.requires_grad_(flows and kind.is_floating_point))
        return tuple(made) if len(made) > 1 else made[0]

    def _unreadable(self, op: str, wrong: Exception) -> str:
        """Why spmd_types could not read a use, where that is not the use's fault."""
        if "is not registered for SPMD" in str(wrong):
            return "its backward pass is written by hand"
        if "cannot propagate through non-linear ops" in str(wrong) and table()[op].linear:
            return "spmd_types does not know that it is linear"
        if type(wrong).__name__ != "DTensorPropagationError" or self.trust is not None and op not in self.trust:
            return ""
        return f"DTensor has no rule: {first_line(wrong)}"

    def _product(self, graph: str, node: Any, read: tuple[Any, ...]) -> Tensor:
        """A use of a multilinear op as the product that it declares, dim by dim: compound dims stay apart, which
        spmd_types does not follow through a reshape."""
        own, op = self.program.graphs[graph], op_of(node)
        letters: dict[str, str] = {}

        def spelled(dims: tuple[str, ...]) -> str:
            return "".join(letters.setdefault(whole_dim(own.dims[d]), chr(97 + len(letters))) for d in dims)

        added = set.intersection(*map(set, op.linear))
        factors: list[tuple[str, Tensor]] = []
        terms: list[tuple[str, Tensor]] = []
        for name, x, operand in zip(node.operands, read, op.signature.operands, strict=True):
            if x is not None:
                (terms if operand.name in added else factors).append((spelled(own.values[name].type.dims), x))
        out = spelled(node.results[0].type.dims)
        made = torch.einsum(f"{','.join(s for s, _ in factors)}->{out}", *(x for _, x in factors))
        for dims, x in terms:
            if not out.endswith(dims):
                raise Refused(f"`{node.op}`: a term along {dims} of {out}")
            made = made + x
        return made

    def _why_not(self, node: Any) -> str:
        """Why spmd_types cannot read a use, as its op declares it."""
        op = op_of(node)
        if op.draws(node):
            return "random numbers"
        if op.index or op.coordinates:
            return "it reads where its rows stand"
        if op.grouped:
            return "it reads a dim in equal runs"
        if op.meets or op.hands_over or op.handed:
            return "ranks hand something on in it"
        if op.monoid is not None and "max" in op.monoid.state:
            return "the largest of parts"
        return ""

    def _declared(self, graph: str, node: Any, have: list[Known | None]) -> list[Known]:
        if graph not in self.wholes:
            self.wholes[graph] = erased(self.good.graphs[graph], self.program.laid.whole[graph], self.types.mesh)
        whole, own = self.wholes[graph], self.program.graphs[graph]
        try:
            use = Use(node, whole.nodes[node.name], whole, own.dims, self.types.mesh, have, own.values)
            return use.results(self.rows)
        except Unproved as wrong:
            raise Refused(f"what `{node.op}` is given: {wrong}") from None


def _is_product(node: Any) -> bool:
    """Whether an op is, as it declares itself, a sum of products: linear in each of its operands, some of which share
    dims that go."""
    op = op_of(node)
    roles = {f.role for o in op.signature.operands for f in o.formals}
    return len(op.linear) > 1 and op.monoid is None and roles == {"parallel", "contract"}
