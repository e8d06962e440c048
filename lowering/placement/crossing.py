"""Calls, loops and experts: what is given to another graph, and what comes back."""

from __future__ import annotations

from dataclasses import replace

from ...dsl.diagnostics import InternalError, fail
from ...dsl.program import Node
from .applying import Applying
from .types import I, M, N, P, Place, R
from .values import Signature


class Crossing(Applying):
    """Adds uses of other graphs. A graph's first caller decides where its inputs are; others bring theirs there."""

    def _entry(self, callee: str, value: str, dims: dict[str, str]) -> Place:
        """Where an input of a block is: split as it is, if the block can take it so; whole where the block splits
        something else."""
        place = want = self.places[value]
        theirs = self.s.program.graphs[callee]
        back = {ours: c for c, ours in dims.items()}
        is_real = self.values[value].type.kind == "real"
        for atom in self.order:
            at = place.on(atom)
            splits = self.s.splits_on(callee, atom)
            if isinstance(at, int):
                inner = back.get(self.values[value].type.dims[at])
                if not splits or inner is not None and atom in self.s.assignment.atoms(theirs.name, inner):
                    continue
                target: str | int = R
            elif at == P and not splits:
                target = self._outside_place(value, atom)
            elif at == M:
                target = N
            else:
                target = R if splits else I if at in (P, R, N) else at
            if not is_real and target in (R, I):
                target = N
            want = want.put(atom, target, self.order)
        return want

    def _outside_place(self, value: str, atom: str) -> str | int:
        """Where a value of the residual stream is on a factor: split along a dim that is, else invariant."""
        for j, d in enumerate(self.values[value].type.dims):
            if atom in self.mine.get(d, ()):
                return j
        return I

    def _bindings(self, node: Node, callee: str) -> dict[str, str]:
        """The callee's dims as ours; an expert has those of the rows that it is given."""
        if node.op == "route":
            theirs = self.s.program.graphs[callee].body.inputs[0].type.dims
            return dict(zip(theirs, self.values[node.operands[0] or ""].type.dims, strict=True))
        return {c: ours[0] for c, ours in node.bindings if ours}

    def _enter(self, node: Node, callee: str, values: list[str]) -> tuple[list[str], Signature]:
        dims = self._bindings(node, callee)
        given = tuple(self._entry(callee, v, dims) for v in values)
        signature = self.s.graph(callee, given)
        brought = [self.bring(v, want, node.spans) for v, want in zip(values, signature.inputs, strict=True)]
        return brought, signature

    def _call(self, node: Node) -> None:
        instance = self.graph.instance(node.attr("instance"))
        values = [o for o in node.operands if o is not None]
        if not instance.bodies:
            raise fail("not-built-yet", "an objective that asks another model is not built yet under a layout",
                       node.spans[0])  # fmt: skip
        brought, signature = self._enter(node, instance.bodies[0], values)
        self._structural(node, brought, signature.outputs)

    def _structural(self, node: Node, brought: list[str], outputs: tuple[Place, ...]) -> None:
        """Add a call: dims are bound as values are split."""
        swap: dict[str, str] = {}
        for name in brought:
            value, place = self.values[name], self.places[name]
            swap.update((d, self.local(d, a)) for d, a in zip(value.type.dims, place.splits, strict=True))
        for r, place in zip(node.results, outputs, strict=True):
            swap.update((d, self.local(d, a)) for d, a in zip(r.type.dims, place.splits, strict=True) if d not in swap)
        filled = iter(brought)
        operands = tuple(None if o is None else next(filled) for o in node.operands)
        callee = self.s.graphs.get(self.graph.instance(node.attr("instance")).bodies[0])
        bindings = node.bindings
        if callee is not None:
            known = {d.name for d in callee.body.dims}
            bindings = tuple(
                (self._their_name(c, swap.get(ours[0], ours[0]) if ours else "", known),
                 tuple(swap.get(o, o) for o in ours))
                for c, ours in node.bindings
            )  # fmt: skip
        for _, ours in bindings:
            for o in ours:
                if o in self.graph.dims:
                    self.local(o, ())
        attrs = tuple((k, tuple(swap.get(d, d) for d in v) if k == "over" else v) for k, v in node.attrs)
        self._add(replace(node, operands=operands, bindings=bindings, attrs=attrs), outputs)

    def _their_name(self, callee_dim: str, ours: str, known: set[str]) -> str:
        """The callee's name of a part: `heads/tensor` where ours is `rows/tensor`."""
        _, slash, atoms = ours.partition("/")
        return f"{callee_dim}/{atoms}" if slash and f"{callee_dim}/{atoms}" in known else callee_dim

    def _loop(self, node: Node) -> None:
        """What is carried from iteration to iteration stays where it is; a single iteration may give something new."""
        values = [o for o in node.operands if o is not None]
        repeats = len(self.graph.schedule_of(node)) > 1
        carried = len(node.results) if repeats else 0
        start = tuple(self._carried(name, i < carried) for i, name in enumerate(values))
        brought: list[str] = []
        outputs: tuple[Place, ...] = ()
        for body in self.graph.bodies_of(node):
            signature = self.s.graph(body, start, start[:carried])
            if not brought:
                brought = [self.bring(v, want, node.spans) for v, want in zip(values, signature.inputs, strict=True)]
                outputs = signature.outputs
            if signature.inputs != start and repeats or signature.outputs != outputs:
                raise InternalError(f"{node.name}: iterations of one loop lie differently")
        self._structural(node, brought, outputs)

    def _carried(self, name: str, is_carried: bool) -> Place:
        """Where a value of the residual stream is between iterations; what all of them read stays R where it is."""
        place = want = self.places[name]
        if self.values[name].type.kind != "real":
            return place
        is_constant = not self._carries(name)
        for atom in self.order:
            at = place.on(atom)
            if is_constant and not isinstance(at, int) or at == R and not is_carried:
                continue
            if not isinstance(at, int) or atom not in self.mine.get(self.values[name].type.dims[at], ()):
                want = want.put(atom, self._outside_place(name, atom), self.order)
        return want

    def _route(self, node: Node) -> None:
        x, routing, *more = [o for o in node.operands if o is not None]
        callee = self.graph.instance(node.attr("instance")).bodies[0]
        (brought, *rest), signature = self._enter(node, callee, [x, *more])
        out = signature.outputs[0]
        want = self.places[routing]
        for atom in self.order:
            at = self.places[brought].on(atom)
            if isinstance(at, int) and self.values[brought].type.dims[at] in self.values[routing].type.dims:
                dim = self.values[brought].type.dims[at]
                want = want.put(atom, self.values[routing].type.dims.index(dim), self.order)
            else:
                want = want.put(atom, R if out.letter(atom) in (P, R) else I, self.order)
        routed = self.bring(routing, want, node.spans)
        self._structural(node, [brought, routed, *rest], (out,))
